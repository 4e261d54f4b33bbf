"""Chains: layers whose result reaches one reader as the reader's integers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import ranges, reference
from .config import QuantSpec
from .reference import StaticGrids

BATCH_NORM = "batch_norm"
RELUS = {"relu": "relu", "relu_": "relu", "relu6": "relu6"}
MOVERS = frozenset(
    [
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        "max_pool1d",
        "max_pool2d",
        "max_pool3d",
        "adaptive_max_pool1d",
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "flatten",
        "unflatten",
        "reshape",
        "view",
        "permute",
        "transpose",
        "movedim",
        "t",
        "squeeze",
        "unsqueeze",
        "contiguous",
        "clone",
    ]
)
# Functions and attributes that read no value of a tensor.
METADATA = frozenset(
    [
        "shape",
        "size",
        "dim",
        "ndim",
        "ndimension",
        "dtype",
        "device",
        "layout",
        "stride",
        "numel",
        "nelement",
        "element_size",
        "is_contiguous",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_nested",
        "is_quantized",
        "is_floating_point",
        "is_complex",
        "is_leaf",
        "requires_grad",
        "grad_fn",
        "names",
        "storage_offset",
        "get_device",
        "_version",
        "is_inference",
        "is_same_size",
        "_is_view",
        "itemsize",
        "nbytes",
        "__len__",
        "output_nr",
        "retains_grad",
        "__hash__",
        "data_ptr",
        "untyped_storage",
        "is_mkldnn",
        "is_xpu",
        "is_mps",
        "_backward_hooks",
        "is_neg",
        "is_conj",
        "has_names",
        "is_shared",
        "is_pinned",
        "is_signed",
    ]
)


def function_name(func: Any) -> str:
    """Returns the name of a function, a method or, for its getter, an attribute."""
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


@dataclass(eq=False)
class Chain:
    """A layer (head) whose integers a reader takes, after BatchNorm, an activation and movers.

    Attributes:
        batch_norm: between the head and the activation.
        activation: ``"relu"``, ``"relu6"`` or None.
        quantizer: the reader's.
        steps: the operations between head and readers.
        members: the modules of the chain; it acts only where all are in evaluation.
        readers: the layers that read the integers; none if the quantizer is the head's own, of its output.
    """

    batch_norm: Any
    activation: str | None
    quantizer: Any
    steps: tuple[str, ...]
    members: tuple[nn.Module, ...]
    readers: tuple[nn.Module, ...] = ()

    def acts(self) -> bool:
        if self.quantizer.observes or (self.readers and is_compiling()):  # tracers do not follow ChainValue
            return False
        for module in self.members:
            if module.training or getattr(module, "_mode", "quantize") != "quantize":
                return False
        # Another config of a reader may have replaced its quantizer.
        return all(reader._modules.get("input_quantizer") is self.quantizer for reader in self.readers)

    @property
    def computed(self) -> tuple[str, ...]:
        """The steps that the head computes."""
        return tuple(step for step in self.steps if step == BATCH_NORM or step in RELUS)

    def is_next(self, position: int, name: str) -> bool:
        """Whether the operation ``name`` comes after ``position`` of the computed steps."""
        computed = self.computed
        if position >= len(computed):
            return False
        return RELUS.get(computed[position], BATCH_NORM) == RELUS.get(name, name)

    def run(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        specs: tuple[QuantSpec, QuantSpec],
        grids: StaticGrids,
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        axis: int,
    ) -> Tensor:
        """Returns the values of the reader's integers, of which the steps change nothing.

        Args:
            input: of the head.
            weight: a matrix with a row per output channel.
            bias: or None.
            specs: of input and weight.
            grids: scale and zero point of each of input and weight.
            product: the head's product; it takes the weight as a matrix.
            axis: of the output channels in the product.
        """
        grid = self.quantizer.grid(input)
        value = reference.requantized(
            input, weight, bias, specs, grids, product, axis, self._statistics(), self.activation, grid,
            self.quantizer.spec,
        )  # fmt: skip
        operands = [input, weight, *([] if bias is None else [bias]), *self._parameters(), grid[0]]
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            y = self._float(input, weight, bias, specs, grids, product)
            value = reference._straight_through(self._fake_quantized(y, grid), value)
        if not self.readers:
            return value
        return ChainValue.of(value, self, 0)

    def _parameters(self) -> list[Tensor]:
        return [] if self.batch_norm is None else list(self.batch_norm.parameters())

    def _statistics(self) -> Any:
        norm = self.batch_norm
        if norm is None:
            return None
        return (norm.running_mean, norm.running_var, norm.weight, norm.bias, norm.eps)

    def _float(
        self,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        specs: tuple[QuantSpec, QuantSpec],
        grids: StaticGrids,
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    ) -> Tensor:
        """Returns the result of the float layer, BatchNorm and ReLU, of which the gradients are."""
        x, w = (
            ranges.fake_quantized(name, tensor, spec, grids)
            for tensor, spec, name in zip((input, weight), specs, ("input", "weight"), strict=True)
        )
        y = product(x, w, bias)
        if self.batch_norm is not None:
            mean, var, gamma, beta, eps = self._statistics()
            y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
        if self.activation is not None:
            y = F.relu(y) if self.activation == "relu" else F.relu6(y)
        return y

    def _fake_quantized(self, y: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
        return ranges.fake_quantized("output", y.to(grid[0].dtype), self.quantizer.spec, {"output": grid})


class ChainValue(Tensor):
    """The values of a reader's integers on their way from the head.

    BatchNorm and ReLU are computed already: here they change nothing. Operations that the recorded
    forward did not have at this place are a RuntimeError.
    """

    _chain: Chain
    _position: int

    @staticmethod
    def of(value: Tensor, chain: Chain, position: int) -> ChainValue:
        result = value.as_subclass(ChainValue)
        result._chain, result._position = chain, position
        return result

    def read_by(self, layer: nn.Module) -> Tensor:
        """Returns the plain tensor for the reader."""
        chain = self._chain
        with torch._C.DisableTorchFunctionSubclass():
            plain = self.as_subclass(Tensor)
        if self._position != len(chain.computed) or all(layer is not reader for reader in chain.readers):
            raise _other_flow(chain, self._position, type(layer).__name__)
        return plain

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if name in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        value = args[0] if args and isinstance(args[0], ChainValue) else kwargs.get("input")
        if not isinstance(value, ChainValue):
            value = next(arg for arg in args if isinstance(arg, ChainValue))
            raise _other_flow(value._chain, value._position, name)
        chain, position = value._chain, value._position
        if name == "hardtanh":
            name = _name_of_hardtanh(args, kwargs)
        is_mover = (
            name in MOVERS
            and not is_active_dropout(name, args, kwargs)
            and (chain.batch_norm is None or position > 0)
        )
        if not is_mover and not chain.is_next(position, name):
            raise _other_flow(chain, position, name)
        with torch._C.DisableTorchFunctionSubclass():
            plain = value.as_subclass(Tensor)
            if not is_mover:
                if name == "relu_" or kwargs.get("inplace") or (name != BATCH_NORM and True in args[1:]):
                    value._position += 1
                    return value
                return ChainValue.of(plain.view_as(plain), chain, position + 1)
            rest = {key: item for key, item in kwargs.items() if key != "input"}
            moved = func(plain, *args[1:], **rest)
        if not isinstance(moved, Tensor) or moved.dtype != plain.dtype:
            raise _other_flow(chain, position, name)
        return value if moved is plain else ChainValue.of(moved, chain, position)


def _name_of_hardtanh(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """nn.ReLU6 calls ``hardtanh(input, 0, 6, inplace)``."""
    low, high = (*args[1:3], *(kwargs[key] for key in ("min_val", "max_val") if key in kwargs))[:2] or (-1, 1)
    return "relu6" if (low, high) == (0, 6) else "hardtanh"


def is_active_dropout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of a dropout function drops values."""
    return name.startswith("dropout") and bool(kwargs.get("training", args[2] if len(args) > 2 else True))


def _other_flow(chain: Chain, position: int, name: str) -> RuntimeError:
    expected = chain.computed[position] if position < len(chain.computed) else "the reading layer"
    return RuntimeError(
        f"{chain.quantizer._name}: expected the flow that prepare recorded, in which {expected} reads this result, got "
        f"{name}; prepare the model with example_inputs that take this way, or without them"
    )
