"""QATLinear, an nn.Linear that fake-quantizes its tensors."""

from __future__ import annotations

import sys
from collections import OrderedDict
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _WrappedHook,
)
from torch.nn.parameter import is_lazy

from .. import checks, kernels, ranges, weight_cache
from ..config import PerChannel, PerGroup, QATConfig, QuantSpec, describe
from ..functional import qat_linear
from .fake_quantize import QUANTIZE, FakeQuantize

# One set per open `unused_layers` block: the layers that ran in the block.
open_blocks: list[set[nn.Module]] = []

# The tensors of a layer that can have a range that is not Dynamic.
QUANTIZED = ("input", "weight", "output")

_MARK = "qatfast: this layer is called, its weight is not read"


def _mark(module: nn.Module, args: Any) -> None:
    """Does nothing: a forward pre-hook that disables the fast path of nn.TransformerEncoderLayer.

    In evaluation, that fast path reads the weights of the linear layers without calling the layers,
    unless one of them has a hook. nn.Module takes 4 to 16 % longer to call a small layer with a
    hook; `QATLinear._call_impl` avoids this if there are no other hooks.
    """


class QATLinear(nn.Linear):
    """An ``nn.Linear`` that fake-quantizes its tensors; see :func:`qatfast.qat_linear`.

    Parameters and initial values are those of ``nn.Linear``, and so are the ``state_dict`` keys if all ranges are
    ``Dynamic()``. For each other range the layer has a :class:`FakeQuantize`: ``input_quantizer``,
    ``weight_quantizer``, ``output_quantizer``. A ``state_dict`` of an ``nn.Linear`` loads strictly in any case.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to learn a bias; must be a bool.
        device: device of the parameters.
        dtype: dtype of the parameters.
        num_bits: short for ``config=QATConfig.tutorial(num_bits)``; None means 8. This config is
            for comparison with tutorials. For fewer than 8 bits, write
            ``config=QATConfig.dynamic(num_bits)``, which preserves far more of the accuracy.
        config: the specs of input, weight, bias and output.

    Raises:
        TypeError: ``bias`` is not a bool, or ``config`` is not a QATConfig.
        ValueError: both ``num_bits`` and ``config`` are passed; ``config`` does not divide a
            parameter, or has a range per channel of another axis of input or output than -1.
        RuntimeError: the layer runs in evaluation and nothing has been observed; see
            :class:`FakeQuantize`.

    Example:
        >>> QATLinear(10, 64)
        QATLinear(in_features=10, out_features=64, bias=True, num_bits=8, input=float, weight=affine per tensor, \
bias=affine per tensor, output=affine per tensor)
    """

    config: QATConfig
    _caches_weight: ClassVar[bool] = True  # cached_weights selects layers by this attribute
    _mode: str = QUANTIZE
    _is_dynamic: bool = True  # whether qat_linear does everything: no range is kept, the mode is QUANTIZE

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_bits: int | None = None,
        config: QATConfig | None = None,
    ) -> None:
        if not isinstance(bias, bool):
            raise TypeError(
                f"QATLinear: expected bias to be a bool, got {bias!r}; for a bit width write "
                f"QATLinear({in_features}, {out_features}, num_bits={bias!r})"
            )
        config = _config(num_bits, config)
        check_parameters(config, in_features, out_features, bias)
        super().__init__(in_features, out_features, bias, device, dtype)
        self._forward_pre_hooks = OrderedDict({_MARK: _mark})
        self.config = config

    @classmethod
    def from_float(
        cls, linear: nn.Linear, *, num_bits: int | None = None, config: QATConfig | None = None
    ) -> QATLinear:
        """Returns a QATLinear that shares the parameters of ``linear``.

        It also takes over the training mode, all hooks, and all other attributes, parameters,
        buffers and submodules. The hooks are copied: an existing handle removes its hook from
        ``linear`` only. The result of ``linear.compile()`` is not taken over.

        Args:
            linear: an nn.Linear, or a subclass with the forward of nn.Linear.
            num_bits: short for ``config=QATConfig.tutorial(num_bits)``.
            config: the specs of input, weight, bias and output. If None, the config of ``linear``
                if it is a QATLinear, otherwise that of the constructor.

        Raises:
            TypeError: ``linear`` is not an nn.Linear, it has another forward, or its weight is
                computed from other parameters, not initialized, managed by FSDP, or not a plain
                floating-point matrix.
            ValueError: the constructor raises it.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"QATLinear.from_float: expected linear to be an nn.Linear, got {type(linear).__name__}"
            )
        obstacle = why_not_from_float(linear, cls)
        if obstacle:
            raise TypeError(f"QATLinear.from_float: {obstacle.message}")
        if isinstance(linear, QATLinear) and num_bits is None and config is None:
            config = linear.config
        out_features, in_features = linear.weight.shape
        has_bias = linear.bias is not None
        layer = cls(in_features, out_features, has_bias, device="meta", num_bits=num_bits, config=config)
        for name in QUANTIZED:
            layer._modules.pop(quantizer_name(name), None)
        _take_over(linear, layer)
        layer._set_quantizers()  # on the device of the weight
        return layer

    def to_float(self) -> nn.Linear:
        """Returns an nn.Linear that shares the parameters, which are not quantized.

        It takes over the same attributes as :meth:`from_float`.

        Raises:
            TypeError: weight or bias is computed from other parameters, or ``forward`` is set on
                the instance.
        """
        obstacle = _computed_parameter(self) or _forward_of_instance(self)
        if obstacle:
            raise TypeError(f"QATLinear.to_float: {obstacle.message}")
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        _take_over(self, linear)
        for name in QUANTIZED:
            linear._modules.pop(quantizer_name(name), None)
        return linear

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "config":
            self._set_quantizers()

    def _set_quantizers(self) -> None:
        """One for each range that is not Dynamic; those that fit the config stay."""
        sizes = {
            "input": torch.Size([self.in_features]),
            "weight": torch.Size([self.out_features, self.in_features]),
            "output": torch.Size([self.out_features]),
        }
        own = self._modules
        for name in QUANTIZED:
            spec, key = getattr(self.config, name), quantizer_name(name)
            if spec is None or spec.is_dynamic:
                own.pop(key, None)
            elif not isinstance(own.get(key), FakeQuantize) or own[key].spec != spec:  # type: ignore[union-attr]
                shape = checks.shape_of_qparams(sizes[name], spec.granularity) if spec.has_state else ()
                quantizer = FakeQuantize(
                    **spec.arguments, range=spec.range, shape=shape, device=self.weight.device
                )
                quantizer.training = self.training
                quantizer._name = f"{type(self).__name__}.{key}"
                quantizer._is_weight = name == "weight"
                own[key] = quantizer
        self._set_mode(self._mode)

    def _set_mode(self, mode: str) -> None:
        vars(self).update(_mode=mode, _is_dynamic=mode == QUANTIZE and self.config.is_dynamic)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        for name in QUANTIZED:
            quantizer = self._modules.get(quantizer_name(name))
            if quantizer is not None:
                quantizer.reset_parameters()  # type: ignore[operator]

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

    def forward(self, input: Tensor) -> Tensor:
        if open_blocks:
            for layers in tuple(open_blocks):
                layers.add(self)
        if getattr(input, "is_nested", False):
            return _forward_nested(self, input)
        parameters: dict[str, Any] = self._parameters
        if "weight" in parameters and "bias" in parameters:  # nn.Module.__getattr__ takes 0.5 us each
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # computed from other parameters by a parametrization
            weight, bias = self.weight, self.bias
        if not self._is_dynamic:
            return self._of_ranges(input, weight, bias)
        slot = weight_cache.slot_of(self)
        if slot is not None:
            return weight_cache.linear(slot, input, weight, bias, self.config)
        return qat_linear(input, weight, bias, config=self.config)

    def _of_ranges(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with ranges that its quantizers keep, or in another mode."""
        checks.linear_operands("qat_linear", input, weight, bias)
        own: dict[str, Any] = self._modules
        quantizers = {name: own[quantizer_name(name)] for name in QUANTIZED if quantizer_name(name) in own}
        output = quantizers.pop("output", None)
        tensors = {"input": input, "weight": weight}
        if self._mode != QUANTIZE:
            for name, quantizer in quantizers.items():
                quantizer.forward(tensors[name])
            y = F.linear(input, weight, bias)
            return y if output is None else output.forward(y)
        grids = {name: quantizer.grid(tensors[name]) for name, quantizer in quantizers.items()}
        if output is None:
            slot = weight_cache.slot_of(self) if ranges.takes_int8_weight(self.config) else None
            int8_weight = () if slot is None else weight_cache.int8_weight(slot, weight, self.config)
            return ranges.qat_linear(input, weight, bias, self.config, grids, int8_weight)
        if output.observes:  # the product comes first
            y = ranges.qat_linear(input, weight, bias, replace(self.config, output=None), grids)
            return output.forward(y)
        grids["output"] = output.grid(input)  # it only asks for the dtype and the device
        return ranges.qat_linear(input, weight, bias, self.config, grids)

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


def quantizer_name(tensor: str) -> str:
    return f"{tensor}_quantizer"


def _config(num_bits: int | None, config: QATConfig | None) -> QATConfig:
    if config is None:
        return QATConfig.tutorial(8 if num_bits is None else num_bits)
    if not isinstance(config, QATConfig):
        raise TypeError(f"QATLinear: expected config to be a QATConfig, got {config!r}")
    if num_bits is not None:
        raise ValueError(
            f"QATLinear: expected num_bits or config, got both; write num_bits={num_bits!r} alone, which is short for "
            f"config=QATConfig.tutorial({num_bits!r}), or put the bits into config"
        )
    return config


def check_parameters(config: QATConfig, in_features: int, out_features: int, bias: bool) -> None:
    """Raises ValueError unless the granularities of ``config`` divide the layer's tensors."""
    weight = (out_features, in_features)
    shapes: list[tuple[str, QuantSpec | None, tuple[int, ...]]] = [("weight", config.weight, weight)]
    shapes += [("bias", config.bias, (out_features,))] if bias else []
    for name, spec, shape in shapes:
        if spec is not None and isinstance(spec.granularity, PerChannel):
            axis = spec.granularity.axis
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"QATLinear: expected the axis of config.{name} to be from {-len(shape)} to {len(shape) - 1} for "
                    f"its {len(shape)} dimensions, got {axis}; write PerChannel(0) for one scale per output channel"
                )
    for name in ("input", "output"):
        spec = getattr(config, name)
        if spec is None or spec.is_dynamic or not isinstance(spec.granularity, PerChannel):
            continue
        if spec.granularity.axis != -1:
            raise ValueError(
                f"QATLinear: expected the axis of config.{name} to be -1 for {spec.range}, got "
                f"{spec.granularity.axis}; write PerChannel(-1) for one scale a feature"
            )
    last_sizes = {"input": in_features, "weight": in_features, "bias": out_features, "output": out_features}
    for name, size in last_sizes.items():
        spec = getattr(config, name)
        if spec is None or not isinstance(spec.granularity, PerGroup) or (name == "bias" and not bias):
            continue
        group_size = spec.granularity.group_size
        if size % group_size != 0:
            features = "in_features" if name in ("input", "weight") else "out_features"
            raise ValueError(
                f"QATLinear: expected {features} to be divisible by group_size={group_size} of config.{name}, got "
                f"{size}; write a group_size that divides {size}"
            )


class Obstacle(NamedTuple):
    """The reason why a layer cannot be quantized.

    ``reason`` is a short form for tables, ``message`` an error message.
    """

    reason: str
    message: str


def why_not_from_float(linear: nn.Linear, cls: type[QATLinear] = QATLinear) -> Obstacle | None:
    """Returns why a ``cls`` cannot replace ``linear``, or None if it can."""
    kind = type(linear).__name__
    if any(is_lazy(parameter) for parameter in linear.parameters(recurse=False)):
        remedy = "run the model once first"
        return Obstacle(
            f"lazy: {remedy}",
            f"expected initialized parameters, got {kind} before its first forward; {remedy}",
        )
    if _is_fsdp(linear):
        return Obstacle(
            "managed by FSDP",
            "expected a layer outside of FSDP, got one that FSDP manages; quantize the model before fully_shard",
        )
    obstacle = _computed_parameter(linear) or _forward_of_instance(linear)
    if obstacle:
        return obstacle
    if type(linear).forward not in (nn.Linear.forward, QATLinear.forward, cls.forward):
        return Obstacle(
            f"{kind} has a forward of its own",
            f"expected the forward of nn.Linear, got {kind}, which has a forward of its own; write a subclass of "
            "QATLinear that does the same",
        )
    for name, parameter in linear._parameters.items():
        if name not in ("weight", "bias") or parameter is None:
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
    if linear.weight.dim() != 2:
        shape = tuple(linear.weight.shape)
        return Obstacle(
            f"weight has the shape {shape}", f"expected weight to have 2 dimensions, got the shape {shape}"
        )
    if not isinstance(linear, QATLinear) and "config" in vars(linear):
        return Obstacle(
            "has an attribute config",
            "expected no attribute config, which a QATLinear has of its own; rename that of the layer",
        )
    return None


def _computed_parameter(linear: nn.Linear) -> Obstacle | None:
    """Returns an Obstacle if weight or bias is computed from other parameters at each call.

    Pruning and parametrizations do so. Such a tensor cannot be shared.
    """
    for name in ("weight", "bias"):
        if name not in linear._parameters:
            return Obstacle(
                f"{name} is computed from other parameters",
                f"expected {name} to be an nn.Parameter, got a tensor computed from other parameters; call "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove first, or apply "
                "these to the new layer",
            )
    return None


def _forward_of_instance(linear: nn.Linear) -> Obstacle | None:
    if "forward" in vars(linear):
        return Obstacle(
            "forward is set on the instance",
            "expected the forward of the class, got one that is set on the instance; remove it first (accelerate: "
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
_NOT_TAKEN_OVER = frozenset(["config", "_compiled_call_impl", "_qatfast_note", "_mode", "_is_dynamic"])


def _take_over(source: nn.Linear, target: Any) -> Any:
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


def _forward_nested(layer: QATLinear, input: Tensor) -> Tensor:
    """Applies the layer to the rows of a nested tensor.

    nn.TransformerEncoder packs a padded batch into a nested tensor in evaluation.
    """
    if input.layout is torch.jagged:
        jagged: Any = input
        rows = layer.forward(jagged.values())
        return torch.nested.nested_tensor_from_jagged(rows, jagged.offsets(), jagged.lengths())
    parts = input.unbind()
    rows = layer.forward(torch.cat([part.flatten(0, -2) for part in parts]))
    sizes = [part.shape[:-1] for part in parts]
    split = rows.split([size.numel() for size in sizes])
    return torch.nested.as_nested_tensor([y.unflatten(0, size) for y, size in zip(split, sizes, strict=True)])
