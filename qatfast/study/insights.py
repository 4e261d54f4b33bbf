"""The verdict of a study and its findings, as sentences that the results support with 95 % confidence.

A model is *without a loss* if the whole 95 % interval of its loss against FP32 is below TOLERANCE. It *loses* if the
interval is above 0. Otherwise the seeds cannot tell. One seed has no interval and can never tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy import stats  # type: ignore[import-untyped]

from .data import plural
from .experiments import Study
from .networks import COMPARED, FLOAT_BITS, TITLES
from .timing import StepTime

TOLERANCE = 0.01
"""A loss below this share of accuracy, one point, counts as no loss."""
MAX_SCATTER = 1.5
"""Times are not reported if their third quartile exceeds the first by more than this factor."""

CONFIDENCE = 0.95

RIVALS = (
    ("qat_learned", "ptq_mse"),
    ("qat_learned", "qat_moving_average"),
    ("qat_learned", "qat_tutorial"),
    ("ptq_mse", "ptq_minmax"),
)
"""Pairs of models whose difference is reported, besides that of each model and FP32."""


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation of one figure over several seeds.

    Args:
        mean: Mean of the values.
        std: Standard deviation of the values with divisor n - 1. None for one value.
        values: One value per seed.
    """

    mean: float
    std: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Returns the spread of at least one value."""
        return cls(
            statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values)
        )


@dataclass(frozen=True)
class Difference:
    """Difference of two models' accuracies, paired by seed.

    Args:
        mean: First minus second accuracy, as a share (0.01 is one point).
        margin: Half the width of the 95 % interval around ``mean``. None for one seed, whose spread is unknown.
        resolution: Share of one test sample.
        seeds: Number of pairs.
    """

    mean: float
    margin: float | None
    resolution: float
    seeds: int

    @property
    def clear(self) -> bool:
        """Returns whether the difference is larger than its margin and than one test sample. False for one seed."""
        return self.margin is not None and abs(self.mean) > max(self.margin, self.resolution * (1 + 1e-9))

    def below(self, bound: float) -> bool:
        """Returns whether the whole interval is below ``bound``. False for one seed."""
        return self.margin is not None and self.mean + self.margin < bound

    @property
    def points(self) -> str:
        """The difference in points with a sign, such as ``-0.2 ± 0.6``."""
        mean = round(100 * self.mean, 1) + 0.0  # -0.0 becomes 0.0
        return f"{mean:+.1f}" + self._margin

    @property
    def size(self) -> str:
        """The difference in points without a sign, such as ``0.2 ± 0.6``."""
        return f"{100 * abs(self.mean):.1f}" + self._margin

    @property
    def _margin(self) -> str:
        return "" if self.margin is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{100 * self.margin:.1f}"


def compare(
    first: Mapping[int, float], second: Mapping[int, float], *, train: int, test: int
) -> Difference | None:
    """Computes the mean difference of two models' accuracies over their common seeds, with its 95 % interval.

    The margin is ``t * std * sqrt(1 / n + test / train)``. The second term accounts for the samples that the splits of
    different seeds share. ``std`` is at least one test sample, which is the resolution of an accuracy.

    Args:
        first: Accuracy by seed.
        second: Accuracy by seed.
        train: Number of training samples.
        test: Number of test samples.

    Returns:
        The difference, or None if there is no common seed.

    Source:
        Nadeau and Bengio 2003, Inference for the generalization error, Machine Learning 52, the corrected resampled
        t-test.
    """
    pairs = [(first[seed], second[seed]) for seed in first if seed in second]
    if not pairs:
        return None
    differences = [left - right for left, right in pairs]
    count = len(pairs)
    margin = None
    if count > 1:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
        deviation = max(statistics.stdev(differences), 1 / test)
        margin = quantile * deviation * math.sqrt(1 / count + test / train)
    return Difference(statistics.fmean(differences), margin, 1 / test, count)


@dataclass(frozen=True)
class Insight:
    """A sentence about the results.

    Args:
        kind: ``headline`` or ``verdict`` (one per bit width), which every report has, or a kind of finding, which a
            report has only if it is more than chance: ``gain``, ``diverged``, ``batch``, ``size``.
        bits: The bit width of the sentence, or 32 for all bit widths.
        value: The figure behind the sentence: a difference of accuracies as a share, or a ratio. None without figure.
        margin: Half the width of the figure's 95 % interval. None if it has no interval.
        clear: Whether the seeds decide it.
        text: The sentence.
    """

    kind: str
    bits: int
    value: float | None
    margin: float | None
    clear: bool
    text: str


@dataclass(frozen=True)
class Outcome:
    """A model compared with FP32.

    Args:
        model: A key of TITLES.
        state: ``lossless``, ``loses``, ``unclear`` or ``diverged``.
        difference: Accuracy of the model minus that of FP32.
        words: The rest of a sentence that begins with the model's title.
    """

    model: str
    state: str
    difference: Difference
    words: str


def find_insights(study: Study) -> list[Insight]:
    """Returns the headline, one verdict per bit width, and the findings that are more than chance.

    Args:
        study: A complete or interrupted study. Nothing is reported about results that are missing.
    """
    verdicts = [
        verdict for bits in study.settings.bits if (verdict := _verdict(study, bits, *_outcomes(study, bits)))
    ]
    if not verdicts:
        return []
    failed = study.divergences("fp32_longer", FLOAT_BITS)
    if failed:
        return [_fp32_failed(study, failed)]
    findings = [
        *_gains(study),
        *_diverged(study),
        *_batch(study),
        *_size(study),
    ]
    return [_headline(study), *verdicts, *findings]


def best(study: Study) -> tuple[int, str] | None:
    """Returns the lowest bits without a loss, and PTQ if it has none there, or else QAT. None without such bits."""
    for bits in sorted(study.settings.bits):
        for outcome in _outcomes(study, bits):
            if outcome.state == "lossless":
                return bits, outcome.model
    return None


def definition(study: Study) -> str:
    """Returns what the figures of a verdict mean."""
    ptq, qat = (TITLES[model] for model in COMPARED)
    epochs = plural(2 * study.settings.epochs, "epoch")
    start = f"PTQ is {ptq}, QAT is {qat}. Figures: points against FP32 at equal training ({epochs})"
    if seeds(study) < 2:
        return f"{start}. One seed has no spread."
    outcomes = [outcome for bits in study.settings.bits for outcome in _outcomes(study, bits)]
    more = " More seeds narrow the intervals." if any(each.state == "unclear" for each in outcomes) else ""
    return (
        f"{start}, paired over {seeds(study)} seeds, ± half the 95 % interval.{more} No loss: the interval ends less "
        f"than {100 * TOLERANCE:g} point below FP32."
    )


def seeds(study: Study) -> int:
    """Returns how many seeds have all models that a verdict compares."""
    fp32 = len(study.accuracies("fp32_longer", FLOAT_BITS))
    return max(
        (
            min(fp32, *(len(study.accuracies(model, bits)) for model in COMPARED))
            for bits in study.settings.bits
        ),
        default=0,
    )


def time_insights(times: list[StepTime]) -> list[str]:
    """Returns one sentence per network: the median ratio of a QAT step to an FP32 step, with its quartiles.

    There is no sentence if the ratios scatter by more than MAX_SCATTER, as the machine was busy then.
    """
    by_network: dict[str, dict[str, StepTime]] = {}
    for entry in times:
        by_network.setdefault(entry.network, {})[entry.model] = entry
    return [
        f"A step of QAT learned takes {_times(models['qatfast'])} an FP32 step, tutorial code "
        f"{_times(models['tutorial'])}; "
        f"{network}."
        for network, models in by_network.items()
        if all(entry.quartiles[1] <= MAX_SCATTER * entry.quartiles[0] for entry in models.values())
    ]


def _times(entry: StepTime) -> str:
    first, third = entry.quartiles
    return f"{entry.ratio:.2f} times ({first:.2f} to {third:.2f})"


def _outcomes(study: Study, bits: int) -> list[Outcome]:
    """Returns the outcomes of PTQ and QAT, without those that are not measured yet."""
    found = (_outcome(study, model, bits) for model in COMPARED)
    return [outcome for outcome in found if outcome is not None]


def _outcome(study: Study, model: str, bits: int) -> Outcome | None:
    difference = difference_to_fp32(study, model, bits)
    if difference is None:
        return None
    failed = study.divergences(model, bits)
    if failed:
        return Outcome(model, "diverged", difference, f"diverged in {_seeds(study, model, bits, failed)}")
    loss = Difference(-difference.mean, difference.margin, difference.resolution, difference.seeds)
    if difference.margin is None:
        return Outcome(model, "unclear", difference, f"is at {difference.points}")
    if loss.clear and loss.mean > 0:
        return Outcome(model, "loses", difference, f"loses {loss.size}")
    if loss.below(TOLERANCE):
        return Outcome(model, "lossless", difference, f"has no loss ({difference.points})")
    return Outcome(model, "unclear", difference, f"is unclear ({difference.points})")


def _headline(study: Study) -> Insight:
    if seeds(study) < 2:
        text = "One seed cannot tell which numbers of bits are without a loss: run again with --seeds 7."
        return Insight("headline", FLOAT_BITS, None, None, False, text)
    lowest: dict[str, int] = {}
    states = []
    for bits in study.settings.bits:
        for outcome in _outcomes(study, bits):
            states.append(outcome.state)
            if outcome.state == "lossless":
                lowest[outcome.model] = min(bits, lowest.get(outcome.model, bits))
    ptq, qat = (lowest.get(model) for model in COMPARED)
    if ptq is None and qat is None:
        text = "No number of bits tried is without a loss."
        if "unclear" in states:
            text = f"{plural(seeds(study), 'seed')} cannot tell which numbers of bits are without a loss."
        return Insight("headline", FLOAT_BITS, None, None, "unclear" not in states, text)
    if ptq is not None and (qat is None or ptq <= qat):
        text = f"Lowest bits without a loss: {ptq}. PTQ is enough there."
    else:
        other = f"PTQ needs {ptq}" if ptq is not None else "PTQ is without a loss at none of the bits tried"
        text = f"Lowest bits without a loss: {qat}, with QAT. {other}."
    return Insight("headline", FLOAT_BITS, None, None, True, text)


def _verdict(
    study: Study, bits: int, ptq: Outcome | None = None, qat: Outcome | None = None
) -> Insight | None:
    """Returns the verdict at a bit width, or None if PTQ or QAT is not measured."""
    if ptq is None or qat is None:
        return None
    gain = difference_of(study, qat.model, ptq.model, bits)
    assert gain is not None
    advice = _advice(ptq.state, qat.state, gain)
    text = f"{bits} bits: {advice}. PTQ {ptq.words}, QAT {qat.words}"
    if gain.clear and "diverged" not in (ptq.state, qat.state):
        text += f"; QAT is {gain.size} {'better' if gain.mean > 0 else 'worse'} than PTQ"
    elif gain.margin is not None and "diverged" not in (ptq.state, qat.state):
        text += f"; QAT minus PTQ is {gain.points}"
    clear = "unclear" not in (ptq.state, qat.state)
    return Insight("verdict", bits, qat.difference.mean, qat.difference.margin, clear, f"{text}.")


def _advice(ptq: str, qat: str, gain: Difference) -> str:
    better, worse = gain.clear and gain.mean > 0, gain.clear and gain.mean < 0
    if gain.margin is None:
        return "one seed cannot tell"
    if ptq == "lossless":
        return "PTQ is enough"
    if qat == "diverged":
        return "QAT does not work here"
    if qat == "lossless":
        return "QAT is worth it" if ptq == "loses" or better else "QAT is the safe choice"
    if worse:
        return "QAT is worse than PTQ"
    if better:
        return "QAT helps, perhaps not enough" if qat == "unclear" else "QAT helps, but not enough"
    if ptq == qat == "loses":
        return "neither is enough"
    return f"{gain.seeds} seeds cannot tell"


def _fp32_failed(study: Study, failed: Mapping[int, str]) -> Insight:
    where = _seeds(study, "fp32_longer", FLOAT_BITS, failed)
    reason = next(iter(failed.values()))
    text = (
        f"FP32 itself did not learn in {where} ({reason}), so nothing can be compared with it: check the labels and "
        "the features, or train longer with --epochs."
    )
    return Insight("headline", FLOAT_BITS, None, None, False, text)


def _gains(study: Study) -> list[Insight]:
    """Returns what the rivals of PTQ and QAT lose, at the bits at which the difference is clear."""
    insights = []
    for first, second in RIVALS:
        if (second, first) != COMPARED:  # their difference is part of a verdict
            sound = _sound(study, first, second)
            gains = {bits: difference_of(study, first, second, bits) for bits in sound}
            insights += _listed(f"{TITLES[first]} is", f"than {TITLES[second]}", gains)
    return insights


def _listed(subject: str, rival: str, found: Mapping[int, Difference | None]) -> list[Insight]:
    """Returns one sentence about all clear gains and one about all clear losses, with the bits of each."""
    insights = []
    for word, sign in (("better", 1), ("worse", -1)):
        clear = {bits: gain for bits, gain in found.items() if gain and gain.clear and sign * gain.mean > 0}
        if clear:
            listing = ", ".join(f"{gain.size} at {bits} bits" for bits, gain in clear.items())
            listing = listing.replace(" at ", " points at ", 1)
            bits, largest = max(clear.items(), key=lambda item: abs(item[1].mean))
            text = f"{subject} {word} {rival} by {listing}."
            insights.append(Insight("gain", bits, largest.mean, largest.margin, True, text))
    return insights


def _diverged(study: Study) -> list[Insight]:
    insights = []
    for model in study.settings.quantized_models:
        for bits in study.settings.bits:
            failed = study.divergences(model, bits)
            if failed:
                reasons = " or ".join(dict.fromkeys(failed.values()))
                text = f"{TITLES[model]} diverged at {bits} bits in {_seeds(study, model, bits, failed)}: {reasons}."
                insights.append(Insight("diverged", bits, None, None, True, text))
    return insights


def _batch(study: Study) -> list[Insight]:
    """Returns the largest clear difference between batch sizes, because tutorials take ranges from the batch."""
    found = {}
    for bits in study.settings.bits:
        difference = compare(
            study.accuracies("qat_tutorial", bits, "accuracy_batch_1"),
            study.accuracies("qat_tutorial", bits),
            train=study.train_samples,
            test=study.test_samples,
        )
        if difference is not None and difference.clear:
            found[bits] = difference
    if not found:
        return []
    bits, difference = max(found.items(), key=lambda item: abs(item[1].mean))
    text = (
        f"{TITLES['qat_tutorial']} takes its ranges from the batch: at {bits} bits one sample at a time is "
        f"{difference.size} points {'better' if difference.mean > 0 else 'worse'} than 256 at a time."
    )
    return [Insight("batch", bits, difference.mean, difference.margin, True, text)]


def _size(study: Study) -> list[Insight]:
    """Returns the size of the model file at the lowest bits without a loss."""
    found = best(study)
    if found is None:
        return []
    bits, model = found
    files = {(file.model, file.bits): file.bytes for file in study.sizes}
    fp32, quantized = files.get(("fp32_longer", FLOAT_BITS)), files.get((model, bits))
    if fp32 is None or quantized is None:
        return []
    text = f"The {TITLES[model]} file at {bits} bits has {quantized:,} bytes, {ratio(fp32, quantized)} FP32 ({fp32:,})."
    return [Insight("size", bits, fp32 / quantized, None, True, text)]


def ratio(fp32: int, quantized: int) -> str:
    """Returns a text such as ``3.2 times smaller than`` or ``1.5 times as large as``."""
    factor = fp32 / quantized
    return f"{factor:.1f} times smaller than" if factor > 1 else f"{1 / factor:.1f} times as large as"


def _sound(study: Study, *models: str) -> list[int]:
    """Returns the bits at which none of the models diverged, because a mean over diverged trainings is meaningless."""
    return [
        bits for bits in study.settings.bits if not any(study.divergences(model, bits) for model in models)
    ]


def _seeds(study: Study, model: str, bits: int, failed: Mapping[int, str]) -> str:
    """Returns a text such as ``2 of 7 seeds``."""
    count = len(study.accuracies(model, bits))
    return f"{len(failed)} of {plural(count, 'seed')}"


def difference_to_fp32(study: Study, model: str, bits: int) -> Difference | None:
    """Returns the accuracy of a model minus that of FP32, or None if one of them is not measured."""
    return _compare(study, (model, bits), ("fp32_longer", FLOAT_BITS))


def difference_of(study: Study, first: str, second: str, bits: int) -> Difference | None:
    """Returns the difference of two quantized models' accuracies, or None if one of them is not measured."""
    return _compare(study, (first, bits), (second, bits))


def _compare(study: Study, first: tuple[str, int], second: tuple[str, int]) -> Difference | None:
    return compare(
        study.accuracies(*first),
        study.accuracies(*second),
        train=study.train_samples,
        test=study.test_samples,
    )
