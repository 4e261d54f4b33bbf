"""The modules that train on the integer grid."""

from .fake_quantize import FakeQuantize
from .linear import QATLinear

__all__ = ["FakeQuantize", "QATLinear"]
