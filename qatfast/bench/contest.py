"""The contest of the providers on one work: results are checked against the reference, then all are timed in turns."""

from __future__ import annotations

import gc
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import device as device_time
from . import importing, layers, network, providers
from .memory import Memory, memory
from .names import BOUNDS, CACHED, COMPILED, EXACT, ONE_THREAD, OURS, REFERENCE, TUTORIAL, TUTORIAL_LAYER
from .providers import Run
from .works import Work, works

SUBJECTS = {"qat_linear": layers, "network": network, "import": importing}
FEW = (OURS, CACHED, COMPILED, TUTORIAL, TUTORIAL_LAYER, "torch.ao fused op", *BOUNDS)
TURN = 2e-3
LONG_CALL = 50e-3
LEAST_ROUNDS = 7
MOST_ROUNDS = 200


class WrongResult(Exception):
    """qatfast does not give the numbers of its reference: its time would mean nothing."""


@dataclass
class Contest:
    """The providers that can do a work, ready to run.

    Args:
        work: what they do.
        runs: one call each; it gives the result, with backward also the gradients.
        errors: largest difference of each result from the reference, as a share of the largest value, or None.
        skipped: why a provider takes no part.
        inside: what is open until it has been measured.
    """

    work: Work
    runs: dict[str, Run] = field(default_factory=dict)
    errors: dict[str, float | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    inside: ExitStack = field(default_factory=ExitStack)


class Spread(NamedTuple):
    """A figure over the rounds: median and quartiles."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """What was measured of one provider.

    Args:
        provider: its name.
        rounds: seconds of one call, in each round.
        error: largest difference from the reference, as a share of the largest value; None: not compared.
        memory: bytes of a call; None: not measured.
    """

    provider: str
    rounds: tuple[float, ...]
    error: float | None = None
    memory: Memory | None = None

    @property
    def seconds(self) -> float:
        """Of one call, median of the rounds."""
        return statistics.median(self.rounds)


@dataclass(frozen=True)
class Result:
    """A contest's outcome: the baseline's timing first."""

    work: Work
    timings: tuple[Timing, ...]
    skipped: dict[str, str]

    def timing(self, provider: str) -> Timing | None:
        """Of a provider; None where it took no part."""
        return next((timing for timing in self.timings if timing.provider == provider), None)

    def ratio(self, provider: str, of: str | None = None) -> Spread | None:
        """Of its time to another's (None: the baseline's), round by round; None where one of them took no part."""
        return self._spread(lambda one, other: one / other, provider, of)

    def above(self, provider: str) -> Spread | None:
        """Its seconds beyond the baseline's, round by round; None where it took no part."""
        return self._spread(lambda one, other: one - other, provider, None)

    def _spread(
        self, figure: Callable[[float, float], float], provider: str, of: str | None
    ) -> Spread | None:
        one, other = self.timing(provider), self.timing(of or self.work.baseline)
        if one is None or other is None:
            return None
        values = [figure(*pair) for pair in zip(one.rounds, other.rounds, strict=True)]
        return spread(values)


def spread(values: Iterable[float]) -> Spread:
    """Median and quartiles of two values or more."""
    low, median, high = statistics.quantiles(values, n=4)
    return Spread(median, low, high)


def names(work: Work) -> list[str]:
    """Everybody who could do a work, the baseline first."""
    found = SUBJECTS.get(work.op, providers).names(work)
    alone = [name + ONE_THREAD for name in (work.baseline, OURS)] if work.threads else []
    return [*found, *alone]


def left_out(work: Work) -> dict[str, str]:
    """Who could, but does not take part, and why."""
    if not work.few:
        return {}
    chosen = (work.baseline, *FEW)
    return {name: work.few for name in names(work) if name.removesuffix(ONE_THREAD) not in chosen}


def contestants(subject: str) -> list[tuple[Work, str]]:
    """Everything that is measured of an operator: each work with each provider."""
    return [(work, name) for work in works(subject) for name in names(work) if name not in left_out(work)]


def prepare(work: Work, wanted: Iterable[str] | None = None) -> Contest:
    """Sets up the providers, runs each once and checks its result.

    Args:
        work: what they are to do.
        wanted: their names; None: all that are not left out.

    Raises:
        WrongResult: qatfast differs from the reference in a bit.
    """
    torch.compiler.reset()  # each size is compiled by itself, and a function only so many times
    contest = Contest(work, skipped=left_out(work))
    everybody = names(work)
    with work.grad_mode(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch says of the age of its own functions
        run_of = SUBJECTS.get(work.op, providers).runs(work, contest.inside)
        expected = tensors(run_of(REFERENCE)()) if REFERENCE in everybody else None
        for name in everybody if wanted is None else wanted:
            if name in contest.skipped:
                continue
            plain = name.removesuffix(ONE_THREAD)
            try:
                run = run_of(plain)
                result = tensors(run()) if expected else ()
            except Exception as error:
                if name in (OURS, REFERENCE, work.baseline):
                    raise
                contest.skipped[name] = _reason(error)
                continue
            if expected and name in EXACT and not _same(result, expected):
                raise WrongResult(f"{work}: {name} differs from its reference")
            contest.runs[name] = run
            compared = work.forward and plain not in (work.baseline, *BOUNDS)
            contest.errors[name] = _error(result, expected, work) if expected and compared else None
    return contest


def tensors(result: Any) -> tuple[Tensor, ...]:
    """The tensors of a result, which is one or several; integers packed with their grid are unpacked."""
    several = result if isinstance(result, tuple | list) else (result,)
    return tuple(one.int_repr() if one.is_quantized else one.detach() for one in several)


def _same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(_same_bits(*pair) for pair in zip(results, expected, strict=True))


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
    by events and with a cold L2 cache; memory is counted on the CPU only.

    Args:
        contest: the providers; the baseline has to be among them.
        seconds: for all rounds together, if 7 of them do not take longer.
    """
    work = contest.work
    with contest.inside, work.grad_mode():
        counted = work.device == "cpu" and work.op != "import"
        bytes_ = {name: memory(run) for name, run in contest.runs.items()} if counted else {}
        times = _times(contest, seconds)
    timings = (
        Timing(name, tuple(values), contest.errors[name], bytes_.get(name)) for name, values in times.items()
    )
    return Result(work, tuple(timings), dict(contest.skipped))


def _times(contest: Contest, seconds: float) -> dict[str, list[float]]:
    """Of one call, in each round."""
    order = list(contest.runs)
    times: dict[str, list[float]] = {name: [] for name in order}
    shuffle = random.Random(0).shuffle
    with _without_collection():
        turns = {name: _turn_of(name, run, contest.work) for name, run in contest.runs.items()}
        end = time.perf_counter() + seconds
        for round_ in range(MOST_ROUNDS):
            if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
                break
            shuffle(order)
            for name in order:
                times[name].append(turns[name]())
    return times


@contextmanager
def _without_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _turn_of(name: str, run: Run, work: Work) -> Callable[[], float]:
    """The turn of a provider, as long as its calls ask for."""
    if work.op == "import":
        return run
    if name.endswith(ONE_THREAD):
        return partial(_on_one_thread, _turn_of(name.removesuffix(ONE_THREAD), run, work))
    if (once := _turn(run, 1, 0, work.device)) < LONG_CALL:
        once = min(_turn(run, 1, 1, work.device) for _ in range(3))
    calls = max(1, min(5000, round(TURN / once)))
    return partial(_turn, run, calls, 1 if once < LONG_CALL else 0, work.device)


def _on_one_thread(turn: Callable[[], float]) -> float:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return turn()
    finally:
        torch.set_num_threads(threads)


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
