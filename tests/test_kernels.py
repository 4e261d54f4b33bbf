"""The compiled kernels give the bits of the reference: on every instruction set, number of threads, size, alignment."""

import json
import os
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import cases
import digests
import qatfast
from qatfast import PerChannel, PerTensor, PerToken, functional, reference

ROOT = Path(__file__).parent.parent
CAPABILITIES = ("default", "avx2", "avx512")
DTYPES = pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)


@pytest.fixture(scope="module")
def expected():
    """The results of the reference, computed once a dtype."""
    known = {}

    def results(dtype):
        if dtype not in known:
            known[dtype] = dict(digests.results(cases.IMPLEMENTATIONS["reference"], dtype))
        return known[dtype]

    return results


def run(script, *arguments, **environment):
    command = [sys.executable, *script, *arguments]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@DTYPES
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_they_are_the_references_with_any_number_of_threads(kernels, expected, threads, dtype, count):
    threads(count)
    least = 0 if count == 1 else 2000
    compared = 0
    for label, value in digests.results(functional, dtype, least):
        try:
            cases.assert_same(value, expected(dtype)[label])
        except AssertionError as error:
            raise AssertionError(f"{label}: {error}") from None
        compared += 1
    assert compared > 100


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_large_tensor_on_any_number_of_threads(kernels, threads, count):
    threads(count)
    x = cases.mixed((2**20 + 5,))
    for granularity in (PerTensor(), PerToken()):
        cases.assert_same(
            functional.fake_quantize(x, granularity=granularity),
            reference.fake_quantize(x, granularity=granularity),
        )
    few_channels = x[: 3 * 349000].view(3, -1)
    for granularity in (PerChannel(0), PerChannel(1)):
        y = functional.fake_quantize(few_channels, granularity=granularity)
        cases.assert_same(y, reference.fake_quantize(few_channels, granularity=granularity))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_gives_the_same_bits(kernels, expected, capability):
    if capability == "avx512" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor or this run has no AVX-512")
    known = {
        label: digests.digest(value) for dtype in cases.FLOATS for label, value in expected(dtype).items()
    }
    script = [str(ROOT / "tests" / "digests.py")]
    found = json.loads(run(script, "public", ATEN_CPU_CAPABILITY=capability))
    assert found.keys() == known.keys()
    assert [label for label in known if found[label] != known[label]] == []


@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE"])
def test_a_library_that_saturates_changes_no_integer_product(kernels, instructions):
    """Without VNNI, oneDNN may add pairs of products in 16 bits."""
    code = (
        "import cases, digests, json, torch;"
        "results = digests.layers(cases.IMPLEMENTATIONS['public'], torch.float32);"
        "print(json.dumps({label: digests.digest(value) for label, value in results}))"
    )
    found = json.loads(run(["-c", code], ONEDNN_MAX_CPU_ISA=instructions))
    layers = digests.layers(cases.IMPLEMENTATIONS["reference"], torch.float32)
    known = {label: digests.digest(value) for label, value in layers}
    assert len(known) > 100
    assert [label for label in known if found[label] != known[label]] == []


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_environment_chooses_the_instruction_set(kernels, capability):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("this processor or this run has no AVX-512")
    code = "import qatfast.kernels; print(qatfast.kernels.extension.instruction_set())"
    name = run(["-c", code], ATEN_CPU_CAPABILITY=capability).strip()
    assert (
        name.lower().replace("-", "")
        in {"default": ("baseline", "default"), "avx2": ("avx2",), "avx512": ("avx512",)}[capability]
    )


def test_the_reference_gives_the_same_bits_on_the_lowest_instruction_set(kernels, expected):
    code = (
        "import cases, digests, json, torch;"
        "results = digests.results(cases.IMPLEMENTATIONS['reference'], torch.float32, 60);"
        "print(json.dumps({label: digests.digest(value) for label, value in results if value.numel() < 5000}))"
    )
    found = json.loads(run(["-c", code], ATEN_CPU_CAPABILITY="default"))
    assert len(found) > 200
    assert [label for label in found if found[label] != digests.digest(expected(torch.float32)[label])] == []


@DTYPES
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerToken()], ids=str)
def test_quotients_next_to_ties(kernels, dtype, granularity):
    """Random scales of every exponent; inputs at half steps and a few numbers beside: where a division that is not
    IEEE's rounds to the other side."""
    rng = np.random.default_rng(1)
    rows, columns = 300, 120
    compute = cases.compute_dtype(dtype)
    span = 12 if dtype == torch.float16 else 100
    scale = torch.tensor(
        rng.uniform(1, 2, (rows, 1)) * np.exp2(rng.integers(-span, span // 2, (rows, 1)))
    ).to(compute)
    halves = torch.tensor(rng.integers(-300, 300, (rows, columns)) + 0.5) * scale.double()
    x = halves.to(dtype)
    infinity = torch.tensor(np.where(rng.random((rows, columns)) < 0.5, -np.inf, np.inf)).to(dtype)
    for _ in range(3):
        x = torch.where(torch.tensor(rng.random((rows, columns)) < 0.6), torch.nextafter(x, infinity), x)
    if granularity == PerTensor():
        operands = [(x[row], scale[row, 0]) for row in range(0, rows, 3)]
    else:
        x = x.t().contiguous() if granularity == PerChannel(1) else x
        operands = [(x, scale[:, 0])]
    for x, scale in operands:
        zero_point = torch.zeros(scale.shape, dtype=torch.int32)
        for function in ("quantize", "fake_quantize_affine"):
            arguments = (x, scale, zero_point, -32768, 32767)
            cases.assert_same(
                getattr(functional, function)(*arguments, granularity=granularity),
                getattr(reference, function)(*arguments, granularity=granularity),
            )


@DTYPES
def test_the_same_call_gives_the_same_bits_every_time(kernels, dtype):
    x = cases.mixed((3, 40000), dtype)
    for granularity in (PerTensor(), PerChannel(0), PerChannel(1)):
        first = functional.fake_quantize(x, granularity=granularity)
        for _ in range(5):
            cases.assert_same(functional.fake_quantize(x, granularity=granularity), first)


def test_calls_from_several_threads_at_once(kernels):
    tensors = [cases.mixed((20000 + size,), seed=size) for size in range(16)]
    expected = [reference.fake_quantize(x) for x in tensors]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for y, other in zip(pool.map(functional.fake_quantize, tensors), expected, strict=True):
                cases.assert_same(y, other)


def test_every_way_to_an_operator_ends_in_the_dispatcher(kernels):
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for op in cases.OPS:
        call = next(cases.calls(op))
        for implementation in ("public", "torch.ops"):
            with Names() as names:
                call.through(cases.IMPLEMENTATIONS[implementation])
            assert f"qatfast.{op}.default" in names.seen


def test_tensor_subclasses_and_function_modes_see_the_call(kernels):
    names = []

    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            names.append(str(function))
            return super().__torch_function__(function, types, args, kwargs)

    class Mode(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    x = cases.normal((9,))
    y = functional.fake_quantize(x.as_subclass(Logged))
    assert type(y) is Logged
    assert any("fake_quantize" in name for name in names)
    cases.assert_same(y.as_subclass(torch.Tensor), functional.fake_quantize(x))
    names.clear()
    with Mode():
        functional.fake_quantize(x)
    assert any("fake_quantize" in name for name in names)


def test_without_kernels_one_warning_names_the_cause_and_the_cure():
    code = """
import warnings, torch, qatfast
x = torch.linspace(-1, 2, 100)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    assert not caught
    y = qatfast.fake_quantize(x)
    qatfast.quantize(x, 0.1, 0, -8, 7)
    qatfast.QATLinear(100, 3)(x).sum().backward()
print([(w.category.__name__, str(w.message), w.filename) for w in caught])
print(y.tolist())
"""
    output = run(["-c", code], QATFAST_NO_EXT="1").splitlines()
    ((category, message, filename),) = eval(output[0])
    assert category == "RuntimeWarning"
    assert filename == "<string>", "the warning points at the caller"
    assert "QATFAST_NO_EXT is set" in message
    assert "Unset it" in message
    x = torch.linspace(-1, 2, 100)
    cases.assert_same(torch.tensor(eval(output[1])), reference.fake_quantize(x))


def test_an_import_alone_warns_of_nothing():
    code = "import warnings; warnings.simplefilter('error'); import qatfast; print(qatfast.kernels.reason())"
    assert "QATFAST_NO_EXT is set" in run(["-c", code], QATFAST_NO_EXT="1")


def test_kernels_that_are_loaded_warn_of_nothing(kernels):
    assert qatfast.kernels.reason() == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for op in cases.OPS:
            next(cases.calls(op)).through(functional)


def test_info_says_what_runs(device):
    facts = qatfast.kernels.info()
    loaded = cases.why_no_kernels("cpu") == ""
    assert facts["kernels"].startswith("loaded" if loaded else "not loaded: ")
    assert facts["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in facts.values())
