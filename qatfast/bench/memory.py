"""The memory of a call on the CPU: the bytes it allocates, and those it keeps for its backward."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile


class Memory(NamedTuple):
    """Bytes of one call.

    Args:
        allocated: all that it asked torch's allocator for, what it gave back within the call too.
        kept: for its backward: every storage that autograd saves, counted once, parameters apart. The input counts, as
            it does within a larger network.
    """

    allocated: int
    kept: int


def memory(run: Callable[[], Any]) -> Memory:
    """Of one more call."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        whole = x if x._base is None else x._base
        if not isinstance(whole, nn.Parameter):
            storage = x.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with (
        _silent(),
        saved_tensors_hooks(pack, lambda x: x),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen,
    ):
        run()
    events = seen.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return Memory(sum(change for change in changes if change > 0), sum(saved.values()))


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the profiler writes to the process's error stream."""
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)
