"""``qatfast bench``: the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from .. import kernels
from ..checks import FLOAT_DTYPES, dtype_name
from .results import Result, as_json, show, skipped, tables
from .runner import WrongResult, measure, prepare
from .workloads import SHORT_SUBJECTS, SUBJECTS, workloads_of

EXAMPLES = """examples:
  qatfast bench                             fake_quantize and the linear layer at a few sizes
  qatfast bench --op quantize dequantize    other operators
  qatfast bench --full --json bench.json    every size and granularity, minutes

Each cell is the ratio to the baseline, with the time of a call in brackets. The bytes that a call allocates and keeps
for its backward are those of one size. The maximum error is the largest difference from the reference in plain
PyTorch, as a share of the largest value. Formulas differ next to ties.
"""
DTYPES = {dtype_name(dtype): dtype for dtype in FLOAT_DTYPES}
SHORT_SECONDS = 1.0
FULL_SECONDS = 1.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``qatfast bench`` to its parser."""
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--op",
        nargs="+",
        choices=SUBJECTS,
        metavar="OP",
        help=f"{', '.join(SUBJECTS)} (default: {' '.join(SHORT_SUBJECTS)})",
    )
    parser.add_argument(
        "--full", action="store_true", help="all sizes and granularities; without --op, of all operators"
    )
    parser.add_argument("--device", type=_device, default="cpu", help="cpu, cuda, cuda:1 (default: cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: float32)",
    )
    parser.add_argument("--json", type=_file, metavar="FILE", help="also write all figures to FILE")


def main(args: argparse.Namespace) -> int:
    """Measures and prints the tables. Progress goes to stderr.

    Args:
        args: The arguments that ``add_arguments`` defines.

    Returns:
        The exit code: 0 if all is done, 1 if a result was wrong.
    """
    if kernels.reason():
        print(f"Without compiled kernels: {kernels.reason()}", file=sys.stderr)
    ops = dict.fromkeys(args.op or (SUBJECTS if args.full else SHORT_SUBJECTS))
    try:
        results = run(ops, short=not args.full, dtype=DTYPES[args.dtype], device=args.device)
    except WrongResult as error:
        print(f"qatfast bench: {error}", file=sys.stderr)
        return 1
    print()
    for table in tables(results):
        show(table)
    for line in skipped(results):
        print(f"skipped: {line}")
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(results), indent=1) + "\n", encoding="utf-8")
    return 0


def run(
    ops: Iterable[str],
    *,
    short: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Result]:
    """Measures all workloads of these operators, and names each on stderr when it begins."""
    results = []
    todo = [workload for op in ops for workload in workloads_of(op, short=short, dtype=dtype, device=device)]
    for index, workload in enumerate(todo, 1):
        print(f"[{index}/{len(todo)}] {workload}", file=sys.stderr, flush=True)
        results.append(measure(prepare(workload), seconds=SHORT_SECONDS if short else FULL_SECONDS))
    return results


def _device(text: str) -> str:
    allowed = ["cpu"]
    if torch.cuda.is_available():
        allowed += ["cuda", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if text not in allowed:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(allowed)} here, got '{text}'")
    return text


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"expected a file in an existing folder, got '{text}'")
    return path
