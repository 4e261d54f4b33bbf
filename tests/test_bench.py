"""The benchmarks: all providers run the same workload; wrong and missing providers are reported."""

import argparse
import importlib.util
import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cases
import operators
import qatfast
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, bench, cli, reference
from qatfast.bench import plots, providers, results, runner, timer, tutorial
from qatfast.bench.results import Memory, as_json, from_json
from qatfast.bench.runner import memory, names
from qatfast.bench.workloads import (
    BOUNDS,
    CACHED,
    COMPILED,
    CONFIGS,
    ELEMENTWISE_OPS,
    GRANULARITIES,
    KI,
    OBSERVED,
    ONE_THREAD,
    OPS,
    OURS,
    REFERENCE,
    SUBJECTS,
    TRIAD,
    TUTORIAL,
    TUTORIAL_LAYER,
    Target,
    Workload,
    workloads_of,
)

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
# The interval of a grid of 256 levels, and the float rounding of the largest value.
ONE_STEP = 1 / 100
# These providers use another range, quantize the input and not the output, or not the bias.
OTHERWISE = ("Brevitas", "torchao", "torch.ao qat.Linear", "NNCF", "ModelOpt")


def small(op, **changes):
    shape = {"qat_linear": (24, 16, 8), "network": (4,)}.get(op, (48, 64))
    return replace(Workload(op, "forward", "small", shape), **changes)


def eager(workload):
    """Returns the names of all providers that do not compile, which takes seconds."""
    return [name for name in names(workload) if "compiled" not in name and name != "NNCF"]


def test_every_operator_is_measured():
    operators = {name for name in vars(reference) if inspect.isfunction(getattr(qatfast, name, None))}
    assert set(OPS) == operators


@pytest.mark.parametrize("subject", SUBJECTS)
def test_the_sizes(subject):
    full, short = workloads_of(subject), workloads_of(subject, short=True)
    assert len(set(map(str, full))) == len(full) and short
    assert {str(workload) for workload in short} <= {str(workload) for workload in full}
    if all(workload.is_elementwise for workload in full):
        assert {workload.granularity for workload in full} == {PerTensor(), *GRANULARITIES.values()}
    assert any(workload.targets for workload in full)


def test_another_dtype_has_no_targets():
    chosen = workloads_of("fake_quantize", dtype=torch.float64)
    assert {workload.dtype for workload in chosen} == {torch.float64}
    assert not any(workload.targets for workload in chosen)
    assert len(set(map(str, chosen))) == len(chosen)


def test_the_targets():
    said = [
        verdict.target
        for subject in SUBJECTS
        for verdict in results.verdicts(
            [bench.Result(workload, (), {}) for workload in workloads_of(subject)]
        )
    ]
    for target in (
        "fake_quantize, forward, per tensor, small: 1: at most 2 µs above clone",
        "fake_quantize, forward, per tensor: 16 Ki: at most 1.50x the time of clone",
        "fake_quantize, forward, per tensor, large: 64 Mi: at most 1.00x the time of reference, compiled",
        "fake_quantize, forward, per tensor, bfloat16: 4 Mi: at most 1.60x the time of clone",
        "fake_quantize, forward, 4 Mi elements: per group of 128: at most 1.50x the time of clone",
        "fake_quantize_affine, backward, per tensor: 4 Mi: at most 1.30x the time of clone",
        "choose_qparams, forward, per tensor: 4 Mi: at most 0.60x the time of clone",
        "quantize, forward, per tensor: 4 Mi: at most 0.90x the time of clone",
        "dequantize, forward, per tensor: 4 Mi: at most 0.90x the time of clone",
        "qat_linear, tutorial config, training step: 32, 10, 64: at most 1.05x the time of nn.Linear",
        "qat_linear, int8 config, training step: 8192, 768, 3072: at most 0.80x the time of nn.Linear",
        "qat_linear, int8 config, training step: 32, 64, 64: at most 0.35x the bytes that nn.Linear keeps",
        "qat_linear, int8 config, inference: 512, 4096, 4096: at most 0.28x the time of nn.Linear",
        "qat_linear, int8 config, inference: 512, 4096, 4096, qatfast, cached weights: at most 0.22x the time of "
        "nn.Linear",
        "network, training step with Adam: batch 32: at most 1.10x the time of ThreeLayerNet",
        "import, after torch: a fresh process: at most 100 ms",
    ):
        assert target in said
    autocast = [text for text in said if "autocast" in text]
    assert len(autocast) == 6 and sum("0.60x the bytes" in text for text in autocast) == 3


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "granularity", [PerTensor(), PerToken(), PerGroup(32), PerChannel(0), PerChannel(1)], ids=str
)
@pytest.mark.parametrize("op", ELEMENTWISE_OPS)
def test_providers_agree_with_the_reference(device, op, granularity, backward):
    if backward and not op.startswith("fake_quantize"):
        pytest.skip("no gradient")
    workload = small(op, granularity=granularity, backward=backward, device=device)
    prepared = bench.prepare(workload, eager(workload))
    assert prepared.errors[OURS] == prepared.errors[REFERENCE] == 0
    assert all(error is None or error <= ONE_STEP for error in prepared.errors.values()), prepared.errors
    # The fused op of torch has channels along the first axis only.
    assert set(prepared.skipped) <= {"torch.ao fused op"} and all(prepared.skipped.values())


@pytest.mark.parametrize("backward", [False, True])
def test_providers_of_an_observed_range_agree(device, backward):
    workload = small(OBSERVED, backward=backward, device=device)
    prepared = bench.prepare(workload, eager(workload))
    assert prepared.errors[OURS] == prepared.errors[REFERENCE] == 0
    assert all(error is None or error <= ONE_STEP for error in prepared.errors.values()), prepared.errors
    assert {"torch.ao FakeQuantize", "torch.ao fused op"} <= set(prepared.runs)


def test_providers_take_images(device):
    workload = small(
        "fake_quantize", shape=(2, 3, 8, 8), granularity=PerChannel(1), channels_last=True, device=device
    )
    prepared = bench.prepare(workload, eager(workload))
    assert prepared.runs["clone"]().is_contiguous(memory_format=torch.channels_last)
    assert all(error is None or error <= ONE_STEP for error in prepared.errors.values()), prepared.errors
    assert {OURS, TUTORIAL, "aten ops", "torch.ao FakeQuantize"} <= set(prepared.runs)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("backward", [False, True])
def test_layers_agree_with_the_reference(device, backward, config):
    workload = small("qat_linear", backward=backward, device=device, config=config)
    prepared = bench.prepare(workload, eager(workload))
    assert prepared.errors[OURS] == prepared.errors[REFERENCE] == 0
    assert (CACHED in prepared.runs) is not backward
    for name, error in prepared.errors.items():
        assert error is None or error <= (0.15 if name in OTHERWISE else ONE_STEP), name
    assert set(prepared.skipped) <= {*OTHERWISE, *BOUNDS}
    prepared.resources.close()


def test_the_layer_runs_under_autocast():
    workload = small("qat_linear", backward=True, config="int8 config", autocast=True)
    prepared = bench.prepare(workload, ["nn.Linear", OURS])
    assert all(run()[0].dtype == torch.bfloat16 for run in prepared.runs.values())


def test_the_backward_alone_gives_the_gradients_alone():
    for op in ("fake_quantize_affine", "qat_linear"):
        with_forward, alone = (
            bench.prepare(small(op, backward=True, forward=forward), [OURS, REFERENCE])
            for forward in (True, False)
        )
        for _ in range(2):
            assert runner._same(with_forward.runs[OURS]()[1:], alone.runs[OURS]())
        assert alone.errors == {OURS: None, REFERENCE: None}
    copy = bench.prepare(small("fake_quantize_affine", backward=True, forward=False), ["clone"])
    assert isinstance(copy.runs["clone"](), torch.Tensor)


def test_the_steps_of_the_network_agree():
    workload = small("network", backward=True)
    prepared = bench.prepare(workload)
    assert set(prepared.runs) == set(names(workload)) and prepared.errors[OURS] == 0
    assert prepared.errors[TUTORIAL] < ONE_STEP
    first, second = (prepared.runs[OURS]() for _ in range(2))
    assert runner._same(first, second)


def test_the_import_is_timed_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(runner, "IMPORT_CODE", "before = '{before}'; name = '{name}'; print(0.25)")
    (workload,) = workloads_of("import")
    result = bench.measure(bench.prepare(workload), seconds=0)
    assert result.timing(OURS).seconds == 0.25 and len(result.timing(OURS).rounds) == timer.MIN_ROUNDS


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("op", OPS)
def test_every_dtype(device, op, dtype):
    workload = small(op, dtype=dtype, device=device)
    prepared = bench.prepare(workload, [workload.baseline, OURS, REFERENCE])
    assert set(prepared.runs) == {workload.baseline, OURS, REFERENCE}


@pytest.mark.parametrize("backward", [False, True], ids=["inference", "step"])
def test_convolutions(backward):
    workload = Workload(
        "qat_conv2d", "small", "", (2, 4, 8, 6, 3, 1, 1), backward=backward, channels_last=True
    )
    prepared = bench.prepare(workload, names(workload))
    assert set(prepared.runs) == {*names(workload)}


def test_the_compiled_reference_agrees():
    prepared = bench.prepare(small("fake_quantize", granularity=PerToken(), backward=True), [COMPILED])
    assert prepared.errors.get(COMPILED, 0.0) <= ONE_STEP
    assert COMPILED in prepared.runs or prepared.skipped[COMPILED]


def test_the_tutorial_formula_keeps_the_shape():
    x = cases.normal((3, 4, 128))
    for granularity in GRANULARITIES.values():
        y = tutorial.FakeQuantize.apply(x, granularity)
        assert y.shape == x.shape
        step = (x.amax() - x.amin()) / 255
        assert (y - reference.fake_quantize(x, granularity=granularity)).abs().max() <= 2 * step


def test_a_gradient_is_part_of_the_check():
    prepared = bench.prepare(small("fake_quantize_affine", backward=True), [OURS])
    value, gradient = prepared.runs[OURS]()
    assert gradient.shape == value.shape and (gradient == 0).any()


def test_a_wrong_result_is_never_timed(monkeypatch):
    right = providers.functional.fake_quantize
    monkeypatch.setattr(
        providers.functional, "fake_quantize", lambda x: right(x) * (1 + torch.finfo(x.dtype).eps)
    )
    with pytest.raises(bench.WrongResult, match=r"fake_quantize, forward: small: qatfast differs"):
        bench.prepare(small("fake_quantize"), ["clone", OURS])


def test_a_provider_that_fails_is_skipped_with_its_reason(monkeypatch):
    def broken(inputs):
        raise ImportError("no module of that name\nand much more")

    monkeypatch.setitem(providers.OTHERS["fake_quantize"], "broken", broken)
    workload = small("fake_quantize")
    prepared = bench.prepare(workload, ["clone", OURS, "broken"])
    assert list(prepared.runs) == ["clone", OURS]
    assert prepared.skipped == {"broken": "ImportError: no module of that name"}
    result = bench.measure(prepared, seconds=0)
    assert results.skipped([result, result]) == [
        f"broken: ImportError: no module of that name ({workload} and 1 more)"
    ]


def test_a_baseline_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(providers, "_clone", lambda inputs: lambda x: x.no_such_method())
    with pytest.raises(AttributeError):
        bench.prepare(small("fake_quantize"))


def test_a_ratio_is_taken_round_by_round(monkeypatch):
    # The machine is twice as slow in every other round, and qatfast takes 1.5 times as long as the
    # baseline.
    rounds = {"clone": 0, OURS: 0}

    def turn_of(name, run, workload):
        def turn():
            rounds[name] += 1
            return (1 + rounds[name] % 2) * (1.5 if name == OURS else 1.0)

        return turn

    monkeypatch.setattr(runner, "_turn_of", turn_of)
    prepared = bench.Runner(
        small("fake_quantize"), {name: int for name in rounds}, dict.fromkeys(rounds, 0.0)
    )
    result = bench.measure(prepared, seconds=0)
    assert set(rounds.values()) == {timer.MIN_ROUNDS}
    assert result.ratio("clone") == (1.0, 1.0, 1.0)
    assert result.ratio(OURS) == (1.5, 1.5, 1.5) and result.ratio("clone", OURS).median == 1 / 1.5
    assert result.above(OURS) == (1.0, 0.5, 1.0) and result.timing(OURS).seconds == 3.0
    assert result.timing("nobody") is result.ratio("nobody") is result.above("nobody") is None


def test_everything_is_timed_on_the_device(device):
    prepared = bench.prepare(small("fake_quantize", device=device), ["clone", OURS])
    result = bench.measure(prepared, seconds=0)
    assert [timing.provider for timing in result.timings] == ["clone", OURS]
    assert all(timing.seconds > 0 for timing in result.timings)


def test_one_thread_is_one_thread_in_its_own_turn_only(monkeypatch, threads):
    threads(2)
    monkeypatch.setattr(runner, "turn_of", lambda run, device: run)
    turns = [
        runner._turn_of(name, torch.get_num_threads, small("fake_quantize"))
        for name in (OURS, OURS + ONE_THREAD, OURS)
    ]
    assert [turn() for turn in turns] == [2, 1, 2]


def test_one_thread_is_measured_if_the_workload_says_so():
    assert OURS + ONE_THREAD not in names(small("quantize"))
    workload = small("quantize", one_thread=True)
    prepared = bench.prepare(workload, ["clone" + ONE_THREAD, OURS + ONE_THREAD])
    assert prepared.errors == {"clone" + ONE_THREAD: None, OURS + ONE_THREAD: 0}


def test_providers_that_are_left_out_are_named():
    workload = small("fake_quantize", reduced="left out here")
    prepared = bench.prepare(workload, eager(workload))
    assert set(prepared.runs) == {"clone", OURS, TUTORIAL, "torch.ao fused op"}
    assert set(prepared.skipped.values()) == {"left out here"} and REFERENCE in prepared.skipped
    listed = [name for workload, name in bench.measurements("fake_quantize") if workload.reduced]
    assert OURS in listed and "aten ops" not in listed


def test_the_triad_moves_the_bytes_of_the_operator():
    for op, bytes_ in {"fake_quantize": 8, "choose_qparams": 4, "quantize": 5, "dequantize": 5}.items():
        workload = small(op, shape=(192 * KI,))
        prepared = bench.prepare(workload, [TRIAD])
        assert prepared.runs[TRIAD]().nbytes * 3 == bytes_ * 192 * KI, op
        assert prepared.errors == {TRIAD: None}


def test_the_bytes_of_a_layer():
    batch, inputs, outputs = small("qat_linear").shape
    step = bench.prepare(small("qat_linear", backward=True), ["nn.Linear", OURS, TUTORIAL_LAYER])
    counted = {name: memory(run) for name, run in step.runs.items()}
    assert counted["nn.Linear"].kept == 4 * batch * inputs  # saves the input; the weight is a parameter
    assert counted[OURS].kept == counted[TUTORIAL_LAYER].kept == 4 * (batch * inputs + outputs * inputs)
    assert counted[TUTORIAL_LAYER].allocated > counted[OURS].allocated > counted["nn.Linear"].allocated


def test_the_bytes_of_a_call():
    x = torch.ones(1000, requires_grad=True)
    assert memory(lambda: None) == (0, 0)
    assert memory(x.detach().clone) == (4000, 0)
    assert memory(lambda: x.exp().sum()) == (4004, 4000)
    assert memory(lambda: (x * x, x[:10] * x[5:15])).kept == 4000  # one storage


def test_the_profiler_prints_nothing(capfd):
    memory(lambda: torch.ones(3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_the_benchmarks_say_so(pytestconfig, monkeypatch):
    monkeypatch.setattr(pytestconfig.option, "device", "cuda")
    with pytest.raises(pytest.UsageError, match=r"^--device cuda: torch finds no CUDA device here$"):
        loaded("conftest").pytest_configure(pytestconfig)


def timed(op="fake_quantize", **changes):
    return timed_at(small(op, **changes))


def timed_at(workload):
    return bench.measure(bench.prepare(workload, [workload.baseline, OURS, REFERENCE]), seconds=0)


def result(workload, ratios, *, kept=None):
    """Returns a result with these ratios to 1 ms.

    Each provider keeps ``kept`` bytes times its ratio.
    """
    timings = [
        bench.Timing(name, (value * 1e-3,) * 3, 0.0, kept and Memory(0, round(kept * value)))
        for name, value in ratios.items()
    ]
    return bench.Result(workload, tuple(timings), {})


def test_the_tables():
    measured_results = [timed(), timed(column="other"), timed("qat_linear")]
    first, second = results.tables(measured_results)
    assert first.title == "fake_quantize, forward (clone = 1.0)"
    assert first.header == ("", "small", "other", "allocated, other", "kept, other", "max error")
    assert [row[0] for row in first.rows] == ["clone", OURS, REFERENCE]
    assert first.rows[0][1].startswith("1.00x (") and first.rows[0][-1] == results.ABSENT
    assert first.rows[1][-3:] == ("12 KiB", "0 B", "0")
    assert "(nn.Linear = 1.0)" in second.title
    for text in (results.plain(first), results.markdown(first)):
        assert first.title in text and all(cell in text for row in first.rows for cell in row)
    lines = results.plain(first).splitlines()[2:]
    assert len({len(line) for line in lines if line}) == 1


def test_numbers_are_short():
    assert [results.ratio(x) for x in (1, 1.434, 9.994, 9.996, 134.2)] == [
        "1.00x",
        "1.43x",
        "9.99x",
        "10x",
        "134x",
    ]
    assert [results.duration(x) for x in (2.5, 0.0123, 4.56e-5, 7e-8)] == [
        "2.5 s",
        "12.3 ms",
        "45.6 µs",
        "70 ns",
    ]
    assert [results.share(x) for x in (0, 0.0039, float("nan"))] == ["0", "0.39 %", "NaN"]
    assert [results.size(x) for x in (0, 1023, 1536, 2**24, 2**31)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "16 MiB",
        "2 GiB",
    ]


def test_a_nan_is_the_largest_error():
    errors = (float("nan"), 0.1)
    measured_results = [
        bench.Result(small("quantize"), (bench.Timing("clone", (1.0, 1.0), error),), {}) for error in errors
    ]
    for order in (measured_results, measured_results[::-1]):
        assert results.tables(order)[0].rows[0][-1] == "NaN"


def test_the_bytes_are_those_of_the_largest_size_that_all_providers_run():
    measured_results = [
        result(small("quantize", column=column), dict.fromkeys(names_, 1.0), kept=100)
        for column, names_ in {"a": ("clone", OURS), "b": ("clone", OURS), "c": ("clone",)}.items()
    ]
    (shown,) = results.tables(measured_results)
    assert shown.header[-3:] == ("allocated, b", "kept, b", "max error")
    assert [row[-2] for row in shown.rows] == ["100 B", "100 B"]


def test_the_share_of_the_bandwidth():
    (shown,) = results.tables([result(small("quantize"), {"clone": 1.0, OURS: 2.0, TRIAD: 0.5})])
    assert shown.rows[-1] == ("qatfast's share of the bandwidth", "25%", *[results.ABSENT] * 3)


def measured(index=0):
    """Returns results of a workload of fake_quantize and of qat_linear."""
    chosen = [workloads_of(op)[index] for op in ("fake_quantize", "qat_linear")]
    ratios = {"clone": 1.0, "nn.Linear": 1.0, OURS: 1.5}
    return [
        result(workload, {name: ratios[name] for name in (workload.baseline, OURS)}, kept=100)
        for workload in chosen
    ]


def test_json_and_back():
    measured_results = [*measured(), timed_at(workloads_of("fake_quantize")[0])]
    record = json.loads(json.dumps(as_json(measured_results)))
    assert from_json(record) == measured_results
    assert {"processor", "threads"} <= set(record["machine"])
    assert {"torch", "brevitas", "torchao", "nncf", "nvidia-modelopt"} <= set(record["versions"])


def test_json_of_another_version_is_an_error():
    record = as_json([result(small("quantize"), {"clone": 1.0})])
    with pytest.raises(
        ValueError, match="expected a workload that this version measures, got 'quantize, forward: small'"
    ):
        from_json(record)


def parse(*arguments):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return parser.parse_args(arguments)


def test_the_command_prints_the_table(monkeypatch, capsys, tmp_path):
    chosen = eager(small("quantize"))
    monkeypatch.setattr(bench.command, "workloads_of", lambda op, **_: [small(op)])
    monkeypatch.setattr(bench.command, "SHORT_SECONDS", 0)
    monkeypatch.setattr(runner, "names", lambda workload: chosen)
    file = tmp_path / "bench.json"
    assert bench.main(parse("--op", "quantize", "quantize", "--json", str(file))) == 0
    out, err = capsys.readouterr()
    assert "quantize, forward (clone = 1.0)" in out and "\x1b" not in out
    for name in chosen:
        assert f"\n{name} " in out
    assert "[1/1] quantize, forward: small" in err
    (entry,) = json.loads(file.read_text())["results"]
    assert entry["work"] == "quantize, forward: small"


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


def loaded(name):
    """Loads a file of the benchmarks as a module."""
    file = BENCHMARKS / f"{name}.py"
    if not file.is_file():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_steps_of_whole_models_are_timed_against_float(monkeypatch):
    script = loaded("models")

    def missing(model, x):
        raise ImportError("no such package")

    wanted = ("float32", "qatfast, static()", "qatfast, dynamic()")
    providers = {name: script.PROVIDERS[name] for name in wanted} | {"other": missing}
    monkeypatch.setattr(script, "PROVIDERS", providers)
    encoder = script.Subject("encoder", lambda: script.encoder(16, 1), lambda: torch.randn(4, 6, 16), 2.0)
    cnn = script.Subject("cnn", script.resnet18, lambda: torch.randn(2, 3, 32, 32), 2.0)
    monkeypatch.setattr(script, "SUBJECTS", {"encoder": encoder, "cnn": cnn})
    rows, skipped = script.measure(encoder, seconds=0)
    assert tuple(row.provider for row in rows) == wanted
    assert rows[0].ratio == (1.0, 1.0, 1.0) and all(row.seconds > 0 for row in rows)
    # the gradients are allocated in the step, and the parameters are not
    parameters = sum(4 * parameter.numel() for parameter in encoder.model().parameters())
    assert all(parameters < row.peak < 3 * parameters for row in rows)
    assert skipped == {"other": "ImportError: no such package"}
    text = script.report(0, ["cnn"])
    assert "## cnn" in text and "| qatfast, static() |" in text and "Without other: ImportError" in text


@pytest.fixture
def results_script():
    """Returns the module benchmarks/results.py."""
    return loaded("results")


@pytest.mark.parametrize(
    ("target", "ratios", "verdict"),
    [
        (Target(1.5), {OURS: 1.5}, ("at most 1.50x the time of clone", "1.50x", True)),
        (Target(1.5), {OURS: 1.51}, ("at most 1.50x the time of clone", "1.51x", False)),
        (
            Target(1.0, of=COMPILED),
            {OURS: 2.0, COMPILED: 2.5},
            ("at most 1.00x the time of reference, compiled", "0.80x", True),
        ),
        (
            Target(1.0, of=COMPILED),
            {OURS: 2.0, COMPILED: 1.9},
            ("at most 1.00x the time of reference, compiled", "1.05x", False),
        ),
        (
            Target(1.0, of=COMPILED),
            {OURS: 2.0},
            ("at most 1.00x the time of reference, compiled", "not measured", None),
        ),
        (Target(2e-6, "above"), {OURS: 1.001}, ("at most 2 µs above clone", "1 µs", True)),
        (Target(2e-6, "above"), {OURS: 1.004}, ("at most 2 µs above clone", "4 µs", False)),
        (Target(2e-3, "seconds"), {OURS: 1.5}, ("at most 2 ms", "1.5 ms", True)),
        (Target(0.5, "kept"), {OURS: 0.4}, ("at most 0.50x the bytes that clone keeps", "0.40x", True)),
        (Target(0.5, "kept"), {OURS: 0.6}, ("at most 0.50x the bytes that clone keeps", "0.60x", False)),
        (
            Target(0.5, provider=CACHED),
            {OURS: 1.0, CACHED: 0.4},
            ("at most 0.50x the time of clone", "0.40x", True),
        ),
        (
            Target(0.5, provider=CACHED),
            {OURS: 0.4},
            ("at most 0.50x the time of clone", "not measured", None),
        ),
    ],
)
def test_targets_are_judged_by_the_figures(target, ratios, verdict):
    measured_result = result(small("quantize", targets=(target,)), {"clone": 1.0, **ratios}, kept=1000)
    provider = f", {CACHED}" if target.provider == CACHED else ""
    words, *rest = verdict
    assert results.verdicts([measured_result]) == [(f"quantize, forward: small{provider}: {words}", *rest)]


def test_a_target_without_counted_bytes_is_not_met():
    without_bytes = result(small("quantize", targets=(Target(0.5, "kept"),)), {"clone": 1.0, OURS: 0.1})
    assert results.verdicts([without_bytes])[0].met is None


def test_a_verdict_has_the_quartiles():
    measured_result = bench.Result(
        small("quantize", targets=(Target(1.5),)),
        (bench.Timing("clone", (1.0,) * 3), bench.Timing(OURS, (1.2, 1.4, 1.6))),
        {},
    )
    assert results.verdicts([measured_result])[0].measured == "1.40x (1.20x to 1.60x)"


def test_a_missed_target_is_marked(results_script):
    missed = result(small("quantize", targets=(Target(1.5), Target(3.0))), {"clone": 1.0, OURS: 2.0})
    assert [line.rsplit("|", 2)[1].strip() for line in results_script.target_lines([missed])[2:]] == [
        "**no**",
        "yes",
    ]


def test_a_faster_provider_is_listed(results_script):
    won = result(small("quantize"), {"clone": 1.0, OURS: 1.5, TRIAD: 0.5, "aten op": 2.0})
    lost = result(small("quantize"), {"clone": 1.0, OURS: 1.5, "aten op": 1.2})
    assert results_script.faster_lines([won])[0].startswith("Nowhere")
    assert results_script.faster_lines([won, lost]) == [
        "- quantize, forward: small: aten op 1.20x, qatfast 1.50x"
    ]


def test_one_thread_is_compared_with_all(results_script):
    ratios = {"clone": 1.0, OURS: 2.0, "clone" + ONE_THREAD: 1.5, OURS + ONE_THREAD: 3.6}
    lines = results_script.one_thread_lines([result(small("quantize", one_thread=True), ratios), timed()])
    assert lines[2:] == ["| quantize, forward: small | 1.50x | 1.80x |"]


def test_the_results_are_written_from_files(results_script, tmp_path, monkeypatch):
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps({"benchmarks": [], "qatfast": as_json(measured())}))
    files[1].write_text(json.dumps(as_json(measured(-1))))
    monkeypatch.setattr(
        sys, "argv", ["results.py", *map(str, files), "--out", str(tmp_path), "--command", "once"]
    )
    results_script.main()
    text = (tmp_path / "RESULTS.md").read_text()
    for heading in (
        "Measured on",
        "Targets",
        "Where another is faster",
        "One thread",
        "fake_quantize",
        "qat_linear",
    ):
        assert f"\n## {heading}\n" in text
    assert "\n- command: `once`\n" in text and "**no**" in text
    assert str(Path.home()) not in text and str(tmp_path) not in text
    for name in ("fake_quantize", "qat_linear"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")


def test_the_lines_of_the_picture():
    ratios = {"clone": 1.0, OURS: 2.0, TUTORIAL: 3.0}
    chosen = [workload for workload in workloads_of("fake_quantize") if not workload.backward][::-1]
    figure = plots.fake_quantize_over_size(result(workload, ratios) for workload in chosen)
    lines = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert list(lines) == ["clone, a plain copy", OURS, TUTORIAL]
    sizes = [x for x, _ in lines[OURS]]
    assert sizes == sorted(set(sizes)) and (sizes[0], sizes[-1]) == (1, 64 * 2**20)
    assert {y for _, y in lines[OURS]} == {2e-3}


def test_the_bars_of_the_picture():
    ratios = {"nn.Linear": 1.0, OURS: 0.8, REFERENCE: 9.0, OURS + ONE_THREAD: 2.0}
    figure = plots.layer_steps(result(workload, ratios) for workload in workloads_of("qat_linear"))
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "weight, bias and output quantized",
        "input and weight quantized",
    ]
    for axes in figure.axes:
        assert [label.get_text() for label in axes.get_yticklabels()] == ["nn.Linear", OURS]
        assert [bar.get_width() for bar in axes.patches] == [1.0, 0.8]
        assert [text.get_text() for text in axes.texts] == ["1.00x", "0.80x"]


def test_a_picture_of_nothing_is_empty():
    assert plots.layer_steps([]).axes and plots.fake_quantize_over_size([]).axes


def test_files_of_two_machines_do_not_mix(results_script):
    record = as_json(measured())
    for name in ("machine", "versions", "device"):
        with pytest.raises(SystemExit, match=f"the files differ in {name}"):
            results_script.joined([record, {**record, name: "another"}])


def run_of(**medians):
    """Returns a group of results in the format of pytest-benchmark."""
    return {
        "benchmarks": [
            {
                "group": "quantize",
                "extra_info": {"provider": name, "baseline": "clone"},
                "stats": {"median": median},
            }
            for name, median in medians.items()
        ]
    }


@pytest.mark.parametrize(
    ("after", "status", "said"),
    [
        (run_of(clone=1.0, qatfast=2.19, other=9.0), 0, "nothing is slower by more than a tenth\n"),
        (run_of(clone=1.0, qatfast=2.22), 1, "quantize: qatfast: 2.00x before, 2.22x after (+11%)\n"),
        (run_of(clone=3.0, qatfast=6.0), 0, "nothing"),
        (run_of(clone=0.5, qatfast=2.0), 1, "4.00x after (+100%)\n"),
    ],
)
def test_a_regression_is_named(monkeypatch, capsys, tmp_path, after, status, said):
    files = [tmp_path / name for name in ("before.json", "after.json")]
    for file, run in zip(files, (run_of(clone=1.0, qatfast=2.0, other=1.0), after), strict=True):
        file.write_text(json.dumps(run))
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, files)])
    with pytest.raises(SystemExit) as ended:
        loaded("compare").main()
    out, err = capsys.readouterr()
    assert ended.value.code == status and said in out and err == "1 compared, 0 in one file only\n"


def test_runs_without_a_common_benchmark_cannot_be_compared(monkeypatch, capsys, tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"benchmarks": []}))
    monkeypatch.setattr(sys, "argv", ["compare.py", str(file), str(file)])
    with pytest.raises(SystemExit) as ended:
        loaded("compare").main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith("error: the files have no benchmark in common\n")


def test_the_benchmarks_are_all_measurements():
    (mark,) = loaded("bench_workloads").test_workload.pytestmark
    expected = [pair for subject in SUBJECTS for pair in bench.measurements(subject)]
    assert [case.values for case in mark.args[1]] == expected


def test_every_operator_has_a_workload():
    assert {*operators.OPERATORS} <= {*SUBJECTS}


def test_a_benchmark_reports_what_the_runner_measured(tmp_path):
    file = tmp_path / "run.json"
    workload = "quantize, forward, per tensor: 256 Ki"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            str(BENCHMARKS / "bench_workloads.py"),
            "-p",
            "no:cacheprovider",
            "-k",
            "quantize-quantize and tensor and 256 and (qatfast or clone) and not thread",
            "--seconds",
            "0",
            "--benchmark-json",
            str(file),
        ],
        check=True,
        capture_output=True,
        # pytest-xdist disables pytest-benchmark.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
    )
    run = json.loads(file.read_text())
    (measured,) = from_json(run["qatfast"])
    assert str(measured.workload) == workload
    assert [timing.provider for timing in measured.timings] == ["clone", OURS]
    for entry in run["benchmarks"]:
        timing = measured.timing(entry["extra_info"]["provider"])
        assert entry["group"] == workload and entry["extra_info"]["baseline"] == "clone"
        assert entry["stats"]["median"] == pytest.approx(timing.seconds)
        assert entry["stats"]["rounds"] == len(timing.rounds) == timer.MIN_ROUNDS
