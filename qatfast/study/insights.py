"""Sentences that the numbers of a study support; a difference within noise is called that."""

from __future__ import annotations

from dataclasses import dataclass

from .experiments import Study
from .names import FLOAT_BITS, TITLES
from .noise import Difference, Spread, compare
from .timing import StepTime

QUANTIZED = [model for model in TITLES if not model.startswith("fp32")]


@dataclass(frozen=True)
class Insight:
    """One finding.

    Args:
        kind: ``threshold``, ``baseline``, ``longer``, ``ptq_drop``, ``qat_advantage``, ``recovery``, ``scores``,
            ``batch`` or ``size``.
        bits: what it is about; 32 for all bit widths and for the float model.
        value: the figure it rests on: a difference of accuracies as a share, or a ratio; None where there is none.
        margin: half the width of its 95 % interval, where it has one.
        clear: whether the figure is more than chance.
        text: the sentence.
    """

    kind: str
    bits: int
    value: float | None
    margin: float | None
    clear: bool
    text: str


def find_insights(study: Study) -> list[Insight]:
    """What the study shows, from the accuracies and file sizes that are there; nothing about those that are not.

    Args:
        study: complete or interrupted.

    Returns:
        The findings, from the baseline down the bit widths.
    """
    fp32 = study.accuracies("fp32", FLOAT_BITS)
    if not fp32:
        return []
    insights = _threshold(study)
    insights.append(_baseline(study, Spread.of(list(fp32.values()))))
    insights += _longer(study)
    for bits in study.settings.bits:
        insights += _ptq_drop(study, bits, "ptq_weights")
        insights += _ptq_drop(study, bits, "ptq")
        insights += _qat_advantage(study, bits, "qat_finetuned", "ptq")
        insights += _scores(study, bits)
        insights += _qat_advantage(study, bits, "qat_finetuned_float_scores", "ptq_float_scores")
        insights += _batch(study, bits)
        insights += _size(study, bits)
    return insights


def time_insights(times: list[StepTime]) -> list[str]:
    """One sentence a network; where 1 is among the middle half of the ratios, that there is no clear difference."""
    by_network: dict[str, dict[str, StepTime]] = {}
    for entry in times:
        by_network.setdefault(entry.network, {})[entry.model] = entry
    return [
        f"{network}: a QAT step with qatfast takes {_times(models['qatfast'])} an FP32 step; "
        f"the tutorials' fake quantization in plain PyTorch takes {_times(models['tutorial'])}."
        for network, models in by_network.items()
    ]


def _times(entry: StepTime) -> str:
    first, third = entry.quartiles
    clear = first > 1 or third < 1
    return f"{entry.ratio:.2f} times" + (
        "" if clear else " (not clearly different: the turns scatter around 1)"
    )


def _threshold(study: Study) -> list[Insight]:
    """The highest bit width at which each model clearly loses against FP32."""
    losing: dict[str, int] = {}
    lossless = []
    for model in QUANTIZED:
        drops = {bits: _compare(study, ("fp32", FLOAT_BITS), (model, bits)) for bits in study.settings.bits}
        clear = [bits for bits, drop in drops.items() if drop is not None and drop.clear and drop.mean > 0]
        if clear:
            losing[model] = max(clear)
        elif any(drop is not None for drop in drops.values()):
            lossless.append(TITLES[model])
    parts = []
    if losing:
        listing = "; ".join(f"{TITLES[model]}: {bits}" for model, bits in losing.items())
        parts.append(f"Highest number of bits with a clear loss of accuracy against FP32: {listing}.")
    if lossless:
        parts.append(f"No clear loss at any number of bits tried: {'; '.join(lossless)}.")
    return [Insight("threshold", FLOAT_BITS, None, None, True, " ".join(parts))] if parts else []


def _baseline(study: Study, accuracy: Spread) -> Insight:
    seeds = len(accuracy.values)
    spread = (
        f"mean of {seeds} seeds, standard deviation {100 * accuracy.std:.1f} points"
        if accuracy.std is not None
        else "one seed, so how much chance there is in it is not measured"
    )
    text = (
        f"FP32 classifies {100 * accuracy.mean:.1f}% of the test samples right ({spread}). "
        f"One of the {study.test_samples} test samples is {100 / study.test_samples:.2f} points."
    )
    return Insight("baseline", FLOAT_BITS, accuracy.mean, None, True, text)


def _longer(study: Study) -> list[Insight]:
    difference = _compare(study, ("fp32_longer", FLOAT_BITS), ("fp32", FLOAT_BITS))
    if difference is None:
        return []
    epochs = study.settings.epochs
    more = f"FP32, trained for {epochs} more epoch{'s' if epochs > 1 else ''}, as fine-tuning does,"
    if difference.clear:
        text = f"{more} {'gains' if difference.mean > 0 else 'loses'} {_points(difference)} points."
    else:
        text = f"{more} is within noise of FP32 ({_signed(difference)} points)."
    return [_insight("longer", FLOAT_BITS, difference, text)]


def _ptq_drop(study: Study, bits: int, model: str) -> list[Insight]:
    difference = _compare(study, ("fp32", FLOAT_BITS), (model, bits))
    if difference is None:
        return []
    if difference.clear:
        what = f"{'loses' if difference.mean > 0 else 'gains'} {_points(difference)} points against FP32."
    else:
        what = f"is within noise of FP32 ({_signed(difference, -1)} points)."
    return [_insight("ptq_drop", bits, difference, f"{bits} bits: {TITLES[model]}, {what}")]


def _qat_advantage(study: Study, bits: int, qat: str, ptq: str) -> list[Insight]:
    difference = _compare(study, (qat, bits), (ptq, bits))
    if difference is None:
        return []
    if not difference.clear:
        text = f"{bits} bits: {TITLES[qat]}, is within noise of {TITLES[ptq]} ({_signed(difference)} points)."
        return [_insight("qat_advantage", bits, difference, text)]
    word = "better" if difference.mean > 0 else "worse"
    text = f"{bits} bits: {TITLES[qat]}, is {_points(difference)} points {word} than {TITLES[ptq]}."
    return [_insight("qat_advantage", bits, difference, text), *_recovery(study, bits, qat, ptq, difference)]


def _recovery(study: Study, bits: int, qat: str, ptq: str, gain: Difference) -> list[Insight]:
    """Only for a clear drop and a clear gain: a share of a drop within noise would mean nothing."""
    drop = _compare(study, ("fp32", FLOAT_BITS), (ptq, bits))
    if drop is None or not drop.clear or drop.mean <= 0 or gain.mean <= 0:
        return []
    share = gain.mean / drop.mean
    back = f"{share:.0%}" if share < 1 else "all"
    text = f"{bits} bits: {TITLES[qat]}, wins back {back} of what {TITLES[ptq]}, loses against FP32."
    return [Insight("recovery", bits, share, None, True, text)]


def _scores(study: Study, bits: int) -> list[Insight]:
    difference = _compare(study, ("qat_finetuned_float_scores", bits), ("qat_finetuned", bits))
    if difference is None or not difference.clear:
        return []
    classes = len(study.samples.class_names)
    why = f"; {2**bits} levels cannot tell the scores of {classes} classes apart" if 2**bits < classes else ""
    verb = "gains" if difference.mean > 0 else "loses"
    gain = f"{verb} {_points(difference)} points"
    text = f"{bits} bits: leaving the class scores in float {gain} for fine-tuned QAT{why}."
    return [_insight("scores", bits, difference, text)]


def _batch(study: Study, bits: int) -> list[Insight]:
    one = study.accuracies("qat_finetuned", bits, "accuracy_batch_1")
    many = study.accuracies("qat_finetuned", bits, "accuracy_batch_256")
    difference = compare(one, many, train=study.train_samples, test=study.test_samples)
    if difference is None or not difference.clear:
        return []
    better, worse = ("1", "256") if difference.mean > 0 else ("256", "1")
    text = (
        f"{bits} bits: with ranges taken from the batch, {TITLES['qat_finetuned']}, is {_points(difference)} points "
        f"better at batch {better} than at batch {worse}; such an accuracy says little without its batch size."
    )
    return [_insight("batch", bits, difference, text)]


def _size(study: Study, bits: int) -> list[Insight]:
    files = {(file.model, file.bits): file.bytes for file in study.sizes}
    fp32, quantized = files.get(("fp32", FLOAT_BITS)), files.get(("ptq", bits))
    if fp32 is None or quantized is None:
        return []
    ratio = fp32 / quantized
    compared = f"{ratio:.1f} times smaller than" if ratio > 1 else f"{1 / ratio:.1f} times as large as"
    text = f"{bits} bits: the model file has {quantized:,} bytes, {compared} the FP32 file of {fp32:,} bytes."
    return [Insight("size", bits, ratio, None, True, text)]


def _compare(study: Study, first: tuple[str, int], second: tuple[str, int]) -> Difference | None:
    return compare(
        study.accuracies(*first),
        study.accuracies(*second),
        train=study.train_samples,
        test=study.test_samples,
    )


def _insight(kind: str, bits: int, difference: Difference, text: str) -> Insight:
    return Insight(kind, bits, difference.mean, difference.margin, difference.clear, text)


def _points(difference: Difference) -> str:
    """``2.3 ± 1.8``: the size of a difference, its direction is in the words around it."""
    return f"{100 * abs(difference.mean):.1f} ±\N{NO-BREAK SPACE}{100 * difference.margin:.1f}"


def _signed(difference: Difference, sign: int = 1) -> str:
    """``+0.2 ± 0.6``."""
    mean = round(100 * sign * difference.mean, 1) + 0.0  # -0.0 becomes 0.0
    return f"{mean:+.1f} ±\N{NO-BREAK SPACE}{100 * difference.margin:.1f}"
