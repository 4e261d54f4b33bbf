"""Writes cuda.md beside this file: what CUDA calls cost, counted on a simulated device, and times computed from that.

python -m cudasim --sms 132 -- python benchmarks/cuda_counts.py      minutes; needs nvcc too

Nothing is timed. The simulator counts launches and bytes of our kernels. Those of PyTorch's operators follow from the
operators that a call runs and the sizes of their tensors.
"""

import math
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import counted
import ptxas
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, __version__
from qatfast.bench import Workload, prepare
from qatfast.bench.workloads import BOTH, FORWARD, KI, MI, OURS, TUTORIAL
from qatfast.checks import dtype_name

OUT = Path(__file__).with_name("cuda.md")
COMMAND = "python -m cudasim --sms 132 -- python benchmarks/cuda_counts.py"
MULTIPROCESSORS = 132
LAUNCH = 3e-6  # seconds
BANDWIDTH = {"H100": 3.35e12, "RTX 4090": 1.0e12}  # bytes per second
# per multiprocessor of the H100
REGISTERS, THREADS, THREAD_BLOCKS, SHARED = 65536, 2048, 32, 228 * KI
RESERVED = KI  # bytes of shared memory that CUDA reserves per thread block

DTYPES = (torch.float32, torch.bfloat16)
# Operators of a layer that are not counted: its products, and the sum that is the bias's gradient.
LEFT_OUT = ("aten::addmm", "aten::mm", "aten::linear", "aten::sum")
TORCH = ("torch.ao fused op", "aten op", "torch.ao FakeQuantize", "torch.ao observer", "torch.ao qat.Linear")
TUTORIALS = (TUTORIAL, "tutorial layer")

HEAD = """# What the CUDA kernels cost

**These are counts and models, not timings.** Launches, bytes and sectors were counted on a simulated device; registers
and shared memory are the compiler's. The times are computed from them: {launch:.0f} µs per launch, and every byte at
the full bandwidth of the memory, {bandwidths}. No GPU was involved, and a real one
differs: caches serve small tensors and second reads faster, no kernel reaches the full bandwidth, and the host may be
slower than the device. What an H100 takes is in [h100.md](h100.md).

- made by: `{command}`
- versions: {versions}

## How to read the tables

- **launches**: kernels of one call. **read**, **written**: bytes per element, including scales and workspace. A second
  read of the tensor counts in full, though part of it comes from the L2 cache. Scales that all threads read count once.
  For the layer, the elements are those of weight, bias and output. Its products and the sum of the bias's gradient are
  not counted for any implementation.
- **sectors**: memory moves in sectors of 32 bytes. This is the number of bytes in the sectors that each access of a
  warp touches, as a share of the bytes that its threads request. It is 1.00 if no byte is moved needlessly, and less
  if threads of a warp read the same scale.
- **registers** per thread and **shared** memory per thread block (KiB), for sm_90. No kernel spills. **occupancy**: the
  share of the 2048 threads of an H100's multiprocessor that these leave room for. The fused kernel holds the tensor in
  registers and shared memory, so its occupancy is low by design for large tensors. The number of bytes in flight
  matters there.
- **PyTorch**: `torch.fused_moving_avg_obs_fake_quant` if it supports the call, and otherwise its module or operator of
  that name; "–" if there is none, or none that runs on the simulated device. The fused operator supports float32, per
  tensor and along the first axis, and rows and groups as channels. Its source has five launches and 13 bytes per
  element per tensor, 17 per channel, for the range, the moving average, the scale, the values and the mask. The
  **tutorial** formula is `qatfast.bench.tutorial`. Any other operator counts as one launch that reads its arguments
  and writes its results once, which is the minimum.
- A time is for the whole call. All counts are those of an H100 with {multiprocessors} multiprocessors. An RTX 4090
  (128, with less shared memory) reads more of a tensor larger than about 20 MB twice.
"""


class Case(NamedTuple):
    title: str
    op: str
    shape: tuple[int, ...]
    granularity: object = PerTensor()
    backward: bool = False

    def workload(self, dtype: torch.dtype) -> Workload:
        passes = BOTH if self.backward else FORWARD
        return Workload(
            self.op, passes, self.title, self.shape, self.backward, self.granularity, dtype, "cuda"
        )

    @property
    def elements(self) -> int:
        if self.op == "qat_linear":
            batch, inputs, outputs = self.shape
            return outputs * (inputs + 1 + batch)
        return math.prod(self.shape)


MATRIX = (1024, 4096)
CASES = (
    Case("per tensor, 4 Ki", "fake_quantize", (4 * KI,)),
    Case("per tensor, 4 Mi: on the chip", "fake_quantize", (4 * MI,)),
    Case("per tensor, 32 Mi: larger than the chip", "fake_quantize", (32 * MI,)),
    Case("per tensor, 4 Mi, forward + backward", "fake_quantize", (4 * MI,), backward=True),
    Case("per token, 1024 of 4096", "fake_quantize", MATRIX, PerToken()),
    Case("per group of 32, 4 Mi", "fake_quantize", MATRIX, PerGroup(32)),
    Case("per channel, axis 0, 1024 of 4096", "fake_quantize", MATRIX, PerChannel(0)),
    Case("per channel, axis 1, (32, 256, 28, 28)", "fake_quantize", (32, 256, 28, 28), PerChannel(1)),
    Case("per channel, channels last, (25088, 256)", "fake_quantize", (32 * 28 * 28, 256), PerChannel(1)),
    Case("per tensor, 4 Mi", "fake_quantize_affine", (4 * MI,)),
    Case("per tensor, 4 Mi, forward + backward", "fake_quantize_affine", (4 * MI,), backward=True),
    Case("per channel, axis 0, 1024 of 4096", "fake_quantize_affine", MATRIX, PerChannel(0)),
    Case("per group of 32, 4 Mi", "fake_quantize_affine", MATRIX, PerGroup(32)),
    Case("per tensor, 4 Mi", "choose_qparams", (4 * MI,)),
    Case("per channel, axis 0, 1024 of 4096", "choose_qparams", MATRIX, PerChannel(0)),
    Case("per tensor, 4 Mi", "quantize", (4 * MI,)),
    Case("per tensor, 4 Mi", "dequantize", (4 * MI,)),
    Case("tutorial config, (256, 1024, 1024)", "qat_linear", (256, 1024, 1024)),
    Case("tutorial config, (512, 4096, 4096)", "qat_linear", (512, 4096, 4096)),
    Case("the same, forward + backward", "qat_linear", (512, 4096, 4096), backward=True),
)


@dataclass
class Cost:
    launches: int = 0
    read: int = 0
    written: int = 0

    def seconds(self, gpu: str) -> float:
        return self.launches * LAUNCH + (self.read + self.written) / BANDWIDTH[gpu]


class Traffic(TorchDispatchMode):
    """Counts the least that PyTorch's operators cost: a launch each, arguments read and results written once."""

    def __init__(self):
        super().__init__()
        self.cost = Cost()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        views = any(out.alias_info and not out.alias_info.is_write for out in func._schema.returns)
        if views or name in LEFT_OUT or "empty" in name or name == "aten::_local_scalar_dense":
            return result
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        outputs = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        launches, again = self.inside(name, args)
        self.cost.launches += launches
        self.cost.read += sum(x.nbytes for x in inputs) + (again * args[0].nbytes if again else 0)
        self.cost.written += sum(x.nbytes for x in outputs)
        return result

    @staticmethod
    def inside(name, args):
        """Returns the launches of an operator and its repeated reads of its first argument, as in PyTorch's source."""
        if name == "aten::_fused_moving_avg_obs_fq_helper":
            per_channel = len(args) > 11 and args[11]
            return 5, 2 if per_channel else 1
        if name == "aten::fake_quantize_per_channel_affine_cachemask":
            return 2, 1
        return 1, 0


def cost_of(run) -> Cost:
    """Returns the cost of a call that runs operators of PyTorch."""
    with Traffic() as traffic:
        run()
    return traffic.cost


def short(kernel: str) -> str:
    """Returns a name such as ``fake_quantize_kernel<float>``."""
    return re.search(r"(\w+_kernel<[^(]*>)\(", kernel)[1]


def read(launch: dict) -> int:
    """Returns the bytes read from memory. Given scales, which many threads read, come from a cache."""
    if "fake_quantize_kernel" in launch["kernel"]:
        return launch["global_load_bytes"]
    return 32 * launch["unique_read_sectors"]


def occupancy(launch: dict, kernel: ptxas.Kernel) -> float:
    """Returns the share of an H100's threads that the registers and the shared memory of a kernel allow."""
    threads = launch["block"][0]
    registers = (
        math.ceil(kernel.registers * 32 / 256) * 256 * threads // 32
    )  # a warp gets them in units of 256
    shared = launch["static_shared"] + launch["dynamic_shared"] + RESERVED
    blocks = min(REGISTERS // registers, THREADS // threads, THREAD_BLOCKS, SHARED // shared)
    return blocks * threads / THREADS


def number(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def distinct(values) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))


def microseconds(cost: Cost | None) -> list[str]:
    return [f"{cost.seconds(gpu) * 1e6:.1f}" if cost else "–" for gpu in BANDWIDTH]


def measure(case: Case, dtype: torch.dtype, kernels: dict[str, ptxas.Kernel]) -> tuple[list[str], list[str]]:
    """Returns the row of the counts and the row of the model."""
    workload = case.workload(dtype)
    runner = prepare(workload, [OURS, *TUTORIALS, *TORCH])
    with workload.grad_mode():
        counts = counted.counted(runner.runs[OURS])
        others = {name: cost_of(run) for name, run in runner.runs.items() if name != OURS}
    foreign = [name for name in counts.kernels if "qatfast" not in name and not name.startswith(LEFT_OUT)]
    if foreign:
        sys.exit(f"cuda_counts.py: {workload} runs operators whose bytes nobody counts: {foreign}")
    launches = counts.launches
    ours = Cost(len(launches), sum(map(read, launches)), counts.written)
    used = [kernels[short(launch["kernel"])] for launch in launches]
    moved = sum(launch["global_load_sectors"] + launch["global_store_sectors"] for launch in launches) * 32
    row = [
        f"{case.op}, {case.title}",
        str(ours.launches),
        number(ours.read / case.elements),
        number(ours.written / case.elements),
        f"{moved / (counts.read + counts.written):.2f}",
        distinct(kernel.registers for kernel in used),
        distinct(number((launch["static_shared"] + launch["dynamic_shared"]) / KI) for launch in launches),
        distinct(f"{occupancy(*pair):.0%}" for pair in zip(launches, used, strict=True)),
    ]
    model = [row[0], *microseconds(ours)]
    for names in (TORCH, TUTORIALS):
        name = next((name for name in names if name in others), None)
        cost = others.get(name)
        model += [name.removeprefix("torch.ao ") if name else "–"] if names is TORCH else []
        model += (
            [str(cost.launches), number((cost.read + cost.written) / case.elements)] if cost else ["–"] * 2
        )
        model += microseconds(cost)
    return row, model


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


COUNTS = ["call", "launches", "read", "written", "sectors", "registers", "shared", "occupancy"]
MODEL = [
    "call",
    *(f"qatfast, µs {gpu}" for gpu in BANDWIDTH),
    "PyTorch's",
    "launches",
    "bytes",
    *BANDWIDTH,
    "tutorial: launches",
    "bytes",
    *BANDWIDTH,
]


def main() -> None:
    if not counted.SIMULATED:
        sys.exit(f"cuda_counts.py: the counters are a simulated device's: {COMMAND}")
    if torch.cuda.get_device_properties(0).multi_processor_count != MULTIPROCESSORS:
        sys.exit(f"cuda_counts.py: the device has to have {MULTIPROCESSORS} multiprocessors: {COMMAND}")
    if reason := ptxas.why_not():
        sys.exit(f"cuda_counts.py: registers come from the compiler, and {reason}")
    with tempfile.TemporaryDirectory() as folder:
        cubins = ptxas.cubins(Path(folder))
    kernels = {short(kernel.name): kernel for cubin in cubins for kernel in cubin.kernels}
    banner = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    lines = [
        HEAD.format(
            launch=LAUNCH * 1e6,
            bandwidths=" and ".join(f"{value / 1e12:g} TB/s ({gpu})" for gpu, value in BANDWIDTH.items()),
            command=COMMAND,
            versions=f"qatfast {__version__}, torch {torch.__version__}, nvcc {re.search(r'V([0-9.]+)', banner)[1]}",
            multiprocessors=MULTIPROCESSORS,
        )
    ]
    for dtype in DTYPES:
        rows = []
        for case in CASES:
            print(f"{case.workload(dtype)}, {dtype_name(dtype)}", file=sys.stderr, flush=True)
            rows.append(measure(case, dtype, kernels))
        counts, model = zip(*rows, strict=True)
        lines += [f"## {dtype_name(dtype)}: counts", "", *table(COUNTS, list(counts)), ""]
        lines += [f"## {dtype_name(dtype)}: the model, µs", "", *table(MODEL, list(model)), ""]
    OUT.write_text("\n".join(lines), encoding="utf-8")
    print(f"wrote {OUT.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
