"""A copy of an integer model that the exporter writes in one of the forms."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..integer import IntegerEmbedding, IntegerLayer, IntegerLinear, IntegerMultiheadAttention
from ..modules import FakeQuantize
from ..qdq import Grid
from . import integer_layers, layers


class _Projections:
    """What projects query, key and value of an IntegerMultiheadAttention whose layers are those of this module."""

    def __init__(self, attention: Any) -> None:
        self.attention = attention

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Tensors that are the same object are quantized once, by the first of their quantizers."""
        quantized: dict[int, Tensor] = {}
        results = []
        for x, name in zip((query, key, value), ("q_proj", "k_proj", "v_proj"), strict=True):
            layer = getattr(self.attention, name)
            if id(x) not in quantized:
                quantized[id(x)] = layer.quantized_input(x)
            results.append(layer.product(quantized[id(x)]))
        return results


def deployed(model: nn.Module, form: str) -> nn.Module:
    """Returns a copy of an integer model whose layers write the nodes of a form."""
    replacements: dict[int, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            replacements[id(module)] = _FakeQuantizer(module, name)
        elif isinstance(module, IntegerLayer):
            replacements[id(module)] = _layer_class(module, form)(module, name)
    result = copy.deepcopy(model, dict(replacements))
    for module in result.modules():
        if isinstance(module, IntegerMultiheadAttention):
            vars(module)["_projected"] = _Projections(module)
    return result.eval()


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
        grid = None
        if not module.spec.is_dynamic:
            scale, zero_point = module.grid(torch.empty(0))
            scale = scale.detach().abs().clamp(min=torch.finfo(torch.float32).tiny)
            grid = Grid.of(module.spec, scale, zero_point)
        self.quantizer = layers.quantizer(module.spec, grid, name)

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x.float()).to(x.dtype)
