"""Time on a CUDA device: events around each call, the L2 cache full of other data before it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]


def seconds(run: Run, calls: int, device: str) -> list[float]:
    """Of each call, on the device: while it empties its cache, the host is ahead and queues the call.

    Args:
        run: one call; it must not wait for the device, or the host's time would be in it.
        calls: how many.
        device: on whose current stream.
    """
    other = _as_large_as_two_caches(device)
    events = []
    with torch.cuda.device(device):
        for _ in range(calls):
            other.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


@cache
def _as_large_as_two_caches(device: str) -> Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device)
