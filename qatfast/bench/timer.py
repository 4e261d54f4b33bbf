"""The timer of the benchmarks and of the study: calls take turns, and each turn gives the seconds of one call."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
Turn = Callable[[], float]

TURN_SECONDS = 2e-3
LONG_CALL_SECONDS = 50e-3
MIN_ROUNDS = 7
MAX_ROUNDS = 200


def time_in_turns(
    turns: Mapping[str, Turn], *, seconds: float, min_rounds: int = MIN_ROUNDS
) -> dict[str, list[float]]:
    """Lets each turn run once per round, in another order each round, so that a busy moment of the machine hits all.

    Args:
        turns: From :func:`turn_of`, by name.
        seconds: No round starts later than this, except for the first ``min_rounds``.
        min_rounds: Minimum number of rounds. The maximum is 200, or this if it is larger.

    Returns:
        The seconds of one call in each round, by name.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    order = list(turns)
    shuffle = random.Random(0).shuffle
    with _without_garbage_collection():
        end = time.perf_counter() + seconds
        for round_index in range(max(min_rounds, MAX_ROUNDS)):
            if round_index >= min_rounds and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                times[name].append(turns[name]())
    return times


def turn_of(run: Run, device: str) -> Turn:
    """Returns the turn of a call, which takes about 2 ms: the call is repeated as often as that allows.

    A turn starts with a call that is not timed, unless a call takes 50 ms or more and caches no longer matter.
    """
    once = _seconds_per_call(run, 1, 0, device)
    if once >= LONG_CALL_SECONDS:
        return partial(_seconds_per_call, run, 1, 0, device)
    once = min(_seconds_per_call(run, 1, 1, device) for _ in range(3))
    calls = max(1, min(5000, round(TURN_SECONDS / once)))
    return partial(_seconds_per_call, run, calls, 1, device)


@contextmanager
def one_thread() -> Iterator[None]:
    """Lets torch compute on one thread inside the block, and restores the caller's number of threads after it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _seconds_per_call(run: Run, calls: int, warmup: int, device: str) -> float:
    for _ in range(warmup):
        run()
    if torch.device(device).type == "cuda":
        return statistics.median(_seconds_on_cuda(run, calls, device))
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls


def _seconds_on_cuda(run: Run, calls: int, device: str) -> list[float]:
    """Times each call by events. Before each call the device fills its L2 cache with other data.

    While the device does that, the host queues the call, so the host's time is not part of the result. ``run`` must
    not wait for the device, or the host would no longer be ahead.
    """
    other_data = _twice_the_l2_cache(device)
    events = []
    with torch.cuda.device(device):
        for _ in range(calls):
            other_data.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in events]


@cache
def _twice_the_l2_cache(device: str) -> Tensor:
    size = torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(2 * size, dtype=torch.uint8, device=device)


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
