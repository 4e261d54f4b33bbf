"""What was measured on: the processor and the versions. No names of hosts, users or folders."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from .. import __version__, kernels

CPU = Path("/sys/devices/system/cpu")
PEERS = ("brevitas", "torchao", "nncf", "nvidia-modelopt")


def machine() -> dict[str, str]:
    """Returns the processor, its cores, caches and instruction sets, the threads, the kernels and the GPU."""
    facts = kernels.info()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": _processor(),
        "cores": str(cores),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": facts["threads"],
        "instruction set": f"{facts['instruction set']} (qatfast), {facts['torch capability']} (torch)",
        "kernels": _kernels(facts["kernels"]),
        "built with": facts["built with"],
    }
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        found["scheduling"] = "real-time priority; other programs run only on a core that is left idle"
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return {name: value for name, value in found.items() if value}


def versions(*packages: str) -> dict[str, str]:
    """Returns the versions of qatfast, torch, numpy and Python, and of ``packages``."""
    found = {
        "qatfast": __version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _kernels(state: str) -> str:
    """Returns the state of the kernels with a hash of the build, so that results of two builds can be told apart."""
    path = getattr(kernels.extension, "__file__", None)
    return f"{state}, build {hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}" if path else state


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _caches() -> str:
    """Returns the caches of the first core, such as ``L1 data 32K, L2 1024K, L3 32768K``."""
    found = []
    for folder in sorted((CPU / "cpu0" / "cache").glob("index*")):
        try:
            level, kind, size = ((folder / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found.append(f"L{level}{' data' if kind == 'Data' else ''} {size}")
    return ", ".join(found)
