"""The kernels equal the reference for all instruction sets, threads, sizes and alignments."""

import json
import os
import platform
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
from operators import IMPLEMENTATIONS, operators
from qatfast import PerChannel, PerTensor, PerToken, functional, reference

ROOT = Path(__file__).parent.parent
CAPABILITIES = ("default", "avx2", "avx512")
DTYPES = pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)


@pytest.fixture(scope="module")
def expected():
    """Returns the results of the reference, computed once per dtype."""
    known = {}

    def results(dtype):
        if dtype not in known:
            known[dtype] = dict(digests.results(IMPLEMENTATIONS["reference"], dtype))
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


@pytest.mark.arithmetic
@DTYPES
@pytest.mark.parametrize("count", [1, 2, 3])
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


@pytest.mark.arithmetic
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_every_instruction_set_gives_the_same_bits(kernels, expected, capability):
    own = torch.backends.cpu.get_cpu_capability()
    if capability == own.lower():
        pytest.skip("the test of one thread runs on this instruction set")
    if capability == "avx512":
        pytest.skip("this processor or this run has no AVX-512")
    known = {
        label: digests.digest(value) for dtype in cases.FLOATS for label, value in expected(dtype).items()
    }
    script = [str(ROOT / "tests" / "digests.py")]
    found = json.loads(run(script, "public", ATEN_CPU_CAPABILITY=capability))
    assert found.keys() == known.keys()
    assert [label for label in known if found[label] != known[label]] == []


@pytest.mark.parametrize("instructions", ["SSE41", "AVX2", "AVX512_CORE"])
def test_a_library_that_saturates_changes_no_int8_gemm(kernels, instructions):
    """Without VNNI, oneDNN may add pairs of products in 16 bits, which saturates."""
    code = (
        "import digests, json, qatfast, torch;"
        "results = digests.layers(qatfast.functional, torch.float32);"
        "print(json.dumps({label: digests.digest(value) for label, value in results}))"
    )
    found = json.loads(run(["-c", code], ONEDNN_MAX_CPU_ISA=instructions))
    layers = digests.layers(IMPLEMENTATIONS["reference"], torch.float32)
    known = {label: digests.digest(value) for label, value in layers}
    assert len(known) > 100
    assert [label for label in known if found[label] != known[label]] == []


PRODUCTS = """
import json, sys, torch
import qatfast
from qatfast import PerToken, QATConfig, QuantSpec, functional

torch.manual_seed(0)
config = QATConfig(QuantSpec(8, granularity=PerToken()), QuantSpec(8, True, PerToken()), None, None)
shapes = [(1, 2, 1), (1, 200, 33), (1, 4099, 16), (2, 3, 5), (3, 1027, 48), (16, 64, 64), (33, 49, 33), (129, 2200, 70)]
wrong = {}
for word in sys.argv[1].split():
    torch.backends.mkldnn.enabled = word == "on"
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows, inputs, outputs in shapes:
            for kind in ("ends", "random"):
                x, w = torch.randn(rows, inputs), torch.randn(outputs, inputs)
                if kind == "ends":  # the largest products, mostly of one sign
                    x, w = torch.where(x > -1, 1.0, -1.0), torch.where(w > -1, 1.0, -1.0)
                sx, zx = functional.choose_qparams(x, granularity=PerToken())
                sw, zw = functional.choose_qparams(w, symmetric=True, granularity=PerToken())
                qx = functional.quantize(x, sx, zx, 0, 255, granularity=PerToken()).long() - zx[:, None]
                qw = functional.quantize(w, sw, zw, -127, 127, granularity=PerToken()).long()
                expected = (qx @ qw.t()).float() * (sx[:, None] * sw)
                y = functional.qat_linear(x, w, config=config)
                differing = int((y != expected).sum())
                if differing:
                    wrong[f"{word} {threads} threads {rows}x{inputs}x{outputs} {kind}"] = differing
print(json.dumps(wrong))
"""


@pytest.mark.parametrize("order", ["off on", "on off on"])
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE", "AVX512_CORE_VNNI", "DEFAULT"])
def test_int8_gemms_are_exact_whenever_onednn_is_switched(kernels, instructions, order):
    """The loop of torch runs while oneDNN is off.

    Its result must not prove that oneDNN is exact.
    """
    assert json.loads(run(["-c", PRODUCTS, order], ONEDNN_MAX_CPU_ISA=instructions)) == {}


@pytest.mark.parametrize("setting", ["autocast", "precision"])
def test_no_setting_of_float_products_reaches_int8_gemms(kernels, setting):
    """If oneDNN is not exact, the int8 GEMM is computed in floats."""
    code = """
import contextlib, sys, torch
from qatfast import QATConfig, functional

x, w = torch.where(torch.randn(2, 65, 2050) > -1, 1.0, -1.0)
specs = QATConfig.int8().codes
forward = torch.ops.qatfast.qat_linear_int8_forward
expected = forward(x, w, None, [], specs)[0]
torch.backends.mkldnn.enabled = False
if sys.argv[1] == "precision":
    torch.set_float32_matmul_precision("medium")
    settings = contextlib.nullcontext()
else:
    settings = torch.autocast("cpu", torch.bfloat16)
for enabled in (False, True):
    torch.backends.mkldnn.enabled = enabled
    with settings:
        y = forward(x, w, None, [], specs)[0]
    assert torch.equal(y, expected), (y - expected).abs().max()
"""
    run(["-c", code, setting], ONEDNN_MAX_CPU_ISA="AVX2")


ARITHMETIC = """
import ctypes, os, sys, torch
import cases
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QuantSpec, functional, reference

libm = ctypes.CDLL("libm.so.6")
torch.set_num_threads(1)  # the other threads begin in a fork, with what is set then

def calls():
    for dtype in cases.FLOATS:
        tiny = torch.finfo(cases.compute_dtype(dtype)).tiny
        for shape, granularity in (
            ((5,), PerTensor()), ((300, 401), PerTensor()), ((300, 401), PerChannel(0)), ((300, 401), PerChannel(1)),
            ((300, 400), PerToken()), ((300, 400), PerGroup(4)), ((300, 400), PerGroup(40)),
            ((64, 12, 9), PerChannel(1)),
        ):
            for factor in (1.0, 40 * tiny):  # ordinary numbers, and those whose steps are subnormal
                x = cases.mixed(shape, dtype)
                if dtype in (torch.float32, torch.float64):
                    x = x * factor
                g = {"granularity": granularity}
                yield "fake_quantize", (x,), g
                yield "choose_qparams", (x, 4), {"symmetric": True, **g}
                scale, zero_point = reference.choose_qparams(x, 8, **g)
                if factor != 1.0:
                    scale = scale * 0.3  # subnormal where it was the smallest normal number
                yield "fake_quantize_affine", (x, scale, zero_point, 0, 255), g
                yield "quantize", (x, scale, zero_point, 0, 255), g
                q = reference.quantize(x, scale, zero_point, 0, 255, **g)
                yield "dequantize", (q, scale, zero_point), {"dtype": dtype, **g}
        for inputs in (65, 33030):
            operands = cases.linear(((40,), inputs, 3), dtype)
            per_token = QATConfig(QuantSpec(8, granularity=PerToken()), QuantSpec(8), QuantSpec(8), QuantSpec(8))
            for config in (QATConfig.int8(), per_token):
                yield "qat_linear", operands, {"config": config}

known = [(op, args, kwargs, getattr(reference, op)(*args, **kwargs)) for op, args, kwargs in calls()]
rounding = {"upward": 0x800, "downward": 0x400, "towardzero": 0xC00}

def results(setting):
    if setting in rounding:
        assert libm.fesetround(rounding[setting]) == 0
    elif setting == "flush_denormal":
        assert torch.set_flush_denormal(True)
    else:
        assert libm.feenableexcept(0x3D) >= 0  # all
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([getattr(functional, op)(*args, **kwargs) for op, args, kwargs, _ in known])
    if setting in rounding:
        assert libm.fegetround() == rounding[setting], "it is left as it was"
        libm.fesetround(0)
    elif setting == "flush_denormal":
        assert (torch.tensor(2.0**-149) * 1.0).item() == 0, "it is left as it was"
        torch.set_flush_denormal(False)
    else:
        assert libm.fegetexcept() == 0x3D, "it is left as it was"
        libm.fedisableexcept(0x3D)
    return found

def check(setting):
    for (op, args, kwargs, expected), *found in zip(known, *results(setting), strict=True):
        for y in found:
            try:
                cases.assert_all_same(y, expected)
            except AssertionError as error:
                raise AssertionError(f"{op} {args[0].dtype} {tuple(args[0].shape)} {kwargs}: {error}") from None

for setting in sys.argv[1:]:
    if os.fork() == 0:
        check(setting)
        os._exit(0)
    assert os.wait()[1] == 0, setting
print(len(known))
"""


@pytest.mark.skipif(
    platform.machine() != "x86_64" or sys.platform != "linux", reason="the constants are those of x86-64"
)
@pytest.mark.arithmetic
def test_the_arithmetic_of_the_thread_changes_no_bit(kernels):
    """Another library may change rounding, traps and flushing.

    The kernels ignore and restore them.
    """
    settings = ("upward", "downward", "towardzero", "traps", "flush_denormal")
    assert int(run(["-c", ARITHMETIC, *settings])) > 300


def test_ranges_of_columns_take_no_memory_for_every_thread(kernels):
    code = """
import resource, torch
from qatfast import PerChannel, functional

torch.set_num_threads(64)
x = torch.ones(2, 4_000_000)
functional.choose_qparams(x[:, :1000], granularity=PerChannel(1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
scale, _ = functional.choose_qparams(x, granularity=PerChannel(1))
functional.fake_quantize(x, granularity=PerChannel(1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    kilobytes = int(run(["-c", code], OMP_NUM_THREADS="64"))
    assert kilobytes < 4 * 32_000, "scale, zero point and the result have 64 MB"


@DTYPES
@pytest.mark.parametrize("count", [3, 64])
@pytest.mark.parametrize(
    "shape", [(2, 70000), (70000, 2), (600, 500), (9, 4, 9000), (500, 90, 5), (3, 50, 700)], ids=cases.name
)
def test_columns_and_blocks_on_more_threads_than_they_are(kernels, threads, dtype, shape, count):
    threads(count)
    x = cases.mixed(shape, dtype)
    for axis in range(len(shape)):
        granularity = PerChannel(axis)
        expected = reference.choose_qparams(x, granularity=granularity)
        cases.assert_all_same(functional.choose_qparams(x, granularity=granularity), expected)
        y = functional.fake_quantize(x, granularity=granularity)
        cases.assert_same(y, reference.fake_quantize(x, granularity=granularity))


def test_convolutions_without_dot_products_of_int8(kernels):
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip("test_int8_windows.py runs on this instruction set")
    run(["-m", "pytest", "-q", str(ROOT / "tests" / "test_int8_windows.py")], ATEN_CPU_CAPABILITY="avx2")


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
        "import digests, json, operators, torch;"
        "results = digests.results(operators.IMPLEMENTATIONS['reference'], torch.float32, 60, 5000);"
        "print(json.dumps({label: digests.digest(value) for label, value in results if value.numel() < 5000}))"
    )
    found = json.loads(run(["-c", code], ATEN_CPU_CAPABILITY="default"))
    assert len(found) > 200
    assert [label for label in found if found[label] != digests.digest(expected(torch.float32)[label])] == []


@DTYPES
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerToken()], ids=str)
def test_quotients_next_to_ties(kernels, dtype, granularity):
    """Tests inputs at and next to half intervals, for random scales of all exponents.

    There, a division that is not IEEE division rounds to another level.
    """
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


@pytest.mark.parametrize("op", operators(), ids=str)
def test_every_way_to_an_operator_ends_in_the_dispatcher(kernels, op, device):
    class Names(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for call in op.calls(device=device):
        for implementation in ("public", "torch.ops"):
            with Names() as names:
                call.through(IMPLEMENTATIONS[implementation])
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
        for op in operators():
            next(op.calls()).through(functional)


def test_info_says_what_runs(device):
    facts = qatfast.kernels.info()
    loaded = cases.why_no_kernels("cpu") == ""
    assert facts["kernels"].startswith("loaded" if loaded else "not loaded: ")
    assert facts["torch"] == torch.__version__
    assert all(isinstance(value, str) and value for value in facts.values())
