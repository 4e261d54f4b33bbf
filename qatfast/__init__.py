"""Fake quantization for PyTorch: fused kernels, a drop-in nn.Linear and a reference."""

import torch

from . import functional, onnx, reference
from .calibration import calibrate, freeze, quantization_disabled, sync_ranges, unfreeze
from .chain import Chain
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
from .convert import convert
from .functional import *  # noqa: F403
from .geometry import Geometry
from .integer import (
    IntegerConv1d,
    IntegerConv2d,
    IntegerConv3d,
    IntegerConvTranspose1d,
    IntegerConvTranspose2d,
    IntegerConvTranspose3d,
    IntegerEmbedding,
    IntegerLinear,
    IntegerMultiheadAttention,
    Requantization,
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
from .serialization import load, save
from .weight_cache import cached_weights

__version__ = "0.1.0"

# torch.load(weights_only=True) loads objects of registered classes only.
torch.serialization.add_safe_globals(
    [
        Chain,
        Dynamic,
        FakeQuantize,
        Fixed,
        Geometry,
        IntegerConv1d,
        IntegerConv2d,
        IntegerConv3d,
        IntegerConvTranspose1d,
        IntegerConvTranspose2d,
        IntegerConvTranspose3d,
        IntegerEmbedding,
        IntegerLinear,
        IntegerMultiheadAttention,
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
        Requantization,
    ]
)

__all__ = [
    "Dynamic",
    "FakeQuantize",
    "Fixed",
    "IntegerConv1d",
    "IntegerConv2d",
    "IntegerConv3d",
    "IntegerConvTranspose1d",
    "IntegerConvTranspose2d",
    "IntegerConvTranspose3d",
    "IntegerEmbedding",
    "IntegerLinear",
    "IntegerMultiheadAttention",
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
    "convert",
    "freeze",
    "functional",
    "load",
    "onnx",
    "prepare",
    "quantization_disabled",
    "reference",
    "save",
    "summary",
    "sync_ranges",
    "unfreeze",
    "unused_layers",
    *functional.__all__,
]
