"""Writes RESULTS.md and two pictures beside this file, from JSON files of one machine and device.

python benchmarks/results.py a.json b.json   files that make bench or qatfast bench --full --json has written
"""

import argparse
import json
import sys
from pathlib import Path

from qatfast.bench import plots
from qatfast.bench.results import (
    ABSENT,
    Result,
    from_json,
    markdown,
    markdown_lines,
    ratio,
    skipped,
    tables,
    verdicts,
)
from qatfast.bench.workloads import BOUNDS, ONE_THREAD, OURS, REFERENCE, SUBJECTS
from qatfast.study.plots import svg

HERE = Path(__file__).parent
PICTURES = {"fake_quantize": plots.fake_quantize_over_size, "qat_linear": plots.layer_steps}

READING = """Each cell is the ratio to the row that is 1.0, then the time of one call. All providers of a column ran in
one process in turns, in another order each round. A turn is about 2 ms of calls, or one call if that takes longer,
after one call that is not timed unless it takes 50 ms or more. Both figures are medians over the rounds. The ratio is
taken round by round, so it need not be the quotient of the two times to the last digit. Ratios near 1 vary by a few
percent from run to run; times depend on the machine. On a CUDA device each call is timed by events after the L2 cache
has been filled with other data, and a turn is the median of its calls.

- **max error**: the largest difference from the reference, as a share of the largest value, over all columns. Formulas
  differ next to ties, by one step of 255. `qatfast` has to equal the reference in every bit of values and gradients;
  if it does not, nothing is timed.
- **allocated**, **kept**: bytes of one call, at the largest size that all providers run. Allocated is all that was
  requested from torch's allocator, including what was freed within the call. Kept is what autograd saves for the
  backward, each storage once, without parameters. The input of a layer counts, as it is an intermediate result of a
  larger network.
- **share of the bandwidth**: an operator has to read its input once and write its result once. The row **triad** is
  `a = b + 2 c` in place on float32 tensors that move as many bytes, in turns with the other providers; the share is
  its time over that of qatfast. Near 100 % the operator is bound by memory, which no other code could change. Far
  below, it is bound by arithmetic or by the cost of a call, or, if the result is larger than what the allocator keeps,
  by the system, which maps fresh memory page by page, for the clone too. The large layers are bound by their product:
  **int8 GEMM alone** is `torch._int_mm`.
- **forward**, **inference** run without a graph, as in evaluation. **forward + backward**, **training step** add the
  gradients: of the input (`torch.autograd.grad`), or for the layer of input, weight and bias (`backward()` with fresh
  `.grad`). **backward** is that part alone, including autograd's own time of about 15 µs, which the tutorial formula
  shows, because its backward computes nothing. The clone in that table is a plain copy, as in the forward.
- Sizes of the layer are (batch, in_features, out_features). Inputs are normal numbers, images channels-last.
- **1 thread**: measured while torch has one thread.
"""
WHO = """- **clone**, **nn.Linear**: the baselines, a copy of the float tensor and the float layer.
- **reference**: `qatfast.reference`, plain PyTorch; **compiled**: under `torch.compile(dynamic=False)`, Inductor.
- **tutorial formula**, **tutorial layer**: min, max, round, clamp as tutorials write them.
- **aten ops**: `torch.aminmax` and `torch.fake_quantize_per_tensor_affine` or `per_channel_affine`,
  `torch.quantize_per_tensor` or `per_channel`; per token and per group as channels of a two-dimensional view.
- **torch.ao**: `FakeQuantize` with `MovingAverageMinMaxObserver`, its fused op
  `torch.fused_moving_avg_obs_fake_quant`, `MinMaxObserver`; `nn.qat.Linear` with the output (other configs than
  tutorial: the input) quantized too, the bias not. **aten learnable op**:
  `torch._fake_quantize_learnable_per_tensor_affine` or `per_channel_affine`.
- **Brevitas**: `QuantLinear`. Tutorial config: weight, bias and output per tensor; other configs: input per tensor,
  weight per output channel. Both have 8 bits in the learned config too, where qatfast has 4.
- int8 config only: **torchao** `FakeQuantizedLinear` (input per token), **NNCF** `nncf.quantize`, **ModelOpt**
  `INT8_DEFAULT_CFG` (needs `pip install nvidia-modelopt requests huggingface_hub`: it does not name the last two), all
  with the with the weight per output channel. The ranges
- **cached weights**: inside `qatfast.cached_weights`.
"""


def text(record: dict, command: str) -> str:
    """Returns the content of RESULTS.md."""
    results = sorted(from_json(record), key=lambda result: SUBJECTS.index(result.workload.op))
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
        *target_lines(results),
        "",
        "## Where another is faster",
        "",
        *faster_lines(results),
        "",
        "## One thread",
        "",
        *one_thread_lines(results),
        "",
        "## How to read the tables",
        "",
        READING,
        "The providers:",
        "",
        WHO,
        *([f"- skipped: {line}" for line in skipped(results)] or ["No provider was skipped."]),
        "",
    ]
    for subject in SUBJECTS:
        chosen = [result for result in results if result.workload.op == subject]
        if chosen:
            lines += [f"## {subject}", "", *(markdown(table) for table in tables(chosen))]
    return "\n".join(lines).rstrip() + "\n"


def target_lines(results: list[Result]) -> list[str]:
    """Returns a table of the targets, what was measured, and whether they are met."""
    words = {True: "yes", False: "**no**", None: ABSENT}
    rows = [(verdict.target, verdict.measured, words[verdict.met]) for verdict in verdicts(results)]
    return markdown_lines(("target", "measured (quartiles)", "met"), rows)


def faster_lines(results: list[Result]) -> list[str]:
    """Returns a line per provider that is faster than qatfast at a workload, baselines and bounds excepted."""
    lines = []
    for result in results:
        ours = result.ratio(OURS).median
        not_compared = (REFERENCE, result.workload.baseline, *BOUNDS)
        for provider in (timing.provider for timing in result.timings):
            if provider.startswith(OURS) or provider.removesuffix(ONE_THREAD) in not_compared:
                continue
            if (theirs := result.ratio(provider).median) < ours:
                lines.append(f"- {result.workload}: {provider} {ratio(theirs)}, qatfast {ratio(ours)}")
    return lines or ["Nowhere in these tables (the baselines, clone and nn.Linear, are not counted)."]


def one_thread_lines(results: list[Result]) -> list[str]:
    """Returns a table of the time on one thread as a multiple of that on all threads."""
    rows = []
    for result in results:
        if result.workload.one_thread:
            ratios = [result.ratio(name + ONE_THREAD, name) for name in (result.workload.baseline, OURS)]
            rows.append((str(result.workload), *(ratio(part.median) if part else ABSENT for part in ratios)))
    return markdown_lines(("time on one thread, on all = 1.0", "the baseline", "qatfast"), rows)


def joined(records: list[dict]) -> dict:
    """Returns the results of several files as one record."""
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
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder of the results (default: that of this file)"
    )
    parser.add_argument(
        "--command", default="make bench", help="the command that measured, as RESULTS.md names it"
    )
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
