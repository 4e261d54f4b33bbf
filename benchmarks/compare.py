"""Compares two runs of the benchmarks and names what has become slower. The exit status is 1 if something has.

python benchmarks/compare.py before.json after.json     copies of .benchmarks/cpu.json, which make bench writes

The median time of qatfast is divided by that of the baseline (clone, nn.Linear) in the same run, so that a slower
machine does not count as slower code. ``pytest-benchmark compare`` only shows two files side by side.
"""

import argparse
import json
import sys
from pathlib import Path

LIMIT = 1.10


def ratios(run: dict) -> dict[str, float]:
    """Returns the time of qatfast in each group, as a multiple of the baseline's."""
    medians = {
        (entry["group"], entry["extra_info"]["provider"]): entry["stats"]["median"]
        for entry in run["benchmarks"]
    }
    baselines = {entry["group"]: entry["extra_info"]["baseline"] for entry in run["benchmarks"]}
    return {
        f"{group}: {provider}": median / medians[group, baselines[group]]
        for (group, provider), median in medians.items()
        if provider.startswith("qatfast")
    }


def slower(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Returns a line per measurement that has become slower by more than a tenth."""
    return [
        f"{name}: {before[name]:.2f}x before, {ratio:.2f}x after ({ratio / before[name] - 1:+.0%})"
        for name, ratio in after.items()
        if name in before and ratio > LIMIT * before[name]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("before", type=Path, metavar="BEFORE.json")
    parser.add_argument("after", type=Path, metavar="AFTER.json")
    args = parser.parse_args()
    before, after = (
        ratios(json.loads(file.read_text(encoding="utf-8"))) for file in (args.before, args.after)
    )
    common = before.keys() & after.keys()
    if not common:
        parser.error("the files have no benchmark in common")
    lines = slower(before, after)
    print("\n".join(lines) or "nothing is slower by more than a tenth")
    print(f"{len(common)} compared, {len(before.keys() ^ after.keys())} in one file only", file=sys.stderr)
    sys.exit(1 if lines else 0)


if __name__ == "__main__":
    main()
