"""Compiles the CUDA kernels with the flags of setup.py and reports the result.

The report has registers, shared memory, spills and code size. If the build contains uncompressed PTX
(NVCC_APPEND_FLAGS=--no-compress), only ptxas runs.
"""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


class Kernel(NamedTuple):
    name: str  # as in C++
    registers: int
    shared: int  # bytes of static shared memory
    spills: int  # bytes


class Cubin(NamedTuple):
    source: Path
    kernels: list[Kernel]
    size: int  # bytes of machine code and its tables
    warnings: list[str]


def why_not() -> str:
    """Why the kernels cannot be compiled here; empty if they can."""
    if not SOURCES:
        return "the sources are not here"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not shutil.which("nvcc"):
        return "there is no nvcc on PATH"
    banner = subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)", banner)
    if not release or release[1] != torch.version.cuda.split(".")[0]:
        return f"torch {torch.__version__} is for CUDA {torch.version.cuda}, and nvcc is another"
    return ""


def cubins(folder: Path, architecture: str = "sm_90") -> list[Cubin]:
    """The kernels of each source, compiled into the folder."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda source: _cubin(source, folder, architecture), SOURCES))


def _cubin(source: Path, folder: Path, architecture: str) -> Cubin:
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

    out = folder / f"{source.stem}.cubin"
    words = ["nvcc", "-cubin", f"-arch={architecture}", "-Xptxas=-v", "-std=c++20", *_flags()]
    words += [*COMMON_NVCC_FLAGS, "-DQATFAST_CUDA=1", f"-I{ROOT / 'csrc'}"]
    words += [f"--system-include={path}" for path in include_paths()]
    ptx = _built_ptx(source, architecture)
    if ptx:
        source_or_ptx = folder / f"{source.stem}.ptx"
        source_or_ptx.write_bytes(ptx)
    else:
        source_or_ptx = source
    done = subprocess.run([*words, str(source_or_ptx), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    warnings = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    return Cubin(source, list(_kernels(done.stderr)), out.stat().st_size, warnings)


def _built_ptx(source: Path, architecture: str) -> bytes:
    """The PTX in the object of the build; empty if it is missing, compressed or older than a source."""
    pattern = f"build/temp.*-{sys.implementation.cache_tag}/csrc/cuda/{source.stem}.o"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*"))
    for path in ROOT.glob(pattern):
        if path.stat().st_mtime > newest:
            target = rf"\.version [\d.]+\s+\.target {architecture}\s.*?(?=\0)".encode()
            found = re.search(target, path.read_bytes(), re.DOTALL)
            return found[0] if found else b""
    return b""


def _flags() -> list[str]:
    """Those for nvcc in setup.py, which cannot be imported: it would build."""
    return ast.literal_eval(re.search(r'"nvcc": (\[.*?\])', (ROOT / "setup.py").read_text(), re.DOTALL)[1])


def _kernels(report: str) -> Iterator[Kernel]:
    """ptxas -v tells of one kernel after another."""
    blocks = re.split(r"Compiling entry function '", report)[1:]
    names = subprocess.run(
        ["c++filt"],
        input="\n".join(block.partition("'")[0] for block in blocks),
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    for name, block in zip(names, blocks, strict=True):
        shared = re.search(r"(\d+) bytes smem", block)
        yield Kernel(
            name,
            int(re.search(r"Used (\d+) registers", block)[1]),
            int(shared[1]) if shared else 0,
            sum(map(int, re.findall(r"(\d+) bytes spill", block))),
        )
