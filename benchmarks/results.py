"""Writes RESULTS.md beside this file: measures everything, or takes what ``qatfast bench --full --json FILE`` measured.

python benchmarks/results.py                 measures, minutes
python benchmarks/results.py a.json b.json   the same tables from these files, of one machine
python benchmarks/results.py --device cuda   on a CUDA device, into RESULTS.cuda.md
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from qatfast.bench import Result, table
from qatfast.bench.command import run
from qatfast.bench.providers import COMPILED, OURS, REFERENCE
from qatfast.bench.record import as_json, from_json
from qatfast.bench.works import OPS

RESULTS = Path(__file__).with_name("RESULTS.md")
MOST_OF_CLONE = 2.5
MOST_OF_LINEAR = 1.10
SIZES = ("4 Ki", "64 Ki", "256 Ki", "1 Mi", "4 Mi")
LAYERS = ("32, 64, 64", "256, 1024, 1024", "512, 4096, 4096")

READING = """Each cell is the ratio to the row that is 1.0, then the time of one call. All providers of a column ran in
one process in turns, in another order each round; a turn is about 2 ms of calls, or one call if that takes longer,
after one call that does not count (not where a call takes 50 ms). Both figures are medians over the rounds, the ratio
taken round by round, so a ratio need not be the quotient of two times to the last digit. Ratios near 1 move by some
percent from run to run; times depend on the machine. On a CUDA device events time each call, whose L2 cache is full of
other data, and a turn is the median of its calls.

- **max error**: the largest difference from the reference, as a share of the largest value, over all columns. Formulas
  differ next to ties, by one step of 255. `qatfast` has to equal the reference in every bit, values and gradients, or
  nothing is timed.
- **forward** runs without a graph, as in evaluation. **forward + backward** adds the gradients: of the input
  (`torch.autograd.grad`), or for the layer of input, weight and bias (`backward()` with fresh `.grad`).
- Sizes of the layer are (batch, in_features, out_features). Inputs are normal numbers.
"""
WHO = """- **clone**, **nn.Linear**: the floor; a copy of the float tensor, the float layer.
- **reference**: `qatfast.reference`, plain PyTorch; **compiled**: under `torch.compile(dynamic=False)`, Inductor.
- **tutorial formula**, **tutorial layer**: min, max, round, clamp as tutorials write them.
- **aten ops**: `torch.aminmax` and `torch.fake_quantize_per_tensor_affine` or `per_channel_affine`,
  `torch.quantize_per_tensor` or `per_channel`; per token and per group as channels of a two-dimensional view.
- **torch.ao**: `FakeQuantize` with `MovingAverageMinMaxObserver`, its fused op
  `torch.fused_moving_avg_obs_fake_quant`, `MinMaxObserver`; `nn.qat.Linear` with the output quantized too, the bias
  not.
- **Brevitas**: `QuantLinear`, weight, bias and output per tensor. **torchao**: `FakeQuantizedLinear`, input per token,
  weight per output channel, output and bias not quantized. These two quantize otherwise, so their error is larger.
"""


def text(record: dict) -> str:
    """RESULTS.md."""
    results = from_json(record)
    lines = [
        "# How fast",
        "",
        "Written by `make bench` (`python benchmarks/results.py`); `qatfast bench` prints a short form.",
        "",
        "## Measured on",
        "",
        *(f"- {name}: {value}" for name, value in record["machine"].items()),
        f"- versions: {', '.join(f'{name} {value}' for name, value in record['versions'].items())}",
        f"- date: {record['date']}",
        f"- command: `{record['command']}`",
        "",
        "## Targets",
        "",
        *targets(results),
        "",
        "## Where another is faster",
        "",
        *faster(results),
        "",
        "## How to read the tables",
        "",
        READING,
        "Who takes part:",
        "",
        WHO,
        *([f"- skipped: {line}" for line in table.skipped(results)] or ["Nobody was skipped."]),
        "",
    ]
    for op in OPS:
        chosen = [result for result in results if result.work.op == op]
        if chosen:
            lines += [f"## {op}", "", *(table.markdown(one) for one in table.tables(chosen))]
    return "\n".join(lines).rstrip() + "\n"


def targets(results: list[Result]) -> list[str]:
    """What was aimed at, what was measured, whether it is met."""
    lines = ["| target | measured (quartiles) | met |", "| --- | ---: | --- |"]

    def add(target: str, result: Result, limit: float) -> None:
        ours = result.timing(OURS)
        low, high = (table.ratio(value) for value in ours.quartiles)
        met = "yes" if ours.ratio <= limit else "**no**"
        lines.append(f"| {target} | {table.ratio(ours.ratio)} ({low} to {high}) | {met} |")

    for result in results:
        work = result.work
        if (work.op, work.backward, work.table) == ("fake_quantize", False, "forward, per tensor"):
            if work.column not in SIZES:
                continue
            add(f"fake_quantize {work.column}: at most {MOST_OF_CLONE}x clone", result, MOST_OF_CLONE)
            compiled = result.timing(COMPILED)
            if compiled is None:
                lines.append(
                    f"| fake_quantize {work.column}: faster than the compiled reference | not measured | – |"
                )
                continue
            times = result.timing(OURS).ratio / compiled.ratio
            lines.append(
                f"| fake_quantize {work.column}: faster than the compiled reference | {times:.2f} of its time | "
                f"{'yes' if times < 1 else '**no**'} |"
            )
        elif work.op == "qat_linear" and work.backward and work.column in LAYERS:
            add(
                f"QATLinear step ({work.column}): at most {MOST_OF_LINEAR:.2f}x nn.Linear",
                result,
                MOST_OF_LINEAR,
            )
    return lines


def faster(results: list[Result]) -> list[str]:
    """A line for each provider that beats qatfast at something; the floor is not one of them."""
    lines = []
    for result in results:
        ours = result.timing(OURS)
        for other in result.timings:
            if other.provider not in (OURS, REFERENCE, result.work.baseline) and other.ratio < ours.ratio:
                lines.append(
                    f"- {result.work}: {other.provider} {table.ratio(other.ratio)}, qatfast {table.ratio(ours.ratio)}"
                )
    return lines or ["Nowhere in these tables (the floor, clone or nn.Linear, apart)."]


def joined(records: list[dict]) -> dict:
    """The results of several files as one."""
    first = records[0]
    for other in records[1:]:
        for name in ("machine", "versions"):
            if other[name] != first[name]:
                sys.exit(f"results.py: the files differ in {name}: {first[name]} and {other[name]}")
    dates = sorted({record["date"] for record in records})
    return {
        **first,
        "date": " to ".join(dict.fromkeys((dates[0], dates[-1]))),
        "results": [entry for record in records for entry in record["results"]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.json")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--out", type=Path, help="default: RESULTS.md, or RESULTS.cuda.md, beside this file")
    args = parser.parse_args()
    cuda = args.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here")
    out = args.out or (RESULTS.with_suffix(".cuda.md") if cuda else RESULTS)
    if args.files:
        record = joined([json.loads(file.read_text(encoding="utf-8")) for file in args.files])
        record["command"] = "qatfast bench --full --op OP --json OP.json; python benchmarks/results.py *.json"
    else:
        record = as_json(run(OPS, device=args.device))
        record["command"] = "python benchmarks/results.py" + (" --device cuda" if cuda else "")
    out.write_text(text(record), encoding="utf-8")
    print(f"wrote {out.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
