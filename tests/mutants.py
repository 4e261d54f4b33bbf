"""Mutation tests: seeds a bug in the CUDA kernels in a copy of the tree; a test must fail.

``python tests/mutants.py [WORD ...]`` runs all mutants, or those with one of the words in their
name. A mutant takes about a minute. Needs nvcc, a CUDA build of torch, and the simulator in the
folder CUDASIM (default: ../shared/cudasim).
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
CUDASIM = Path(os.environ.get("CUDASIM") or ROOT.parent / "shared" / "cudasim").resolve()
PARTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "csrc", "qatfast", "tests")
TIMEOUT = 600  # seconds for the tests of a mutant


class Mutant(NamedTuple):
    name: str
    file: str  # in csrc
    old: str  # occurs exactly once in the file
    new: str
    tests: str  # arguments of pytest
    strict: bool = False  # whether races and reads of uninitialized memory are errors


BUDGET = "tests/test_cuda.py::test_fake_quantize_is_one_launch"
INTEGERS = "tests/test_qat_linear.py -k 'integers and public'"
AFFINE = "tests/test_fake_quantize_affine.py tests/test_cuda.py"
LEARNED = "tests/test_cuda.py -k 'backward_of_a_learned'"
# Mutants of the same file are adjacent: each build then recompiles only this file.
MUTANTS = (
    Mutant(
        "a 32-bit index in the plan",
        "cuda/plan.cpp",
        "const int64_t units = layout.outer * plan.units_per_run;",
        "const int64_t units = static_cast<int32_t>(layout.outer * plan.units_per_run);",
        "tests/test_cuda_plan.py",
    ),
    Mutant(
        "no grid barrier",
        "cuda/dynamic_quantize.cuh",
        "        if (barrier) {\n          cooperative_groups::this_grid().sync();\n        }\n",
        "",
        f"{BUDGET} -k 300007",
        strict=True,
    ),
    Mutant(
        "the other tensor's CTAs leave before the grid barrier",
        "cuda/dynamic_quantize.cuh",
        "if (!all_held && launch.barrier && task.plan.team == 1) {",
        "if (false) {",
        "tests/test_cuda.py -k a_layer_is_two_launches",
    ),
    Mutant(
        "no __syncthreads after the reduction",
        "cuda/dynamic_quantize.cuh",
        "      __syncthreads();\n      const BlockGrid<C> block_grid(shared[index], task.quant_range);",
        "      const BlockGrid<C> block_grid(shared[index], task.quant_range);",
        f"{BUDGET} -k 'float32 and PerToken'",
        strict=True,
    ),
    Mutant(
        "no __syncthreads between two tiles",
        "cuda/dynamic_quantize.cuh",
        "    __syncthreads(); // all threads have read the ranges of the previous tile\n",
        "",
        f"{BUDGET} -k 'float32 and 200'",
        strict=True,
    ),
    Mutant(
        "infinities and NaN enter the range",
        "cuda/dynamic_quantize.cuh",
        "    if (!finite) {",
        "    if (false) {",
        "tests/test_special_values.py",
    ),
    Mutant(
        "infinities are not clamped",
        "cuda/dynamic_quantize.cuh",
        "if (finite && block_grid.holds_all",
        "if (block_grid.holds_all",
        "tests/test_special_values.py",
    ),
    Mutant(
        "blocks beyond the ends of their grid are not clamped",
        "cuda/dynamic_quantize.cuh",
        "finite && block_grid.holds_all",
        "finite",
        "tests/test_fake_quantize.py tests/test_special_values.py",
    ),
    Mutant(
        "fewer threads than planned hold a bias in registers",
        "cuda/plan.cpp",
        "second.width <= warp || second.layout.outer * second.units_per_run <= most_held",
        "second.all_held || second.layout.outer * second.units_per_run <= most_held",
        "tests/test_cuda.py -k beside_a_weight",
    ),
    Mutant(
        "every member of a team writes the first member's partial range",
        "cuda/dynamic_quantize.cuh",
        "partials[member * task.plan.tile_blocks + i] = shared[i];",
        "partials[i] = shared[i];",
        f"{BUDGET} -k 300007",
    ),
    Mutant(
        "all teams share the first one's partial ranges",
        "cuda/dynamic_quantize.cuh",
        "static_cast<RangeKeys<C>*>(task.partials) + tile * team * plan.tile_blocks",
        "static_cast<RangeKeys<C>*>(task.partials)",
        f"{BUDGET} -k 'float32 and PerChannel'",
    ),
    Mutant(
        "elements outside of a run widen its range",
        "cuda/dynamic_quantize.cuh",
        "    Unit<T> unit_values{};\n",
        "    Unit<T> unit_values;\n    for (T& x : unit_values.at) {\n      x = T(100.f);\n    }\n",
        "tests/test_fake_quantize.py",
    ),
    Mutant(
        "the last unit is missing",
        "cuda/dynamic_quantize.cuh",
        "rest - width : rest + (end - 1 - rest) / width * width;",
        "rest - width : rest + (end - 1 - rest) / width * width - width;",
        f"{BUDGET} -k 'float32 and 3000001'",
    ),
    Mutant(
        "rows of a column belong to no team member",
        "cuda/dynamic_quantize.cuh",
        "layout.outer * (member + 1) / team",
        "layout.outer / team * (member + 1)",
        f"{BUDGET} -k 'float32 and 700003'",
    ),
    Mutant(
        "the default stream in place of the current one",
        "cuda/fake_quantize.cu",
        "const auto stream = c10::cuda::getCurrentCUDAStream(device);",
        "const cudaStream_t stream = nullptr;",
        "tests/test_cuda.py -k 'stream or graph'",
    ),
    Mutant(
        "16-byte stores even if only the input is aligned",
        "cuda/fake_quantize.cu",
        "distance(from) == distance(to)",
        "true",
        "tests/test_cuda.py -k accesses_are_16_bytes",
    ),
    Mutant(
        "half types rounded towards zero",
        "cuda/units.cuh",
        "__floats2half2_rn(a, b)",
        "__halves2half2(__float2half_rz(a), __float2half_rz(b))",
        "tests/test_fake_quantize.py -k float16",
    ),
    Mutant(
        "the last element is not stored",
        "cuda/static_quantize.cuh",
        "    if (i < count) {\n      to[i] = unit.at[i];",
        "    if (i + 1 < count) {\n      to[i] = unit.at[i];",
        "tests/test_quantize.py",
    ),
    Mutant(
        "no second round of the grid of CTAs",
        "cuda/static_quantize.cuh",
        "const int64_t stride = int64_t{gridDim.x} * blockDim.x;",
        "const int64_t stride = numel;",
        "tests/test_cuda.py -k given_ranges",
    ),
    Mutant(
        "the bits of a mask in the wrong order",
        "cuda/static_range.cu",
        "static_cast<unsigned>(i < count && passes) << i",
        "static_cast<unsigned>(i < count && passes) << (N - 1 - i)",
        AFFINE,
    ),
    Mutant(
        "< for <= in the gradient's mask",
        "common/quant_math.h",
        "grid.scale), (grid.lo <= level) & (level <= grid.hi)",
        "grid.scale), (grid.lo <= level) & (level < grid.hi)",
        AFFINE,
    ),
    Mutant(
        "a product with the rounded reciprocal for a division",
        "common/quant_math.h",
        "return fused_multiply_add(fused_multiply_add(-quotient, scale, x), reciprocal, quotient);",
        "return quotient;",
        "tests/test_quantize.py",
    ),
    Mutant(
        "no barrier before a row's levels are summed",
        "cuda/int8_gemm.cu",
        "__syncthreads_or(has_nan);",
        "has_nan;",
        INTEGERS,
        strict=True,
    ),
    Mutant(
        "no barrier before the range of a row is reduced",
        "cuda/int8_gemm.cu",
        "  __syncthreads();\n  RangeKeys<C> keys;",
        "  RangeKeys<C> keys;",
        INTEGERS,
        strict=True,
    ),
    Mutant(
        "a NaN in a row is ignored",
        "cuda/int8_gemm.cu",
        "any_nan ? std::numeric_limits<C>::quiet_NaN() : row_grid.scale",
        "row_grid.scale",
        INTEGERS,
    ),
    Mutant(
        "the zero point of the weight is ignored",
        "cuda/int8_gemm.cu",
        " - row_level_sum * weight_zero[i];",
        ";",
        INTEGERS,
    ),
    Mutant(
        "all rows of a static matrix have the first one's grid",
        "cuda/int8_gemm.cu",
        "grid_per_row ? row : 0",
        "0",
        "tests/test_cuda.py -k 'static_ranges and PerChannel'",
    ),
    Mutant(
        "no barrier before the sums of a block's chunks are added",
        "cuda/fake_quantize_learned.cu",
        "    __syncthreads();\n    const double total = ordered_sum(sums, chunks);",
        "    const double total = ordered_sum(sums, chunks);",
        LEARNED,
        strict=True,
    ),
    Mutant(
        "every other row of sums is left out",
        "cuda/sum.cuh",
        "i < n && i < (chunk + 1) * sum_chunk; i += sum_lanes",
        "i < n && i < (chunk + 1) * sum_chunk; i += 2 * sum_lanes",
        LEARNED,
    ),
    Mutant(
        "the first CTA of a team moves the stored range",
        "cuda/observe_range.cu",
        "== team - 1",
        "== 0",
        "tests/test_cuda.py -k 'observing and 300007'",
    ),
    Mutant(
        "no fence before a CTA of a team says that it is ready",
        "cuda/observe_range.cu",
        "        __threadfence();\n        is_last",
        "        is_last",
        "tests/test_cuda.py -k 'observing and 300007 and float32'",
        strict=True,
    ),
    Mutant(
        "every block counts the batch",
        "cuda/observe_range.cu",
        "if (atomicExch(counted, 1) == 0) {",
        "if (true) {",
        "tests/test_cuda.py -k 'observing and PerGroup'",
    ),
    Mutant(
        "a search keeps the first chunk of a warp for all of them",
        "cuda/search_qparams.cu",
        "if (n > warps * sum_chunk) {",
        "if (false) {",
        "tests/test_cuda.py -k 'search_reads and 16500'",
    ),
    Mutant(
        "equal errors take the smallest range",
        "cuda/search_qparams.cu",
        "sums[i][0] < sums[best][0]",
        "sums[i][0] <= sums[best][0]",
        "tests/test_search_qparams.py",
    ),
    Mutant(
        "ties are rounded up, not to even",
        "common/quant_math.h",
        "return (x + magic) - magic;",
        """const T half = T{} + element_t<T>(0.5);
  const T nearest = (x + magic) - magic;
  return x - nearest == half ? nearest + half + half : nearest;""",
        "tests/test_fake_quantize.py",
    ),
)


def run(command: list[str] | str, folder: Path, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command in ``folder``; stdout and stderr are merged."""
    return subprocess.run(
        command,
        shell=isinstance(command, str),
        cwd=folder,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )


def build(folder: Path) -> None:
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    process = run(
        command, folder, TORCH_CUDA_ARCH_LIST="9.0+PTX", NVCC_APPEND_FLAGS="--no-compress", FORCE_CUDA="1"
    )
    if process.returncode:
        sys.exit(f"mutants.py: the build failed\n{process.stdout}")


def failure(folder: Path, tests: str, strict: bool) -> str | None:
    """Returns the first test that fails, or None if all tests pass."""
    options = "--strict" if strict else ""
    command = (
        f"{sys.executable} -m cudasim {options} -- "
        f"{sys.executable} -m pytest -qx --tb=no -p no:cacheprovider --device cuda {tests}"
    )
    try:
        process = run(command, folder, PYTHONPATH=os.pathsep.join([str(CUDASIM), str(folder)]))
    except subprocess.TimeoutExpired:
        return f"timeout of {TIMEOUT} s"
    failed = re.search(r"^(?:FAILED|ERROR) (?:tests/)?(.+?)(?: - .*)?$", process.stdout, re.MULTILINE)
    if process.returncode == 0:
        return None
    if process.returncode == 1 and failed:
        return failed[1]
    sys.exit(f"mutants.py: the tests did not run: {command}\n{process.stdout}")


def patched(text: str, mutant: Mutant) -> str:
    if (count := text.count(mutant.old)) != 1:
        sys.exit(
            f"mutants.py: {mutant.name}: expected this text once in csrc/{mutant.file}, got it {count} times:\n"
            f"{mutant.old}"
        )
    return text.replace(mutant.old, mutant.new)


def why_not() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not shutil.which("nvcc"):
        return "there is no nvcc on PATH"
    if not (CUDASIM / "cudasim").is_dir():
        return f"there is no simulator in {CUDASIM} (CUDASIM names another folder)"
    return ""


def main() -> int:
    words = sys.argv[1:]
    mutants = [mutant for mutant in MUTANTS if not words or any(word in mutant.name for word in words)]
    if reason := why_not():
        print(f"SKIPPED: no mutant was built or tested: {reason}.")
        return 0
    texts = {file: (ROOT / "csrc" / file).read_text() for file in {mutant.file for mutant in MUTANTS}}
    for mutant in MUTANTS:  # checks all mutants before the first build
        patched(texts[mutant.file], mutant)
    survivors = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in PARTS:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, folder / part)
        build(folder)
        for tests, strict in dict.fromkeys((mutant.tests, mutant.strict) for mutant in mutants):
            if broken := failure(folder, tests, strict):
                sys.exit(f"mutants.py: {broken} fails without a mutant")
        print("| mutant | file | caught by |\n| --- | --- | --- |", flush=True)
        for mutant in mutants:
            file = folder / "csrc" / mutant.file
            file.write_text(patched(texts[mutant.file], mutant))
            build(folder)
            caught = failure(folder, mutant.tests, mutant.strict)
            file.write_text(texts[mutant.file])  # the next build recompiles it
            survivors += caught is None
            by = f"{caught}{' (strict)' if mutant.strict else ''}" if caught else "**nothing**"
            print(f"| {mutant.name} | {mutant.file} | {by} |", flush=True)
    print(f"{len(mutants)} mutants, {survivors} survived")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
