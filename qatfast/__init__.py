"""Fake quantization for PyTorch: fused kernels, a drop-in nn.Linear and a reference in plain PyTorch."""

from . import functional, reference
from .config import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QuantSpec
from .fake_quantizer import FakeQuantize
from .functional import (
    choose_qparams,
    dequantize,
    fake_quantize,
    fake_quantize_affine,
    qat_linear,
    quantize,
)
from .linear import QATLinear
from .weight_cache import cached_weights

__version__ = "0.1.0"

__all__ = [
    "FakeQuantize",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QATConfig",
    "QATLinear",
    "QuantSpec",
    "cached_weights",
    "choose_qparams",
    "dequantize",
    "fake_quantize",
    "fake_quantize_affine",
    "functional",
    "qat_linear",
    "quantize",
    "reference",
]
