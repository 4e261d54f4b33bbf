"""The modules FakeQuantize and QATLinear."""

from .fake_quantize import FakeQuantize
from .linear import QATLinear

__all__ = ["FakeQuantize", "QATLinear"]
