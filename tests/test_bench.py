"""The benchmarks: every provider does the same work, whoever is wrong or missing is named, the figures add up."""

import argparse
import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cases
from qatfast import PerToken, bench, cli, reference
from qatfast.bench import contest, table, tutorial
from qatfast.bench.contest import names
from qatfast.bench.providers import COMPILED, OURS, REFERENCE
from qatfast.bench.record import as_json, from_json
from qatfast.bench.works import GRANULARITIES, OPS, Work, works

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# one step of the 255, and the float rounding of the largest value
ONE_STEP = 1 / 100
# these quantize otherwise: another range, the input in place of the output, the bias not
OTHERWISE = ("Brevitas", "torchao", "torch.ao qat.Linear")


def small(op, **changes):
    shape = (4, 16, 8) if op == "qat_linear" else (48, 64)
    return replace(Work(op, "forward", "small", shape), **changes)


def eager(op):
    """All but the compiled ones, which take seconds."""
    return [name for name in names(op) if "compiled" not in name]


def test_every_operator_is_measured():
    assert set(OPS) == set(cases.OPS)


@pytest.mark.parametrize("op", OPS)
def test_the_sizes(op):
    full, short = works(op), works(op, short=True)
    assert len(set(map(str, full))) == len(full) and short
    if op in ("fake_quantize", "qat_linear"):
        assert {work.shape for work in short} < {work.shape for work in full}
        assert {work.backward for work in full} == {True, False}
    else:
        assert {work.granularity for work in full} == set(GRANULARITIES.values())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("granularity", GRANULARITIES.values(), ids=str)
@pytest.mark.parametrize("op", cases.OPS[:-1])
def test_providers_agree_with_the_reference(device, op, granularity, backward):
    if backward and not op.startswith("fake_quantize"):
        pytest.skip("no gradient")
    work = small(op, granularity=granularity, backward=backward, device=device)
    prepared = bench.prepare(work, eager(op))
    assert prepared.errors[OURS] == prepared.errors[REFERENCE] == 0
    assert all(error <= ONE_STEP for error in prepared.errors.values()), prepared.errors
    # torch's fused op has channels along the first axis only
    assert set(prepared.skipped) <= {"torch.ao fused op"} and all(prepared.skipped.values())


@pytest.mark.parametrize("backward", [False, True])
def test_layers_agree_with_the_reference(device, backward):
    prepared = bench.prepare(small("qat_linear", backward=backward, device=device), eager("qat_linear"))
    assert prepared.errors[OURS] == prepared.errors[REFERENCE] == 0
    for name, error in prepared.errors.items():
        assert error <= (0.15 if name in OTHERWISE else ONE_STEP), name
    assert set(prepared.skipped) <= set(OTHERWISE)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("op", OPS)
def test_every_dtype(device, op, dtype):
    prepared = bench.prepare(small(op, dtype=dtype, device=device), eager(op))
    assert {small(op).baseline, OURS, REFERENCE} <= set(prepared.runs)


def test_the_compiled_reference_agrees():
    prepared = bench.prepare(small("fake_quantize", granularity=PerToken(), backward=True), [COMPILED])
    assert prepared.errors.get(COMPILED, 0.0) <= ONE_STEP
    assert COMPILED in prepared.runs or prepared.skipped[COMPILED]


def test_the_tutorial_formula_keeps_the_shape():
    x = cases.normal((3, 4, 32))
    for granularity in GRANULARITIES.values():
        y = tutorial.FakeQuantize.apply(x, granularity)
        assert y.shape == x.shape
        step = (x.amax() - x.amin()) / 255
        assert (y - reference.fake_quantize(x, granularity=granularity)).abs().max() <= 2 * step


def test_a_gradient_is_part_of_the_check():
    inputs_differ = bench.prepare(small("fake_quantize_affine", backward=True), [OURS])
    value, gradient = inputs_differ.runs[OURS]()
    assert gradient.shape == value.shape and (gradient == 0).any()


def test_a_wrong_result_is_never_timed(monkeypatch):
    right = contest.providers.functional.fake_quantize
    monkeypatch.setattr(
        contest.providers.functional, "fake_quantize", lambda x: right(x) * (1 + torch.finfo(x.dtype).eps)
    )
    with pytest.raises(bench.WrongResult, match=r"fake_quantize, forward: small: qatfast differs"):
        bench.prepare(small("fake_quantize"), ["clone", OURS])


def test_a_provider_that_fails_is_skipped_with_its_reason(monkeypatch):
    def broken(inputs):
        raise ImportError("no module of that name\nand much more")

    monkeypatch.setitem(contest.providers.OTHERS["fake_quantize"], "broken", broken)
    work = small("fake_quantize")
    prepared = bench.prepare(work, ["clone", OURS, "broken"])
    assert list(prepared.runs) == ["clone", OURS]
    assert prepared.skipped == {"broken": "ImportError: no module of that name"}
    result = bench.measure(prepared, seconds=0)
    assert table.skipped([result, result]) == [
        f"broken: ImportError: no module of that name ({work} and 1 more)"
    ]


def test_a_baseline_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(contest.providers, "_clone", lambda inputs: lambda x: x.no_such_method())
    with pytest.raises(AttributeError):
        bench.prepare(small("fake_quantize"))


def test_a_ratio_is_taken_round_by_round(monkeypatch):
    # the machine is twice as slow in every other round; qatfast takes 1.5 times as long in each of them
    rounds = {"clone": 0, OURS: 0}

    def turn_of(run, device):
        def turn():
            rounds[run] += 1
            return (1 + rounds[run] % 2) * (1.5 if run == OURS else 1.0)

        return turn

    monkeypatch.setattr(contest, "_turn_of", turn_of)
    prepared = bench.Contest(
        small("fake_quantize"), {name: name for name in rounds}, dict.fromkeys(rounds, 0.0)
    )
    result = bench.measure(prepared, seconds=0)
    assert set(rounds.values()) == {contest.LEAST_ROUNDS}
    assert result.timing("clone").ratio == 1.0
    assert (result.timing(OURS).ratio, result.timing(OURS).quartiles) == (1.5, (1.5, 1.5))
    assert result.timing("nobody") is None


def test_everything_is_timed_on_the_device(device):
    prepared = bench.prepare(small("fake_quantize", device=device), ["clone", OURS])
    result = bench.measure(prepared, seconds=0)
    assert [timing.provider for timing in result.timings] == ["clone", OURS]
    assert all(timing.seconds > 0 for timing in result.timings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_benchmarks_say_so(results_script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results.py", "--device", "cuda"])
    with pytest.raises(SystemExit):
        results_script.main()
    assert capsys.readouterr().err.endswith("--device cuda: torch finds no CUDA device here\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", str(BENCHMARKS), "--device", "cuda"],
        capture_output=True,
        text=True,
    )
    assert (
        run.returncode == 4 and run.stderr.strip() == "ERROR: --device cuda: torch finds no CUDA device here"
    )


def timed(op="fake_quantize", **changes):
    return bench.measure(
        bench.prepare(small(op, **changes), [small(op).baseline, OURS, REFERENCE]), seconds=0
    )


def test_the_tables():
    results = [timed(), timed(column="other"), timed("qat_linear")]
    first, second = table.tables(results)
    assert first.title == "fake_quantize, forward, float32 (clone = 1.0)"
    assert first.header == ("", "small", "other", "max error")
    assert [row[0] for row in first.rows] == ["clone", OURS, REFERENCE]
    assert first.rows[0][1].startswith("1.00x (") and first.rows[0][-1] == table.ABSENT
    assert first.rows[1][-1] == "0"
    assert "(nn.Linear = 1.0)" in second.title
    for text in (table.plain(first), table.markdown(first)):
        assert first.title in text and all(cell in text for row in first.rows for cell in row)
    lines = table.plain(first).splitlines()[2:]
    assert len({len(line) for line in lines if line}) == 1


def test_numbers_are_short():
    assert [table.ratio(x) for x in (1, 1.434, 9.994, 9.996, 134.2)] == [
        "1.00x",
        "1.43x",
        "9.99x",
        "10x",
        "134x",
    ]
    assert [table.duration(x) for x in (2.5, 0.0123, 4.56e-5, 7e-8)] == [
        "2.5 s",
        "12.3 ms",
        "45.6 µs",
        "70 ns",
    ]
    assert [table.share(x) for x in (0, 0.0039)] == ["0", "0.39 %"]


def test_json_and_back():
    results = [timed(), timed("qat_linear", backward=True)]
    record = json.loads(json.dumps(as_json(results)))
    again = from_json(record)
    assert [(r.work.op, r.work.table, r.work.column, r.work.backward, r.work.dtype) for r in again] == [
        (r.work.op, r.work.table, r.work.column, r.work.backward, r.work.dtype) for r in results
    ]
    assert [r.timings for r in again] == [r.timings for r in results]
    assert {"processor", "threads"} <= set(record["machine"]) and "torch" in record["versions"]


def parse(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_prints_the_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(bench.command, "works", lambda op, **_: [small(op)])
    monkeypatch.setattr(bench.command, "SHORT_SECONDS", 0)
    monkeypatch.setattr(contest, "names", eager)
    file = tmp_path / "bench.json"
    assert bench.main(parse("--op", "quantize", "quantize", "--json", str(file))) == 0
    out, err = capsys.readouterr()
    assert "quantize, forward, float32 (clone = 1.0)" in out and "\x1b" not in out
    for name in eager("quantize"):
        assert f"\n{name} " in out
    assert "[1/1] quantize, forward: small" in err
    assert [entry["work"]["op"] for entry in json.loads(file.read_text())["results"]] == ["quantize"]


def test_the_command_says_when_a_result_is_wrong(monkeypatch, capsys):
    def wrong(*_, **__):
        raise bench.WrongResult("quantize: qatfast differs from its reference")

    monkeypatch.setattr(bench.command, "prepare", wrong)
    assert bench.main(parse("--op", "quantize")) == 1
    assert "qatfast bench: quantize: qatfast differs from its reference\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "conv"), "argument --op: invalid choice: 'conv'"),
        (("--op",), "argument --op: expected at least one argument"),
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--device", "tpu"), "argument --device: expected one of cpu"),
        (("--json", "no/such/folder.json"), "argument --json: expected a file in an existing folder"),
        (("--size", "4"), "unrecognized arguments: --size 4"),
    ],
)
def test_a_wrong_argument_is_one_line(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench", *arguments])
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and out == ""
    assert message in err and err.count("\n") == 1


@pytest.fixture
def results_script():
    """benchmarks/results.py."""
    if not BENCHMARKS.is_dir():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("results", BENCHMARKS / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(op, shown, ratios, *, group="forward, per tensor", backward=False):
    """A result with these ratios."""
    timings = [bench.Timing(name, 1e-3, value, (value, value), 0.0) for name, value in ratios.items()]
    return bench.Result(small(op, table=group, column=shown, backward=backward), tuple(timings), {})


def test_targets_are_judged_by_the_figures(results_script):
    lines = results_script.targets(
        [
            result("fake_quantize", "4 Ki", {"clone": 1.0, OURS: 2.4, COMPILED: 3.0}),
            result("fake_quantize", "4 Mi", {"clone": 1.0, OURS: 2.6, COMPILED: 2.0}),
            result("fake_quantize", "32 Mi", {"clone": 1.0, OURS: 9.0, COMPILED: 2.0}),
            result("fake_quantize", "1 Mi", {"clone": 1.0, OURS: 2.0}),
            result("qat_linear", "32, 64, 64", {"nn.Linear": 1.0, OURS: 1.1}, group="step", backward=True),
            result(
                "qat_linear", "256, 1024, 1024", {"nn.Linear": 1.0, OURS: 1.2}, group="step", backward=True
            ),
            result("qat_linear", "32, 64, 64", {"nn.Linear": 1.0, OURS: 9.0}),
        ]
    )
    verdicts = [line.rsplit("|", 2)[1].strip() for line in lines[2:]]
    assert verdicts == ["yes", "yes", "**no**", "**no**", "yes", "–", "yes", "**no**"]
    assert "0.80 of its time" in lines[3] and "1.30 of its time" in lines[5]


def test_what_is_lost_is_said(results_script):
    won = result("quantize", "4 Mi", {"clone": 1.0, OURS: 1.5, "aten op": 2.0})
    lost = result("quantize", "4 Ki", {"clone": 1.0, OURS: 1.5, "aten op": 1.2})
    assert results_script.faster([won])[0].startswith("Nowhere")
    assert results_script.faster([won, lost]) == [
        "- quantize, forward, per tensor: 4 Ki: aten op 1.20x, qatfast 1.50x"
    ]


def test_the_results_are_written_from_files(results_script, tmp_path, monkeypatch):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, one in zip(files, [timed(), timed("qat_linear")], strict=True):
        file.write_text(json.dumps(as_json([one])))
    out = tmp_path / "RESULTS.md"
    monkeypatch.setattr(sys, "argv", ["results.py", *map(str, files), "--out", str(out)])
    results_script.main()
    text = out.read_text()
    for heading in (
        "## Measured on",
        "## Targets",
        "## Where another is faster",
        "## fake_quantize",
        "## qat_linear",
    ):
        assert f"\n{heading}\n" in text
    assert str(Path.home()) not in text and str(tmp_path) not in text


def test_files_of_two_machines_do_not_mix(results_script):
    record = as_json([timed()])
    with pytest.raises(SystemExit, match="the files differ in machine"):
        results_script.joined([record, {**record, "machine": {"processor": "another"}}])


@pytest.mark.parametrize("op", cases.OPS)
def test_the_benchmark_files_collect(op):
    file = BENCHMARKS / f"bench_{op}.py"
    if not file.is_file():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (mark,) = getattr(module, f"test_{op}").pytestmark
    assert mark.args[1] == [(work, name) for work in works(op) for name in names(op)]
