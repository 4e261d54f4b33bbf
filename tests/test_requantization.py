"""int8_requantize_: the values of integers from sums, alone and in the call of a linear layer."""

import numpy as np
import pytest
import torch

import cases
import qatfast
from qatfast import (
    MinMax,
    PerChannel,
    QATConfig,
    QATLinear,
    QuantSpec,
    kernels,
    requantization,
)

pytestmark = [
    pytest.mark.skipif(kernels.extension is None, reason="there are no kernels"),
    pytest.mark.arithmetic,
]


def oracle(sums, offset, factor, low, high, scale):
    """In NumPy: the sum in int64, each operation rounded to float32."""
    total = (sums.numpy().astype(np.int64) + offset.numpy()).astype(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        level = np.clip(np.rint(total * factor.numpy()), np.float32(low), np.float32(high))
    return torch.from_numpy(level * np.float32(scale) + np.float32(0))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (5, 16), (300, 17), (33, 100), (3000, 64), (0, 4), (4, 0)])
def test_values_of_integers(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    reach = 2**30 if dtype == torch.int32 else 2**24
    sums = torch.randint(-reach, reach, shape, generator=generator, dtype=torch.int32)
    offset = torch.randint(-(2**30), 2**30, shape[1:], generator=generator, dtype=torch.int32)
    factor = torch.rand(shape[1:], generator=generator) * 2e-7
    factor[::5], factor[1::7] = torch.nan, torch.finfo(torch.float32).max
    expected = oracle(sums, offset, factor, -3.0, 252.0, 0.0123)
    given = sums.to(dtype)
    found = kernels.extension.int8_requantize_(given, offset, factor, -3.0, 252.0, 0.0123)
    assert found.data_ptr() == given.data_ptr()
    cases.assert_same(found.view(torch.float32), expected)


def test_ties_are_rounded_to_even_and_zeros_are_positive():
    sums = torch.tensor([[-3, -1, 1, 3, 5, 0]], dtype=torch.int32)
    half, zeros = torch.full((6,), 0.5), torch.zeros(6, dtype=torch.int32)
    found = kernels.extension.int8_requantize_(sums, zeros, half, -10.0, 10.0, 1.0).view(torch.float32)
    cases.assert_same(found, torch.tensor([[-2.0, 0.0, 0.0, 2.0, 2.0, 0.0]]))


@pytest.mark.parametrize(
    ("sums", "offset", "text"),
    [
        (
            torch.zeros(2, 3, dtype=torch.float64),
            torch.zeros(3, dtype=torch.int32),
            "a contiguous matrix of int32",
        ),
        (
            torch.zeros(2, 3),
            torch.zeros(2, dtype=torch.int32),
            "one int32 offset and one float32 factor per column",
        ),
    ],
)
def test_other_tensors_are_refused(sums, offset, text):
    with pytest.raises(ValueError, match=f"int8_requantize_: expected {text}"):
        kernels.extension.int8_requantize_(sums, offset, torch.ones(3), 0.0, 1.0, 1.0)
    assert not sums.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_linear_layer_in_one_call(dtype, bits):
    """The kernel gives what its steps give, for any leading dimensions, and NaN in the rows that hold one."""
    rows = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
    config = QATConfig(QuantSpec(bits, range=MinMax()), rows, None, QuantSpec(8, range=MinMax()))
    layer = QATLinear(24, 7, config=config)
    x = torch.randn(2, 3, 24)
    layer(x)
    integer = qatfast.convert(layer)
    operands, grid = integer._kept(integer._operands), (integer.input_scale, integer.input_zero_point)
    x[1, 2, 5] = torch.nan
    x = x.to(dtype)
    for input in (x, x[0], x[1], x[1, 2], x[:, :, ::2].repeat(1, 1, 2), x.transpose(0, 1)):
        results = [
            requantization.linear(input, *grid, (0, 2**bits - 1), one)
            for one in (operands, operands._replace(arguments=None))
        ]
        assert results[0].shape == (*input.shape[:-1], 7)
        torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(results[0].isnan().any(-1), input.isnan().any(-1))
    assert requantization.linear(x[:0], *grid, (0, 2**bits - 1), operands).shape == (0, 3, 7)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("columns", [1, 2, 15, 33, 1024, 1025, 2063])
def test_products_of_all_sizes(columns, count, threads):
    """Around the sizes of vectors and blocks, with the largest integers."""
    threads(count)
    for rows, outputs in ((1, 1), (5, 17), (7, 16), (259, 33), (800, 3), (70, 130)):
        x = cases.integers((rows, columns), torch.int8)
        weight = cases.integers((outputs, columns), torch.int8).flip(0).contiguous()
        x[0], weight[0], weight[-1] = -128, -128, 127
        expected = (x.double() @ weight.double().t()).to(torch.int32)
        assert torch.equal(kernels.extension.int8_mm(x, weight), expected)


def test_products_without_elements():
    x, weight = torch.zeros(3, 0, dtype=torch.int8), torch.zeros(2, 0, dtype=torch.int8)
    assert torch.equal(kernels.extension.int8_mm(x, weight), torch.zeros(3, 2, dtype=torch.int32))
    assert kernels.extension.int8_mm(x[:0], weight).shape == (0, 2)
    with pytest.raises(ValueError, match="int8_mm: expected int8 matrices of as many columns"):
        kernels.extension.int8_mm(x, weight.float())


@pytest.mark.parametrize("rows, outputs, columns", [(18, 8, 1), (1, 5, 8), (18, 1, 8)])
@pytest.mark.parametrize("stride", [1, 3, 9])
def test_products_for_any_strides_of_a_single_row_or_column(rows, outputs, columns, stride):
    """The strides of a dimension of size 1 mean nothing; oneDNN reads some of them."""
    generator = torch.Generator().manual_seed(0)

    def matrix(rows):
        flat = torch.randint(-128, 128, (rows * columns,), generator=generator, dtype=torch.int8)
        if columns == 1:
            return flat.as_strided((rows, 1), (1, stride))
        return flat.as_strided((rows, columns), (stride if rows == 1 else columns, 1))

    x, weight = matrix(rows), matrix(outputs)
    expected = x.long() @ weight.long().t()
    assert torch.equal(kernels.extension.int8_mm(x, weight).long(), expected)
    ones, zeros = torch.ones(1), torch.zeros(1, dtype=torch.int32)

    def int8_rows(values):
        sums, count = values.sum(1, dtype=torch.int64), len(values)
        return [values, ones.repeat(count), zeros.repeat(count), sums]

    product = torch.ops.qatfast.int8_product(int8_rows(x), int8_rows(weight), None)
    assert torch.equal(product, expected.float())


def test_a_linear_layer_reads_no_stride_of_a_single_row():
    rows = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
    layer = QATLinear(
        24, 7, config=QATConfig(QuantSpec(8, range=MinMax()), rows, None, QuantSpec(8, range=MinMax()))
    )
    x = torch.randn(1, 24)
    layer(x)
    integer = qatfast.convert(layer)
    assert torch.equal(integer(x.as_strided((1, 24), (1, 1))), integer(x))
