"""The command line ``qatfast`` with the commands info, visualize, compare and bench."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from qatfast import __version__

INTERRUPTED = 130
BAD_DATA = 1
"""The data or a file cannot be used, or a package is not installed."""
BAD_ARGUMENT = 2

BUILT_IN = ("synthetic", "digits", "mnist1d")
"""Data that ``compare`` has without a file."""
_DATA = f"{', '.join(BUILT_IN)}, or a .csv or .npz file"

DESCRIPTION = (
    "Fake quantization for PyTorch: information about the installation, examples, comparisons and benchmarks."
)
EXAMPLES = """examples:
  qatfast info                     versions, kernels, threads
  qatfast visualize --bits 4       what 4 bits do to a signal
  qatfast compare                  FP32, PTQ and QAT on handwritten digits; writes report/index.html
  qatfast bench                    a short table of speeds
"""
VISUALIZE_EXAMPLES = """examples:
  qatfast visualize                     8 bits; writes quantization_8bit.png
  qatfast visualize --bits 8 4 2        a picture per bit width
  qatfast visualize --out pictures      into the folder pictures

exit codes: 0 done, 1 a picture cannot be written or a package is missing (pip install matplotlib scikit-learn rich),
2 bad argument, 130 interrupted
"""
COMPARE_EXAMPLES = """examples:
  qatfast compare                                       handwritten digits, 8 4 3 2 bits, 7 seeds
  qatfast compare --bits 4 --epochs 2 --seeds 1         a short run
  qatfast compare --data mnist1d --seeds 5              signals that are hard to classify (pip install mnist1d)
  qatfast compare --data mnist1d --network cnn          convolutions with BatchNorm instead of linear layers
  qatfast compare --all                                 also PTQ min-max, QAT as in tutorials, QAT moving average
  qatfast compare --data iris.csv --target species      your table: a header row, numbers, one label column;
                                                        commas, semicolons or tabs between the cells
  qatfast compare --data arrays.npz --target labels     your arrays: all arrays but the labels are features

A report in OUT is replaced when the new report is complete. A folder with other files is never changed.
Ctrl-C leaves a partial report, marked as such, in OUT, or in OUT-partial if OUT has a complete report.
If the output is not a terminal, progress is one line per training.
exit codes: 0 done, 1 bad data or a missing package (pip install matplotlib scikit-learn rich), 2 bad argument,
130 interrupted
"""


class _Flat(argparse.Action):
    """Concatenates the lists that the values of an option are parsed into."""

    def __call__(self, _parser: Any, namespace: argparse.Namespace, values: Any, _option: Any = None) -> None:
        setattr(namespace, self.dest, [value for each in values for value in each])


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(BAD_ARGUMENT, f"{self.prog}: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        argv: Arguments without the program's name. None means ``sys.argv[1:]``.

    Returns:
        The exit code: 0 done, 1 bad data or a missing package, 2 bad argument, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if sys.stdout is None:  # closed by the caller
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an arrow must not be an error if the output is ASCII
    try:
        parser = _parser(arguments)
        options = parser.parse_args(arguments)
        return options.run(options)
    except KeyboardInterrupt:
        print("qatfast: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader closed the pipe; Python's flush at exit must not fail because of that.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BAD_DATA


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="qatfast",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qatfast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(name: str, help: str, run: Callable[[argparse.Namespace], int], epilog: str = "") -> _Parser:
        command = commands.add_parser(
            name,
            help=help,
            description=help[0].upper() + help[1:] + ".",
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        command.set_defaults(run=run)
        return command

    add("info", "print versions, whether the kernels are loaded, threads and devices", _info)
    _visualize_arguments(
        add("visualize", "show what quantization does to a signal", _visualize, VISUALIZE_EXAMPLES)
    )
    _compare_arguments(
        add("compare", "train in FP32, with PTQ and with QAT, and compare", _compare, COMPARE_EXAMPLES)
    )
    bench = add("bench", "measure the speed of the operators", _bench)
    if "bench" in arguments[:1]:
        from qatfast.bench import add_arguments

        add_arguments(bench)
    return parser


def _visualize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--bits", type=_bits, nargs="+", action=_Flat, default=[8], help="bit widths, 2 to 16 (default: 8)"
    )
    parser.add_argument("--seed", type=_seed, default=42, help="seed of the noise (default: 42)")
    parser.add_argument(
        "--out", type=Path, default=Path(), help="folder of the pictures (default: the current one)"
    )


def _compare_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        default="digits",
        metavar="DATA",
        help=f"{_DATA} (default: digits)",
    )
    parser.add_argument(
        "--target", metavar="COLUMN", help="the file's column (.csv) or array (.npz) with the labels"
    )
    parser.add_argument(
        "--bits",
        type=_bits,
        nargs="+",
        action=_Flat,
        default=[8, 4, 3, 2],
        help="bit widths, 2 to 16: 8 4 or 8,4 (default: 8 4 3 2)",
    )
    parser.add_argument(
        "--epochs",
        type=_count,
        default=20,
        help="epochs of FP32, followed by as many of FP32 or QAT (default: 20)",
    )
    parser.add_argument(
        "--seeds",
        type=_count,
        default=7,
        help="number of repetitions; a single seed shows no significant difference (default: 7)",
    )
    parser.add_argument("--seed", type=_seed, default=42, help="the first seed (default: 42)")
    parser.add_argument(
        "--network",
        choices=["mlp", "cnn"],
        default="mlp",
        help="three linear layers, or two convolutions with BatchNorm, for digits and mnist1d (default: mlp)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps (default: cpu)")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder of the report (default: report)"
    )
    parser.add_argument(
        "--all",
        action="store_true",
        help="train all models: also PTQ min-max, QAT as in tutorials and QAT with a moving average",
    )
    parser.add_argument("--verbose", action="store_true", help="print every table and the code too")


def _info(_options: argparse.Namespace) -> int:
    from qatfast import kernels

    facts = kernels.info()
    width = max(map(len, facts)) + 2
    for name, value in facts.items():
        print(f"{name + ':':<{width}}{value}")
    return 0


def _visualize(options: argparse.Namespace) -> int:
    def run() -> int:
        from qatfast.study import visualize_quantization

        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            return _say("visualize", f"--out: {options.out}: is a file; name a folder", BAD_ARGUMENT)
        for bits in dict.fromkeys(options.bits):
            path = options.out / f"quantization_{bits}bit.png"
            visualize_quantization(bits, seed=options.seed, path=path)
            print(f"{'picture':<16}{path}\n")
        return 0

    return _one_line_errors("visualize", run)


def _compare(options: argparse.Namespace) -> int:
    wrong = _wrong_data_arguments(options) or _wrong_device(options.device) or _wrong_seeds(options)
    if wrong:
        return _say("compare", wrong, BAD_ARGUMENT)

    def run() -> int:
        missing = _missing_target(options)
        if missing:
            return _say("compare", missing, BAD_ARGUMENT)
        from qatfast.study.command import run_compare
        from qatfast.study.experiments import Settings

        settings = Settings(
            data=options.data,
            target=options.target,
            bits=tuple(sorted(set(options.bits), reverse=True)),
            epochs=options.epochs,
            seeds=options.seeds,
            seed=options.seed,
            device=options.device,
            network=options.network,
            every_model=options.all,
        )
        return run_compare(settings, options.out, verbose=options.verbose)

    return _one_line_errors("compare", run)


def _bench(options: argparse.Namespace) -> int:
    from qatfast import bench

    return bench.main(options)


def _one_line_errors(command: str, run: Callable[[], int]) -> int:
    """Calls ``run``; prints an error that the user can fix as a single line."""
    try:
        from qatfast.study.data import DataError
        from qatfast.study.report import FolderError
    except ImportError as error:
        if "qatfast.study needs" not in str(error):
            raise
        return _say(command, str(error), BAD_DATA)
    try:
        return run()
    except DataError as error:
        return _say(command, str(error), BAD_DATA)
    except FolderError as error:
        return _say(command, f"--out: {error}", BAD_ARGUMENT)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _say(command, f"{where}{error.strerror or error}", BAD_DATA)


def _say(command: str, message: str, code: int) -> int:
    print(f"qatfast {command}: {message}", file=sys.stderr)
    return code


def _wrong_data_arguments(options: argparse.Namespace) -> str:
    """Returns an error message about --data and --target, or an empty string."""
    if options.data in BUILT_IN:
        if options.target is not None:
            return f"--target: only for a file; --data {options.data} contains its labels"
        return ""
    path = Path(options.data)
    if path.is_dir():
        return f"--data: '{options.data}' is a folder; expected {_DATA}"
    if path.suffix.lower() not in (".csv", ".npz"):
        return f"--data: expected {_DATA}, got '{options.data}'"
    if not path.is_file():
        return f"--data: no file '{options.data}'; allowed are {_DATA}"
    return ""


def _missing_target(options: argparse.Namespace) -> str:
    """Returns an error message with the possible values if --target is missing, or an empty string."""
    if options.target is not None or options.data in BUILT_IN:
        return ""
    from qatfast.study.data import label_columns, listing

    kind = "array" if options.data.lower().endswith(".npz") else "column"
    names = listing(label_columns(options.data))
    return f"--target: needed with a file; name the {kind} with the labels, one of {names}"


def _wrong_device(name: str) -> str:
    """Returns an error message if the device cannot be used, or an empty string."""
    import torch

    devices = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        devices.append("mps")
    # "cuda" is the current CUDA device.
    allowed = {*devices, *(["cuda"] if len(devices) > 1 and devices[1].startswith("cuda") else [])}
    return (
        ""
        if name in allowed
        else f"--device: expected one of {', '.join(sorted(allowed))} here, got '{name}'"
    )


def _wrong_seeds(options: argparse.Namespace) -> str:
    last = options.seed + options.seeds - 1
    return "" if last < 2**32 else f"--seed: the last seed, {last}, must be less than 2^32"


def _bits(text: str) -> list[int]:
    """Parses ``8`` or ``8,4``."""
    return [_whole_number(part, 2, 16) for part in text.split(",")]


def _count(text: str) -> int:
    return _whole_number(text, 1, 100_000)


def _seed(text: str) -> int:
    return _whole_number(text, 0, 2**32 - 1)


def _whole_number(text: str, low: int, high: int) -> int:
    number = int(text) if text.isascii() and text.isdigit() else None
    if number is None or not low <= number <= high:
        raise argparse.ArgumentTypeError(f"expected a whole number from {low} to {high}, got '{text}'")
    return number


if __name__ == "__main__":
    sys.exit(main())
