"""convert: a prepared model becomes one of integer layers."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments
from . import flow as flows
from .calibration import evaluation
from .integer import INTEGER_LAYERS, IntegerLayer
from .modules import FakeQuantize, QuantizedLayer
from .modules.base import kind_name

FORMS = ("integer", "quantized_decomposed")


def convert(model: nn.Module, *, form: str = "integer", example_inputs: Any = None) -> nn.Module:
    """Returns the deployed model: a copy whose quantized layers hold integers.

    In the form ``"integer"`` it gives the results of ``model.eval()`` to the bit. Each quantized layer becomes an
    :class:`IntegerLinear <qatfast.integer.IntegerLinear>`, ``IntegerConv1d`` to ``3d``, ``IntegerConvTranspose1d`` to
    ``3d``, ``IntegerEmbedding`` or ``IntegerMultiheadAttention``, without a float weight; layers of one Parameter with
    equal integers share them. A BatchNorm that a chain folds becomes nn.Identity. All other modules, and layers that
    ``prepare`` left in float, are copied. The result is in evaluation mode and has no gradients in its integer layers;
    ``model`` is unchanged.

    Args:
        model: after ``prepare``, or with quantized layers placed by hand; trained or calibrated.
        form: ``"integer"``, or ``"quantized_decomposed"``: PyTorch's own operators that quantize and dequantize, which
            ExecuTorch reads as they are, LiteRT after :func:`qatfast.qdq.with_float_weights`, Inductor and torchao
            after :func:`qatfast.qdq.with_uint8_activations`. Its results differ by a step of a grid here and there,
            as these operators multiply by a rounded reciprocal.
        example_inputs: as for ``prepare``. The model runs once, and the chains must be those that ``prepare`` recorded.

    Returns:
        A new model, in evaluation mode.

    Raises:
        TypeError: ``model`` is not an nn.Module or has no quantized layers; a layer is a subclass with a forward of its
            own.
        ValueError: ``form`` is another; the flow with ``example_inputs`` is another.
        RuntimeError: a range has not been observed.

    Example:
        >>> from qatfast import prepare
        >>> x = torch.randn(32, 8)
        >>> model = prepare(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)), example_inputs=x)
        >>> y = model(x)  # training observes the ranges
        >>> deployed = convert(model)
        >>> torch.equal(deployed(x), model.eval()(x)), deployed[0].weight.dtype
        (True, torch.int8)
    """
    arguments.module("convert", "model", model)
    if form not in FORMS:
        raise ValueError(f"convert: expected form to be 'integer' or 'quantized_decomposed', got {form!r}")
    if not any(isinstance(module, (QuantizedLayer, FakeQuantize)) for module in model.modules()):
        what = "a converted one" if any(isinstance(m, IntegerLayer) for m in model.modules()) else "none"
        raise TypeError(
            f"convert: expected a model with quantized layers, got {type(model).__name__}, {what}; call "
            "qatfast.prepare first"
        )
    if example_inputs is not None:
        _check_flow(model, example_inputs)
    with evaluation(model):
        replacements = _replacements(model)
    memo: dict[int, Any] = {id(module): replacement for module, replacement in replacements.items()}
    result = copy.deepcopy(model, memo).eval()
    if form == "integer":
        return result
    return import_module(".qdq", __package__).decomposed(result)


def _replacements(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Returns what replaces each layer and folded BatchNorm."""
    result: dict[nn.Module, nn.Module] = {}
    unobserved: list[str] = []
    tied: dict[int, list[IntegerLayer]] = {}
    parts: set[nn.Module] = set()  # of a layer that is replaced as a whole
    for name, layer in model.named_modules():
        if not isinstance(layer, QuantizedLayer) or layer in parts:
            continue
        cls = _integer_class(layer, name)
        parts.update(layer.modules())
        try:
            replacement = cls.from_qat(layer)
        except RuntimeError as error:
            if "expected a range that has been observed" not in str(error):
                raise
            unobserved.append(str(error).partition(":")[0])
            continue
        _take_hooks(layer, replacement)
        result[layer] = replacement
        if isinstance(replacement, IntegerLayer):
            _tie(replacement, tied.setdefault(id(layer.weight), []))
        if getattr(replacement, "requantization", None) is not None:
            norm = None if layer._chain is None else layer._chain.batch_norm
            if norm is not None:
                result[norm] = nn.Identity().eval()
                _take_hooks(norm, result[norm])
    if unobserved:
        raise RuntimeError(
            f"convert: expected ranges that have been observed, got none for {', '.join(dict.fromkeys(unobserved))}; "
            "train the model first, or run some batches inside qatfast.calibrate(model)"
        )
    return result


def _integer_class(layer: QuantizedLayer, name: str) -> Any:
    kind = next(kind for kind in INTEGER_LAYERS if isinstance(layer, kind))
    if type(layer).forward is not kind.forward or "forward" in vars(layer):
        raise TypeError(
            f"convert: expected the forward of {kind_name(kind)}, got {name or 'the root'!r}, a "  # type: ignore[arg-type]
            f"{type(layer).__name__} with a forward of its own; it has no integer layer"
        )
    return INTEGER_LAYERS[kind]


def _tie(layer: IntegerLayer, others: list[IntegerLayer]) -> None:
    """Shares buffers of the weight with a layer that was made of the same Parameter."""
    for name in ("weight", "weight_scale", "weight_zero_point", "weight_nan"):
        for other in others:
            mine, theirs = layer._buffers[name], other._buffers[name]
            if mine is not None and theirs is not None and _equal(mine, theirs):
                layer._buffers[name] = theirs
    others.append(layer)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.shape == right.shape and torch.equal(left, right)


def _take_hooks(source: nn.Module, target: nn.Module) -> None:
    """Copies the user's forward hooks."""
    for name in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
        getattr(target, name).update(getattr(source, name))
    for name in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        hooks = {key: hook for key, hook in getattr(source, name).items() if isinstance(key, int)}
        getattr(target, name).update(hooks)


def _check_flow(model: nn.Module, example_inputs: Any) -> None:
    """Raises ValueError unless the chains of a recorded forward are those that ``prepare`` found."""
    own: dict[nn.Module, QuantizedLayer] = {
        module: module for module in model.modules() if isinstance(module, QuantizedLayer)
    }
    flow = flows.record(model, *arguments.example_inputs("convert", example_inputs), set(own))
    names = {module: name for name, module in model.named_modules()}
    calls = {op.module: op for op in flow.operations if op.name == "layer"}
    for layer in own.values():
        chain = layer._chain
        if chain is None or layer.config.output is not None:
            continue
        found = None
        if flow.called.get(layer) == 1:
            found = flows.chain_from(calls[layer], layer, flow, own, has_output=not chain.has_readers)
        expected = flows.chain_text(chain, names)
        actual = "another way" if found is None else flows.chain_text(found, names)
        if actual != expected:
            raise ValueError(
                f"convert: expected the flow that prepare recorded, in which {names[layer]!r} goes {expected}, got "
                f"{actual} with example_inputs; prepare the model with example_inputs that take this way"
            )
