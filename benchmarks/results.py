"""Writes RESULTS.md and two pictures beside this file from what was measured.

python benchmarks/results.py a.json b.json   of one machine and device; from make bench, or qatfast bench --full --json
"""

import argparse
import json
import sys
from pathlib import Path

from qatfast.bench import Result, plots, table, targets
from qatfast.bench.names import BOUNDS, ONE_THREAD, OURS, REFERENCE
from qatfast.bench.record import from_json
from qatfast.bench.works import SUBJECTS
from qatfast.study.plots import svg

HERE = Path(__file__).parent
PICTURES = {"fake_quantize": plots.fake_quantize_over_size, "qat_linear": plots.layer_steps}

READING = """Each cell is the ratio to the row that is 1.0, then the time of one call. All providers of a column ran in
one process in turns, in another order each round; a turn is about 2 ms of calls, or one call if that takes longer,
after one call that does not count (not where a call takes 50 ms). Both figures are medians over the rounds, the ratio
taken round by round, so a ratio need not be the quotient of two times to the last digit. Ratios near 1 move by some
percent from run to run; times depend on the machine. On a CUDA device events time each call, whose L2 cache is full of
other data, and a turn is the median of its calls.

- **max error**: the largest difference from the reference, as a share of the largest value, over all columns. Formulas
  differ next to ties, by one step of 255. `qatfast` has to equal the reference in every bit, values and gradients, or
  nothing is timed.
- **allocated**, **kept**: bytes of one call, of the largest size that all take part in. Allocated is all that was asked
  of torch's allocator, what was given back within the call too. Kept is what autograd saves for the backward, every
  storage once, parameters apart: for the layer its input counts too, as it is an intermediate result of a larger
  network.
- **share of the bandwidth**: an operator has to read its input once and write its result once. The row **triad** is
  `a = b + 2 c`, all float32 in memory that is there, moving as many bytes, in turns with the rest; the share is its
  time over that of qatfast. Near 100 % the operator is bound by memory, which no other code could change; far below, by
  arithmetic or by its call; and where the result is larger than what the allocator keeps, by the system, which hands
  out fresh memory page by page, to the clone as well. The large layers are bound by their product: **integer product
  alone** is `torch._int_mm`.
- **forward**, **inference** run without a graph, as in evaluation. **forward + backward**, **training step** add the
  gradients: of the input (`torch.autograd.grad`), or for the layer of input, weight and bias (`backward()` with fresh
  `.grad`). **backward** is that part alone, autograd's own time included: some 15 µs, as the tutorial formula shows,
  whose backward computes nothing. Next to it the plain clone stays what it is in the forward.
- Sizes of the layer are (batch, in_features, out_features). Inputs are normal numbers, images channels-last.
- **1 thread**: the same while torch has one thread.
"""
WHO = """- **clone**, **nn.Linear**: the floor; a copy of the float tensor, the float layer.
- **reference**: `qatfast.reference`, plain PyTorch; **compiled**: under `torch.compile(dynamic=False)`, Inductor.
- **tutorial formula**, **tutorial layer**: min, max, round, clamp as tutorials write them.
- **aten ops**: `torch.aminmax` and `torch.fake_quantize_per_tensor_affine` or `per_channel_affine`,
  `torch.quantize_per_tensor` or `per_channel`; per token and per group as channels of a two-dimensional view.
- **torch.ao**: `FakeQuantize` with `MovingAverageMinMaxObserver`, its fused op
  `torch.fused_moving_avg_obs_fake_quant`, `MinMaxObserver`; `nn.qat.Linear` with the output (int8 config: the input)
  quantized too, the bias not.
- **Brevitas**: `QuantLinear`. Tutorial config: weight, bias and output per tensor; int8 config: input per tensor,
  weight per output channel.
- int8 config only: **torchao** `FakeQuantizedLinear` (input per token), **NNCF** `nncf.quantize`, **ModelOpt**
  `INT8_DEFAULT_CFG` (needs `pip install nvidia-modelopt requests huggingface_hub`: it does not name the last two), all
  with the weight per output channel. The ranges of Brevitas and NNCF are learnt, those of ModelOpt stay, so
  their errors are larger.
- **cached weights**: inside `qatfast.cached_weights`.
"""


def text(record: dict, command: str) -> str:
    """RESULTS.md."""
    results = sorted(from_json(record), key=lambda result: SUBJECTS.index(result.work.op))
    lines = [
        "# How fast",
        "",
        "Written by `make bench`; `qatfast bench` prints a short form.",
        "",
        "## Measured on",
        "",
        *(f"- {name}: {value}" for name, value in record["machine"].items()),
        f"- versions: {', '.join(f'{name} {value}' for name, value in record['versions'].items())}",
        f"- date: {record['date']}",
        f"- command: `{command}`",
        "",
        "## Targets",
        "",
        *verdicts(results),
        "",
        "## Where another is faster",
        "",
        *faster(results),
        "",
        "## One thread",
        "",
        *one_thread(results),
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
    for subject in SUBJECTS:
        chosen = [result for result in results if result.work.op == subject]
        if chosen:
            lines += [f"## {subject}", "", *(table.markdown(one) for one in table.tables(chosen))]
    return "\n".join(lines).rstrip() + "\n"


def verdicts(results: list[Result]) -> list[str]:
    """What was aimed at, what was measured, whether it is met."""
    words = {True: "yes", False: "**no**", None: table.ABSENT}
    rows = [(one.target, one.measured, words[one.met]) for one in targets.verdicts(results)]
    return table.rows(("target", "measured (quartiles)", "met"), rows)


def faster(results: list[Result]) -> list[str]:
    """A line for each provider that beats qatfast at something; the floor is not one of them."""
    lines = []
    for result in results:
        ours = result.ratio(OURS).median
        for other in (timing.provider for timing in result.timings):
            aside = (REFERENCE, result.work.baseline, *BOUNDS)
            if other.startswith(OURS) or other.removesuffix(ONE_THREAD) in aside:
                continue
            if (theirs := result.ratio(other).median) < ours:
                lines.append(f"- {result.work}: {other} {table.ratio(theirs)}, qatfast {table.ratio(ours)}")
    return lines or ["Nowhere in these tables (the floor, clone or nn.Linear, apart)."]


def one_thread(results: list[Result]) -> list[str]:
    """How many times as long a call takes on one thread as on all."""
    rows = [
        (str(result.work), *(table.ratio(part.median) if part else table.ABSENT for part in parts))
        for result in results
        if result.work.threads
        for parts in [[result.ratio(name + ONE_THREAD, name) for name in (result.work.baseline, OURS)]]
    ]
    return table.rows(("time on one thread, on all = 1.0", "the baseline", "qatfast"), rows)


def joined(records: list[dict]) -> dict:
    """The results of several files as one."""
    first = records[0]
    for other in records[1:]:
        for name in ("machine", "versions", "device"):
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
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json")
    parser.add_argument("--out", type=Path, default=HERE, help="the folder (default: that of this file)")
    parser.add_argument("--command", default="make bench", help="what measured, for the record")
    args = parser.parse_args()
    files = [json.loads(file.read_text(encoding="utf-8")) for file in args.files]
    record = joined([file.get("qatfast", file) for file in files])
    cuda = "" if record["device"] == "cpu" else ".cuda"
    written = {f"RESULTS{cuda}.md": text(record, args.command)}
    results = from_json(record)
    for name, draw in PICTURES.items():
        written[f"{name}{cuda}.svg"] = svg(draw(results))
    for name, content in written.items():
        (args.out / name).write_text(content, encoding="utf-8")
        print(f"wrote {name}", file=sys.stderr)


if __name__ == "__main__":
    main()
