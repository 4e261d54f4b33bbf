"""A copy of an integer model that the exporter writes in one of the forms."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .. import qdq
from ..integer import IntegerEmbedding, IntegerLayer, IntegerLinear, IntegerMultiheadAttention
from ..modules import FakeQuantize
from . import integer_layers, layers


def deployed(model: nn.Module, form: str) -> nn.Module:
    """Returns a copy of an integer model whose layers write the nodes of a form."""

    def made(module: nn.Module, name: str) -> nn.Module:
        if isinstance(module, FakeQuantize):
            return _FakeQuantizer(module, name)
        return _layer_class(module, form)(module, name)

    return qdq.with_layers(model, made)


def check_static(model: nn.Module) -> None:
    """Raises ValueError if a range is dynamic, which QuantizeLinear does not have."""
    for name, module in model.named_modules():
        specs: dict[str, Any] = {}
        if isinstance(module, FakeQuantize):
            specs = {"range": module.spec}
        elif isinstance(module, IntegerLayer):
            keys = ("output",) if isinstance(module, IntegerEmbedding) else ("input", "output")
            specs = {f"config.{key}": getattr(module.config, key) for key in keys}
        elif isinstance(module, IntegerMultiheadAttention):
            specs = {"attention": module.attention}
        for key, spec in specs.items():
            if spec is not None and spec.is_dynamic:
                raise ValueError(
                    "qatfast.onnx.export: expected ranges that are not Dynamic() in the form 'qdq', got "
                    f"{key}={spec} of {name or 'the root'!r}; train with QATConfig.static(), or write form='integer'"
                )


def _layer_class(layer: Any, form: str) -> type[nn.Module]:
    if isinstance(layer, IntegerEmbedding):
        return layers.Embedding
    is_linear = isinstance(layer, IntegerLinear)
    if form == "integer" and layer.config.uses_int8_gemm(layer.rows[1]):
        return integer_layers.Linear if is_linear else integer_layers.Conv
    return layers.Linear if is_linear else layers.Conv


class _FakeQuantizer(nn.Module):
    """A FakeQuantize of the model's own."""

    def __init__(self, module: FakeQuantize, name: str) -> None:
        super().__init__()
        grid = qdq.grid_of_quantizer(module)
        self.quantizer = layers.quantizer(module.spec, grid, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x.float()).to(x.dtype)
