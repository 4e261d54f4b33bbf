"""The registry of operators, with one entry per public function.

Tests select operators by property: ``operators(elementwise=True)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

import cases
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, functional, reference


class Call(NamedTuple):
    """A legal call of a public function with keyword arguments."""

    op: str
    label: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def replaced(self, **changes: Any) -> Call:
        return self._replace(arguments={**self.arguments, **changes})

    def through(self, implementation: Any) -> Any:
        return getattr(implementation, self.op)(**self.arguments)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    @property
    def schema_arguments(self) -> tuple[Any, ...]:
        return schema_arguments(self.op, **self.arguments)


def schema_arguments(op: str, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """Converts arguments of the public function to arguments of the schema of ``op``."""
    bound = inspect.signature(getattr(functional, op)).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(map(_code_of, bound.arguments.values()))


def _code_of(value: Any) -> Any:
    if isinstance(value, QATConfig):
        return value.codes
    return value.code if isinstance(value, (PerTensor, PerChannel, PerGroup, PerToken)) else value


@dataclass(frozen=True)
class Operator:
    """A public function, its legal calls and its properties."""

    name: str
    # (blocks, dtype, device=, seed=) -> (label, arguments) of each call
    inputs: Callable[..., Iterator[tuple[str, dict[str, Any]]]]
    # The names of the arguments that get a gradient.
    differentiable: tuple[str, ...] = ()
    # Whether it returns a tensor with the shape of ``input``.
    elementwise: bool = False
    # The devices that have kernels.
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        return self.name

    @property
    def takes_granularity(self) -> bool:
        return "granularity" in inspect.signature(getattr(functional, self.name)).parameters

    def calls(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        blocks: tuple[tuple[tuple[int, ...], Any], ...] = cases.FEW_BLOCKS,
        device: str = "cpu",
        seed: int = 0,
        requires_grad: bool = False,
    ) -> Iterator[Call]:
        """Yields legal calls: at least one per granularity, or per config.

        With ``requires_grad``, the input and the differentiable arguments require grad if they are
        floating-point tensors.
        """
        for label, arguments in self.inputs(blocks, dtype, device=device, seed=seed):
            for name in ("input", *self.differentiable):
                if arguments[name].is_floating_point():
                    arguments[name].requires_grad_(requires_grad)
            yield Call(self.name, label, arguments)


def _dynamic_range(blocks: Any, dtype: torch.dtype, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for shape, granularity in blocks:
        for grid, symmetric in (("affine", False), ("symmetric", True)):
            x = cases.normal(shape, dtype, **options)
            arguments = {"input": x, "num_bits": 5, "symmetric": symmetric, "granularity": granularity}
            yield f"{cases.name((shape, granularity))}-{grid}", arguments


def _static_range(blocks: Any, dtype: torch.dtype, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for shape, granularity in blocks:
        grid = cases.grid(shape, granularity, dtype, **options)
        arguments = {"input": cases.normal(shape, dtype, **options), **grid._asdict()}
        yield cases.name((shape, granularity)), {**arguments, "granularity": granularity}


def _integers(blocks: Any, dtype: torch.dtype, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for shape, granularity in blocks:
        grid = cases.grid(shape, granularity, dtype, **options)
        q = cases.integers(shape, torch.uint8, **options)
        arguments = {"input": q, "scale": grid.scale, "zero_point": grid.zero_point}
        yield cases.name((shape, granularity)), {**arguments, "granularity": granularity, "dtype": dtype}


def _layers(_: Any, dtype: torch.dtype, **options: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    for label, config in cases.CONFIGS.items():
        operands = cases.linear(((5,), 16, 6), dtype, **options)
        yield label, {**operands._asdict(), "config": config}


OPERATORS = {
    operator.name: operator
    for operator in (
        Operator("fake_quantize", _dynamic_range, differentiable=("input",), elementwise=True),
        Operator("fake_quantize_affine", _static_range, differentiable=("input",), elementwise=True),
        Operator("choose_qparams", _dynamic_range),
        Operator("search_qparams", _dynamic_range),
        Operator("fake_quantize_learned", _static_range, differentiable=("input", "scale"), elementwise=True),
        Operator("quantize", _static_range, elementwise=True),
        Operator("dequantize", _integers, elementwise=True),
        Operator("qat_linear", _layers, differentiable=("input", "weight", "bias")),
    )
}


def operators(device: str | None = None, **properties: Any) -> tuple[Operator, ...]:
    """Returns the operators with these properties, and with kernels for ``device`` if not None."""
    return tuple(
        operator
        for operator in OPERATORS.values()
        if (device is None or device in operator.devices)
        and all(getattr(operator, name) == value for name, value in properties.items())
    )


def _through_torch_ops(op: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(torch.ops.qatfast, op)(*schema_arguments(op, *args, **kwargs))


# The implementations of the operators; each takes the arguments of the public functions.
IMPLEMENTATIONS = {
    "public": functional,
    "reference": SimpleNamespace(**{op: getattr(reference, op) for op in OPERATORS}),
    "torch.ops": SimpleNamespace(**{op: partial(_through_torch_ops, op) for op in OPERATORS}),
}
