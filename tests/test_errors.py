"""Illegal arguments: types and messages of all errors; no argument is changed, nothing crashes."""

import dataclasses
import inspect
import math
from typing import Any, NamedTuple

import pytest
import torch

import cases
from operators import IMPLEMENTATIONS, operators
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QuantSpec, functional

PYTHON = ("public", "reference")  # errors that a schema cannot express
EVERYWHERE = ("public", "reference", "torch.ops")
FLOAT_RULE = "to be float32, float64, float16 or bfloat16"


class Bad(NamedTuple):
    op: str
    arguments: dict[str, Any]
    error: type[Exception]
    message: str
    through: tuple[str, ...] = EVERYWHERE


def x(*shape, dtype=torch.float32, device="cpu"):
    return torch.zeros(shape, dtype=dtype, device=device)


def parameters(op):
    return inspect.signature(getattr(functional, op)).parameters


def good(op, **changes):
    """Returns legal arguments of ``op`` with ``changes``."""
    legal = {
        "input": x(4, 6, dtype=torch.int8 if op == "dequantize" else torch.float32),
        "scale": torch.tensor(0.5),
        "zero_point": torch.tensor(0, dtype=torch.int32),
        "quant_min": -8,
        "quant_max": 7,
        "weight": x(3, 6),
        "bias": x(3),
    }
    return {**{name: value for name, value in legal.items() if name in parameters(op)}, **changes}


def bad(op, error, message, through=EVERYWHERE, **changes):
    return Bad(op, good(op, **changes), error, f"{op}: {message}", through)


def dynamic(op):
    granularity_words = (
        "expected granularity to be PerTensor(), PerChannel(axis), PerGroup(group_size) or PerToken(), got "
    )
    for num_bits in (1, 17, 0, -8, 2**40):
        yield bad(op, ValueError, f"expected num_bits to be from 2 to 16, got {num_bits}", num_bits=num_bits)
    for num_bits in (2.5, 8.0, True, "8", None, torch.tensor(8)):
        yield bad(
            op, TypeError, f"expected num_bits to be an int, got {num_bits!r}", PYTHON, num_bits=num_bits
        )
    yield bad(
        op, ValueError, "expected num_bits to be from 2 to 16, got " + "1" + "0" * 30, PYTHON, num_bits=10**30
    )
    for symmetric in (1, 0, None, "yes"):
        words = f"expected symmetric to be a bool, got {symmetric!r}"
        yield bad(op, TypeError, words, PYTHON, symmetric=symmetric)
    for granularity in (None, 0, "per_tensor", PerTensor, (0, 0), QuantSpec()):
        yield bad(op, TypeError, f"{granularity_words}{granularity!r}", PYTHON, granularity=granularity)
    yield from floats_only(op)
    yield from blocks(op)


def floats_only(op, name="input"):
    for dtype in (torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64):
        words = f"expected {name} {FLOAT_RULE}, got {cases.name(dtype)}"
        yield bad(op, TypeError, words, **{name: x(4, 6, dtype=dtype)})
    words = f"expected {name} {FLOAT_RULE}, got float8_e4m3fn"
    yield bad(op, TypeError, words, **{name: x(4, 6).to(torch.float8_e4m3fn)})
    yield from tensors_only(op, name)


def tensors_only(op, name):
    for value, kind in ((1.0, "float"), ([1.0], "list"), (None, "NoneType"), (x(3).numpy(), "ndarray")):
        yield bad(op, TypeError, f"expected {name} to be a torch.Tensor, got {kind}", PYTHON, **{name: value})
    for layout in ("sparse_coo", "sparse_csr"):
        value = x(4, 6).to_sparse(layout=getattr(torch, layout))
        words = f"expected {name} to be a strided tensor, got torch.{layout}"
        yield bad(op, TypeError, words, PYTHON, **{name: value})
    words = f"expected {name} to be a strided tensor, got torch._mkldnn"
    yield bad(op, TypeError, words, PYTHON, **{name: x(4, 6).to_mkldnn()})


def blocks(op):
    scalar = {"input": good(op)["input"][0, 0]}
    for granularity in (PerChannel(0), PerChannel(-1), PerGroup(1), PerToken()):
        words = f"expected PerTensor() for a 0-dimensional input, got {granularity}"
        yield bad(op, ValueError, words, **scalar, granularity=granularity)
    for axis in (2, -3, 2**40):
        words = f"expected axis to be from -2 to 1 for an input of 2 dimensions, got {axis}"
        yield bad(op, ValueError, words, granularity=PerChannel(axis))
    for size in (4, 7, 12):
        words = f"expected the last dimension to be divisible by group_size={size}, got 6"
        yield bad(op, ValueError, words, granularity=PerGroup(size))


def given(op):
    int8 = op == "dequantize"
    subject = "float32 output" if int8 else "float32 input"
    yield from blocks(op)
    for dtype in (torch.float64, torch.float16, torch.int32, torch.bool, torch.complex64):
        words = f"expected scale to be float32 for {subject}, got {cases.name(dtype)}"
        yield bad(op, TypeError, words, scale=torch.tensor(1, dtype=dtype))
    double = {"dtype": torch.float64} if int8 else {"input": x(4, 6, dtype=torch.float64)}
    words = f"expected scale to be float64 for {subject.replace('float32', 'float64')}, got float32"
    yield bad(op, TypeError, words, **double)
    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.bool, torch.complex64):
        words = f"expected zero_point to be an integer tensor, got {cases.name(dtype)}"
        yield bad(op, TypeError, words, zero_point=torch.tensor(0, dtype=dtype))
    for granularity, shape, wrong in (
        (PerTensor(), "()", (2,)),
        (PerTensor(), "()", (1, 1, 1)),
        (PerTensor(), "()", (0,)),
        (PerChannel(0), "(4,)", (6,)),
        (PerChannel(1), "(6,)", ()),
        (PerChannel(-1), "(6,)", (1,)),
        (PerChannel(0), "(4,)", (1, 4)),
        (PerChannel(1), "(6,)", (6, 1)),
        (PerGroup(3), "(4, 2)", (4,)),
        (PerGroup(3), "(4, 2)", (8,)),
        (PerGroup(3), "(4, 2)", (4, 1, 2)),
        (PerToken(), "(4,)", (1, 4)),
        (PerToken(), "(4,)", (1,)),
    ):
        words = f"to have shape {shape} for {granularity}, got {wrong}"
        yield bad(op, ValueError, f"expected scale {words}", scale=torch.ones(wrong), granularity=granularity)
        right = torch.ones(eval(shape))
        zero_point = torch.zeros(wrong, dtype=torch.int32)
        words = f"expected zero_point {words}"
        yield bad(op, ValueError, words, scale=right, zero_point=zero_point, granularity=granularity)
    for value in (0.0, -0.0, -1.0, math.nan, math.inf, -math.inf):
        words = f"expected scale to be positive and finite, got {value:g}"
        yield bad(op, ValueError, words, scale=torch.tensor(value))
        yield bad(op, ValueError, words, PYTHON, scale=value)
        scale = torch.ones(4).index_fill_(0, torch.tensor(2), value)
        per_channel = {"zero_point": torch.zeros(4, dtype=torch.int32), "granularity": PerChannel(0)}
        yield bad(op, ValueError, words, scale=scale, **per_channel)
    low, high = (-32768, 65535) if int8 else (-8, 7)
    words = f"expected zero_point to be from {low} to {high}, got "
    for value in (low - 1, high + 1, -(2**31), 2**31 - 1, 2**31, 2**62):
        yield bad(op, ValueError, words, zero_point=torch.tensor(value))
        yield bad(op, ValueError, words, PYTHON, zero_point=value)
    yield bad(op, ValueError, f"{words}{2**70}", PYTHON, zero_point=2**70)
    for value in (1.5, 3.0, math.nan, math.inf, True, "0", None, [0]):
        words = f"expected zero_point to be a torch.Tensor or an int, got {value!r}"
        yield bad(op, TypeError, words, PYTHON, zero_point=value)
    for value in (True, "1", None, [1.0]):
        words = f"expected scale to be a torch.Tensor or a number, got {value!r}"
        yield bad(op, TypeError, words, PYTHON, scale=value)
    words = "expected scale to be positive and finite, got "
    yield bad(op, ValueError, words, PYTHON, scale=10**400)
    for value, inexact in ((1e39, "inf"), (3.4028235677973366e38, "inf"), (1e-50, "0"), (2.0**-150, "0")):
        yield bad(op, ValueError, f"{words}{value:g}, which is {inexact} in float32", PYTHON, scale=value)
    for dtype, value in (
        (torch.uint64, 2**64 - 8),
        (torch.uint64, 2**63),
        (torch.int64, 2**32),
        (torch.uint32, 2**31),
    ):
        words = f"expected zero_point to be from {low} to {high}, got {value}"
        yield bad(op, ValueError, words, zero_point=torch.tensor(value, dtype=dtype))
    if not int8:
        for dtype, value in (
            (torch.int8, -128),
            (torch.uint8, 200),
            (torch.int16, 300),
            (torch.uint16, 65535),
        ):
            words = f"expected zero_point to be from {low} to {high}, got {value}"
            yield bad(op, ValueError, words, zero_point=torch.tensor(value, dtype=dtype))
    if op != "quantize":  # integer results have no gradient
        words = (
            "expected scale not to require grad, got one that does; write fake_quantize_learned to train it"
        )
        yield bad(op, ValueError, words, scale=torch.tensor(1.0, requires_grad=True))
    for granularity in (PerChannel(0), PerGroup(3), PerToken()):
        words = f"expected scale to be a torch.Tensor for {granularity}, got 0.5"
        yield bad(op, TypeError, words, PYTHON, scale=0.5, zero_point=0, granularity=granularity)
    for name in ("scale", "zero_point"):
        words = f"expected {name} on cpu, the device of input, got meta"
        yield bad(op, RuntimeError, words, **{name: good(op)[name].to("meta")})
        words = f"expected {name} to be a strided tensor, got torch.sparse_coo"
        full = {"scale": torch.ones(4), "zero_point": torch.zeros(4, dtype=torch.int32)}
        full[name] = full[name].to_sparse()
        yield bad(op, TypeError, words, PYTHON, **full, granularity=PerChannel(0))


def ranges(op):
    for low, high in ((0, 0), (7, -8), (-32769, 0), (0, 65536), (-(2**40), 2**40)):
        words = f"expected -32768 <= quant_min < quant_max <= 65535, got quant_min={low}, quant_max={high}"
        yield bad(op, ValueError, words, quant_min=low, quant_max=high)
    words = "expected quant_max - quant_min <= 65535, got 98303"
    yield bad(op, ValueError, words, quant_min=-32768, quant_max=65535)
    for value in (1.0, True, None, "1", torch.tensor(1)):
        words = f"expected quant_min to be an int, got {value!r}"
        yield bad(op, TypeError, words, PYTHON, quant_min=value)
        words = f"expected quant_max to be an int, got {value!r}"
        yield bad(op, TypeError, words, PYTHON, quant_max=value)


def linear():
    op = "qat_linear"
    yield from floats_only(op)
    yield from floats_only(op, "weight")
    yield from (case for case in floats_only(op, "bias") if "NoneType" not in case.message)
    for name in ("weight", "bias"):
        shape = good(op)[name].shape
        words = f"expected {name} to be float32, the dtype of input, got float64"
        yield bad(op, TypeError, words, **{name: x(*shape, dtype=torch.float64)})
        words = f"expected {name} on cpu, the device of input, got meta"
        yield bad(op, RuntimeError, words, **{name: x(*shape, device="meta")})
    yield bad(
        op,
        RuntimeError,
        "expected weight on meta, the device of input, got cpu",
        input=x(4, 6, device="meta"),
    )
    for shape in ((), (6,), (3, 6, 1), (1, 3, 6)):
        words = f"expected weight to have shape (out_features, in_features), got {shape}"
        yield bad(op, ValueError, words, weight=x(*shape))
    for shape in ((4, 5), (6, 4), (), (0,), (1,), (2, 3, 1)):
        words = f"expected input to have shape (..., 6), the in_features of weight, got {shape}"
        yield bad(op, ValueError, words, input=x(*shape))
    for shape in ((4,), (1,), (), (1, 3), (3, 1), (0,)):
        words = f"expected bias to have shape (3,), the out_features of weight, got {shape}"
        yield bad(op, ValueError, words, bias=x(*shape))
    for config in (None, 8, QuantSpec(), QATConfig):
        yield bad(op, TypeError, f"expected config to be a QATConfig, got {config!r}", PYTHON, config=config)
    for name, size in (("input", 6), ("weight", 6), ("bias", 3), ("output", 3)):
        config = QATConfig(**{name: QuantSpec(granularity=PerGroup(4))})
        words = f"{name}: expected the last dimension to be divisible by group_size=4, got {size}"
        yield bad(op, ValueError, words, config=config)
    for name, dims, axis in (("input", 2, 2), ("weight", 2, -3), ("bias", 1, 1), ("output", 2, 5)):
        config = QATConfig(**{name: QuantSpec(granularity=PerChannel(axis))})
        words = f"{name}: expected axis to be from {-dims} to {dims - 1} for an input of {dims} dimensions, got {axis}"
        yield bad(op, ValueError, words, config=config)


def int8_linear():
    """Yields the errors of a layer with int8 GEMM, whose messages are those of other layers."""
    for case in linear():
        if "config" not in case.arguments:
            yield case._replace(arguments={**case.arguments, "config": QATConfig.int8()})
    for name, size in (("bias", 3), ("output", 3)):
        config = dataclasses.replace(QATConfig.int8(), **{name: QuantSpec(granularity=PerGroup(4))})
        words = f"{name}: expected the last dimension to be divisible by group_size=4, got {size}"
        yield bad("qat_linear", ValueError, words, config=config)


def of_all_operators():
    """Yields the errors that follow from the parameters of an operator."""
    for op in operators():
        if "num_bits" in parameters(op.name):
            yield from dynamic(op.name)
        elif "scale" in parameters(op.name) and "scale" not in op.differentiable:
            yield from given(op.name)
            if "quant_min" in parameters(op.name):
                yield from floats_only(op.name)
                yield from ranges(op.name)


def others():
    for dtype in (torch.float32, torch.int32, torch.int64, torch.bool, torch.complex64):
        words = f"expected input to be int8, uint8, int16 or uint16, got {cases.name(dtype)}"
        yield bad("dequantize", TypeError, words, input=x(4, 6, dtype=dtype))
    yield from tensors_only("dequantize", "input")
    for dtype in (torch.int8, torch.complex64, torch.bool):
        yield bad("dequantize", TypeError, f"expected dtype {FLOAT_RULE}, got {dtype}", PYTHON, dtype=dtype)
        words = f"expected dtype {FLOAT_RULE}, got {cases.name(dtype)}"
        yield bad("dequantize", TypeError, words, ("torch.ops",), dtype=dtype)
    for dtype in (None, "float32", float, 32):
        yield bad("dequantize", TypeError, f"expected dtype {FLOAT_RULE}, got {dtype}", PYTHON, dtype=dtype)
    words = (
        "expected quant_min and quant_max to fit in one of int8, uint8, int16 and uint16, got quant_min=-1, "
    )
    yield bad("quantize", ValueError, words + "quant_max=40000", quant_min=-1, quant_max=40000)
    words = "expected quant_min and quant_max to fit in one of int8, uint8, int16 and uint16, got quant_min=-20000, "
    yield bad("quantize", ValueError, words + "quant_max=32768", quant_min=-20000, quant_max=32768)


TABLE = [
    *of_all_operators(),
    *others(),
    *linear(),
    *int8_linear(),
]
NAMES = [
    f"{case.op}-{case.message.removeprefix(case.op + ': ').removeprefix('expected ')}"[:90] for case in TABLE
]


def copy_of(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


def assert_unchanged(value, before):
    if not isinstance(value, torch.Tensor) or value.is_meta:
        return
    if value.layout == torch.strided and not value.is_complex() and value.dtype != torch.float8_e4m3fn:
        cases.assert_same(value, before)
    else:
        assert torch.equal(value.to_dense().to(torch.complex64), before.to_dense().to(torch.complex64))


@pytest.mark.parametrize("case", TABLE, ids=NAMES)
@pytest.mark.parametrize("through", EVERYWHERE)
def test_type_and_words(case, through):
    if through not in case.through:
        pytest.skip("torch.ops has this error from its schema")
    if through == "torch.ops" and (reason := cases.why_no_kernels("cpu")):
        pytest.skip(reason)
    before = {name: copy_of(value) for name, value in case.arguments.items()}
    with pytest.raises(case.error) as caught:
        getattr(IMPLEMENTATIONS[through], case.op)(**case.arguments)
    assert type(caught.value) is case.error
    assert case.message in str(caught.value)
    for name, value in case.arguments.items():
        assert_unchanged(value, before[name])


@pytest.mark.parametrize(
    "case", [case for case in TABLE if "strided" in case.message], ids=lambda case: case.message
)
def test_other_layouts_reach_no_kernel_through_torch_ops(kernels, case):
    with pytest.raises((TypeError, NotImplementedError)):
        getattr(IMPLEMENTATIONS["torch.ops"], case.op)(**case.arguments)


@pytest.mark.parametrize("op", operators(), ids=str)
def test_nested_tensors(op):
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    for implementation in PYTHON:
        with pytest.raises(TypeError, match=f"{op}: expected input to be a strided tensor"):
            next(op.calls()).replaced(input=nested).through(IMPLEMENTATIONS[implementation])


@pytest.mark.parametrize("code", [(4, 0), (-1, 0), (2, 0), (2, -1), (0,), (0, 0, 0), ()], ids=str)
def test_granularities_that_do_not_exist(kernels, code):
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.qatfast.fake_quantize(x(4, 6), 8, False, code)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.qatfast.quantize(x(4, 6), torch.tensor(1.0), torch.tensor(0), 0, 15, code)


@pytest.mark.parametrize(
    "code",
    [
        (),
        (8,),
        (8, 0, 0),
        (8, 0, 0, 0, 0),
        (1, 0, 0, 0),
        (17, 0, 0, 0),
        (-8, 0, 0, 0),
        (8, 0, 9, 0),
        (8, 3, 0, 0),
    ],
)
@pytest.mark.parametrize("position", range(4))
def test_specs_that_do_not_exist(kernels, code, position):
    for specs in (0,) * 16, QATConfig.int8().codes:
        specs = specs[: 4 * position] + code + specs[4 * position + 4 :]
        with pytest.raises(ValueError, match="qat_linear"):
            torch.ops.qatfast.qat_linear(x(4, 6), x(3, 6), x(3), specs)


def integers(*, rows=3, columns=6, dtype=torch.float32, **changes):
    """Returns the tensors of an int8 weight with ``changes``."""
    kinds = {"scale": dtype, "zero_point": torch.int32, "level_sums": torch.int64}
    right = {name: x(rows, dtype=kind) for name, kind in kinds.items()}
    return list({"values": x(rows, columns, dtype=torch.int8), **right, **changes}.values())


INT8_WEIGHT = "expected int8_weight as qat_linear_int8_weight returns it for this weight"


@pytest.mark.parametrize(
    "given, message",
    [
        (integers()[:3], "expected the 4 tensors of qat_linear_int8_weight, got 3"),
        (integers(rows=4), INT8_WEIGHT),
        (integers(columns=5), INT8_WEIGHT),
        (integers(dtype=torch.float64), INT8_WEIGHT),
        (integers(values=x(3, 6, dtype=torch.uint8)), INT8_WEIGHT),
        (integers(values=x(6, 3, dtype=torch.int8).t()), INT8_WEIGHT),
        (integers(scale=x(3, 1)), INT8_WEIGHT),
        (integers(scale=x(6)[::2]), INT8_WEIGHT),
        (integers(zero_point=x(3, dtype=torch.int64)), INT8_WEIGHT),
        (integers(zero_point=x(dtype=torch.int32)), INT8_WEIGHT),
        (integers(level_sums=x(2, dtype=torch.int64)), INT8_WEIGHT),
        (integers(level_sums=x(3, dtype=torch.int32)), INT8_WEIGHT),
    ],
)
def test_integers_of_another_weight_crash_nothing(kernels, given, message):
    for operator in (torch.ops.qatfast.qat_linear_int8, torch.ops.qatfast.qat_linear_int8_forward):
        with pytest.raises(ValueError, match=f"qat_linear: {message}"):
            operator(x(4, 6), x(3, 6), x(3), given, QATConfig.int8().codes)


@pytest.mark.parametrize(
    "code", [(0, 0, 0, 0), (9, 0, 0, 0), (8, 0, 1, 1), (8, 0, 1, -1), (8, 0, 2, 3), (8, 0, 2, 12)], ids=str
)
def test_the_int8_gemm_takes_no_other_specs(kernels, code):
    operators, specs = torch.ops.qatfast, QATConfig.int8().codes
    words = "qat_linear: expected a weight spec of at most 8 bits per tensor or per row, got "
    for shape in ((3, 6), (6,)):
        with pytest.raises(ValueError, match=words):
            operators.qat_linear_int8_weight(x(*shape), code)
    with pytest.raises(ValueError, match=words):
        operators.qat_linear_int8(x(4, 6), x(3, 6), None, [], specs[:4] + code + specs[8:])
    words = "qat_linear: expected an input spec of at most 8 bits per tensor or per token, got "
    with pytest.raises(ValueError, match=words):
        operators.qat_linear_int8(x(4, 6), x(3, 6), None, [], code + specs[4:])


def test_the_weight_of_the_int8_gemm_is_a_float_matrix(kernels):
    code = QATConfig.int8().weight.code
    with pytest.raises(TypeError, match=f"qat_linear: expected weight {FLOAT_RULE}, got int8"):
        torch.ops.qatfast.qat_linear_int8_weight(x(3, 6, dtype=torch.int8), code)
    for shape in ((6,), (), (2, 3, 6)):
        with pytest.raises(ValueError, match="qat_linear: expected a weight"):
            torch.ops.qatfast.qat_linear_int8_weight(x(*shape), code)


@pytest.mark.parametrize(
    "given",
    [
        integers(values=x(18, dtype=torch.int8)),
        integers(values=x(3, 6, dtype=torch.uint8)),
        integers(values=x(6, 3, dtype=torch.int8).t()),
        integers(scale=x(4)),
        integers(scale=x(3, dtype=torch.float64)),
        integers(zero_point=x(4, dtype=torch.int32)),
        integers(zero_point=x(3, dtype=torch.int64)),
    ],
)
def test_wrong_integers_of_an_input_crash_nothing(kernels, given):
    words = "qat_linear_int8_input: expected the values, scale and zero_point of the layer's forward"
    with pytest.raises(ValueError, match=words):
        torch.ops.qatfast.qat_linear_int8_input(*given[:3], torch.float32)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"int8_input": integers()[:3]}, "expected the 4 tensors of int8 rows, got 3 and 4"),
        ({"int8_input": integers(columns=5)}, "expected int8 rows of input and weight with as many columns"),
        ({"int8_weight": integers(dtype=torch.float64)}, "expected int8 rows of input and weight"),
        ({"int8_input": integers(level_sums=x(3))}, "expected int8 rows of input and weight"),
        ({"bias": x(4)}, "expected int8 rows of input and weight"),
    ],
)
def test_a_product_of_int8_rows_says_what_does_not_fit(kernels, changes, words):
    arguments = {"int8_input": integers(), "int8_weight": integers(), "bias": None, **changes}
    with pytest.raises(ValueError, match=f"int8_product: {words}"):
        torch.ops.qatfast.int8_product(*arguments.values())


LAYER_OF_BACKWARD = r"expected the gradient, input and weight of one layer, got \("
ROWS_SPEC = (8, True, 3, 0)


@pytest.mark.parametrize(
    "grad, weight, spec, words",
    [
        (x(4), x(4, 6), ROWS_SPEC, LAYER_OF_BACKWARD),
        (x(2, 4), x(4, 6), ROWS_SPEC, LAYER_OF_BACKWARD),
        (x(3, 5), x(4, 6), ROWS_SPEC, LAYER_OF_BACKWARD),
        (x(3, 4), x(4, 7), ROWS_SPEC, LAYER_OF_BACKWARD),
        (x(3, 4), x(4, 6, 1), ROWS_SPEC, "expected a weight spec of at most 8 bits"),
        (x(3, 4), x(4, 6), (9, True, 3, 0), "expected a weight spec of at most 8 bits"),
        (x(3, 4), x(4, 6), (0, 0, 0, 0), "expected a weight spec of at most 8 bits"),
        (x(3, 4), x(4, 6), (), r"expected a spec \(num_bits, grid, kind, argument\)"),
    ],
)
def test_a_backward_of_the_int8_gemm_says_what_does_not_fit(kernels, grad, weight, spec, words):
    values, scale, zero_point, _ = integers()
    with pytest.raises(ValueError, match=f"qat_linear_int8_backward: {words}"):
        torch.ops.qatfast.qat_linear_int8_backward(grad, values, scale, zero_point, weight, spec)


@pytest.mark.parametrize("grad, input", [(x(3), x(3, 6)), (x(3, 4), x(3)), (x(3, 4), x(4, 6))])
def test_a_weight_gradient_says_what_does_not_fit(kernels, grad, input):
    words = r"qat_linear_grad_weight: expected the gradient and input of one layer, got \(3"
    with pytest.raises(ValueError, match=words):
        torch.ops.qatfast.qat_linear_grad_weight(grad, input)


@pytest.mark.parametrize(
    "grad, mask, stride",
    [
        (x(4, 6), torch.zeros(2, dtype=torch.uint8), (6, 1)),
        (x(4, 6), torch.zeros(3), (6, 1)),
        (x(4, 6), torch.zeros(3, dtype=torch.uint8), (6,)),
        (x(4, 6), torch.zeros(3, dtype=torch.uint8), (100, 1)),
        (x(4, 6), torch.zeros(3, dtype=torch.uint8), (0, 0)),
        (x(4, 6), torch.zeros(3, dtype=torch.uint8), (-6, 1)),
        (x(4, 6, dtype=torch.int32), torch.zeros(3, dtype=torch.uint8), (6, 1)),
        (x(4, 6), torch.zeros(6, dtype=torch.uint8)[::2], (6, 1)),
        (x(4, 6), torch.zeros(3, dtype=torch.uint8, device="meta"), (6, 1)),
    ],
)
def test_a_backward_with_wrong_arguments_crashes_nothing(kernels, grad, mask, stride):
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.qatfast.fake_quantize_affine_backward(grad, mask, stride)


@pytest.mark.parametrize(
    "function, arguments, message",
    [
        ("fake_quantize", (x(3), 8, False, (0, 0), True, 1), "expected at most 5 arguments, got 6"),
        ("fake_quantize", (3, 8, False, (0, 0), True), "expected argument 1 to be a tensor, got int"),
        ("fake_quantize", (x(3), "8", False, (0, 0), True), "expected argument 2 to be an int, got str"),
        ("fake_quantize", (x(3), 8, "no", (0, 0), True), "expected argument 3 to be a bool, got str"),
        (
            "fake_quantize",
            (x(3), 8, False, None, True),
            "expected argument 4 to be a tuple of integers, got NoneType",
        ),
        (
            "fake_quantize",
            (x(3), 8, False, [0, 0]),
            "expected argument 4 to be a tuple of integers, got list",
        ),
        ("relu", (x(3), "6"), "expected argument 2 to be a number or None, got str"),
        (
            "qat_linear",
            (x(4, 6), x(3, 6), 3, (0,) * 16),
            "expected argument 3 to be a tensor or None, got int",
        ),
        ("qat_linear", (x(4, 6), x(3, 6), None, (0,) * 16, 3), "argument 5 to be a dtype or None, got int"),
        ("int8_product", ((x(3), 4), (), None), "expected argument 1 to be a tuple of tensors, got int"),
        ("int8_mm", (x(3), x(3), x(3)), "expected at most 2 arguments, got 3"),
        ("int8_mm", (x(3), 4), "expected argument 2 to be a tensor, got int"),
    ],
)
def test_direct_entries_say_which_argument_does_not_fit(kernels, function, arguments, message):
    with pytest.raises(TypeError) as caught:
        getattr(kernels, function)(*arguments)
    assert str(caught.value).startswith(f"{function}: ")
    assert message in str(caught.value)


@pytest.mark.parametrize("op", operators(), ids=str)
def test_granularity_and_the_like_are_keyword_only(op):
    arguments = next(op.calls()).arguments.values()
    for implementation in PYTHON:
        with pytest.raises(TypeError, match="positional argument"):
            getattr(IMPLEMENTATIONS[implementation], op.name)(*arguments)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("op", [op for op in operators("cuda") if len(next(op.calls()).tensors) > 1], ids=str)
def test_two_devices(op):
    call = next(op.calls())
    name = list(call.tensors)[1]
    with pytest.raises(RuntimeError, match=f"{op}: expected {name} on cuda:0, the device of input, got cpu"):
        call.replaced(input=call.arguments["input"].cuda()).through(functional)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_what_a_backward_reads_is_on_one_device():
    operators, of_layer = torch.ops.qatfast, integers()[:3]
    for index, name in ((1, "scale"), (2, "zero_point")):
        given = [tensor if i == index else tensor.cuda() for i, tensor in enumerate(of_layer)]
        words = f"qat_linear_int8_input: expected {name} on cuda:0, the device of input, got cpu"
        with pytest.raises(RuntimeError, match=words):
            operators.qat_linear_int8_input(*given, torch.float32)
    grid = torch.tensor(1.0).cuda(), torch.tensor(0, dtype=torch.int32).cuda()
    words = "fake_quantize_learned_backward: expected grad on cuda:0, the device of input, got cpu"
    with pytest.raises(RuntimeError, match=words):
        operators.fake_quantize_learned_backward(x(4, 6), x(4, 6).cuda(), *grid, 0, 15, (0, 0))
