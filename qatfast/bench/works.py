"""What is measured: the operators, their sizes and granularities, the passes, and the figures they are held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import reference
from ..checks import dtype_name
from ..config import Granularity, PerChannel, PerGroup, PerTensor, PerToken, QATConfig
from .names import CACHED, COMPILED, OURS

OPS = ("fake_quantize", "fake_quantize_affine", "choose_qparams", "quantize", "dequantize", "qat_linear")
SUBJECTS = (*OPS, "network", "import")
SHORT_OPS = ("fake_quantize", "qat_linear")
BASELINES = {"qat_linear": "nn.Linear", "network": "ThreeLayerNet", "import": "import torch"}
QUANT_MIN, QUANT_MAX = 0, 255

KI, MI = 2**10, 2**20
FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward + backward"
STEP = "training step"

TINY = (1, 64, KI, 4 * KI)
SIZES = tuple(2**power for power in range(14, 23))  # 16 Ki to 4 Mi
LARGE = tuple(2**power for power in range(23, 27))  # 8 Mi to 64 Mi
# 256 Ki and 4 Mi elements as rows, and as images
MATRICES = ((256, 1024), (1024, 4096))
IMAGES = ((4, 64, 32, 32), (16, 256, 32, 32))
GRANULARITIES: dict[str, Granularity] = {
    "per token": PerToken(),
    "per group of 32": PerGroup(32),
    "per group of 128": PerGroup(128),
    "per channel 0": PerChannel(0),
    "per channel 1": PerChannel(1),
}
# (batch, in_features, out_features)
SMALL_LAYER, MIDDLE_LAYER = (32, 64, 64), (256, 1024, 1024)
BROAD_LAYER, LONG_LAYER = (512, 4096, 4096), (8192, 768, 3072)
TUTORIAL_LAYERS = ((32, 10, 64), SMALL_LAYER, MIDDLE_LAYER, BROAD_LAYER)
# most of nn.Linear's time: a step, inference, inference with cached weights; most of the bytes it keeps
INT8_LIMITS = {
    SMALL_LAYER: (1.15, 1.6, 1.3, 0.35),
    MIDDLE_LAYER: (0.85, 0.50, 0.40, 0.30),
    BROAD_LAYER: (0.78, 0.28, 0.22, 0.27),
    LONG_LAYER: (0.80, 0.33, 0.30, 0.27),
}
CONFIGS = {"tutorial config": QATConfig(), "int8 config": QATConfig.int8()}

LARGE_CALL = "left out of the large sizes, where its calls take long"
OTHER_DTYPE = "left out of the other types"


@dataclass(frozen=True)
class Target:
    """A figure that a provider is held to.

    Args:
        most: the largest that will do.
        figure: what of: ``time`` and ``kept`` bytes are ratios, ``seconds`` and ``above`` (the time beyond the other's)
            are in seconds.
        provider: who.
        of: the other; None: the baseline.
    """

    most: float
    figure: str = "time"
    provider: str = OURS
    of: str | None = None


@dataclass(frozen=True)
class Work:
    """An operator on one input.

    Args:
        op: its name.
        table: the results that belong together: the passes, the size.
        column: this one of them.
        shape: of the input; of ``qat_linear`` (batch, in_features, out_features).
        backward: whether the gradients are part of it.
        granularity: which elements share a scale.
        dtype: of the float tensors.
        device: where they are.
        forward: False: the gradients alone.
        channels_last: the layout of a four-dimensional input.
        config: of ``qat_linear``, as in ``CONFIGS``.
        autocast: whether ``qat_linear`` runs under autocast to bfloat16.
        threads: whether one thread takes part too.
        few: why only the leanest providers take part; empty: all do.
        targets: what it is held to.
    """

    op: str
    table: str
    column: str
    shape: tuple[int, ...] = ()
    backward: bool = False
    granularity: Granularity = PerTensor()
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    forward: bool = True
    channels_last: bool = False
    config: str = "tutorial config"
    autocast: bool = False
    threads: bool = False
    few: str = ""
    targets: tuple[Target, ...] = ()

    def __str__(self) -> str:
        return f"{self.title}: {self.column}"

    @property
    def title(self) -> str:
        """Of its table."""
        dtype = "" if self.dtype == torch.float32 else f", {dtype_name(self.dtype)}"
        return f"{self.op}, {self.table}{dtype}"

    @property
    def baseline(self) -> str:
        """The provider whose time is 1.0."""
        return BASELINES.get(self.op, "clone")

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

    @property
    def moved(self) -> int:
        """Bytes that cross memory at the least: the input is read once, the result written once."""
        written = {"choose_qparams": 0, "quantize": self.x.numel()}
        return self.x.nbytes + written.get(self.work.op, self.real.nbytes)


def normal(work: Work, *shape: int, seed: int = 0) -> Tensor:
    """Normal numbers from numpy: those of torch depend on the instruction set."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    x = torch.from_numpy(values).to(work.device, work.dtype)
    return x.to(memory_format=torch.channels_last) if work.channels_last else x


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
    subject: str, *, short: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Work]:
    """What is measured of an operator, of a network's step, of the import.

    Args:
        subject: one of ``SUBJECTS``.
        short: only what the short table shows.
        dtype: of the float tensors; the figures to be held are those of float32.
        device: where they are.
    """
    chosen = [replace(work, device=device) for work in _ALL[subject]() if not short or _is_short(work)]
    if dtype == torch.float32:
        return chosen
    return [replace(work, dtype=dtype, targets=()) for work in chosen if work.dtype == torch.float32]


def _is_short(work: Work) -> bool:
    if work.op == "qat_linear":
        return work.table.endswith(STEP) and work.shape in (SMALL_LAYER, MIDDLE_LAYER)
    plain = work.dtype == torch.float32 and not work.backward
    return work.op not in OPS or (plain and work.shape in ((16 * KI,), (256 * KI,), (4 * MI,)))


def _fake_quantize() -> Iterator[Work]:
    op, limit = "fake_quantize", Target(1.5)
    yield from _sizes(op, "per tensor, small", TINY, Target(2e-6, "above"))
    yield from _sizes(op, "per tensor", SIZES, limit, Target(1.0, of=COMPILED))
    yield from _sizes(op, "per tensor, large", LARGE, limit, Target(1.0, of=COMPILED), few=LARGE_CALL)
    yield from _sizes(op, "per tensor", (4 * KI, 256 * KI, 4 * MI), backward=True)
    for shape in MATRICES:
        yield from _granularities(op, shape, limit)
    for image in IMAGES:
        column = f"{elements(image)} elements"
        yield Work(
            *(op, f"{FORWARD}, per channel 1, channels-last images", column, image),
            granularity=PerChannel(1),
            channels_last=True,
            targets=(limit,),
        )
    for dtype in (torch.bfloat16, torch.float16):
        for work in _sizes(
            op, "per tensor", (16 * KI, 256 * KI, 4 * MI, 64 * MI), Target(1.6), few=OTHER_DTYPE
        ):
            yield replace(work, dtype=dtype)


def _fake_quantize_affine() -> Iterator[Work]:
    op, sizes, limit = "fake_quantize_affine", (256 * KI, 4 * MI), Target(1.3)
    yield from _sizes(op, "per tensor", sizes, limit)
    yield from _sizes(op, "per tensor", sizes, limit, backward=True, forward=False)
    yield from _sizes(op, "per tensor", sizes, backward=True)
    yield from _granularities(op, MATRICES[-1], limit)


def _one_pass(op: str, limit: float) -> Iterator[Work]:
    yield from _sizes(op, "per tensor", (256 * KI, 4 * MI), Target(limit))
    yield from _granularities(op, MATRICES[-1], Target(limit))


def _sizes(op: str, table: str, sizes: tuple[int, ...], *targets: Target, **options: Any) -> Iterator[Work]:
    for size in sizes:
        work = Work(op, "", elements((size,)), (size,), targets=targets, **options)
        threads = not work.backward and size in (256 * KI, 4 * MI, 64 * MI)
        yield replace(work, table=f"{_passes(work)}, {table}", threads=threads)


def _granularities(op: str, shape: tuple[int, ...], limit: Target) -> Iterator[Work]:
    table = f"{FORWARD}, {elements(shape)} elements"
    for name, granularity in GRANULARITIES.items():
        yield Work(op, table, name, shape, granularity=granularity, targets=(limit,))


def _passes(work: Work) -> str:
    if not work.backward:
        return FORWARD
    return BOTH if work.forward else BACKWARD


def _qat_linear() -> Iterator[Work]:
    tutorial, int8 = CONFIGS
    for shape in TUTORIAL_LAYERS:
        yield _layer(tutorial, STEP, shape, Target(1.05), backward=True)
    for shape in TUTORIAL_LAYERS[1:]:
        yield _layer(tutorial, "inference", shape)
    for config in CONFIGS:
        yield _layer(config, BACKWARD, MIDDLE_LAYER, backward=True, forward=False)
    for shape, (step, _, _, kept) in INT8_LIMITS.items():
        yield _layer(int8, STEP, shape, Target(step), Target(kept, "kept"), backward=True)
    for shape, (_, inference, cached, _) in INT8_LIMITS.items():
        yield _layer(int8, "inference", shape, Target(inference), Target(cached, provider=CACHED))
    for shape in tuple(INT8_LIMITS)[1:]:
        yield _layer(
            int8,
            f"{STEP} under bfloat16 autocast",
            shape,
            *(Target(1.05), Target(0.6, "kept")),
            backward=True,
            autocast=True,
        )


def _layer(config: str, table: str, shape: tuple[int, ...], *targets: Target, **options: Any) -> Work:
    few = LARGE_CALL if shape == LONG_LAYER else ""
    threads = table == STEP and shape == MIDDLE_LAYER
    column = ", ".join(map(str, shape))
    return Work(
        *("qat_linear", f"{config}, {table}", column, shape),
        **{"config": config, "few": few, "threads": threads, "targets": targets, **options},
    )


def _network() -> Iterator[Work]:
    yield Work("network", f"{STEP} with Adam", "batch 32", (32,), True, targets=(Target(1.10),))


def _import() -> Iterator[Work]:
    yield Work("import", "after torch", "a fresh process", targets=(Target(0.1, "seconds"),))


_ALL: dict[str, Callable[[], Iterator[Work]]] = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_affine": _fake_quantize_affine,
    "choose_qparams": partial(_one_pass, "choose_qparams", 0.6),
    "quantize": partial(_one_pass, "quantize", 0.9),
    "dequantize": partial(_one_pass, "dequantize", 0.9),
    "qat_linear": _qat_linear,
    "network": _network,
    "import": _import,
}


def elements(shape: tuple[int, ...]) -> str:
    """How many: ``4 Ki``, ``32 Mi``."""
    count = math.prod(shape)
    for unit, name in ((MI, "Mi"), (KI, "Ki")):
        if count % unit == 0:
            return f"{count // unit} {name}"
    return str(count)
