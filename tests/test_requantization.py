"""int8_requantize_: the values of integers from sums."""

import numpy as np
import pytest
import torch

import cases
from qatfast import kernels

pytestmark = pytest.mark.skipif(kernels.extension is None, reason="there are no kernels")


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
