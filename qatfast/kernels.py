"""The compiled extension: whether it is loaded, why not, and what it runs on.

``qatfast._C`` is loaded once, at import, and only with the torch it was built with (``_build.json`` beside it says
which): another torch may crash it. Without it, the reference serves every function after one warning.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import warnings
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_REINSTALL = "Install qatfast again (pip install --force-reinstall --no-deps, from its source) to build for this torch."
_COMPILER = "Install a C++ compiler (g++ or clang++) and install qatfast again."


def build_record() -> dict[str, object]:
    """What setup.py wrote of the build: torch, kernels, reason, compiler, debug, sanitize; empty if there is none."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.is_file() else {}


def _load() -> tuple[ModuleType | None, str]:
    """(the extension, "") or (None, why not and what to do)."""
    if os.environ.get("QATFAST_NO_EXT", "") not in ("", "0"):
        return None, "QATFAST_NO_EXT is set. Unset it to use the kernels."
    record = build_record()
    if not record:
        return None, f"the package was not installed, only imported from its source. {_REINSTALL}"
    if not record["kernels"]:
        cure = _COMPILER if "compiler" in str(record["reason"]) else _REINSTALL
        return None, f"the package was built without kernels ({record['reason']}). {cure}"
    if record["torch"] != torch.__version__:
        return (
            None,
            f"they were built with torch {record['torch']}, and this is torch {torch.__version__}. {_REINSTALL}",
        )
    try:
        return import_module("qatfast._C"), ""
    except ImportError as error:
        return None, f"the library does not load ({error}). {_REINSTALL}"


extension, _reason = _load()
_warned: set[str] = set()


def reason() -> str:
    """Why there are no kernels and what to do about it; empty if they are loaded."""
    return _reason


def route(*tensors: Any) -> Any:
    """Where the operators for these tensors are: the extension, ``torch.ops.qatfast``, or None for the reference.

    The kernels take dense CPU (and, where they were built, CUDA) tensors outside of functorch transforms, in which a
    C++ autograd Function has no part.
    The extension's direct entry points save the overhead of torch.ops, which tracers and tensor subclasses must see.
    """
    if extension is None:
        _warn_once(f"qatfast runs without its compiled kernels, slowly, with the same results: {_reason}")
        return None
    if not torch.compiler.is_dynamo_compiling() and extension.takes(*tensors):
        return extension
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return None  # the reference's checks say what is wrong
        if tensor.is_nested or tensor.is_quantized:
            return None
        if is_dtensor(tensor):
            # The operators of PyTorch know how to shard themselves: a range is that of the whole tensor.
            _warn_once(
                "qatfast has no compiled kernels for DTensors (tensor parallel) and computes them in plain PyTorch, "
                "slowly, with the same results"
            )
            return None
        if not (tensor.is_cpu or (tensor.is_cuda and extension.has_cuda)):
            _warn_of_device(tensor.device.type)
            return None
    return None if torch._C._are_functorch_transforms_active() else torch.ops.qatfast


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor (tensor parallel), which only a process that has imported them can have."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def why_no_cuda() -> str:
    """Why there are no CUDA kernels and what to do about it; empty if they are loaded."""
    if extension is None:
        return _reason
    if extension.has_cuda:
        return ""
    return f"{build_record()['cuda_reason']}. Install qatfast again with a torch and an nvcc of one CUDA version."


def _warn_of_device(device: str) -> None:
    if device == "meta":
        return
    cause = (
        f" ({why_no_cuda()})"
        if device == "cuda"
        else ": nothing to install; CPU and CUDA tensors use kernels."
    )
    _warn_once(
        f"qatfast has no compiled kernels for {device} tensors and computes them in plain PyTorch, slowly, with the "
        f"same results{cause}"
    )


def _warn_once(message: str) -> None:
    if torch.compiler.is_compiling() or message in _warned:
        return
    _warned.add(message)
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def info() -> dict[str, str]:
    """What ``qatfast info`` prints: versions, kernels and why not, instruction set, threads, CUDA."""
    from . import __version__

    record = build_record()
    kernels = (
        f"kernels for {record['cuda_architectures']}" if not why_no_cuda() else f"no kernels: {why_no_cuda()}"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    cuda = f"{device}, torch CUDA {torch.version.cuda or 'none'}; {kernels}"
    return {
        "qatfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": "loaded" if extension is not None else f"not loaded: {_reason}",
        "built with": f"torch {record['torch']}, {record['compiler']}"
        if record.get("kernels")
        else "nothing built",
        "instruction set": extension.instruction_set() if extension is not None else "none (plain PyTorch)",
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "cuda": cuda,
    }
