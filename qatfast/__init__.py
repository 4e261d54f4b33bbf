"""Fake quantization for PyTorch: fused kernels, a drop-in nn.Linear and a reference."""

import torch

from . import functional, reference
from .config import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QuantSpec
from .functional import (
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_affine,
    qat_linear,
    quantize,
)
from .model import Summary, prepare, summary, unused_layers
from .modules import FakeQuantize, QATLinear
from .weight_cache import cached_weights

__version__ = "0.1.0"

# torch.load(weights_only=True) loads objects of registered classes only.
torch.serialization.add_safe_globals(
    [FakeQuantize, PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QATLinear, QuantSpec]
)

__all__ = [
    "FakeQuantize",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QATConfig",
    "QATLinear",
    "QuantSpec",
    "Summary",
    "cached_weights",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_affine",
    "functional",
    "prepare",
    "qat_linear",
    "quantize",
    "reference",
    "summary",
    "unused_layers",
]
