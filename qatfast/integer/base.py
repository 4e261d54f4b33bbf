"""IntegerLayer, the base of the layers of a deployed model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from operator import is_
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import checks, functional, packing, ranges, reference
from ..chain import Chain, ChainValue
from ..config import PerChannel, QATConfig, QuantSpec, describe
from ..modules.base import QuantizedLayer
from ..requantization import Operands

# The tensors of a layer, in the order of its state_dict. What a layer does not need is None.
BUFFERS = (
    *("weight", "weight_scale", "weight_zero_point", "weight_nan", "bias"),
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point"),
)
Grid = tuple[Tensor, Tensor]
ROWS = PerChannel(0)
# The value of an integer may exceed 6 by half a step: the model's own ReLU6 must not change it.
_RELU6 = Chain(None, "relu6", None, ("relu6",), ())


@dataclass(frozen=True)
class Requantization:
    """Says that a layer computes the integers of its result from its sums; see ``qatfast.reference.requantized``.

    Attributes:
        spec: of the integers, whose grid is ``output_scale`` and ``output_zero_point``.
        activation: ``"relu"``, ``"relu6"`` or None, computed with them.
        is_read: whether another layer reads the integers. Their values are then float32 (float64 in a float64 model),
            which carries the integers in models of each dtype.
    """

    spec: QuantSpec
    activation: str | None
    is_read: bool


class IntegerLayer(nn.Module):
    """A layer with the integers of its weight, made by :func:`qatfast.convert`; it has no gradients.

    Buffers, of which a layer has those that it needs:

    - ``weight``: int8, or int16 above 8 bits, in the shape of the float layer. Up to 4 bits it is uint8, with the
      rows of :meth:`integers` packed by ``qatfast.packing.pack_rows``. Affine integers are stored from 0 on, those
      of 8 and 16 bits less 128 and 32768. A weight that stays in float is the float weight.
    - ``weight_scale``, ``weight_zero_point`` (int8 or int16, only of affine weights): those of
      :func:`qatfast.choose_qparams` for the matrix with a row per output channel;
      ``weight = (integers - weight_zero_point) * weight_scale``.
    - ``weight_nan``: the positions (int64, in the flat matrix) of elements that are NaN.
    - ``bias``: float32 (float64 in float64 models) as it is added, or int32 if the layer requantizes.
    - ``input_scale``, ``input_zero_point`` (int32): of ranges that are not dynamic.
    - ``output_scale``, ``output_zero_point``: likewise, and of layers that requantize.

    Attributes:
        config: of the layer that it was made of.
        dtype: of the result, except under autocast.
        requantization: or None.
    """

    config: QATConfig
    dtype: torch.dtype
    requantization: Requantization | None
    _source: ClassVar[type[QuantizedLayer]]  # the layer that it is made of

    weight: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor | None
    weight_nan: Tensor | None
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None

    def __init__(
        self,
        arguments: dict[str, Any],
        config: QATConfig,
        dtype: torch.dtype,
        requantization: Requantization | None,
        buffers: dict[str, Tensor],
    ) -> None:
        super().__init__()
        self.arguments = arguments
        for name, value in arguments.items():
            setattr(self, name, value)
        self.config, self.dtype, self.requantization = config, dtype, requantization
        for name in BUFFERS:
            self.register_buffer(name, buffers.get(name))
        self.training = False

    # The weight

    @property
    def rows(self) -> tuple[int, int]:
        """The shape of the weight as a matrix with a row per output channel."""
        raise NotImplementedError

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The shape of the weight of the float layer."""
        return self.rows

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of an input; dimensions of the batch are 1 or left out."""
        return self.rows[1:]

    @property
    def output_shape(self) -> tuple[int, ...]:
        return self.rows[:1]

    def to_rows(self, weight: Tensor) -> Tensor:
        """Returns a weight in the shape of the float layer as this matrix."""
        return weight

    def from_rows(self, rows: Tensor) -> Tensor:
        """Returns this matrix in the shape of the float layer."""
        return rows

    def integers(self) -> Tensor:
        """Returns the weight's integers as a matrix with a row per output channel, int8 or int16."""
        spec = self.config.weight
        if spec is None:
            raise TypeError(f"{type(self).__name__}.integers: expected a quantized weight, got a float one")
        if packing.values_per_byte(spec.num_bits) == 1:
            return self.to_rows(self.weight)
        return packing.unpack_rows(self.weight, spec.num_bits, self.rows[1], spec.symmetric)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Returns the weight as floats, in the shape of the float layer.

        In a layer with a folded BatchNorm it is the folded weight.

        Args:
            dtype: None means that of the layer.
        """
        dtype = self.dtype if dtype is None else dtype
        spec = self.config.weight
        if spec is None:
            return self.weight.to(dtype)
        granularity = spec.granularity
        if self.requantization is not None:  # a scale per row, whatever it was
            granularity = ROWS
        scale = self.weight_scale.to(checks.compute_dtype(dtype))
        zero_point = self._zero_point_like(scale)
        rows = functional.dequantize(self.integers(), scale, zero_point, granularity=granularity, dtype=dtype)
        if self.weight_nan is not None:
            rows = rows.flatten().index_fill(0, self.weight_nan, torch.nan).view_as(rows)
        return self.from_rows(rows)

    def _zero_point_like(self, scale: Tensor) -> Tensor:
        if self.weight_zero_point is None:
            return torch.zeros_like(scale, dtype=torch.int32)
        return self.weight_zero_point.to(torch.int32).expand_as(scale)

    def _rows_of_grid(self) -> Grid:
        """Returns scale and zero point of each row; the scale of a row that holds a NaN is NaN.

        There is one for all, or one per row.
        """
        count = self.rows[0]
        scale = self.weight_scale.reshape(-1).expand(count)
        if self.weight_nan is not None:
            scale = scale.index_fill(0, self.weight_nan // self.rows[1], torch.nan)
        zero_point = self.weight_zero_point
        if zero_point is None:
            return scale.contiguous(), torch.zeros(count, dtype=torch.int32, device=scale.device)
        return scale.contiguous(), zero_point.to(torch.int32).reshape(-1).expand(count).contiguous()

    def _levels(self) -> Tensor:
        """Returns the levels of the weight, a matrix in float64."""
        return self.integers().double() - self._rows_of_grid()[1].unsqueeze(-1)

    def _kept(self, build: Callable[[], Any]) -> Any:
        """Returns what ``build`` makes of the buffers; keeps it until one of them is replaced or written."""
        if is_compiling() or torch._C._are_functorch_transforms_active():
            return build()
        kept = vars(self).get("_kept_operands")
        if (
            kept is not None
            and len(kept[0]) == len(self._buffers)
            and all(map(is_, kept[0], self._buffers.values()))
            and [tensor._version for tensor in kept[1]] == kept[2]
        ):
            return kept[3]
        tensors = tuple(self._buffers.values())
        versioned = [tensor for tensor in tensors if tensor is not None and not tensor.is_inference()]
        versions = [tensor._version for tensor in versioned]
        with torch.inference_mode(False):
            operands = build()
        vars(self)["_kept_operands"] = (tensors, versioned, versions, operands)
        return operands

    # Input, bias and output

    def _input_grid(self, compute: torch.dtype) -> Grid | None:
        return self._grid("input", compute)

    def _grid(self, name: str, compute: torch.dtype) -> Grid | None:
        scale, zero_point = self._buffers[f"{name}_scale"], self._buffers[f"{name}_zero_point"]
        if scale is None or zero_point is None:
            return None
        return scale if scale.dtype == compute else scale.to(compute), zero_point

    def _float_dtype(self, input: Tensor) -> torch.dtype:
        """The dtype of weight and bias: that of the layer, but float32 for a float32 input from another layer."""
        if input.dtype == self.dtype:
            return self.dtype
        return torch.promote_types(input.dtype, self.dtype)

    def _b_hat(self, input: Tensor, input_scale: Tensor | None, bias: Tensor | None = None) -> Tensor | None:
        """Returns the bias as it is added to the product of a layer that does not requantize.

        ``bias`` comes in the place of that of the layer.
        """
        if bias is None:
            bias = self._buffers["bias"]
            if bias is not None and self.config.has_int32_bias and self.input_scale is None:
                assert input_scale is not None
                bias = reference.int32_bias(bias, input_scale, self._rows_of_grid()[0])
        if bias is None:
            return None
        dtype = self._float_dtype(input)
        bias = bias if bias.dtype == dtype else bias.to(dtype)
        return bias if self.config.bias is None else bias + 0.0  # a value that underflows is not -0.0

    def _output(self, y: Tensor, input: Tensor) -> Tensor:
        """Returns ``y`` with its quantizer, in the dtype of the result."""
        spec = self._output_spec()
        if spec is not None:
            y = fake_quantized(y, spec, self._grid("output", checks.compute_dtype(y.dtype)))
        return self._rounded(y, input)

    def _output_spec(self) -> QuantSpec | None:
        return self.config.output

    def _rounded(self, y: Tensor, input: Tensor) -> Tensor:
        dtype = ranges.product_dtype(input) if _is_autocast(input, self.dtype) else self.dtype
        return y if y.dtype == dtype else y.to(dtype)

    # Requantization

    def _operands(self) -> Operands:
        requantization, grid = self.requantization, self._grid("output", torch.float32)
        assert requantization is not None and grid is not None
        assert self.input_scale is not None and self.input_zero_point is not None and self.bias is not None
        input_spec, (scale, _) = self.config.input, self._rows_of_grid()
        assert input_spec is not None
        factor, low, high, y_scale = reference.requantization(
            self.input_scale.float(), scale.float(), requantization.activation, grid, requantization.spec
        )
        operands = Operands(self.integers().contiguous(), self.bias, factor, low, high, y_scale)
        if is_compiling():
            return operands
        return operands.with_sums(self.input_zero_point, (input_spec.quant_min, input_spec.quant_max))

    def _requantized(self, acc: Tensor, axis: int, input: Tensor) -> Tensor:
        """Returns the result of the exact sums ``acc``."""
        requantization, compute = self.requantization, checks.compute_dtype(input.dtype)
        output = self._grid("output", compute)
        assert requantization is not None and output is not None
        assert self.input_scale is not None and self.bias is not None
        input_scale, weight_scale = self.input_scale.to(compute), self._rows_of_grid()[0].to(compute)
        activation, spec = requantization.activation, requantization.spec
        return reference.requantize(acc, self.bias, input_scale, weight_scale, axis, activation, output, spec)

    def _passed_on(self, y: Tensor, input: Tensor) -> Tensor:
        """Returns the values of integers in the dtype in which they leave the layer."""
        assert self.requantization is not None
        if self.requantization.is_read:
            return y
        y = self._rounded(y, input)
        return y if self.requantization.activation != "relu6" else ChainValue.of(y, _RELU6, 0)

    def _check_input(self, input: Any) -> None:
        name = type(self).__name__
        checks.tensor(name, "input", input, checks.FLOAT_DTYPES)
        checks.same_device(name, "input", input, self._buffers["weight"])  # type: ignore[arg-type]
        is_wide = input.dtype == torch.float32 and self.dtype in (torch.float16, torch.bfloat16)
        if input.dtype != self.dtype and not is_wide and not _is_autocast(input, self.dtype):
            raise TypeError(
                f"{name}: expected input to be {checks.dtype_name(self.dtype)}, the dtype of the layer, got "
                f"{checks.dtype_name(input.dtype)}"
            )

    def check_buffers(self, name: str, *, has_input: bool = True) -> None:
        """Raises ValueError unless the buffers are those of a layer with these arguments and this config.

        Args:
            name: of the layer, for messages.
            has_input: False if the grid of the input may be absent.
        """
        for key, kinds in self._legal_buffers().items():
            value = self._buffers[key]
            kind = None if value is None else (value.dtype, tuple(value.shape))
            if kind not in kinds and (has_input or kind is not None or not key.startswith("input")):
                expected = " or ".join(
                    "none" if kind is None else f"{kind[0]} of shape {kind[1]}" for kind in kinds
                )
                actual = "none" if kind is None else f"{kind[0]} of shape {kind[1]}"
                raise ValueError(
                    f"{type(self).__name__}: expected {name}.{key} to be {expected}, got {actual}"
                )

    def _legal_buffers(self) -> dict[str, list[Any]]:
        """Returns the dtypes and shapes that each buffer may have; None if it may be absent."""
        config, (outputs, columns) = self.config, self.rows
        compute, matrix = checks.compute_dtype(self.dtype), torch.Size((outputs, columns))
        legal: dict[str, list[Any]] = {name: [None] for name in BUFFERS}
        spec = config.weight
        if spec is None:
            legal["weight"] = [(self.dtype, self.weight_shape)]
        else:
            per_byte = packing.values_per_byte(spec.num_bits)
            packed = (torch.uint8, (outputs, -(-columns // per_byte)))
            legal["weight"] = [packed if per_byte > 1 else (integer_dtype(spec), self.weight_shape)]
            shape = checks.shape_of_qparams(matrix, spec.granularity)
            legal["weight_scale"] = [(compute, (outputs,) if self.requantization else shape)]
            if not spec.symmetric:
                shapes = [(), (outputs,)] if self.requantization else [shape]
                legal["weight_zero_point"] = [(integer_dtype(spec), shape) for shape in shapes]
            count = 0 if self.weight_nan is None else len(self.weight_nan)
            legal["weight_nan"] = [None, (torch.int64, (count,))]
        legal["bias"] = [None, (compute, (outputs,))]
        if self.requantization is not None:
            legal["bias"] = [(torch.int32, (outputs,))]
        sizes = {"input": self.input_shape, "output": self.output_shape}
        for role, role_spec in (("input", config.input), ("output", self.requantization or config.output)):
            if isinstance(role_spec, Requantization):
                shape = ()
            elif role_spec is None or role_spec.is_dynamic:
                continue
            else:
                shape = checks.shape_of_qparams(torch.Size(sizes[role]), role_spec.granularity)
            legal[f"{role}_scale"], legal[f"{role}_zero_point"] = [(compute, shape)], [(torch.int32, shape)]
        return legal

    # nn.Module

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLayer:
        """Moves the buffers between devices. They keep their dtypes; that of the result follows the model."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            if result.dtype != tensor.dtype:
                result = tensor.to(result.device)
            same = (result.device, result.data_ptr()) == (tensor.device, tensor.data_ptr())
            return tensor if same and not tensor.is_meta and result.shape == tensor.shape else result

        super()._apply(moved, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        vars(self).pop("_kept_operands", None)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_kept_operands"}

    def extra_repr(self) -> str:
        parts = [f"{name}={value}" for name, value in self.arguments.items()]
        if self.requantization is not None:
            parts.append(f"requantizes to {self.requantization.spec.num_bits} bits")
            if self.requantization.activation is not None:
                parts.append(self.requantization.activation)
        return ", ".join([*parts, describe(self.config)])

    # Making it

    @classmethod
    def from_qat(cls, layer: Any) -> Any:
        """Returns the integer layer of a quantized layer, which stays as it is.

        Raises:
            RuntimeError: a range has not been observed.
        """
        raise NotImplementedError


def is_converted(model: nn.Module) -> bool:
    """Returns whether ``model`` has integer layers and no quantized ones."""
    modules = list(model.modules())
    return any(isinstance(module, IntegerLayer) for module in modules) and not any(
        isinstance(module, QuantizedLayer) for module in modules
    )


def _is_autocast(input: Tensor, dtype: torch.dtype) -> bool:
    kind = input.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind) and torch.float64 not in (input.dtype, dtype)


def fake_quantized(x: Tensor, spec: QuantSpec | None, grid: Grid | None) -> Tensor:
    """Returns ``x`` on the grid, or on that of its range if ``grid`` is None."""
    if spec is None:
        return x
    if grid is None:
        return functional.fake_quantize(x, **spec.arguments)
    return functional.fake_quantize_affine(
        x, *grid, spec.quant_min, spec.quant_max, granularity=spec.granularity
    )


def integer_dtype(spec: QuantSpec) -> torch.dtype:
    """Returns the dtype of integers that are not packed, and of zero points."""
    return torch.int8 if spec.num_bits <= 8 else torch.int16
