"""The layers of a deployed model, which hold integers."""

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

__all__ = [
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
