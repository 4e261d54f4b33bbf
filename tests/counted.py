"""Counts the kernels of a call on a CUDA device, and on a simulator its bytes and host syncs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

try:  # a simulated device, if the tests run on one
    import cudasim

    SIMULATED = cudasim.active()
except ImportError:
    SIMULATED = False


class Counts(NamedTuple):
    result: Any
    kernels: list[str]  # the names of all kernels, including those of ATen
    read: int | None  # bytes read by kernels of qatfast; None without a simulator
    written: int | None  # bytes written by kernels of qatfast
    host_syncs: int | None
    launches: list[dict[str, Any]]  # launches of kernels of qatfast, as the simulator reports them


def counted(function: Callable[[], Any]) -> Counts:
    """Counts the second call of ``function``: the first may read properties of the device."""
    function()
    if SIMULATED:
        counts = cudasim.count(function)
        names = [launch["kernel"] for launch in counts.launches] + list(counts.fallback_ops)
        return Counts(
            counts.result,
            names,
            counts.bytes_read,
            counts.bytes_written,
            counts.host_syncs,
            list(counts.launches),
        )
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        result = function()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counts(result, names, None, None, None, [])
