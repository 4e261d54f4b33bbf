"""FakeQuantize, the module form of fake_quantize."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import Granularity, PerTensor, QuantSpec
from ..functional import fake_quantize


class FakeQuantize(torch.nn.Module):
    """A module that applies :func:`qatfast.fake_quantize` to its input.

    It has no parameters and no buffers, and its result is the same in training and in evaluation.

    Args:
        num_bits: number of bits, 2 to 16.
        symmetric: see :class:`qatfast.QuantSpec`.
        granularity: which elements share a scale.
        narrow_range: see :class:`qatfast.QuantSpec`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``num_bits`` is not from 2 to 16.

    Example:
        >>> FakeQuantize(num_bits=4)
        FakeQuantize(num_bits=4, symmetric=False, granularity=PerTensor())
    """

    def __init__(
        self,
        num_bits: int = 8,
        *,
        symmetric: bool = False,
        granularity: Granularity = PerTensor(),
        narrow_range: bool = True,
    ) -> None:
        super().__init__()
        self.spec = QuantSpec(num_bits, symmetric, granularity, narrow_range=narrow_range)

    def forward(self, input: Tensor) -> Tensor:
        return fake_quantize(input, **self.spec.arguments)

    def extra_repr(self) -> str:
        spec = self.spec
        narrow_range = "" if spec.narrow_range else ", narrow_range=False"
        return f"num_bits={spec.num_bits}, symmetric={spec.symmetric}, granularity={spec.granularity}{narrow_range}"
