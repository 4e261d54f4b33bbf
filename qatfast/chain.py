"""Chains: layers whose result reaches one reader as the reader's integers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.utils._pytree import tree_leaves, tree_map

from . import activation, checks, kernels, ranges, reference, requantization, weight_cache
from .config import FLOAT, QUANTIZE, QuantSpec
from .reference import StaticGrids
from .requantization import Operands

BATCH_NORM = "batch_norm"
RELUS = {"relu": "relu", "relu_": "relu", "relu6": "relu6"}
MAX_POOLS = tuple(f"{name}{dims}d" for name in ("max_pool", "adaptive_max_pool") for dims in (1, 2, 3))
MOVERS = frozenset(
    [
        "dropout",
        "dropout1d",
        "dropout2d",
        "dropout3d",
        *MAX_POOLS,
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
# Functions whose operands are quantized on their own: a deployed model computes them between its integers.
JOINS = frozenset(
    [
        "add",
        "add_",
        "__add__",
        "__iadd__",
        "__radd__",
        "cat",
        "concat",
        "concatenate",
        "mean",
        *MAX_POOLS,
        *(f"{name}{dims}d" for name in ("avg_pool", "adaptive_avg_pool") for dims in (1, 2, 3)),
    ]
)
# Functions and attributes that read no value of a tensor.
METADATA = frozenset(
    [
        "grad",
        "retain_grad",
        "register_hook",
        "requires_grad_",
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
    """A layer (head) whose result a quantizer takes, after BatchNorm, an activation and movers.

    Attributes:
        batch_norm: between the head and the activation.
        activation: ``"relu"``, ``"relu6"`` or None.
        quantizer: the readers' or, if there are none, the head's own, of its output.
        steps: the operations between head and readers, or between head and its own quantizer.
        members: the modules of the chain; it acts only where all are in evaluation.
        readers: the layers that read the integers.
    """

    batch_norm: Any
    activation: str | None
    quantizer: Any
    steps: tuple[str, ...]
    members: tuple[nn.Module, ...]
    readers: tuple[nn.Module, ...] = ()

    def acts(self) -> bool:
        if self.quantizer.observes:
            return False
        for module in self.members:
            if module.training or getattr(module, "_mode", QUANTIZE) != QUANTIZE:
                return False
        # Another config of a reader may have replaced its quantizer.
        return all(reader._modules.get("input_quantizer") is self.quantizer for reader in self.readers)

    @property
    def has_readers(self) -> bool:
        return len(self.readers) > 0  # torch.compile traces no truth value of a tuple of modules

    @property
    def computed(self) -> tuple[str, ...]:
        """The steps that the head computes."""
        return tuple(step for step in self.steps if step == BATCH_NORM or step in RELUS)

    def is_next(self, position: int, name: str) -> bool:
        """Returns whether the operation ``name`` comes after ``position`` of the computed steps."""
        computed = self.computed
        if position >= len(computed):
            return False
        return RELUS.get(computed[position], BATCH_NORM) == RELUS.get(name, name)

    def run(
        self,
        head: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Callable[[], Tensor],
        product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        axis: int,
        int8_product: Callable[[Tensor, Tensor, Operands], Tensor],
    ) -> Tensor:
        """Returns the values of the reader's integers, of which the steps change nothing.

        Args:
            head: the layer.
            input: of the head.
            weight: of the head.
            bias: or None.
            rows: gives the weight as a matrix with a row per output channel.
            product: the head's product; it takes the weight as a matrix.
            axis: of the output channels in the product.
            int8_product: the result, of the grid of the input and the integers of the weight.
        """
        grids, grid = head._grids(input, rows), self.quantizer.grid(input)
        specs = (head.config.input, head.config.weight)
        if requantization.takes_int8(input, specs[1].symmetric):
            scale, zero_point = grids["input"]
            x_grid = checks.positive_scale(scale).reshape(()), zero_point.reshape(())
            operands = self._operands(head, rows, bias, x_grid, grids.get("weight"), grid)
            value = int8_product(*x_grid, operands)
        else:
            value = reference.requantized(
                input, rows(), bias, specs, grids, product, axis, self._statistics(), self.activation, grid,
                self.quantizer.spec,
            )  # fmt: skip
        tensors = [input, weight, *([] if bias is None else [bias]), *self._parameters(), grid[0]]
        has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if has_gradient or kernels.is_forward_mode():
            y = self._float(input, rows(), bias, specs, grids, product)
            value = reference._straight_through(self._fake_quantized(y, grid), value)
        return value

    def _operands(
        self,
        head: Any,
        rows: Callable[[], Tensor],
        bias: Tensor | None,
        x_grid: tuple[Tensor, Tensor],
        w_grid: tuple[Tensor, Tensor] | None,
        y_grid: tuple[Tensor, Tensor],
    ) -> Operands:
        """Returns the integers of the weight, in a block of ``cached_weights`` those of the call before."""
        statistics, spec, x_spec = self._statistics(), head.config.weight, head.config.input

        def operands() -> Operands:
            return requantization.operands_of(
                rows(),
                bias,
                spec,
                w_grid,
                x_grid[0],
                statistics,
                self.activation,
                y_grid,
                self.quantizer.spec,
            )

        slot = None if is_compiling() else weight_cache.slot_of(head)
        if slot is None:
            return operands()
        others = [bias, *x_grid, *(w_grid or ()), *y_grid, *(statistics or ())[:4]]
        ends = x_spec.quant_min, x_spec.quant_max
        return weight_cache.kept_for(
            slot.of_chain, head.weight, head.config, others, lambda: operands().with_sums(x_grid[1], ends)
        )

    def carried(self, y: Tensor, is_float: bool = False) -> Any:
        """Returns the head's result on its way.

        Args:
            y: values of integers if the chain acts.
            is_float: whether BatchNorm, activation and the head's own quantizer are still to be computed.
        """
        if is_float and (self.has_readers or self.quantizer._mode == FLOAT):
            # Each module does its own, but an activation whose result is quantized keeps bits.
            is_lean = self.has_readers and self.activation is not None and self.members[0].training
            return ChainValue.of(y, self, 0, True) if is_lean and activation.keeps_bits(y) else y
        if not self.computed and not self.has_readers:
            return self.quantizer.forward(y) if is_float else y
        return ChainValue.of(y, self, 0, is_float)

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
            *tensors, eps = self._statistics()
            mean, var, gamma, beta = (tensor if tensor is None else tensor.to(y.dtype) for tensor in tensors)
            y = F.batch_norm(y, mean, var, gamma, beta, False, 0.0, eps)
        if self.activation is not None:
            y = F.relu(y) if self.activation == "relu" else F.relu6(y)
        return y

    def _fake_quantized(self, y: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
        return ranges.fake_quantized("output", y.to(grid[0].dtype), self.quantizer.spec, {"output": grid})


class Carrier:
    """What ChainValue and ChainProxy share.

    Attributes:
        _chain: the chain that the value passes.
        _positions: the numbers of computed steps that it passed; the last one is the current position.
        _is_float: whether the steps are still to be computed; else they change nothing.
        _results: the plain result, after an operation in place that ends the chain.

    Operations in place append to the lists: torch.compile follows no other change of a tensor's attribute.
    """

    _chain: Chain
    _positions: list[int]
    _is_float: bool
    _results: list[Tensor]

    def read_by(self, layer: nn.Module) -> Tensor:
        """Returns the plain tensor for the reader."""
        chain, position = self._chain, self._positions[-1]
        is_expected = any(layer is reader for reader in chain.readers)
        if self._is_open and not (is_expected and position == len(chain.computed)):
            raise _other_flow(chain, position, type(layer).__name__)
        return self._plain()

    @property
    def _is_open(self) -> bool:
        """Returns whether only the steps and the readers of the chain can take the value."""
        return len(self._results) == 0 and not self._is_float

    def _plain(self) -> Tensor:
        return self._results[0] if self._results else self._own()

    def _own(self) -> Tensor:
        raise NotImplementedError

    def _written(self) -> Tensor:
        """Returns the tensor for an operation in place."""
        return self._own()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if not is_compiling() and func in (torch.autograd.grad, torch.autograd.backward, Tensor.backward):
            args, kwargs = tree_map(_graph_tensor, (args, kwargs))
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        is_metadata = name in METADATA
        if args and isinstance(args[0], ChainValue) and not _carriers(args[1:], kwargs):
            is_setter = name in ("__set__", "__delete__") and not args[0]._is_open
            if is_metadata or is_setter:  # an attribute or a hook of a copy would be lost
                with torch._C.DisableTorchFunctionSubclass():
                    return func(_graph_tensor(args[0]), *args[1:], **kwargs)
        carriers = _carriers(args, kwargs)
        value = carriers[0]
        if not is_metadata:
            is_first = (args[0] if args else kwargs.get("input")) is value and len(carriers) == 1
            if is_first and len(value._results) == 0:
                found = value._next(func, name, args, kwargs)
                if found is not None:
                    return found
            if name == "detach" and value._positions[-1] == len(value._chain.computed):
                return value._plain().detach()  # for hooks: it is what the reader takes
            for carrier in carriers:
                # F.relu_ is not seen by torch.compile, so that what comes after it must not go on unnoticed
                if carrier._is_open or (is_compiling() and len(carrier._results) == 0):
                    raise _other_flow(carrier._chain, carrier._positions[-1], name)
        args, kwargs = tree_map(_unwrapped, (args, kwargs))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    def _next(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Returns the result of a step or a mover, or None if the operation is neither."""
        chain, position = self._chain, self._positions[-1]
        if name == "hardtanh":
            name = _name_of_hardtanh(args, kwargs)
        rest = {key: item for key, item in kwargs.items() if key != "input"}
        if chain.is_next(position, name):
            is_in_place = bool(
                name == "relu_" or kwargs.get("inplace") or (name != BATCH_NORM and True in args[1:])
            )
            result = self._written() if is_in_place and self._is_float else self._own()
            if self._is_float and name in RELUS and activation.keeps_bits(result):
                result = activation.relu(result, RELUS[name], is_in_place)
            elif self._is_float:
                with torch._C.DisableTorchFunctionSubclass():
                    result = func(result, *args[1:], **rest)
            return self._after_step(result, is_in_place)
        is_mover = name in MOVERS and (chain.batch_norm is None or position > 0)
        if not is_mover or (not self._is_float and is_active_dropout(name, args, kwargs)):
            return None
        plain = self._own()
        with torch._C.DisableTorchFunctionSubclass():
            moved = func(plain, *args[1:], **rest)
        if not isinstance(moved, Tensor) or moved.dtype != plain.dtype:
            return None
        return self if moved is plain else ChainValue.of(moved, chain, position, self._is_float)

    def _after_step(self, result: Tensor, is_in_place: bool) -> Any:
        chain, position = self._chain, self._positions[-1] + 1
        is_end = position == len(chain.computed) and (self._is_float or not chain.has_readers)
        if is_end and self._is_float and not chain.has_readers:
            result = chain.quantizer.forward(result)
        if is_in_place:
            self._positions.append(position)
        if is_in_place and is_end:
            self._results.append(result)
        if is_end:
            return result
        return self if is_in_place else ChainValue.of(result, chain, position, self._is_float)


class ChainValue(Carrier, Tensor):
    """The result of a chain's head on its way to the quantizer.

    In evaluation these are the values of the quantizer's integers: BatchNorm and ReLU are computed
    already and change nothing. Operations that the recorded forward did not have at this place are
    a RuntimeError. Where the chain does not act, the head's own quantizer takes the value as soon as
    BatchNorm and ReLU have computed it.
    """

    @staticmethod
    def of(value: Tensor, chain: Chain, position: int, is_float: bool = False) -> Any:
        result: Any = value.as_subclass(ChainValue) if type(value) is Tensor else ChainProxy(value)
        result._chain, result._is_float = chain, is_float
        result._positions, result._results = [position], []
        return result

    def _own(self) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.view_as(self)  # torch.compile does not trace as_subclass(Tensor)

    def _written(self) -> Tensor:
        if is_compiling():
            return self._own()
        # In place on a view, autograd copies the gradient of its base.
        with torch._C.DisableTorchFunctionSubclass():
            base = self._base
            is_same = (
                type(base) is Tensor
                and (base.shape, base.stride()) == (self.shape, self.stride())
                and base.storage_offset() == self.storage_offset()
            )
        return base if is_same else self._own()  # type: ignore[return-value]


class ChainProxy(Carrier):
    """Takes the place of ChainValue for tensors of other classes, as torch.export and DTensor have them."""

    def __init__(self, value: Tensor) -> None:
        self._value = value

    def _own(self) -> Tensor:
        return self._value

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") and name not in METADATA:
            raise AttributeError(name)
        attribute = getattr(Tensor, name)
        if not callable(attribute):
            return getattr(self._value, name)
        return lambda *args, **kwargs: self.__torch_function__(attribute, (), (self, *args), kwargs)


def _carriers(args: Sequence[Any], kwargs: dict[str, Any]) -> list[Carrier]:
    leaves: Any = (*args, *kwargs.values())
    if any(isinstance(leaf, (list, tuple, dict)) for leaf in leaves):
        leaves = tree_leaves(leaves)  # takes 20 us
    return [leaf for leaf in leaves if isinstance(leaf, Carrier)]


def _unwrapped(leaf: Any) -> Any:
    return leaf._plain() if isinstance(leaf, Carrier) else leaf


def _graph_tensor(leaf: Any) -> Any:
    """Returns the tensor itself, which stands in the graph, where _unwrapped would return a view of it."""
    if not isinstance(leaf, Carrier):
        return leaf
    if leaf._results or not isinstance(leaf, Tensor):
        return leaf._plain()
    return leaf


def _name_of_hardtanh(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """nn.ReLU6 calls ``hardtanh(input, 0, 6, inplace)``."""
    low, high = (*args[1:3], *(kwargs[key] for key in ("min_val", "max_val") if key in kwargs))[:2] or (-1, 1)
    return "relu6" if (low, high) == (0, 6) else "hardtanh"


def is_active_dropout(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Returns whether a call of a dropout function drops values."""
    return name.startswith("dropout") and bool(kwargs.get("training", args[2] if len(args) > 2 else True))


def _other_flow(chain: Chain, position: int, name: str) -> RuntimeError:
    expected = chain.computed[position] if position < len(chain.computed) else "the reading layer"
    reader = getattr(chain.quantizer, "_name", "a converted model")
    return RuntimeError(
        f"{reader}: expected the flow that prepare recorded, in which {expected} reads this result, got "
        f"{name}; prepare the model with example_inputs that take this way, or without them"
    )
