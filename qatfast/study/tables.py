"""The tables of the study as plain text cells, for the terminal and for the page alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from .experiments import Study
from .names import FLOAT_BITS, TITLES
from .noise import Spread
from .signal_error import SignalError
from .visualize import describe


@dataclass(frozen=True)
class Table:
    """A table.

    Args:
        title: what it shows.
        explanation: a sentence or two that say what its numbers mean.
        header: one text a column; the first column names the rows.
        rows: as many texts each.
        text_columns: so many columns from the left hold words, the others numbers.
    """

    title: str
    explanation: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    text_columns: int = 1


def accuracy_table(study: Study) -> Table:
    """Test accuracy of every model at every bit width."""
    explanation = (
        "Share of test samples classified right, in percent"
        + (", mean ± standard deviation over the seeds" if study.settings.seeds > 1 else ", one seed")
        + ". Every quantized activation has a fixed range, taken from the training samples: the batch plays no part."
    )
    bits = study.settings.bits
    rows = []
    for model, title in TITLES.items():
        whole = study.accuracies(model, FLOAT_BITS)
        if whole:
            rows.append((title, _percent(whole), *[""] * len(bits)))
        cells = [study.accuracies(model, width) for width in bits]
        if any(cells):
            rows.append((title, "", *(_percent(cell) for cell in cells)))
    return Table("Accuracy", explanation, ("model", "float", *(f"{width} bits" for width in bits)), rows)


def batch_table(study: Study) -> Table:
    """The models whose accuracy differs between batch 1 and batch 256, with both."""
    explanation = (
        "The same models with each range taken from the batch itself, as in training: one test sample at a time / 256 "
        "at a time. The ranges of a batch depend on its other samples, so the same sample may be classified "
        "differently. In percent, mean over the seeds; an empty cell: both are the same for every seed."
    )
    bits = study.settings.bits
    rows = []
    for model, title in TITLES.items():
        cells = [_both_batches(study, model, width) for width in bits]
        if any(cells):
            rows.append((title, *cells))
    return Table("Ranges from the batch", explanation, ("model", *(f"{width} bits" for width in bits)), rows)


def size_table(study: Study) -> Table:
    """The bytes of the model files."""
    explanation = (
        "Bytes of the files in models/, and how many times smaller than FP32: the float weights as torch.save writes "
        "them, and for n bits the integers packed without gaps, with a scale and a zero point each; with quantized "
        "activations their ranges too. The names and shapes that each file holds weigh more the smaller the network "
        "is."
    )
    bits = study.settings.bits
    found = {(file.model, file.bits): file.bytes for file in study.sizes}
    fp32 = found.get(("fp32", FLOAT_BITS))
    rows = []
    for model in ("fp32", "ptq_weights", "ptq", "qat_finetuned"):
        cells = [_bytes(found.get((model, width)), fp32) for width in (FLOAT_BITS, *bits)]
        if any(cells):
            rows.append((TITLES[model], *cells))
    return Table("Model size", explanation, ("model", "float", *(f"{width} bits" for width in bits)), rows)


def time_table(study: Study) -> Table:
    """The times of a training step."""
    explanation = (
        "Median time of one training step at 8 bits (forward, backward, Adam), the three networks taking turns in one "
        "run; the ratio to FP32 is the median of the ratios turn by turn, and half of these lie in the range beside "
        "it. Times depend on the machine and on what else it does; ratios less so."
    )
    titles = {"fp32": "FP32", "tutorial": "QAT, plain PyTorch", "qatfast": "QAT, qatfast"}
    rows = [
        (
            entry.network,
            titles[entry.model],
            _milliseconds(entry.seconds),
            f"{entry.ratio:.2f}",
            "" if entry.model == "fp32" else "–".join(f"{ratio:.2f}" for ratio in entry.quartiles),
        )
        for entry in study.step_times
    ]
    return Table(
        "Training time", explanation, ("network", "model", "ms a step", "this / FP32", "middle half"), rows, 2
    )


def layer_table(study: Study) -> Table:
    """The relative quantization error of each layer."""
    explanation = (
        "Length of the error over length of the float values, in percent (first seed): of the weight matrix alone / of "
        "what the layer gives for the test samples, with the errors of the layers before it."
    )
    bits = study.settings.bits
    found = {(e.model, e.layer, e.bits): e for e in study.layer_errors}
    rows = []
    for model in TITLES:
        for layer in dict.fromkeys(error.layer for error in study.layer_errors):
            errors = [found.get((model, layer, width)) for width in bits]
            if any(errors):
                cells = [
                    f"{100 * e.weight_error:.2g} / {100 * e.output_error:.2g}" if e is not None else ""
                    for e in errors
                ]
                rows.append((f"{TITLES[model]}, {layer}", *cells))
    return Table("Quantization error", explanation, ("layer", *(f"{width} bits" for width in bits)), rows)


def signal_table(signals: list[SignalError]) -> Table:
    """The figures of the quantized signal at several bit widths."""
    explanation = (
        "The scale is the distance of two neighbouring levels; no value inside the range is moved by more than half of "
        "it. The zero point is the integer that stands for 0.0."
    )
    columns = [describe(signal) for signal in signals]
    header, *rest = [(name, *(column[name] for column in columns)) for name in columns[0]]
    return Table("A signal", explanation, tuple(header), rest)


def print_table(console: Console, table: Table) -> None:
    """Prints one table to a terminal or a file."""
    shown = RichTable(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, name in enumerate(table.header):
        words = number < table.text_columns
        shown.add_column(name, justify="left" if words else "right", no_wrap=not words)
    for row in table.rows:
        shown.add_row(*row)
    console.print(f"\n{table.title}", style="bold")
    console.print(table.explanation, style="dim", highlight=False)
    console.print(shown)


def _both_batches(study: Study, model: str, bits: int) -> str:
    one, many = (study.accuracies(model, bits, f"accuracy_batch_{size}") for size in (1, 256))
    means = (f"{100 * Spread.of(list(values.values())).mean:.1f}" for values in (one, many) if one != many)
    return " / ".join(means)


def _bytes(size: int | None, fp32: int | None) -> str:
    if size is None:
        return ""
    return f"{size:,}" if fp32 is None or size == fp32 else f"{size:,} ({fp32 / size:.1f}×)"


def _percent(values: dict[int, float]) -> str:
    if not values:
        return ""
    spread = Spread.of(list(values.values()))
    mean = f"{100 * spread.mean:.1f}"
    return mean if spread.std is None else f"{mean} ±\N{NO-BREAK SPACE}{100 * spread.std:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g}" if seconds < 0.1 else f"{1000 * seconds:.0f}"
