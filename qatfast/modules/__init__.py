"""The modules: FakeQuantize and the quantized layers."""

from torch import nn

from .base import QuantizedLayer
from .fake_quantize import FakeQuantize
from .linear import QATLinear

# The layers of torch.nn that have a quantized one, and which.
QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    cls._float_class: cls for cls in (QATLinear,)
}

__all__ = ["QUANTIZED_LAYERS", "FakeQuantize", "QATLinear", "QuantizedLayer"]
