"""QuantizedLayer, the base of all layers that quantize their tensors."""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _WrappedHook,
)
from torch.nn.parameter import is_lazy

from .. import checks, kernels
from ..chain import Chain
from ..config import QUANTIZE, PerTensor, QATConfig, QuantSpec, describe
from .fake_quantize import FakeQuantize

Layer = TypeVar("Layer", bound="QuantizedLayer")

# One set per open `unused_layers` block: the layers that ran in the block.
open_recordings: list[set[nn.Module]] = []

_MARK = "qatfast: this layer is called, its weight is not read"


def _mark(module: nn.Module, args: Any) -> None:
    """Does nothing: a forward pre-hook that disables the fast path of nn.TransformerEncoderLayer.

    In evaluation, that fast path reads the weights of the linear layers without calling the layers,
    unless one of them has a hook. nn.Module takes 4 to 16 % longer to call a small layer with a
    hook; `QuantizedLayer._call_impl` avoids this if there are no other hooks.
    """


class TensorSpec(NamedTuple):
    """How a tensor of a layer is quantized; ``shape`` is that of the tensor that its quantizer takes.

    Dimensions of the batch are 1 or left out: a range that a layer keeps does not depend on them.
    """

    spec: QuantSpec | None
    shape: tuple[int, ...]


class QuantizedLayer(nn.Module):
    """The base of the layers that quantize their tensors.

    A subclass also derives from the layer of torch.nn that it replaces, ``_float_class``. It keeps a
    :class:`FakeQuantize` for each tensor whose range is not ``Dynamic()``.
    """

    config: QATConfig
    _float_class: ClassVar[type[nn.Module]]
    _methods: ClassVar[tuple[str, ...]] = ("forward",)  # a float layer that overrides one is not replaced
    _shared: ClassVar[tuple[str, ...]] = ("weight", "bias")  # the parameters of the float layer
    _quantizers: ClassVar[tuple[str, ...]] = ("input_quantizer", "weight_quantizer", "output_quantizer")
    _argument: ClassVar[str] = "module"  # the argument of from_float, in messages
    _mode: str = QUANTIZE
    _chain: Chain | None = None  # the chain that starts at this layer
    _is_dynamic: bool = True  # whether no range is kept and the mode is QUANTIZE

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        """Returns the constructor's arguments for a layer like ``module``, without device, dtype and config."""
        raise NotImplementedError

    @classmethod
    def check_config(cls, config: QATConfig, module: Any) -> None:
        """Raises ValueError unless ``config`` fits a layer with the tensors of ``module``."""
        raise NotImplementedError

    @classmethod
    def _own_obstacle(cls, module: Any) -> Obstacle | None:
        """Returns why a layer of this class in particular cannot replace ``module``."""
        return None

    def _tensors(self) -> dict[str, TensorSpec]:
        """Returns how each tensor is quantized, by the name of its quantizer."""
        raise NotImplementedError

    def _set_up(self, config: QATConfig) -> None:
        """Checks and sets the config; constructors call it last."""
        self.check_config(config, self)
        self._forward_pre_hooks = OrderedDict({_MARK: _mark})
        self.config = config

    @classmethod
    def from_float(cls: type[Layer], module: Any, *, config: QATConfig | None = None) -> Layer:
        """Returns a quantized layer that shares the parameters of ``module``.

        It also takes over the training mode, all hooks, and all other attributes, parameters,
        buffers and submodules. The hooks are copied: an existing handle removes its hook from
        ``module`` only. The result of ``module.compile()`` is not taken over.

        Args:
            module: the layer of torch.nn, or a subclass with its forward.
            config: how the tensors are quantized. If None, the config of ``module`` if it is
                quantized already, otherwise that of the constructor.

        Raises:
            TypeError: ``module`` is another layer, it has another forward, or a parameter is
                computed from others, not initialized, managed by FSDP, or not a plain
                floating-point tensor of the right shape.
            ValueError: the constructor raises it.
        """
        return cls._from_float(module, config=config)

    @classmethod
    def _from_float(cls: type[Layer], module: Any, **config: Any) -> Layer:
        name = kind_name(cls)
        if not isinstance(module, cls._float_class):
            raise TypeError(
                f"{name}.from_float: expected {cls._argument} to be {_a_float(cls)}, got {type(module).__name__}"
            )
        obstacle = why_not_from_float(module, cls)
        if obstacle:
            raise TypeError(f"{name}.from_float: {obstacle.message}")
        if isinstance(module, QuantizedLayer) and all(value is None for value in config.values()):
            config = {"config": module.config}
        layer = cls(**cls._arguments(module), device="meta", **config)
        for key in cls._quantizers:
            layer._modules.pop(key, None)
        _take_over(module, layer)
        layer._set_quantizers()  # on the device of the weight
        return layer

    def to_float(self) -> Any:
        """Returns the layer of torch.nn that shares the parameters, which are not quantized.

        It takes over the same attributes as :meth:`from_float`.

        Raises:
            TypeError: a parameter is computed from other parameters, or ``forward`` is set on the
                instance.
        """
        obstacle = _computed_parameter(self, self._shared) or _method_of_instance(self, self._methods)
        if obstacle:
            raise TypeError(f"{kind_name(type(self))}.to_float: {obstacle.message}")
        module = self._float_class(**self._arguments(self), device="meta")
        _take_over(self, module)
        for key in self._quantizers:
            module._modules.pop(key, None)
        return module

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "config":
            self._set_quantizers()

    def _set_quantizers(self) -> None:
        """Creates a quantizer for each range that is not Dynamic; quantizers that fit the config stay."""
        own = self._modules
        for key, (spec, shape) in self._tensors().items():
            if spec is None or spec.is_dynamic:
                own.pop(key, None)
            elif not isinstance(own.get(key), FakeQuantize) or own[key].spec != spec:  # type: ignore[union-attr]
                own[key] = self._quantizer(key, spec, shape)
        output = self.config.output
        self._chain = None
        if output is not None and self.is_head():
            self._chain = Chain(None, None, own["output_quantizer"], (), (self,))
        self._set_mode(self._mode)

    def _quantizer(self, key: str, spec: QuantSpec, shape: tuple[int, ...]) -> FakeQuantize:
        """Returns a new quantizer of this layer for a tensor of the given shape."""
        sizes = checks.shape_of_qparams(torch.Size(shape), spec.granularity) if spec.has_state else ()
        device = next(self.parameters(recurse=False)).device
        quantizer = FakeQuantize(**spec.arguments, range=spec.range, shape=sizes, device=device)
        quantizer.training = self.training
        quantizer._name = f"{type(self).__name__}.{key}"
        quantizer._is_weight = key.endswith("weight_quantizer")
        return quantizer

    def set_chain(self, chain: Chain) -> None:
        """Makes this layer the head of ``chain``."""
        vars(self)["_chain"] = chain

    def add_output_quantizer(self) -> FakeQuantize:
        """Returns a new quantizer for the result after BatchNorm and activation, with the spec of the input."""
        spec = self.config.input
        assert spec is not None
        self._modules["output_quantizer"] = quantizer = self._quantizer("output_quantizer", spec, ())
        return quantizer

    @property
    def _fan_in(self) -> int | None:
        """The number of products in a sum; None if the layer cannot be the head of a chain."""
        return None

    def is_head(self) -> bool:
        """Returns whether the integers of the result follow from those of the product by requantization.

        The layer multiplies integers, its input has one range that is not Dynamic, its bias stays in float
        or is int32, and its output stays in float or has one range that is not Dynamic.
        """
        config, fan_in = self.config, self._fan_in
        if fan_in is None or config.specs["bias"] is not None or config.input is None:
            return False
        for spec in (config.input, config.output):
            if spec is not None and (spec.is_dynamic or not isinstance(spec.granularity, PerTensor)):
                return False
        if config.output is not None and config.output.num_bits > 8:
            return False
        return config.uses_int8_gemm(fan_in) and fan_in * 255 * 128 < 2**30

    def _set_mode(self, mode: str) -> None:
        vars(self).update(_mode=mode, _is_dynamic=mode == QUANTIZE and self.config.is_dynamic)

    def _reset_quantizers(self) -> None:
        for key in self._quantizers:
            quantizer = self._modules.get(key)
            if quantizer is not None:
                quantizer.reset_parameters()  # type: ignore[operator]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        ranges = tuple(f"{prefix}{key}." for key in self._quantizers)
        is_part = any(key.startswith(prefix) and not key.startswith(ranges) for key in state_dict)
        for key in self._quantizers:
            quantizer = self._modules.get(key)
            if isinstance(quantizer, FakeQuantize):
                quantizer._is_left_out = not is_part

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        self._reset_quantizers()

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer as nn.Module does, but skips `_mark` if it is the only hook."""
        pre_hooks = self._forward_pre_hooks
        if (
            len(pre_hooks) == 1
            and _MARK in pre_hooks
            and not (
                self._forward_hooks
                or self._backward_hooks
                or self._backward_pre_hooks
                or _global_forward_pre_hooks
                or _global_forward_hooks
                or _global_backward_pre_hooks
                or _global_backward_hooks
                or torch._C._get_tracing_state()
            )
        ):
            return self.forward(*args, **kwargs)
        return super()._call_impl(*args, **kwargs)

    def _grids(self, input: torch.Tensor, rows: Callable[[], torch.Tensor]) -> dict[str, Any]:
        """Returns the grids of input and weight, the latter unless it is Dynamic; see ``Chain.run``.

        ``rows`` gives the weight as a matrix.
        """
        quantizers: dict[str, Any] = {
            name: self._modules[f"{name}_quantizer"]
            for name in ("input", "weight")
            if f"{name}_quantizer" in self._modules
        }
        return {
            name: quantizer.grid(input if name == "input" else rows())
            for name, quantizer in quantizers.items()
        }

    def _record_call(self) -> None:
        """Tells the open blocks of ``unused_layers`` that the layer runs."""
        for layers in tuple(open_recordings):
            layers.add(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self.config)}"

    def __getstate__(self) -> dict[str, Any]:
        """Removes `_mark`, so that pickles contain no function of this module."""
        state = dict(super().__getstate__())
        state["_forward_pre_hooks"] = OrderedDict(_hooks_of_user(self._forward_pre_hooks))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forward_pre_hooks = OrderedDict({_MARK: _mark, **_hooks_of_user(self._forward_pre_hooks)})


def static_config(cls: type[QuantizedLayer], config: QATConfig | None) -> QATConfig:
    """Returns the config of a constructor's argument."""
    if config is None:
        return QATConfig.static()
    if not isinstance(config, QATConfig):
        raise TypeError(f"{kind_name(cls)}: expected config to be a QATConfig, got {config!r}")
    return config


class Obstacle(NamedTuple):
    """The reason why a layer cannot be quantized.

    ``reason`` is a short form for tables, ``message`` an error message.
    """

    reason: str
    message: str


def kind_name(cls: type[QuantizedLayer]) -> str:
    """Returns the name of the public class of which ``cls`` may be a subclass."""
    return next(base.__name__ for base in cls.__mro__ if "_float_class" in vars(base))


def _a_float(cls: type[QuantizedLayer]) -> str:
    """Returns the float layer's name with its article."""
    return f"an nn.{cls._float_class.__name__}"


def why_not_from_float(module: nn.Module, cls: type[QuantizedLayer]) -> Obstacle | None:
    """Returns why a ``cls`` cannot replace ``module``, or None if it can."""
    kind = type(module).__name__
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        remedy = "run the model once first"
        return Obstacle(
            f"lazy: {remedy}",
            f"expected initialized parameters, got {kind} before its first forward; {remedy}",
        )
    if _is_fsdp(module):
        return Obstacle(
            "managed by FSDP",
            "expected a layer outside of FSDP, got one that FSDP manages; quantize the model before fully_shard",
        )
    obstacle = _computed_parameter(module, cls._shared) or _method_of_instance(module, cls._methods)
    if obstacle:
        return obstacle
    for name in cls._methods:
        if not any(getattr(type(module), name) is getattr(base, name, None) for base in cls.__mro__):
            return Obstacle(
                f"{kind} has a {name} of its own",
                f"expected the {name} of nn.{cls._float_class.__name__}, got {kind}, which has a {name} of its own; "
                f"write a subclass of {kind_name(cls)} that does the same",
            )
    for name in cls._shared:
        parameter = module._parameters[name]
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter and not kernels.is_dtensor(parameter):
            actual = type(parameter).__name__
            return Obstacle(
                f"{name} is of type {actual}",
                f"expected {name} to be an nn.Parameter, got {actual}; convert it to a plain one first",
            )
        if parameter.dtype not in checks.FLOAT_DTYPES:
            return Obstacle(
                f"{name} is {checks.dtype_name(parameter.dtype)}",
                f"expected {name} to be float32, float64, float16 or bfloat16, got {parameter.dtype}",
            )
    obstacle = cls._own_obstacle(module)
    if obstacle:
        return obstacle
    if not isinstance(module, QuantizedLayer) and "config" in vars(module):
        return Obstacle(
            "has an attribute config",
            f"expected no attribute config, which a {kind_name(cls)} has of its own; rename that of the layer",
        )
    return None


def wrong_dimensions(weight: torch.Tensor, expected: int) -> Obstacle | None:
    """Returns an Obstacle unless the weight has the expected number of dimensions."""
    if weight.dim() == expected:
        return None
    shape = tuple(weight.shape)
    return Obstacle(
        f"weight has the shape {shape}",
        f"expected weight to have {expected} dimensions, got the shape {shape}",
    )


def _computed_parameter(module: nn.Module, names: tuple[str, ...]) -> Obstacle | None:
    """Returns an Obstacle if a parameter is computed from other parameters at each call.

    Pruning and parametrizations do so. Such a tensor cannot be shared.
    """
    for name in names:
        if name not in module._parameters:
            return Obstacle(
                f"{name} is computed from other parameters",
                f"expected {name} to be an nn.Parameter, got a tensor computed from other parameters; call "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove first, or apply "
                "these to the new layer",
            )
    return None


def _method_of_instance(module: nn.Module, names: tuple[str, ...]) -> Obstacle | None:
    for name in names:
        if name in vars(module):
            return Obstacle(
                f"{name} is set on the instance",
                f"expected the {name} of the class, got one that is set on the instance; remove it first (accelerate: "
                "remove_hook_from_module) and set it again on the new layer",
            )
    return None


def _is_fsdp(module: nn.Module) -> bool:
    """Returns whether FSDP2 manages ``module``, without importing FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)


# The attributes of an nn.Module that are dicts or sets: parameters, buffers, submodules, hooks.
CONTAINERS = frozenset(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
# The attributes that stay with their module: the config, the compiled call, the note of `prepare`.
_NOT_TAKEN_OVER = frozenset(
    ["config", "_compiled_call_impl", "_qatfast_note", "_mode", "_is_dynamic", "_chain"]
)


def _take_over(source: nn.Module, target: Any) -> Any:
    """Shares the parameters and all other attributes of ``source`` with ``target``; returns it."""
    attributes = vars(target)
    for name, value in vars(source).items():
        if name == "_forward_pre_hooks":
            attributes[name].update(_hooks_of_user(value))
        elif name == "_load_state_dict_pre_hooks":
            attributes[name].update((key, _rebound(hook, target)) for key, hook in value.items())
        elif name in CONTAINERS:
            attributes[name].update(value)
        elif name not in _NOT_TAKEN_OVER:
            attributes[name] = value
    return target


def share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Makes ``target`` use the hook dicts of ``source``: existing handles then remove its hooks."""
    attributes = vars(target)
    for name in CONTAINERS:
        hooks = vars(source).get(name)
        if hooks and name.endswith(("_hooks", "_with_kwargs", "_always_called")):
            hooks.update(attributes[name])
            attributes[name] = hooks


def _hooks_of_user(pre_hooks: dict[Any, Any]) -> dict[Any, Any]:
    return {key: hook for key, hook in pre_hooks.items() if key != _MARK}


def _rebound(hook: Any, module: nn.Module) -> Any:
    """Returns ``hook`` for ``module`` if it is bound to the module that it was registered on."""
    return _WrappedHook(hook.hook, module) if isinstance(hook, _WrappedHook) and hook.with_module else hook
