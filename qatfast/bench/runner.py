"""Runs the providers of a workload: compares each result with the reference, then measures time and memory."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from . import convolutions, layers, providers
from .results import Memory, Result, Timing
from .timer import Run, Turn, one_thread, time_in_turns, turn_of
from .workloads import (
    BOUNDS,
    CACHED,
    COMPILED,
    EXACT,
    ONE_THREAD,
    OURS,
    REFERENCE,
    TUTORIAL,
    TUTORIAL_LAYER,
    Workload,
    workloads_of,
)

REDUCED_PROVIDERS = (OURS, CACHED, COMPILED, TUTORIAL, TUTORIAL_LAYER, "torch.ao fused op", *BOUNDS)
IMPORT_CODE = (
    "import time; {before}; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"
)


class WrongResult(Exception):
    """qatfast does not give the numbers of its reference, so its time would mean nothing."""


@dataclass
class Runner:
    """The providers that can run a workload, ready to be measured.

    Args:
        workload: What they run.
        runs: One call of each provider, by its name. It returns the result, with backward also the gradients.
        errors: Largest difference of each result from the reference, as a share of the largest value. None if the
            result is not compared.
        skipped: Why a provider does not take part, by its name.
        resources: Context managers that stay open until the providers have been measured.
    """

    workload: Workload
    runs: dict[str, Run] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    resources: ExitStack = field(default_factory=ExitStack)


class _Kind(NamedTuple):
    """Who runs a kind of workload: ``names`` of the providers, the baseline first, and ``runs`` to set them up."""

    names: Callable[[Workload], list[str]]
    runs: Callable[[Workload, ExitStack], Callable[[str], Run]]


def _import_names(workload: Workload) -> list[str]:
    return [workload.baseline, OURS]


def _import_runs(workload: Workload, resources: ExitStack) -> Callable[[str], Run]:
    """Returns a function that gives the call which measures an import in a fresh process, in seconds."""
    codes = {
        workload.baseline: IMPORT_CODE.format(before="pass", name="torch"),
        OURS: IMPORT_CODE.format(before="import torch", name="qatfast"),
    }
    return lambda name: partial(_printed_seconds, codes[name])


def _printed_seconds(code: str) -> float:
    # Compiled once, as for users: some environments write no bytecode.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, check=True, env=environment).stdout)


_ELEMENTWISE = _Kind(providers.names, providers.runs)
_KINDS = {
    "qat_linear": _Kind(layers.names, layers.runs),
    "qat_conv2d": _Kind(convolutions.names, convolutions.runs),
    "network": _Kind(layers.network_names, layers.network_runs),
    "import": _Kind(_import_names, _import_runs),
}


def names(workload: Workload) -> list[str]:
    """Returns the names of all providers that could run a workload, the baseline first."""
    found = _KINDS.get(workload.op, _ELEMENTWISE).names(workload)
    return [*found, *(name + ONE_THREAD for name in (workload.baseline, OURS) if workload.one_thread)]


def left_out(workload: Workload) -> dict[str, str]:
    """Returns why providers that could run a workload do not, by their names."""
    if not workload.reduced:
        return {}
    chosen = (workload.baseline, *REDUCED_PROVIDERS)
    return {name: workload.reduced for name in names(workload) if name.removesuffix(ONE_THREAD) not in chosen}


def measurements(subject: str) -> list[tuple[Workload, str]]:
    """Returns each workload of a subject with each provider that takes part in it."""
    return [
        (workload, name)
        for workload in workloads_of(subject)
        for name in names(workload)
        if name not in left_out(workload)
    ]


def prepare(workload: Workload, wanted: Iterable[str] | None = None) -> Runner:
    """Sets up the providers, runs each once and checks its result.

    Args:
        workload: What they are to run.
        wanted: Names of the providers. None means all that are not left out.

    Raises:
        WrongResult: qatfast differs from the reference in a bit.
    """
    torch.compiler.reset()  # torch compiles a function only for a limited number of sizes
    runner = Runner(workload, skipped=left_out(workload))
    known = names(workload)
    with workload.grad_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its own quantization functions are deprecated
        run_of = _KINDS.get(workload.op, _ELEMENTWISE).runs(workload, runner.resources)
        expected = tensors(run_of(REFERENCE)()) if REFERENCE in known else None
        for name in known if wanted is None else wanted:
            if name in runner.skipped:
                continue
            plain = name.removesuffix(ONE_THREAD)
            try:
                run = run_of(plain)
                result = tensors(run()) if expected else ()
            except Exception as error:
                if name in (OURS, REFERENCE, workload.baseline):
                    raise
                runner.skipped[name] = _reason(error)
                continue
            if expected and name in EXACT and not _same(result, expected):
                raise WrongResult(f"{workload}: {name} differs from its reference")
            runner.runs[name] = run
            compared = workload.forward and plain not in (workload.baseline, *BOUNDS)
            runner.errors[name] = _error(result, expected, workload) if expected and compared else None
    return runner


def measure(runner: Runner, *, seconds: float = 3.0) -> Result:
    """Times the providers in turns, see :func:`time_in_turns`, and counts the memory of a call on the CPU.

    Args:
        runner: The providers. The baseline has to be among them.
        seconds: Time for all rounds together, unless the minimum number of rounds takes longer.
    """
    workload = runner.workload
    with runner.resources, workload.grad_mode():
        counted = workload.device == "cpu" and workload.op != "import"
        memories = {name: memory(run) for name, run in runner.runs.items()} if counted else {}
        turns = {name: _turn_of(name, run, workload) for name, run in runner.runs.items()}
        times = time_in_turns(turns, seconds=seconds)
    timings = (
        Timing(name, tuple(values), runner.errors[name], memories.get(name)) for name, values in times.items()
    )
    return Result(workload, tuple(timings), dict(runner.skipped))


def _turn_of(name: str, run: Run, workload: Workload) -> Turn:
    if workload.op == "import":
        return run  # it measures its own time
    turn = turn_of(run, workload.device)
    return partial(_on_one_thread, turn) if name.endswith(ONE_THREAD) else turn


def _on_one_thread(turn: Turn) -> float:
    with one_thread():
        return turn()


def memory(run: Run) -> Memory:
    """Counts the bytes that one more call allocates, and those that it keeps for its backward."""
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        whole = x if x._base is None else x._base
        if not isinstance(whole, nn.Parameter):
            storage = x.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return x

    with (
        _without_error_stream(),
        saved_tensors_hooks(pack, lambda x: x),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [event.nbytes() for event in events if event.name() == "[memory]"]
    return Memory(sum(change for change in changes if change > 0), sum(saved.values()))


@contextmanager
def _without_error_stream() -> Iterator[None]:
    """Discards what the process writes to its error stream, as the profiler reports its start and end there."""
    error_stream, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(error_stream, 2)
        os.close(error_stream)
        os.close(null)


def tensors(result: Any) -> tuple[Tensor, ...]:
    """Returns the tensors of a result as a tuple. A quantized tensor of torch is replaced by its integers."""
    parts = result if isinstance(result, tuple | list) else (result,)
    return tuple(part.int_repr() if part.is_quantized else part.detach() for part in parts)


def _same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(_same_bits(*pair) for pair in zip(results, expected, strict=True))


def _same_bits(actual: Tensor, expected: Tensor) -> bool:
    if actual.dtype != expected.dtype or actual.shape != expected.shape:
        return False
    first, second = (x.contiguous().flatten().view(torch.uint8) for x in (actual, expected))
    return torch.equal(first, second)


def _error(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], workload: Workload) -> float:
    """Returns the largest difference of the values; gradients at the ends of the range are a matter of definition."""
    if workload.backward:
        result, expected = result[:1], expected[:1]
    errors = []
    for actual, exact in zip(result, expected, strict=True):
        first, second = (x.to(torch.float64).flatten() for x in (actual, exact))
        errors.append(float((first - second).abs().max() / second.abs().max()))
    return max(errors)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
