"""QATLinear, an nn.Linear that fake-quantizes its tensors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import checks, ranges, requantization, weight_cache
from ..chain import Carrier, Chain
from ..config import OBSERVED, QUANTIZE, PerChannel, PerGroup, QATConfig, QuantSpec
from ..functional import qat_linear
from .base import Obstacle, QuantizedLayer, TensorSpec, open_recordings, wrong_dimensions

# The tensors of a layer that can have a range that is not Dynamic.
QUANTIZED = ("input", "weight", "output")


class QATLinear(QuantizedLayer, nn.Linear):
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

    _float_class = nn.Linear
    _argument = "linear"
    _caches_weight: ClassVar[bool] = True  # cached_weights selects layers by this attribute
    _observes_int8: bool = False  # whether an input may be observed and multiplied in one call

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
        super().__init__(in_features, out_features, bias, device, dtype)
        self._set_up(config)

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
        return cls._from_float(linear, num_bits=num_bits, config=config)

    @classmethod
    def _arguments(cls, module: Any) -> dict[str, Any]:
        out_features, in_features = module.weight.shape
        return {"in_features": in_features, "out_features": out_features, "bias": module.bias is not None}

    @classmethod
    def check_config(cls, config: QATConfig, module: Any) -> None:
        out_features, in_features = module.weight.shape
        check_parameters(config, in_features, out_features, module.bias is not None)

    @classmethod
    def _own_obstacle(cls, module: Any) -> Obstacle | None:
        return wrong_dimensions(module.weight, 2)

    @property
    def _fan_in(self) -> int:
        return self.in_features

    def _tensors(self) -> dict[str, TensorSpec]:
        config = self.config
        return {
            "input_quantizer": TensorSpec(config.input, (self.in_features,)),
            "weight_quantizer": TensorSpec(config.weight, (self.out_features, self.in_features)),
            "output_quantizer": TensorSpec(config.output, (self.out_features,)),
        }

    def _set_mode(self, mode: str) -> None:
        super()._set_mode(mode)
        config = self.config
        takes_both = mode == QUANTIZE and config.uses_int8_gemm(self.in_features)
        is_plain = takes_both and config.bias is None and config.output is None
        vars(self)["_observes_int8"] = (
            is_plain and ranges.takes_int8_weight(config) and isinstance(config.input.range, OBSERVED)  # type: ignore[union-attr]
        )

    def forward(self, input: Tensor) -> Tensor:
        if open_recordings:
            self._record_call()
        if isinstance(input, Carrier):
            if input._is_open:
                return self._of_carrier(input)
            input = input.read_by(self)
        if getattr(input, "is_nested", False):
            return _forward_nested(self, input)
        parameters: dict[str, Any] = self._parameters
        if "weight" in parameters and "bias" in parameters:  # nn.Module.__getattr__ takes 0.5 us each
            weight, bias = parameters["weight"], parameters["bias"]
        else:  # computed from other parameters by a parametrization
            weight, bias = self.weight, self.bias
        if self._chain is not None:
            return self._as_head(self._chain, input, weight, bias, ranges.product_dtype(weight))
        if not self._is_dynamic:
            return self._of_ranges(input, weight, bias)
        slot = weight_cache.slot_of(self)
        if slot is not None:
            return weight_cache.linear(slot, input, weight, bias, self.config)
        return qat_linear(input, weight, bias, config=self.config)

    def _of_carrier(self, input: Carrier) -> Any:
        """The reader of a chain: computes in float32 and rounds once to the dtype of the layer."""
        x = input.read_by(self)
        weight, bias, dtype = self.weight, self.bias, ranges.product_dtype(self.weight)
        wide = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        if self._chain is not None:
            return self._as_head(self._chain, x, *wide, dtype)
        return self._of_ranges(x, *wide).to(dtype)

    def _as_head(
        self, chain: Chain, input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype
    ) -> Any:
        """The layer with a chain; ``dtype`` is that of a result that leaves the chain."""
        if chain.acts():
            checks.linear_operands("qat_linear", input, weight, bias)
            spec: Any = self.config.input
            int8_linear = requantization.traced_linear if is_compiling() else requantization.linear

            def int8_product(scale: Tensor, zero_point: Tensor, operands: Any) -> Tensor:
                return int8_linear(input, scale, zero_point, (spec.quant_min, spec.quant_max), operands)

            y = chain.run(self, input, weight, bias, lambda: weight, F.linear, -1, int8_product)
            return chain.carried(y if chain.has_readers else y.to(dtype))
        y = self._of_ranges(input, weight, bias).to(dtype)
        return y if self.config.output is not None else chain.carried(y, is_float=True)

    def _of_ranges(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer with ranges that its quantizers keep, or in another mode."""
        if self._observes_int8:
            quantizer: Any = self._modules["input_quantizer"]
            state = quantizer.state_to_move()
            if state is not None:
                slot = weight_cache.slot_of(self)
                int8_weight = () if slot is None else weight_cache.int8_weight(slot, weight, self.config)
                found = ranges.qat_linear_observed(input, weight, bias, self.config, state, int8_weight)
                if found is not None:
                    y, *grid = found
                    quantizer.remember(self, *grid)
                    return y
        checks.linear_operands("qat_linear", input, weight, bias)
        own: dict[str, Any] = self._modules
        quantizers = {name: own[quantizer_name(name)] for name in QUANTIZED if quantizer_name(name) in own}
        output = quantizers.pop("output", None)
        if self.config.output is None:  # one of a chain comes later
            output = None
        tensors = {"input": input, "weight": weight}
        if self._mode != QUANTIZE:
            for name, quantizer in quantizers.items():
                quantizer.forward(tensors[name])
            y = F.linear(input, weight, bias)
            return y if output is None else output.forward(y)
        grids = {name: quantizer.grid(tensors[name], self) for name, quantizer in quantizers.items()}
        config, int8_weight, slot = self.config, (), weight_cache.slot_of(self)
        if slot is not None:
            int8_weight, weight, config = ranges.kept_weight(slot, weight, config, grids)
        if output is None:
            return ranges.qat_linear(input, weight, bias, config, grids, int8_weight)
        if output.observes:  # the product comes first
            y = ranges.qat_linear(input, weight, bias, replace(config, output=None), grids, int8_weight)
            return output.forward(y)
        grids["output"] = output.grid(input)  # it only asks for the dtype and the device
        return ranges.qat_linear(input, weight, bias, config, grids, int8_weight)


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
    shapes += [("bias", config.specs["bias"], (out_features,))] if bias else []
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
        spec = config.specs[name]
        if spec is None or not isinstance(spec.granularity, PerGroup) or (name == "bias" and not bias):
            continue
        group_size = spec.granularity.group_size
        if size % group_size != 0:
            features = "in_features" if name in ("input", "weight") else "out_features"
            raise ValueError(
                f"QATLinear: expected {features} to be divisible by group_size={group_size} of config.{name}, got "
                f"{size}; write a group_size that divides {size}"
            )


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
