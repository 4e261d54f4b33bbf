"""Fake quantization for PyTorch: fused kernels, a drop-in nn.Linear and a reference."""

import torch

from . import functional, reference
from .calibration import calibrate, freeze, quantization_disabled, sync_ranges, unfreeze
from .config import (
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
from .functional import (
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_affine,
    fake_quantize_learned,
    qat_linear,
    quantize,
    search_qparams,
)
from .model import Summary, prepare, summary, unused_layers
from .modules import (
    FakeQuantize,
    QATConv1d,
    QATConv2d,
    QATConv3d,
    QATConvTranspose1d,
    QATConvTranspose2d,
    QATConvTranspose3d,
    QATEmbedding,
    QATLinear,
    QATMultiheadAttention,
)
from .weight_cache import cached_weights

__version__ = "0.1.0"

# torch.load(weights_only=True) loads objects of registered classes only.
torch.serialization.add_safe_globals(
    [
        Dynamic,
        FakeQuantize,
        Fixed,
        Learned,
        MinMax,
        MovingAverage,
        PerChannel,
        PerGroup,
        PerTensor,
        PerToken,
        QATConfig,
        QATConv1d,
        QATConv2d,
        QATConv3d,
        QATConvTranspose1d,
        QATConvTranspose2d,
        QATConvTranspose3d,
        QATEmbedding,
        QATLinear,
        QATMultiheadAttention,
        QuantSpec,
    ]
)

__all__ = [
    "Dynamic",
    "FakeQuantize",
    "Fixed",
    "Learned",
    "MinMax",
    "MovingAverage",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QATConfig",
    "QATConv1d",
    "QATConv2d",
    "QATConv3d",
    "QATConvTranspose1d",
    "QATConvTranspose2d",
    "QATConvTranspose3d",
    "QATEmbedding",
    "QATLinear",
    "QATMultiheadAttention",
    "QuantSpec",
    "Summary",
    "cached_weights",
    "calibrate",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_affine",
    "fake_quantize_learned",
    "freeze",
    "functional",
    "prepare",
    "qat_linear",
    "quantization_disabled",
    "quantize",
    "reference",
    "search_qparams",
    "summary",
    "sync_ranges",
    "unfreeze",
    "unused_layers",
]
