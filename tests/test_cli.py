"""The command line: its output and files, its errors and exit codes."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import qatfast as qatfast_package
from qatfast import cli, kernels

try:
    import pty
except ImportError:
    pty = None

# SIGINT may be ignored if the tests run in the background; child processes inherit this.
LAUNCH = (
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "from qatfast.cli import main; sys.exit(main())"
)
QUICK = ("--epochs", "1", "--seeds", "1", "--bits", "4")


def command(*arguments):
    return [sys.executable, "-c", LAUNCH, *arguments]


def environment(**changes):
    # With two threads on a busy machine, small layers would wait for the second thread at every
    # step.
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        **changes,
    }


def qatfast(*arguments, cwd=None, **changes):
    return subprocess.run(
        command(*arguments), cwd=cwd, env=environment(**changes), capture_output=True, text=True, timeout=300
    )


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Returns a folder in which ``qatfast compare`` has run."""
    folder = tmp_path_factory.mktemp("cli")
    return qatfast("compare", *QUICK, cwd=folder), folder / "report"


def test_compare_writes_the_report_and_prints_its_tables(compared):
    done, report = compared
    assert done.returncode == 0 and done.stderr == ""
    assert (report / "index.html").is_file() and results(report)["complete"] is True
    assert (
        results(report)["settings"] | {"bits": [4], "epochs": 1, "seeds": 1, "seed": 42}
        == results(report)["settings"]
    )
    assert "\nOne seed cannot tell which numbers of bits are without a loss" in done.stdout
    assert "\n  4 bits: one seed cannot tell. PTQ " in done.stdout
    assert "\nTest accuracy. " in done.stdout and "\nModel file. " not in done.stdout
    assert done.stdout.rstrip().endswith("report/index.html")
    assert [path.name for path in report.parent.iterdir()] == ["report"]
    if kernels.reason():
        assert "Without compiled kernels" in done.stdout


def test_without_a_terminal_no_bars_are_printed(compared):
    done, _ = compared
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", done.stdout + done.stderr)
    assert "━" not in done.stdout + done.stderr


def test_without_a_terminal_each_training_is_a_line(compared):
    done, _ = compared
    lines = [line for line in done.stdout.splitlines() if re.match(r"\d/3  ", line)]
    names = ["FP32 start", "FP32", "QAT learned, 4 bits"]
    assert [re.split(r"/3  |, seed", line)[1] for line in lines] == names
    assert all(re.search(r"loss \d\.\d{3}  accuracy \d+\.\d%$", line) for line in lines)


def on_a_terminal(code, columns, **changes):
    """Returns the output of a program on a terminal with this number of columns."""
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=child,
        stderr=child,
        stdin=subprocess.DEVNULL,
        env=environment(COLUMNS=str(columns), TERM="dumb", **changes),
    )
    os.close(child)
    shown = b""
    with contextlib.suppress(OSError):  # the end of a terminal
        while chunk := os.read(parent, 65536):
            shown += chunk
    os.close(parent)
    assert process.wait(timeout=60) == 0
    return shown.decode().replace("\r\n", "\n")


FULL_STUDY = """
import itertools, warnings
warnings.simplefilter("ignore")  # that there are no kernels
from qatfast.study import Settings, Study, quantize_signal
from qatfast.study.command import _announcement, _print, _results
from qatfast.study.data import digits_samples
from qatfast.study.experiments import ModelFile, Run
from qatfast.study.networks import TITLES
from qatfast.study.timing import StepTime
study = Study(Settings(every_model={verbose}), digits_samples(), 8970, 1437, 360, complete=True)
losses = {8: 0, 4: 0.02, 3: 0.1, 2: 0.3, 32: 0}
for seed, model, bits in itertools.product(range(42, 49), TITLES, (32, 8, 4, 3, 2)):
    if (bits == 32) == model.startswith("fp32"):
        accuracy = 0.96 - losses[bits] * (1 + list(TITLES).index(model)) / 7
        failed = "the loss rose" if (model, bits) == ("qat_tutorial", 2) else ""
        batch_1 = accuracy + bits / 320 if model == "qat_tutorial" else None
        study.runs.append(Run(seed, model, bits, 0.1, accuracy, batch_1, failed))
        study.sizes += [ModelFile(model, bits, 1000 * bits, "f")]
for network in ("64 → 64 → 64 → 10, batch 32, 1 thread", "1024 → 1024 → 1024 → 10, batch 256, 2 threads"):
    for model in ("fp32", "tutorial", "qatfast"):
        study.step_times += [StepTime(network, model, 0.001, 1.05, (1.01, 1.12))]
_print(_announcement(study))
_print(_results(study, [quantize_signal(bits) for bits in (8, 4, 3, 2)], {verbose}))
"""


@pytest.mark.skipif(pty is None, reason="needs a Unix terminal")
@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_gets_less_than_45_lines(columns):
    both = [FULL_STUDY.replace("{verbose}", verbose) for verbose in ("False", "True")]
    short, long = on_a_terminal("\nprint('--verbose:')\n".join(both), columns).split("--verbose:\n")
    shown = short.splitlines()
    assert 20 < len(shown) + 2 < 45  # two lines are missing: the path of the report, and --verbose
    assert max(map(len, shown)) <= columns
    first = next(line for line in shown if "without a loss" in line)
    assert first.startswith("Lowest bits without a loss: ")
    assert re.findall(r"(?m)^  (\d) bits: ", "\n".join(shown)) == ["8", "4", "3", "2"]
    for title in ("Model file", "Training time", "A signal"):
        assert f"\n{title}. " in long and f"\n{title}. " not in "\n".join(shown)


def test_compare_own_table(tmp_path):
    rows = "".join(f"{i % 7},{-i},{'late' if i % 7 > 3 else 'early'}\n" for i in range(80))
    (tmp_path / "trains.csv").write_text(f"hour,noise,when\n{rows}")
    done = qatfast(
        "compare",
        "--data",
        "trains.csv",
        "--target",
        "when",
        *QUICK,
        "--out",
        "a/b",
        "--seed",
        "7",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    found = results(tmp_path / "a/b")
    assert found["data"]["classes"] == ["early", "late"] and found["network"]["layers"] == [2, 128, 128, 2]
    assert {run["seed"] for run in found["runs"]} == {7}


def interrupt_when(tmp_path, ready, *arguments):
    """Runs ``qatfast compare`` and sends SIGINT when ``ready()`` is true.

    Returns exit code, output and errors.
    """
    process = subprocess.Popen(
        command("compare", *arguments),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not ready() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    return process.returncode, output, errors


def test_ctrl_c_leaves_a_partial_report_and_the_complete_one(compared, tmp_path):
    _, report = compared
    (tmp_path / "report").mkdir()
    for name in results(report)["files"]:
        (tmp_path / "report" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "report" / name).write_bytes((report / name).read_bytes())
    before = (tmp_path / "report/index.html").read_bytes()

    def something_is_measured():
        return any(tmp_path.glob(".report-*/models/fp32.pt"))

    code, output, errors = interrupt_when(tmp_path, something_is_measured, "--seeds", "50", "--bits", "4")
    assert code == 130 and errors == "" and "Interrupted" in output
    assert "Partial report" in output and "report-partial" in output.replace("\n", "")
    partial = results(tmp_path / "report-partial")
    assert partial["complete"] is False and partial["runs"]
    assert "Partial report" in (tmp_path / "report-partial/index.html").read_text()
    assert (tmp_path / "report/index.html").read_bytes() == before and results(tmp_path / "report")[
        "complete"
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "report-partial"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--bits", "1"], "--bits: expected a whole number from 2 to 16, got '1'"),
        (["--bits", "17"], "--bits: expected a whole number from 2 to 16, got '17'"),
        (["--bits", "4.5"], "--bits: expected a whole number from 2 to 16, got '4.5'"),
        (["--bits", "8,"], "--bits: expected a whole number from 2 to 16, got ''"),
        (["--bits", "8,17"], "--bits: expected a whole number from 2 to 16, got '17'"),
        (["--bits"], "--bits: expected at least one argument"),
        (["--epochs", "0"], "--epochs: expected a whole number from 1 to"),
        (["--epochs", "x"], "--epochs: expected a whole number from 1 to"),
        (["--seeds", "-1"], "--seeds: expected"),
        (["--seed", "4294967296"], "--seed: expected a whole number from 0 to 4294967295"),
        (["--seed", "4294967295"], "--seed: the last seed, 4294967301, must be less than 2^32"),
        (["--device", "tpu"], "--device: expected one of cpu"),
        (["--device", "cuda:99"], "--device: expected one of cpu"),
        (
            ["--data", "mnist"],
            "--data: expected synthetic, digits, mnist1d, or a .csv or .npz file, got 'mnist'",
        ),
        (["--data", "none.csv"], "--data: no file 'none.csv'; allowed are synthetic, digits"),
        (
            ["--data", "table.csv"],
            "--target: needed with a file; name the column with the labels, one of 'a', 'y'",
        ),
        (["--data", "full"], "--data: 'full' is a folder; expected synthetic, digits, mnist1d, or a .csv"),
        (["--data", "digits", "--target", "y"], "--target: only for a file"),
        (["--out", "table.csv"], "table.csv: is a file"),
        (["--out", "."], "is the current folder"),
        (["--out", "full"], "holds files that are not a report's (notes.txt)"),
        (["--epoch", "3"], "unrecognized arguments: --epoch 3"),
        (["digits"], "unrecognized arguments: digits"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text("a,y\n1,0\n")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("mine")
    assert exit_code("compare", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and printed.err.count("\n") == 1
    assert printed.err.startswith("qatfast")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "table.csv"]


def exit_code(*arguments):
    try:
        return cli.main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("arguments", [[], ["compere"], ["info", "--all"], ["visualize", "--bits", "0"]])
def test_wrong_commands_are_one_line_and_exit_code_2(capsys, arguments):
    assert exit_code(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("a,b\n1,2\n", "no column 'y'; the columns are 'a', 'b'"),
        ("a,y\n1,0\nx,1\n", "line 3, column 'a': 'x' is not a number"),
        ("a,y\n1,0\n2,0\n", "column 'y' holds 1 class"),
        ("a,y\n1,0\nnan,1\n", "is not a finite number"),
        (
            "a,y\n" + "".join(f"{i},{i / 3}\n" for i in range(40)),
            "40 different numbers in 40 samples, a regression target",
        ),
        ("", "expected a header and at least one row, got 0 line(s)"),
    ],
)
def test_bad_data_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").write_text(text)
    assert exit_code("compare", "--data", "table.csv", "--target", "y") == 1
    printed = capsys.readouterr()
    assert message in printed.err and printed.err.count("\n") == 1 and printed.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["table.csv"]


@pytest.mark.parametrize("command", ["compare", "visualize"])
@pytest.mark.parametrize("raises", [False, True])
def test_a_missing_extra_is_one_line(capsys, monkeypatch, command, raises):
    for name in [name for name in sys.modules if name.startswith("qatfast.study")]:
        monkeypatch.delitem(sys.modules, name)

    def find_spec(name):
        if name == "matplotlib" and raises:
            raise ModuleNotFoundError("No module named 'matplotlib'")
        return None if name == "matplotlib" else object()

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    assert exit_code(command) == 1
    said = "qatfast.study needs matplotlib: pip install matplotlib scikit-learn rich"
    assert capsys.readouterr().err == f"qatfast {command}: {said}\n"
    exit_code(command, "--help")
    assert "1 " in capsys.readouterr().out.split("exit codes:")[1].split("package")[0]


def test_a_closed_pipe_ends_quietly_and_leaves_nothing(tmp_path):
    process = subprocess.Popen(
        command("compare", *QUICK),
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 1 and errors == b""
    assert list(tmp_path.iterdir()) == []


def test_output_that_knows_no_arrows(tmp_path):
    done = qatfast("visualize", "--bits", "3", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    code = FULL_STUDY.replace("{verbose}", "True").replace(
        "_print(_ann", "cli.main(['--version'])\n_print(_ann"
    )
    code = "import contextlib\nfrom qatfast import cli\n" + code.replace(
        "cli.main(['--version'])", "with contextlib.suppress(SystemExit): cli.main(['--version'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(PYTHONIOENCODING="ascii"), capture_output=True
    )
    assert done.returncode == 0 and b"64 ? 64" in done.stdout


def test_a_picture_that_cannot_be_finished_leaves_the_earlier_one(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    (tmp_path / "quantization_8bit.png").write_text("old")

    def interrupted(figure, path, **_):
        path.write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", interrupted)
    assert exit_code("visualize", "--out", str(tmp_path)) == 130
    assert [path.name for path in tmp_path.iterdir()] == ["quantization_8bit.png"]
    assert (tmp_path / "quantization_8bit.png").read_text() == "old"


def test_version(capsys):
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"qatfast {qatfast_package.__version__}\n"


def test_info(capsys):
    assert exit_code("info") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(kernels.info())
    assert all(value in line for line, value in zip(lines, kernels.info().values(), strict=True))


def test_info_without_kernels():
    done = qatfast("info", QATFAST_NO_EXT="1")
    assert done.returncode == 0 and done.stderr == ""
    assert "not loaded: QATFAST_NO_EXT is set" in done.stdout


def test_visualize(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert exit_code("visualize", "--bits", "8,4", "2", "--out", "pictures") == 0
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == [
        "quantization_2bit.png",
        "quantization_4bit.png",
        "quantization_8bit.png",
    ]
    printed = capsys.readouterr().out
    for word in ("scale", "zero point", "levels", "mean abs error", "max abs error"):
        assert printed.count(f"\n{word} ") + printed.startswith(word) == 3
    (tmp_path / "file").write_text("")
    assert exit_code("visualize", "--out", "file") == 2
    assert capsys.readouterr().err == "qatfast visualize: --out: file: is a file; name a folder\n"
    assert exit_code("visualize", "--out", "file/below") == 1
    assert capsys.readouterr().err == "qatfast visualize: file/below: Not a directory\n"


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["visualize", "--help"]])
def test_help_has_examples(capsys, arguments):
    assert exit_code(*arguments) == 0
    printed = capsys.readouterr().out
    assert "examples:" in printed and "  qatfast " in printed


def test_compare_help_names_every_argument(capsys):
    exit_code("compare", "--help")
    printed = capsys.readouterr().out
    for argument in ("data", "target", "bits", "epochs", "seeds", "seed", "device", "out", "all", "verbose"):
        assert f"--{argument} " in printed
    assert "OUT-partial" in printed and "130" in printed


def test_the_package_and_the_command_line_load_without_the_extra():
    code = "import sys, qatfast, qatfast.cli; qatfast.cli.main(['info']); print({extra} & set(sys.modules))"
    code = code.replace("{extra}", "{'matplotlib', 'sklearn', 'rich'}")
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "set()"
