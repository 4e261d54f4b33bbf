"""The contest of the providers on one work: results are checked against the reference, then all are timed in turns."""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import device as device_time
from . import layers, providers
from .providers import OURS, REFERENCE
from .works import Work, works
from .works import inputs as elementwise_inputs

TURN = 2e-3
LONG_CALL = 50e-3
LEAST_ROUNDS = 7
MOST_ROUNDS = 200

Run = Callable[[], Any]


class WrongResult(Exception):
    """qatfast does not give the numbers of its reference: its time would mean nothing."""


@dataclass
class Contest:
    """The providers that can do a work, ready to run.

    Args:
        work: what they do.
        runs: one call each; it gives the result, with backward also the gradients.
        errors: largest difference of each result from the reference, as a share of the largest value.
        skipped: why a provider takes no part.
    """

    work: Work
    runs: dict[str, Run] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Timing:
    """The time of one provider.

    Args:
        provider: its name.
        seconds: of one call, median of the rounds.
        ratio: to the baseline, median over the rounds.
        quartiles: of these ratios.
        error: largest difference from the reference, as a share of the largest value.
    """

    provider: str
    seconds: float
    ratio: float
    quartiles: tuple[float, float]
    error: float


@dataclass(frozen=True)
class Result:
    """A contest's outcome: the baseline's timing first."""

    work: Work
    timings: tuple[Timing, ...]
    skipped: dict[str, str]

    def timing(self, provider: str) -> Timing | None:
        """Of a provider; None where it took no part."""
        return next((timing for timing in self.timings if timing.provider == provider), None)


def names(op: str) -> list[str]:
    """All providers of an operator, the baseline first."""
    return list(layers.providers() if op == "qat_linear" else providers.providers(op))


def contestants(op: str) -> list[tuple[Work, str]]:
    """Everything that is measured of an operator: each work with each provider."""
    return [(work, name) for work in works(op) for name in names(op)]


def prepare(work: Work, wanted: Iterable[str] | None = None) -> Contest:
    """Sets up the providers, runs each once and checks its result.

    Args:
        work: what they are to do.
        wanted: their names; None: all.

    Raises:
        WrongResult: qatfast differs from the reference in a bit.
    """
    torch.compiler.reset()  # each size is compiled by itself, and a function only so many times
    make = _layer_run if work.op == "qat_linear" else _elementwise_run
    with work.grad_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of the age of its own functions
        run_of = make(work)
        expected = tensors(run_of(REFERENCE)())
        contest = Contest(work)
        for name in names(work.op) if wanted is None else wanted:
            try:
                run = run_of(name)
                result = tensors(run())
            except Exception as error:
                if name in (OURS, REFERENCE, work.baseline):
                    raise
                contest.skipped[name] = _reason(error)
                continue
            if name == OURS and not all(_same_bits(*pair) for pair in zip(result, expected, strict=True)):
                raise WrongResult(f"{work}: qatfast differs from its reference")
            contest.runs[name] = run
            contest.errors[name] = 0.0 if name == work.baseline else _error(result, expected, work)
    return contest


def _elementwise_run(work: Work) -> Callable[[str], Run]:
    inputs = elementwise_inputs(work)
    available = providers.providers(work.op)

    def run_of(name: str) -> Run:
        function = available[name](inputs)
        if not work.backward:
            return partial(function, inputs.x)

        def both() -> Any:
            y = function(inputs.x)
            return y, *torch.autograd.grad(y, inputs.x, inputs.grad)

        return both

    return run_of


def _layer_run(work: Work) -> Callable[[str], Run]:
    inputs = layers.inputs(work)
    available = layers.providers()
    leaves = (inputs.x, inputs.weight, inputs.bias)

    def run_of(name: str) -> Run:
        function = available[name](inputs)
        if not work.backward:
            return partial(function, inputs.x)

        def step() -> Any:
            for leaf in leaves:
                leaf.grad = None
            y = function(inputs.x)
            y.backward(inputs.grad)
            return y, *(leaf.grad for leaf in leaves)

        return step

    return run_of


def tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, which is one or several; integers packed with their grid are unpacked."""
    several = result if isinstance(result, tuple | list) else (result,)
    return tuple(one.int_repr() if one.is_quantized else one.detach() for one in several)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    first, second = (x.contiguous().flatten().view(torch.uint8) for x in (one, other))
    return torch.equal(first, second)


def _error(result: tuple[Tensor, ...], expected: tuple[Tensor, ...], work: Work) -> float:
    """Of the values; gradients at the ends of the range are a matter of definition."""
    if work.backward:
        result, expected = result[:1], expected[:1]
    errors = []
    for one, other in zip(result, expected, strict=True):
        first, second = (x.to(torch.float64).flatten() for x in (one, other))
        errors.append(float((first - second).abs().max() / second.abs().max()))
    return max(errors)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def measure(contest: Contest, *, seconds: float = 3.0) -> Result:
    """Times the providers in turns, in another order each round, so that a busy moment of the machine hits all.

    A turn is as many calls as take about 2 ms, after one that does not count (not where a call takes 50 ms, and caches
    no longer matter). The ratio is taken round by round. On a CUDA device a turn is the median of its calls, each timed
    by events and with a cold L2 cache.

    Args:
        contest: the providers; the baseline has to be among them.
        seconds: for all rounds together, if 7 of them do not take longer.
    """
    work = contest.work
    order = list(contest.runs)
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with work.grad_mode():
            turns = {name: _turn_of(run, work.device) for name, run in contest.runs.items()}
            end = time.perf_counter() + seconds
            for round_ in range(MOST_ROUNDS):
                if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
                    break
                shuffle(order)
                for name in order:
                    times[name].append(turns[name]())
    finally:
        if collecting:
            gc.enable()
    base = times[work.baseline]
    timings = []
    for name, values in times.items():
        ratios = [value / one for value, one in zip(values, base, strict=True)]
        first, _, third = statistics.quantiles(ratios, n=4)
        timings.append(
            Timing(
                name,
                statistics.median(values),
                statistics.median(ratios),
                (first, third),
                contest.errors[name],
            )
        )
    return Result(work, tuple(timings), dict(contest.skipped))


def _turn_of(run: Run, device: str) -> Callable[[], float]:
    """The turn of a provider, as long as its calls ask for."""
    if (once := _turn(run, 1, 0, device)) < LONG_CALL:
        once = min(_turn(run, 1, 1, device) for _ in range(3))
    calls = max(1, min(5000, round(TURN / once)))
    return partial(_turn, run, calls, 1 if once < LONG_CALL else 0, device)


def _turn(run: Run, calls: int, uncounted: int, device: str) -> float:
    """Seconds of one call."""
    for _ in range(uncounted):
        run()
    if torch.device(device).type == "cuda":
        return statistics.median(device_time.seconds(run, calls, device))
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) / calls
