"""The layers of a deployed model, which hold integers."""

from __future__ import annotations

from typing import Any

from torch import nn

from .attention import IntegerMultiheadAttention
from .base import IntegerLayer, Requantization
from .conv import (
    IntegerConv1d,
    IntegerConv2d,
    IntegerConv3d,
    IntegerConvTranspose1d,
    IntegerConvTranspose2d,
    IntegerConvTranspose3d,
)
from .embedding import IntegerEmbedding
from .linear import IntegerLinear

# By the quantized layer that each is made of.
INTEGER_LAYERS: dict[type[nn.Module], Any] = {
    cls._source: cls
    for cls in (
        *(IntegerConv1d, IntegerConv2d, IntegerConv3d),
        *(IntegerConvTranspose1d, IntegerConvTranspose2d, IntegerConvTranspose3d),
        *(IntegerEmbedding, IntegerLinear, IntegerMultiheadAttention),
    )
}

__all__ = [
    "INTEGER_LAYERS",
    "IntegerConv1d",
    "IntegerConv2d",
    "IntegerConv3d",
    "IntegerConvTranspose1d",
    "IntegerConvTranspose2d",
    "IntegerConvTranspose3d",
    "IntegerEmbedding",
    "IntegerLayer",
    "IntegerLinear",
    "IntegerMultiheadAttention",
    "Requantization",
]
