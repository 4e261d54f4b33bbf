"""The modules: FakeQuantize and the quantized layers."""

from torch import nn

from .attention import QATMultiheadAttention
from .base import QuantizedLayer
from .conv import (
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATConvTranspose3d,
)
from .embedding import QATEmbedding
from .fake_quantize import FakeQuantize
from .linear import QATLinear

# The layers of torch.nn that have a quantized one, and which.
QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    cls._float_class: cls
    for cls in (
        QATLinear,
        QATConv1d,
        QATConv2d,
        QATConv3d,
        QATConvTranspose1d,
        QATConvTranspose2d,
        QATConvTranspose3d,
        QATEmbedding,
        QATMultiheadAttention,
    )
}

__all__ = [
    "QUANTIZED_LAYERS",
    "FakeQuantize",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATConvTranspose1d",
    "QATConvTranspose2d",
    "QATConvTranspose3d",
    "QATEmbedding",
    "QATLinear",
    "QATMultiheadAttention",
    "QuantizedLayer",
]
