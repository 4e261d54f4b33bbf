"""Means, standard deviations, and whether a difference between two models is more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats  # type: ignore[import-untyped]

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Spread:
    """One figure over several seeds.

    Args:
        mean: of the values.
        std: standard deviation of the values (divisor n - 1); None for one value.
        values: one a seed.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values)
        )


@dataclass(frozen=True)
class Difference:
    """How much more accurate one model is than another, seed by seed on the same samples.

    Args:
        mean: first minus second accuracy, as a share (0.01 is one point).
        margin: half the width of the 95 % interval around ``mean``; None for one seed, whose spread is unknown.
        resolution: the share that one test sample is.
        seeds: how many pairs there are.
    """

    mean: float
    margin: float | None
    resolution: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Whether it is more than chance: larger than its margin and than one test sample; never for one seed."""
        return self.margin is not None and abs(self.mean) > max(self.margin, self.resolution * (1 + 1e-9))

    def below(self, bound: float) -> bool:
        """Whether the whole interval is below ``bound``; never for one seed."""
        return self.margin is not None and self.mean + self.margin < bound

    @property
    def points(self) -> str:
        """``-0.2 ± 0.6``: in points, with a sign."""
        mean = round(100 * self.mean, 1) + 0.0  # -0.0 becomes 0.0
        return f"{mean:+.1f}" + self._margin

    @property
    def size(self) -> str:
        """``0.2 ± 0.6``: in points, where the words around it say the direction."""
        return f"{100 * abs(self.mean):.1f}" + self._margin

    @property
    def _margin(self) -> str:
        return "" if self.margin is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{100 * self.margin:.1f}"


def compare(
    first: Mapping[int, float], second: Mapping[int, float], *, train: int, test: int
) -> Difference | None:
    """The mean difference of two models' accuracies over the seeds that both have, with its 95 % interval.

    The margin is ``t * std * sqrt(1 / n + test / train)``: the second term is there because the seeds' splits share
    samples, and ``std`` is at least one test sample, finer than which no accuracy is known. One seed has no margin.

    Args:
        first: accuracy by seed.
        second: accuracy by seed.
        train: training samples.
        test: test samples.

    Returns:
        The difference, or None where no seed has both.

    Source:
        Nadeau and Bengio 2003, Inference for the generalization error, Machine Learning 52, the corrected resampled
        t-test.
    """
    pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    if not pairs:
        return None
    differences = [one - other for one, other in pairs]
    count = len(pairs)
    margin = None
    if count > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        deviation = max(statistics.stdev(differences), 1 / test)
        margin = quantile * deviation * math.sqrt(1 / count + test / train)
    return Difference(statistics.fmean(differences), margin, 1 / test, count)
