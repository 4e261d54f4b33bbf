"""Loads the compiled extension and selects the implementation for a call.

``qatfast._C`` is loaded once per process, at import, and only if that is safe: ``_build.json`` next
to it names the torch that it was built with (it may crash with another version), the file is
complete, and no other copy of qatfast has registered its operators (torch would abort). Otherwise
every function uses the reference, after one warning. A damaged installation does not make
``import qatfast`` fail.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import re
import struct
import sys
import warnings
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

_REINSTALL = "Install qatfast again (pip install --force-reinstall --no-deps, from its source) to build for this torch."
_COMPILER = "Install a C++ compiler (g++ or clang++) and install qatfast again."


def _read_record() -> tuple[dict[str, Any], str]:
    """Returns (the build record of setup.py, ""), or ({}, the reason and a remedy)."""
    path = Path(__file__).with_name("_build.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}, f"the package was not installed, only imported from its source. {_REINSTALL}"
    except OSError as error:
        return {}, f"{path} cannot be read ({error.strerror}). Make it readable, or install qatfast again."
    except (ValueError, RecursionError) as error:
        return {}, f"{path} is damaged ({error}). {_REINSTALL}"
    types = {"kernels": bool, "torch": str | None, "reason": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), types[key]) for key in types):
        return {}, f"{path} is damaged (it does not say what was built). {_REINSTALL}"
    return record, ""


_record, _no_record = _read_record()


def build_record() -> dict[str, Any]:
    """Returns the build record of setup.py, empty if there is none.

    Its keys are torch, kernels, reason, compiler, debug, sanitize, cuda, cuda_reason and
    cuda_architectures.
    """
    return _record


def _load() -> tuple[ModuleType | None, str]:
    """Returns (the extension, ""), or (None, the reason and a remedy)."""
    if os.environ.get("QATFAST_NO_EXT", "") not in ("", "0"):
        return None, "QATFAST_NO_EXT is set. Unset it to use the kernels."
    if _no_record:
        return None, _no_record
    if not _record["kernels"]:
        remedy = _COMPILER if "compiler" in _record["reason"] else _REINSTALL
        return None, f"the package was built without kernels ({_record['reason']}). {remedy}"
    if _record["torch"] != torch.__version__:
        return (
            None,
            f"they were built with torch {_record['torch']}, and this is torch {torch.__version__}. {_REINSTALL}",
        )
    folder = Path(__file__).parent
    path = next(filter(Path.is_file, (folder / f"_C{suffix}" for suffix in EXTENSION_SUFFIXES)), None)
    if path is None:
        others = ", ".join(sorted(library.name for library in folder.glob("_C.*.so"))) or "none"
        return (
            None,
            f"there is no library for Python {platform.python_version()} in {folder} (found: {others}). {_REINSTALL}",
        )
    if not _is_complete(path):
        return None, f"the library {path} is damaged or cannot be read. {_REINSTALL}"
    if hasattr(torch.ops.qatfast, "fake_quantize") and not _is_loaded(path):
        return (
            None,
            f"another copy of qatfast has loaded its kernels in this process ({_loaded_libraries()}), and this copy is "
            f"{folder}. Import one copy only: uninstall the other, or take it off sys.path.",
        )
    try:
        return import_module("qatfast._C"), ""
    except Exception as error:  # the reference does not need the extension
        return None, f"the library does not load ({error}). {_REINSTALL}"


def _is_complete(path: Path) -> bool:
    """Returns whether a 64-bit ELF file includes its section headers, which are at its end.

    Loading a truncated library is a bus error.
    """
    try:
        with path.open("rb") as file:
            header = file.read(64)
            order = "<" if header[5:6] == b"\x01" else ">"
            sections, size, count = struct.unpack_from(f"{order}Q10xHH", header, 40)
            return header[:5] == b"\x7fELF\x02" and sections + size * count <= file.seek(0, os.SEEK_END)
    except (OSError, struct.error):
        return False


def _is_loaded(path: Path) -> bool:
    """Returns whether the process has loaded this file (by device and inode, or by name)."""
    try:
        ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return False
    return True


def _loaded_libraries() -> str:
    """Returns the paths of the qatfast libraries in this process."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "from an unknown place"
    return ", ".join(dict.fromkeys(re.findall(r"/.*/qatfast/_C\..*", maps))) or "from an unknown place"


extension, _reason = _load()
_warned: set[str] = set()


def reason() -> str:
    """Returns why there are no kernels, with a remedy; empty if they are loaded."""
    return _reason


def are_plain(*tensors: Any) -> bool:
    """Returns whether the entry points of the extension take these tensors; see :func:`route`."""
    return extension is not None and not torch.compiler.is_dynamo_compiling() and extension.takes(*tensors)


def route(*tensors: Any) -> Any:
    """Returns the module whose operators take these tensors, or None for the reference.

    The kernels take dense CPU tensors (and CUDA tensors if built with CUDA) outside of functorch
    transforms, which do not support C++ autograd functions. The entry points of the extension avoid
    the overhead of ``torch.ops.qatfast``, which tracers and tensor subclasses need.
    """
    if extension is None:
        _warn_once(f"qatfast runs without its compiled kernels, slowly, with the same results: {_reason}")
        return None
    if are_plain(*tensors):
        return extension
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            return None  # the checks of the reference raise
        if tensor.is_nested or tensor.is_quantized:
            return None
        if is_dtensor(tensor):
            # PyTorch shards its own operators correctly: a range is that of the whole tensor.
            _warn_once(
                "qatfast has no compiled kernels for DTensors (tensor parallel) and computes them in plain PyTorch, "
                "slowly, with the same results"
            )
            return None
        if not (tensor.is_cpu or (tensor.is_cuda and extension.has_cuda)):
            _warn_of_device(tensor.device.type)
            return None
    return None if torch._C._are_functorch_transforms_active() else torch.ops.qatfast


def is_forward_mode() -> bool:
    """Returns whether forward-mode AD is active, which autograd functions in Python do not support."""
    return forward_ad._current_level >= 0


def is_dtensor(tensor: Any) -> bool:
    """Returns whether ``tensor`` is a DTensor, without importing ``torch.distributed.tensor``."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def why_no_cuda() -> str:
    """Returns why there are no CUDA kernels, with a remedy; empty if they are loaded."""
    if extension is None:
        return _reason
    if extension.has_cuda:
        return ""
    cause = _record.get("cuda_reason", "not built for CUDA")
    return f"{cause}. Install qatfast again with a torch and an nvcc of the same CUDA version."


def _warn_of_device(device: str) -> None:
    if device == "meta":
        return
    cause = f" ({why_no_cuda()})" if device == "cuda" else ". Only CPU and CUDA tensors have kernels."
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
    """Returns the rows that ``qatfast info`` prints."""
    from . import __version__

    kernels = (
        f"no kernels: {why_no_cuda()}"
        if why_no_cuda()
        else f"kernels for {_record.get('cuda_architectures')}"
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"
    cuda = f"{device}, torch CUDA {torch.version.cuda or 'none'}; {kernels}"
    return {
        "qatfast": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernels": "loaded" if extension is not None else f"not loaded: {_reason}",
        "built with": f"torch {_record['torch']}, {_record.get('compiler')}"
        if _record.get("kernels")
        else "nothing built",
        "instruction set": extension.instruction_set() if extension is not None else "none (plain PyTorch)",
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "cuda": cuda,
    }
