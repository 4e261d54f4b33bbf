import copy
import dataclasses
import pickle

import numpy as np
import pytest

from qatfast import (
    Dynamic,
    Fixed,
    Learned,
    MinMax,
    MovingAverage,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QuantSpec,
)
from qatfast.config import granularity_from_code

GRANULARITIES = (PerTensor(), PerChannel(0), PerChannel(-2), PerGroup(32), PerToken())
GRANULARITY_WORDS = (
    "expected granularity to be PerTensor(), PerChannel(axis), PerGroup(group_size) or PerToken()"
)


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_a_granularity_is_its_code(granularity):
    assert granularity_from_code(granularity.code) == granularity
    assert [other for other in GRANULARITIES if other.code == granularity.code] == [granularity]


RANGES = (Dynamic(), MovingAverage(0.1), MinMax(), Learned(), Fixed(-1.0, 2.0))
VALUES = (
    *GRANULARITIES,
    *RANGES,
    QuantSpec(4),
    QuantSpec(4, symmetric=True, narrow_range=False),
    QuantSpec(range=MovingAverage()),
    QATConfig.int8(),
    QATConfig.static(4),
)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_values_are_frozen_hashable_and_survive_copies(value):
    for other in (copy.copy(value), copy.deepcopy(value), pickle.loads(pickle.dumps(value))):
        assert other == value
        assert hash(other) == hash(value)
        assert vars(other) == vars(value)
    assert eval(repr(value)) == value
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.num_bits = 3


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_files_hold_the_arguments_and_not_what_is_made_of_them(value):
    """Derived fields are computed again, so pickles of older versions may have other fields."""
    state = value.__getstate__()
    assert state == {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
    other = type(value).__new__(type(value))
    other.__setstate__({**state, "code": (), "codes": ((),)})
    assert vars(other) == vars(value)


def test_numpy_integers_become_ints():
    assert QuantSpec(np.int64(4)) == QuantSpec(4)
    assert type(QuantSpec(np.int64(4)).num_bits) is int
    assert PerChannel(np.int32(1)) == PerChannel(1)


@pytest.mark.parametrize("num_bits", range(2, 17))
def test_the_ends_of_the_integer_range(num_bits):
    affine, symmetric = QuantSpec(num_bits), QuantSpec(num_bits, symmetric=True)
    assert (affine.quant_min, affine.quant_max) == (0, 2**num_bits - 1)
    assert (symmetric.quant_min, symmetric.quant_max) == (-(2 ** (num_bits - 1)) + 1, 2 ** (num_bits - 1) - 1)


def test_the_recipes():
    affine = QuantSpec(5, False, PerTensor())
    assert QATConfig() == QATConfig.tutorial(8) == QATConfig.tutorial()
    assert QATConfig.tutorial(5) == QATConfig(input=None, weight=affine, bias=affine, output=affine)
    assert QATConfig.int8() == QATConfig(
        input=QuantSpec(8),
        weight=QuantSpec(8, symmetric=True, granularity=PerChannel(0)),
        bias=None,
        output=None,
    )
    assert QATConfig.dynamic() == QATConfig.dynamic(num_bits=8)
    assert QATConfig.dynamic(4) == QATConfig(
        input=QuantSpec(4, granularity=PerToken()),
        weight=QuantSpec(4, symmetric=True, granularity=PerChannel(0)),
        bias=None,
        output=None,
    )
    assert QATConfig.weight_only() == QATConfig.weight_only(num_bits=4, group_size=32)
    assert QATConfig.weight_only(3, 16) == QATConfig(
        weight=QuantSpec(3, granularity=PerGroup(16)), bias=None, output=None
    )


def test_the_recipes_with_a_static_input():
    weight = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
    static = QATConfig(QuantSpec(8, range=MovingAverage()), weight, None, None)
    assert QATConfig.static() == QATConfig.static(8) == static
    assert QATConfig.static(9).input == QuantSpec(9, range=MovingAverage())
    low = QuantSpec(4, symmetric=True, granularity=PerChannel(0), range=Learned())
    assert QATConfig.static(4) == QATConfig(QuantSpec(4, range=Learned()), low, None, None)
    full = QuantSpec(8, symmetric=True, range=MovingAverage(), narrow_range=False)
    symmetric = QATConfig.static(activations="symmetric")
    assert symmetric == QATConfig(full, weight, None, None)
    for name in ("onnxruntime", "executorch", "litert", "openvino", "coreml"):
        assert QATConfig.for_target(name) == static
    assert QATConfig.for_target("tensorrt") == symmetric


def test_which_configs_are_dynamic():
    assert QATConfig().is_dynamic
    assert QATConfig.weight_only().is_dynamic
    assert not QATConfig.static().is_dynamic
    assert not QATConfig(output=QuantSpec(range=Fixed(0, 1))).is_dynamic


def test_the_codes_of_a_config():
    assert QATConfig.int8().codes == (8, 0, 0, 0, 8, 1, 1, 0, *[0] * 8)
    assert QATConfig.weight_only(3, 16).codes == (*[0] * 4, 3, 0, 2, 16, *[0] * 8)


@pytest.mark.parametrize(
    "input, weight, expected",
    [
        (QuantSpec(8), QuantSpec(8), True),
        (QuantSpec(2, True, PerToken()), QuantSpec(2, True, PerToken()), True),
        (QuantSpec(8), QuantSpec(8, granularity=PerChannel(0)), True),
        (QuantSpec(8), QuantSpec(8, granularity=PerChannel(-2)), True),
        (QuantSpec(8), QuantSpec(8, granularity=PerGroup(6)), True),
        (QuantSpec(8), QuantSpec(8, granularity=PerGroup(3)), False),
        (QuantSpec(8), QuantSpec(8, granularity=PerGroup(12)), False),
        (QuantSpec(8), QuantSpec(8, granularity=PerChannel(1)), False),
        (QuantSpec(8), QuantSpec(8, granularity=PerChannel(-1)), False),
        (QuantSpec(8, granularity=PerGroup(6)), QuantSpec(8), False),
        (QuantSpec(8, granularity=PerChannel(0)), QuantSpec(8), False),
        (QuantSpec(9), QuantSpec(8), False),
        (QuantSpec(8), QuantSpec(9), False),
        (None, QuantSpec(8), False),
        (QuantSpec(8), None, False),
    ],
    ids=str,
)
def test_which_layers_multiply_integers(input, weight, expected):
    for others in (QuantSpec(16), None):
        config = QATConfig(input, weight, others, others)
        assert config.uses_int8_gemm(6) is expected


def test_the_recipes_that_multiply_integers():
    assert QATConfig.int8().uses_int8_gemm(100)
    assert QATConfig.dynamic().uses_int8_gemm(100)
    assert not QATConfig.dynamic(9).uses_int8_gemm(100)
    assert not QATConfig.tutorial().uses_int8_gemm(100)
    assert not QATConfig.weight_only(8, 100).uses_int8_gemm(100)


def test_words():
    assert str(QuantSpec(4, symmetric=True, granularity=PerGroup(32))) == "4-bit symmetric per group of 32"
    assert str(QuantSpec(8, granularity=PerChannel(-1))) == "8-bit affine per channel -1"
    assert str(QuantSpec(granularity=PerToken())) == "8-bit affine per token"
    assert str(QuantSpec(range=MinMax())) == "8-bit affine per tensor, MinMax()"


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: QuantSpec(1), ValueError, "QuantSpec: expected num_bits to be from 2 to 16, got 1"),
        (lambda: QuantSpec(17), ValueError, "QuantSpec: expected num_bits to be from 2 to 16, got 17"),
        (lambda: QuantSpec(2.5), TypeError, "QuantSpec: expected num_bits to be an int, got 2.5"),
        (lambda: QuantSpec(True), TypeError, "QuantSpec: expected num_bits to be an int, got True"),
        (lambda: QuantSpec("8"), TypeError, "QuantSpec: expected num_bits to be an int, got '8'"),
        (lambda: QuantSpec(8, 1), TypeError, "QuantSpec: expected symmetric to be a bool, got 1"),
        (
            lambda: QuantSpec(8, granularity="tensor"),
            TypeError,
            f"QuantSpec: {GRANULARITY_WORDS}, got 'tensor'",
        ),
        (lambda: PerChannel(1.0), TypeError, "PerChannel: expected axis to be an int, got 1.0"),
        (lambda: PerChannel(True), TypeError, "PerChannel: expected axis to be an int, got True"),
        (lambda: PerGroup(0), ValueError, "PerGroup: expected group_size to be at least 1, got 0"),
        (lambda: PerGroup(-4), ValueError, "PerGroup: expected group_size to be at least 1, got -4"),
        (lambda: PerGroup(None), TypeError, "PerGroup: expected group_size to be an int, got None"),
        (
            lambda: QATConfig(weight=8),
            TypeError,
            "QATConfig: expected weight to be a QuantSpec or None, got 8",
        ),
        (lambda: QATConfig.dynamic(1), ValueError, "QuantSpec: expected num_bits to be from 2 to 16, got 1"),
        (lambda: QATConfig.dynamic(True), TypeError, "QuantSpec: expected num_bits to be an int, got True"),
        (lambda: QATConfig.tutorial(0), ValueError, "QuantSpec: expected num_bits to be from 2 to 16, got 0"),
        (
            lambda: QATConfig(bias=QuantSpec(range=MinMax())),
            ValueError,
            "QATConfig: expected Dynamic() for the bias, got MinMax()",
        ),
        (
            lambda: QATConfig(input=QuantSpec(granularity=PerGroup(4), range=Fixed(0, 1))),
            ValueError,
            "QATConfig: expected Dynamic() for groups of the input, got Fixed(lo=0.0, hi=1.0)",
        ),
        (
            lambda: QuantSpec(granularity=PerToken(), range=Learned()),
            ValueError,
            "QuantSpec: expected Dynamic() for PerToken(), got Learned()",
        ),
        (lambda: QuantSpec(range="dynamic"), TypeError, "QuantSpec: expected range to be Dynamic(), Moving"),
        (
            lambda: MovingAverage(0),
            ValueError,
            "MovingAverage: expected averaging_constant to be greater than 0 and at most 1, got 0.0",
        ),
        (lambda: MovingAverage(1.5), ValueError, "and at most 1, got 1.5"),
        (lambda: MovingAverage(True), TypeError, "expected averaging_constant to be a number, got True"),
        (lambda: Fixed(1, 2), ValueError, "Fixed: expected finite lo <= 0 <= hi that are not both 0, got"),
        (lambda: Fixed(0, 0), ValueError, "Fixed: expected finite lo <= 0 <= hi that are not both 0, got"),
        (lambda: Fixed(0, float("inf")), ValueError, "Fixed: expected finite lo <= 0 <= hi"),
        (lambda: Fixed("0", 1), TypeError, "Fixed: expected lo to be a number, got '0'"),
        (
            lambda: QATConfig.static(activations="none"),
            ValueError,
            "QATConfig.static: expected activations to be 'affine' or 'symmetric', got 'none'",
        ),
        (
            lambda: QATConfig.for_target("onnx"),
            ValueError,
            "QATConfig.for_target: expected one of onnxruntime, executorch, litert, openvino, coreml, tensorrt",
        ),
        (
            lambda: QATConfig.weight_only(4, 0),
            ValueError,
            "PerGroup: expected group_size to be at least 1, got 0",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)
