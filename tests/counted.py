"""What a call does on a CUDA device: its kernels, and where a simulator counts them, its bytes and waits."""

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
    kernels: list[str]  # ours and ATen's
    read: int | None  # bytes of our kernels; None where nobody counts them
    written: int | None
    host_syncs: int | None
    launches: list[dict[str, Any]]  # of our kernels, as the simulator describes them


def counted(function: Callable[[], Any]) -> Counts:
    """The second call of ``function``: the first may ask the device for its properties."""
    function()
    if SIMULATED:
        c = cudasim.count(function)
        names = [launch["kernel"] for launch in c.launches] + list(c.fallback_ops)
        return Counts(c.result, names, c.bytes_read, c.bytes_written, c.host_syncs, list(c.launches))
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        result = function()
        torch.cuda.synchronize()
    names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return Counts(result, names, None, None, None, [])
