"""What is measured: the operators, their sizes and granularities, forward alone or forward + backward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..config import Granularity, PerChannel, PerGroup, PerTensor, PerToken

OPS = ("fake_quantize", "fake_quantize_affine", "choose_qparams", "quantize", "dequantize", "qat_linear")
SHORT_OPS = ("fake_quantize", "qat_linear")
QUANT_MIN, QUANT_MAX = 0, 255

KI, MI = 2**10, 2**20
FORWARD = "forward"
BOTH = "forward + backward"
# 256 Ki and 4 Mi elements as rows
MATRICES = ((256, 1024), (1024, 4096))
GRANULARITIES: dict[str, Granularity] = {
    "per tensor": PerTensor(),
    "per token": PerToken(),
    "per group of 32": PerGroup(32),
    "per channel 0": PerChannel(0),
    "per channel 1": PerChannel(1),
}
# (batch, in_features, out_features)
LAYERS = ((32, 10, 64), (32, 64, 64), (256, 1024, 1024), (512, 4096, 4096))


@dataclass(frozen=True)
class Work:
    """An operator on one input.

    Args:
        op: its name.
        table: the results that belong together: forward or forward + backward, the size.
        column: this one of them.
        shape: of the input; of ``qat_linear`` (batch, in_features, out_features).
        backward: whether the gradients are part of it.
        granularity: which elements share a scale; ``qat_linear`` has the tutorial config.
        dtype: of the float tensors.
        device: where they are.
    """

    op: str
    table: str
    column: str
    shape: tuple[int, ...]
    backward: bool = False
    granularity: Granularity = PerTensor()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.op}, {self.table}: {self.column}"

    @property
    def baseline(self) -> str:
        """The provider whose time is 1.0."""
        return "nn.Linear" if self.op == "qat_linear" else "clone"

    def grad_mode(self) -> AbstractContextManager[Any]:
        """Forward alone is measured as in evaluation: no graph is kept."""
        return torch.set_grad_enabled(self.backward)


@dataclass(frozen=True)
class Inputs:
    """The tensors of an elementwise operator, the same for each provider.

    Args:
        work: what they are for.
        x: the input; integers for ``dequantize``.
        real: the float input.
        grad: of the output.
        scale: of a given grid, somewhat narrower than the input's range.
        zero_point: of the grid.
        arguments: of the public function, after the input.
    """

    work: Work
    x: Tensor
    real: Tensor
    grad: Tensor
    scale: Tensor
    zero_point: Tensor
    arguments: dict[str, Any]


def normal(work: Work, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers from numpy: those of torch depend on the instruction set."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return torch.from_numpy(values).to(work.device, work.dtype)


def inputs(work: Work) -> Inputs:
    """The tensors of an operator other than ``qat_linear``."""
    granularity: dict[str, Any] = {}
    if not isinstance(work.granularity, PerTensor):
        granularity["granularity"] = work.granularity
    real = normal(work, *work.shape)
    x = real
    scale, zero_point = reference.choose_qparams(real * 0.75, **granularity)
    arguments: dict[str, Any] = {}
    if work.op in ("fake_quantize_affine", "quantize", "dequantize"):
        arguments.update(scale=scale, zero_point=zero_point)
    if work.op == "dequantize":
        x = reference.quantize(real, scale, zero_point, QUANT_MIN, QUANT_MAX, **granularity)
        if work.dtype != torch.float32:
            arguments.update(dtype=work.dtype)
    elif arguments:
        arguments.update(quant_min=QUANT_MIN, quant_max=QUANT_MAX)
    if work.backward:
        x = x.detach().requires_grad_()
    return Inputs(
        work, x, real, normal(work, *work.shape, seed=1), scale, zero_point, {**arguments, **granularity}
    )


def works(
    op: str, *, short: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Work]:
    """What is measured of an operator.

    Args:
        op: its name.
        short: only what the short table shows.
        dtype: of the float tensors.
        device: where they are.
    """
    chosen = _short(op) if short else _all(op)
    return [replace(work, dtype=dtype, device=device) for work in chosen]


def _short(op: str) -> Iterator[Work]:
    if op == "qat_linear":
        return _layers(LAYERS[1:3], backward=True)
    return _sizes(op, (4 * KI, 256 * KI, 4 * MI))


def _all(op: str) -> Iterator[Work]:
    if op == "qat_linear":
        yield from _layers(LAYERS, backward=True)
        yield from _layers(LAYERS, backward=False)
        return
    if op == "fake_quantize":
        sizes = (4 * KI, 64 * KI, 256 * KI, MI, 4 * MI)
        yield from _sizes(op, (*sizes, 32 * MI))
        yield from _sizes(op, sizes, backward=True)
    for shape in MATRICES:
        yield from _granularities(op, shape)
    if op == "fake_quantize_affine":
        yield from _sizes(op, (256 * KI, 4 * MI), backward=True)


def _sizes(op: str, sizes: tuple[int, ...], *, backward: bool = False) -> Iterator[Work]:
    for size in sizes:
        yield Work(op, f"{BOTH if backward else FORWARD}, per tensor", elements(size), (size,), backward)


def _granularities(op: str, shape: tuple[int, int]) -> Iterator[Work]:
    for name, granularity in GRANULARITIES.items():
        if op != "fake_quantize" or name != "per tensor":
            table = f"{FORWARD}, {elements(shape[0] * shape[1])} elements"
            yield Work(op, table, name, shape, granularity=granularity)


def _layers(shapes: tuple[tuple[int, int, int], ...], *, backward: bool) -> Iterator[Work]:
    for shape in shapes:
        table = f"training step ({BOTH})" if backward else FORWARD
        yield Work("qat_linear", table, ", ".join(map(str, shape)), shape, backward)


def elements(count: int) -> str:
    """``4 Ki``, ``32 Mi``."""
    for unit, name in ((MI, "Mi"), (KI, "Ki")):
        if count % unit == 0:
            return f"{count // unit} {name}"
    return str(count)
