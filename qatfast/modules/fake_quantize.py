"""FakeQuantize: fake quantization of one tensor, with the range that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling

from .. import arguments, checks, kernels, ranges, reference
from ..config import (
    FLOAT,
    OBSERVE,
    QUANTIZE,
    Dynamic,
    Fixed,
    Granularity,
    Learned,
    MovingAverage,
    PerChannel,
    PerTensor,
    QuantSpec,
    Range,
)
from ..functional import fake_quantize, fake_quantize_affine, fake_quantize_learned, search_qparams


class FakeQuantize(nn.Module):
    """Fake-quantizes its input to the integer grid of a range; see :func:`qatfast.fake_quantize`.

    ``range`` says where the range comes from. With ``Dynamic()`` and ``Fixed(lo, hi)`` there are no parameters and no
    buffers, and training and evaluation are the same. The others keep, in float32 in modules of every dtype:

    - ``MovingAverage()`` and ``MinMax()``: buffers ``running_min``, ``running_max``, ``num_batches``. In training each
      input is quantized with the stored range, which then moves; the first input sets it. Evaluation uses it.
    - ``Learned()``: the parameter ``scale``, buffers ``zero_point`` and ``num_batches``. The first input in training
      sets them by :func:`qatfast.search_qparams`. Run the module once before torch.compile or
      DistributedDataParallel wraps it.

    An input without a finite value changes nothing. A ``state_dict`` without any of these keys, as of a float model,
    loads strictly and leaves the module as if it had observed nothing.

    Args:
        num_bits: number of bits, 2 to 16.
        symmetric: see :class:`qatfast.QuantSpec`.
        granularity: which elements share a scale.
        range: where the range comes from.
        narrow_range: see :class:`qatfast.QuantSpec`.
        shape: of the scale, where the module keeps a range per channel (``(C,)``) or per group.
        device: of the parameter and the buffers.

    Attributes:
        frozen: if True, the range stays as it is in training too, and a learned scale gets no gradient.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: ``num_bits`` is not from 2 to 16; ``shape`` does not fit ``granularity``; ``PerToken()`` with a
            range that is not ``Dynamic()``.
        RuntimeError: in evaluation, or if ``frozen``, when nothing has been observed.

    Example:
        >>> FakeQuantize(num_bits=4)
        FakeQuantize(num_bits=4, symmetric=False, granularity=PerTensor())
        >>> quantizer = FakeQuantize(range=MovingAverage())
        >>> quantizer(torch.tensor([-1.0, 1.0])), quantizer.running_min
        (tensor([-0.9961,  0.9961]), tensor(-1.))
    """

    spec: QuantSpec
    scale: nn.Parameter
    zero_point: Tensor
    running_min: Tensor
    running_max: Tensor
    num_batches: Tensor
    frozen: bool = False
    _mode: str = QUANTIZE
    _name: str = "FakeQuantize"  # in messages
    _is_weight: bool = False  # a weight is at hand in evaluation too
    _is_observed: bool = False  # whether num_batches is known to be greater than 0
    _was_observed: bool = True  # in the latest forward of a learned range
    _counts: tuple[int, Any] = (0, 0)  # elements that calibrate saw, and how many of them were clipped
    _latest: dict[int, tuple[Tensor, Tensor]]  # the latest grid that observed, by the id of the reader
    _saved_as: str | None = None  # the first prefix of the latest state_dict
    _is_left_out: bool = False  # whether the checkpoint that is loaded has nothing of the quantizer's layer
    _loaded_with: list[str] | None = None  # the error_msgs of the latest load_state_dict, which identify it

    def __init__(
        self,
        num_bits: int = 8,
        *,
        symmetric: bool = False,
        granularity: Granularity = PerTensor(),
        range: Range = Dynamic(),
        narrow_range: bool = True,
        shape: Sequence[int] = (),
        device: Any = None,
    ) -> None:
        super().__init__()
        self.spec = QuantSpec(num_bits, symmetric, granularity, range, narrow_range)
        shape = _checked_shape(shape)
        if not self.spec.has_state:
            return
        if isinstance(granularity, PerTensor) != (shape == ()):
            expected = "(), that of one scale," if shape else "the shape of the scale, as (C,),"
            raise ValueError(f"FakeQuantize: expected shape to be {expected} for {granularity}, got {shape}")
        if isinstance(granularity, PerChannel) and len(shape) != 1:
            raise ValueError(f"FakeQuantize: expected shape to be (C,) for {granularity}, got {shape}")
        if isinstance(range, Learned):
            shape = shape or (1,)  # FSDP takes no parameters of shape ()
            self.scale = nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device))
            self.register_buffer("zero_point", torch.empty(shape, dtype=torch.int32, device=device))
        else:
            for name in ("running_min", "running_max"):
                self.register_buffer(name, torch.empty(shape, dtype=torch.float32, device=device))
        self.register_buffer("num_batches", torch.empty((), dtype=torch.int64, device=device))
        self.reset_parameters()

    def _set_mode(self, mode: str) -> None:
        self._mode = mode

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forgets what was observed."""
        for buffer in self._buffers.values():
            assert buffer is not None
            buffer.zero_()
        for parameter in self._parameters.values():
            assert parameter is not None
            parameter.fill_(1.0)
        self._is_observed, self._latest = False, {}

    def forward(self, input: Tensor) -> Tensor:
        spec, mode = self.spec, self._mode
        if mode == QUANTIZE and spec.is_observed:
            extension = kernels.extension  # one call: a small tensor takes 3.7 us, and 5.3 below
            if extension is not None and self.training and not self.frozen and not is_dynamo_compiling():
                own: dict[str, Any] = self._buffers  # nn.Module.__getattr__ takes 0.5 us each
                state = own["running_min"], own["running_max"], own["num_batches"]
                found = extension.forward_observed(input, *state, spec.averaging_constant, spec.code)
                if found is not None:
                    y, scale, zero_point = found
                    self._latest[id(None)] = (scale, zero_point)
                    return y
        if mode == FLOAT:
            return input
        if spec.is_dynamic:
            return input if mode == OBSERVE else fake_quantize(input, **spec.arguments)
        checks.tensor(self._name, "input", input, checks.FLOAT_DTYPES)
        to_move = self.state_to_move() if mode == QUANTIZE and spec.is_observed else None
        if to_move is not None:
            y, scale, zero_point = ranges.fake_quantize_observed(input, *to_move, spec)
            self.remember(None, scale, zero_point)
            return y
        scale, zero_point = self.grid(input)
        if mode == OBSERVE:
            self._count(input.detach(), scale.detach(), zero_point)
            return input
        function = fake_quantize_learned if isinstance(spec.range, Learned) else fake_quantize_affine
        return function(
            input, scale, zero_point, spec.quant_min, spec.quant_max, granularity=spec.granularity
        )

    @property
    def clipped(self) -> float | None:
        """The share of the elements in the latest ``calibrate`` that the range of then clipped; None before."""
        elements, clipped = self._counts
        return float(clipped) / elements if elements else None

    def _count(self, input: Tensor, scale: Tensor, zero_point: Tensor) -> None:
        spec = self.spec
        if self.frozen or is_compiling():
            return
        ends = (spec.quant_min, spec.quant_max)
        inside = reference._fake_quantize(input, scale, zero_point, *ends, spec.granularity)[1]
        elements, clipped = self._counts
        self._counts = elements + input.numel(), clipped + (~inside & ~input.isnan()).sum()

    def int8_conv_input(
        self, call: Callable[..., tuple[Tensor, ...]], input: Tensor, reader: nn.Module | None = None
    ) -> tuple[Tensor, ...]:
        """Returns :func:`ranges.int8_conv_input`; observes the input where forward would, in the same pass."""
        spec = self.spec
        state = self.state_to_move() if spec.is_observed else None
        if state is not None:
            results = ranges.int8_conv_input(call, spec, *state)
            self.remember(reader, *results[2:4])
            return results
        return ranges.int8_conv_input(call, spec, *self.grid(input, reader))

    def grid(self, input: Tensor, reader: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Returns the scale and the zero point that quantize ``input``, and observes it where forward would.

        The range is not ``Dynamic()``. ``reader`` is the layer that takes them: layers that share the
        quantizer get different ones in a forward that observes, and again in a recomputed forward.
        """
        if isinstance(self.spec.range, Fixed):
            return ranges.fixed_grid(input, self.spec)
        return self._learned(input) if isinstance(self.spec.range, Learned) else self._stored(input, reader)

    @property
    def observes(self) -> bool:
        """Returns whether the range depends on the current inputs."""
        return (self.training or self._mode == OBSERVE) and not self.frozen and self.spec.has_state

    def state_to_move(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Returns what an input moves now: running_min, running_max and num_batches; None if it moves nothing.

        The range is observed.
        """
        if not self.observes or _in_backward():
            return None
        own: dict[str, Any] = self._buffers
        return own["running_min"], own["running_max"], own["num_batches"]

    def remember(self, reader: nn.Module | None, scale: Tensor, zero_point: Tensor) -> None:
        """Keeps the grid for a recomputed forward, as of activation checkpointing."""
        if not is_compiling():
            self._latest[id(reader)] = (scale, zero_point)

    def _stored(self, input: Tensor, reader: nn.Module | None) -> tuple[Tensor, Tensor]:
        """Returns the grid of an observed range, and moves the range where forward would."""
        spec = self.spec
        state = self.state_to_move()
        if state is not None:
            if self._mode == OBSERVE and isinstance(spec.range, MovingAverage):  # the mean of the batches
                spec = replace(spec, range=MovingAverage(1 / (int(self.num_batches) + 1)))
            grid = ranges.observe_range(input.detach(), *state, spec)
            self.remember(reader, *grid)
            return grid
        if self.observes and id(reader) in self._latest:
            return self._latest[id(reader)]
        if not self._has_observed():
            raise self._unobserved()
        compute = checks.compute_dtype(input.dtype)
        return ranges.qparams_of_range(self.running_min, self.running_max, spec, compute)

    def _learned(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the learned grid; the first tensor sets it."""
        compute = checks.compute_dtype(input.dtype)
        scale = self.scale.detach() if self.frozen else self.scale
        if not _in_backward():
            self._was_observed = self._has_observed()
        if self._was_observed:  # a recomputed forward takes the way of the first
            return scale.to(compute), self.zero_point
        if self.frozen or not (self.observes or self._is_weight):
            raise self._unobserved()
        with torch.no_grad():
            first, zero_point = search_qparams(input.detach(), **self.spec.arguments)
            if first.numel() != scale.numel():
                raise ValueError(
                    f"{self._name}: expected an input with {scale.numel()} blocks, the elements of scale, got "
                    f"{first.numel()}"
                )
            first, zero_point = first.reshape(scale.shape), zero_point.reshape(scale.shape)
            if not _in_backward():
                # without a branch on the device's values; a tensor of zeros has the least scale and sets nothing
                sets = (self.num_batches == 0) & (first > torch.finfo(compute).tiny).any()
                value = first.clamp(max=reference.FLOAT32_MAX).to(torch.float32)
                self.scale.copy_(torch.where(sets, value, self.scale))
                self.zero_point.copy_(torch.where(sets, zero_point, self.zero_point))
                self.num_batches.add_(sets)
                self._has_observed()  # so that a graph compiled from now on has no search
            is_set = self.num_batches > 0
        return torch.where(is_set, scale.to(compute), first), torch.where(is_set, self.zero_point, zero_point)

    def _has_observed(self) -> bool:
        """Reads the device only while nothing is known to be observed, and never in a graph."""
        if not self._is_observed and not is_compiling():
            if self.num_batches.is_meta:
                return True
            self._is_observed = bool(self.num_batches > 0)
        return self._is_observed

    def _unobserved(self) -> RuntimeError:
        return RuntimeError(
            f"{self._name}: expected a range that has been observed, got none; train the model first, or run some "
            "batches inside qatfast.calibrate(model)"
        )

    def train(self, mode: bool = True) -> FakeQuantize:
        super().train(mode)
        if not mode and self.spec.has_state:
            self._is_observed = False
            self._has_observed()
        return self

    def to_empty(self, **kwargs: Any) -> FakeQuantize:
        super().to_empty(**kwargs)
        self.reset_parameters()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FakeQuantize:
        """Moves the state between devices. It keeps its dtypes, whatever those of the model are."""

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        was_meta = self.spec.has_state and self.num_batches.is_meta
        super()._apply(moved, recurse)
        self._latest = {}
        if was_meta and not self.num_batches.is_meta:  # by to_empty() of a parent
            self.reset_parameters()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Saves copies under all names of a shared quantizer but the first.

        safetensors and Transformers save no tensors that share memory.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._saved_as != prefix and f"{self._saved_as}num_batches" in destination:
            if not keep_vars:
                for name in (*self._parameters, *self._buffers):
                    destination[prefix + name] = destination[prefix + name].clone()
        else:
            self._saved_as = prefix

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = [prefix + name for name in (*self._parameters, *self._buffers)]
        is_float = not any(name in state_dict for name in names)
        is_loaded = self._loaded_with is error_msgs  # under another of its names
        if is_float and not (is_loaded or self._is_left_out):
            self.reset_parameters()
        missing: list[str] = []
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs
        )
        for name, own in (*self._parameters.items(), *self._buffers.items()):
            value, key = state_dict.get(prefix + name), prefix + name
            is_reported = any(key in message for message in error_msgs)
            # Earlier versions of torch load the first element of a vector into a scalar.
            if isinstance(value, Tensor) and value.shape != own.shape and not is_reported:  # type: ignore[union-attr]
                shapes = f"{tuple(value.shape)} in the checkpoint, {tuple(own.shape)} in the module"  # type: ignore[union-attr]
                error_msgs.append(f"size mismatch for {key}: {shapes}")
        if not is_float:
            missing_keys += missing
            self._is_observed, self._latest, self._loaded_with = False, {}, error_msgs
            self._has_observed()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_latest": {}}

    def extra_repr(self) -> str:
        spec = self.spec
        text = f"num_bits={spec.num_bits}, symmetric={spec.symmetric}, granularity={spec.granularity}"
        if not spec.is_dynamic:
            text += f", range={spec.range}"
        if not spec.narrow_range:
            text += ", narrow_range=False"
        return text + (", frozen=True" if self.frozen else "")


def _checked_shape(shape: Any) -> tuple[int, ...]:
    if not isinstance(shape, (tuple, list)):
        raise TypeError(f"FakeQuantize: expected shape to be a tuple of ints, got {shape!r}")
    sizes = tuple(arguments.integer("FakeQuantize", "the sizes of shape", size) for size in shape)
    if any(size < 0 for size in sizes):
        raise ValueError(f"FakeQuantize: expected the sizes of shape to be at least 0, got {sizes}")
    return sizes


def _in_backward() -> bool:
    """Returns whether a backward runs, as when activation checkpointing calls a module again."""
    return not is_compiling() and torch._C._current_graph_task_id() != -1
