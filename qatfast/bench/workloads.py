"""What is measured: the operators, their sizes, granularities and passes, and the targets that they are held to."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import functional, reference
from ..checks import dtype_name
from ..config import Granularity, PerChannel, PerGroup, PerTensor, PerToken, QATConfig

# Providers that other modules refer to.
OURS = "qatfast"
CACHED = "qatfast, cached weights"
REFERENCE = "reference"
COMPILED = "reference, compiled"
TUTORIAL = "tutorial formula"
TUTORIAL_LAYER = "tutorial layer"
TRIAD = "triad"
INT8_GEMM = "int8 GEMM alone"

ONE_THREAD = ", 1 thread"
"""Suffix of a provider's name: the same provider while torch has one thread."""

EXACT = (OURS, CACHED)
"""Providers that have to give the reference's bits."""

BOUNDS = (TRIAD, INT8_GEMM)
"""Providers that do only the part of the work that bounds its time. Their results are not compared."""

OPS = (*functional.__all__,)
ELEMENTWISE_OPS = tuple(op for op in OPS if op != "qat_linear")
OBSERVED = "fake_quantize_observed"  # what FakeQuantize calls if its range is a moving average
SUBJECTS = (*OPS, OBSERVED, "qat_conv2d", "network", "import")
# Subjects that are measured without --op and --full.
SHORT_SUBJECTS = ("fake_quantize", "qat_linear")
BASELINES = {
    "qat_linear": "nn.Linear",
    "qat_conv2d": "nn.Conv2d",
    "network": "ThreeLayerNet",
    "import": "import torch",
}
QUANT_MIN, QUANT_MAX = 0, 255

KI, MI = 2**10, 2**20
FORWARD = "forward"
BACKWARD = "backward"
BOTH = "forward + backward"
STEP = "training step"

TINY = (1, 64, KI, 4 * KI)
SIZES = tuple(2**power for power in range(14, 23))  # 16 Ki to 4 Mi
LARGE = tuple(2**power for power in range(23, 27))  # 8 Mi to 64 Mi
# 256 Ki and 4 Mi elements, as matrices and as images
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
# Limits as shares of nn.Linear: time of a step, of inference, of inference with cached weights, and bytes kept
INT8_LIMITS = {
    SMALL_LAYER: (1.15, 1.6, 1.3, 0.35),
    MIDDLE_LAYER: (0.85, 0.50, 0.40, 0.30),
    BROAD_LAYER: (0.78, 0.28, 0.22, 0.27),
    LONG_LAYER: (0.80, 0.33, 0.30, 0.27),
}
# The same for ranges that the layer keeps: time of a step, and of inference with cached weights as a share of the
# int8 GEMM alone
STATIC_LIMITS: dict[tuple[int, ...], tuple[float, float | None]] = {
    SMALL_LAYER: (1.2, None),
    MIDDLE_LAYER: (0.80, 1.35),
    BROAD_LAYER: (0.76, 1.08),
    LONG_LAYER: (0.78, 0.85),
}
CONFIGS = {
    "tutorial config": QATConfig(),
    "int8 config": QATConfig.int8(),
    "static config": QATConfig.static(),
    "learned config": QATConfig.static(4),
}

LARGE_SIZE = "left out of the large sizes, where its calls take long"
OTHER_DTYPE = "left out of the other types"


@dataclass(frozen=True)
class Target:
    """A limit that a provider has to keep.

    Args:
        most: Largest value that meets the target.
        figure: What is limited. ``time`` and ``kept`` (bytes) are ratios to another provider, ``seconds`` is the time
            itself and ``above`` the time beyond that of another provider, both in seconds.
        provider: Name of the provider.
        of: Name of the other provider. None means the baseline.
    """

    most: float
    figure: str = "time"
    provider: str = OURS
    of: str | None = None


@dataclass(frozen=True)
class Workload:
    """An operator on one input, or another subject of a measurement.

    Args:
        op: Name of the operator, or another one of ``SUBJECTS``.
        table: Title of the table that the results belong to: the passes and the sizes.
        column: Title of the column in that table.
        shape: Shape of the input. For ``qat_linear`` (batch, in_features, out_features), for ``qat_conv2d`` a
            ConvolutionShape.
        backward: Whether the gradients are computed.
        granularity: Which elements share a scale.
        dtype: Type of the float tensors.
        device: Device of the tensors.
        forward: Whether the forward pass is timed. False means the gradients alone.
        channels_last: Whether a four-dimensional input is in channels-last layout.
        config: Config of ``qat_linear``, a key of ``CONFIGS``.
        autocast: Whether ``qat_linear`` runs under autocast to bfloat16.
        one_thread: Whether the baseline and qatfast are also measured while torch has one thread.
        reduced: Why only the fastest providers take part. Empty if all do.
        targets: The limits that providers have to keep.
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
    one_thread: bool = False
    reduced: str = ""
    targets: tuple[Target, ...] = ()

    def __str__(self) -> str:
        return f"{self.title}: {self.column}"

    @property
    def title(self) -> str:
        """Title of the table."""
        dtype = "" if self.dtype == torch.float32 else f", {dtype_name(self.dtype)}"
        return f"{self.op}, {self.table}{dtype}"

    @property
    def baseline(self) -> str:
        """The provider whose time is 1.0."""
        return BASELINES.get(self.op, "clone")

    @property
    def is_elementwise(self) -> bool:
        """Whether the subject is an operator of one tensor, with or without a given range."""
        return self.op in ELEMENTWISE_OPS

    def grad_mode(self) -> AbstractContextManager[Any]:
        """Returns a context in which no graph is kept if only the forward pass is measured, as in evaluation."""
        return torch.set_grad_enabled(self.backward)


@dataclass(frozen=True)
class Inputs:
    """The tensors of an elementwise operator, the same for each provider.

    Args:
        workload: The workload that they are made for.
        x: Input of the operator. Integers for ``dequantize``.
        real: Float input.
        grad: Gradient of the output.
        scale: Scale of a given grid, which is somewhat narrower than the input's range.
        zero_point: Zero point of that grid.
        arguments: Arguments of the public function after the input.
    """

    workload: Workload
    x: Tensor
    real: Tensor
    grad: Tensor
    scale: Tensor
    zero_point: Tensor
    arguments: dict[str, Any]

    @property
    def moved(self) -> int:
        """Minimum number of bytes to move: the input is read once and the result is written once."""
        written = {"choose_qparams": 0, "search_qparams": 0, "quantize": self.x.numel()}
        return self.x.nbytes + written.get(self.workload.op, self.real.nbytes)


def normal(workload: Workload, *shape: int, seed: int = 0) -> Tensor:
    """Returns normal numbers from numpy, because those of torch depend on the instruction set."""
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    x = torch.from_numpy(values).to(workload.device, workload.dtype)
    return x.to(memory_format=torch.channels_last) if workload.channels_last else x


def inputs(workload: Workload) -> Inputs:
    """Returns the tensors of an elementwise operator."""
    granularity: dict[str, Any] = {}
    if not isinstance(workload.granularity, PerTensor):
        granularity["granularity"] = workload.granularity
    real = normal(workload, *workload.shape)
    x = real
    scale, zero_point = reference.choose_qparams(real * 0.75, **granularity)
    if workload.op == "fake_quantize_learned" and workload.backward:
        scale.requires_grad_()  # its backward computes both gradients
    if workload.op == "dequantize":
        x = reference.quantize(real, scale, zero_point, QUANT_MIN, QUANT_MAX, **granularity)
    available = {
        "scale": scale,
        "zero_point": zero_point,
        "quant_min": QUANT_MIN,
        "quant_max": QUANT_MAX,
        "dtype": workload.dtype,
    }
    parameters = inspect.signature(getattr(reference, workload.op, reference.fake_quantize)).parameters
    arguments = {name: value for name, value in available.items() if name in parameters}
    if workload.backward:
        x = x.detach().requires_grad_()
    return Inputs(
        workload,
        x,
        real,
        normal(workload, *workload.shape, seed=1),
        scale,
        zero_point,
        {**arguments, **granularity},
    )


def workloads_of(
    subject: str, *, short: bool = False, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Workload]:
    """Returns the workloads of an operator, of a network's training step, or of the import.

    Args:
        subject: One of ``SUBJECTS``.
        short: Whether to return only the workloads of the short table.
        dtype: Type of the float tensors. There are targets only for float32.
        device: Device of the tensors.
    """
    chosen = [
        replace(workload, device=device)
        for workload in _workloads(subject)
        if not short or _is_short(workload)
    ]
    if dtype == torch.float32:
        return chosen
    return [
        replace(workload, dtype=dtype, targets=()) for workload in chosen if workload.dtype == torch.float32
    ]


def _workloads(subject: str) -> Iterator[Workload]:
    return _ALL[subject]() if subject in _ALL else _one_pass(subject, Target(1.5))


def _is_short(workload: Workload) -> bool:
    if workload.op == "qat_linear":
        return workload.table.endswith(STEP) and workload.shape in (SMALL_LAYER, MIDDLE_LAYER)
    plain = workload.dtype == torch.float32 and not workload.backward
    return not workload.is_elementwise or (plain and workload.shape in ((16 * KI,), (256 * KI,), (4 * MI,)))


def _fake_quantize() -> Iterator[Workload]:
    op, limit = "fake_quantize", Target(1.5)
    yield from _sizes(op, "per tensor, small", TINY, Target(2e-6, "above"))
    yield from _sizes(op, "per tensor", SIZES, limit, Target(1.0, of=COMPILED))
    yield from _sizes(op, "per tensor, large", LARGE, limit, Target(1.0, of=COMPILED), reduced=LARGE_SIZE)
    yield from _sizes(op, "per tensor", (4 * KI, 256 * KI, 4 * MI), backward=True)
    for shape in MATRICES:
        yield from _granularities(op, shape, limit)
    for image in IMAGES:
        column = f"{elements(image)} elements"
        yield Workload(
            op,
            f"{FORWARD}, per channel 1, channels-last images",
            column,
            image,
            granularity=PerChannel(1),
            channels_last=True,
            targets=(limit,),
        )
    for dtype in (torch.bfloat16, torch.float16):
        for workload in _sizes(
            op, "per tensor", (16 * KI, 256 * KI, 4 * MI, 64 * MI), Target(1.6), reduced=OTHER_DTYPE
        ):
            yield replace(workload, dtype=dtype)


def _fake_quantize_affine() -> Iterator[Workload]:
    op, sizes, limit = "fake_quantize_affine", (256 * KI, 4 * MI), Target(1.3)
    yield from _sizes(op, "per tensor", sizes, limit)
    yield from _sizes(op, "per tensor", sizes, limit, backward=True, forward=False)
    yield from _sizes(op, "per tensor", sizes, backward=True)
    yield from _granularities(op, MATRICES[-1], limit)


def _fake_quantize_learned() -> Iterator[Workload]:
    op = "fake_quantize_learned"
    yield from _sizes(op, "per tensor", (256 * KI, MI, 4 * MI))
    yield from _sizes(op, "per tensor", (MI,), Target(3.5), backward=True)
    yield from _granularities(op, MATRICES[-1])


def _search_qparams() -> Iterator[Workload]:
    op, limit = "search_qparams", Target(25)
    yield from _sizes(op, "per tensor", (256 * KI, MI), limit)
    yield from _granularities(op, (KI, KI), limit)


def _fake_quantize_observed() -> Iterator[Workload]:
    for size, limit in ((64 * KI, 1.5), (MI, 1.15), (16 * MI, 1.0)):
        yield from _sizes(
            OBSERVED, "per tensor", (size,), Target(limit), reduced=LARGE_SIZE if size > MI else ""
        )
    yield from _sizes(OBSERVED, "per tensor", (MI,), Target(1.6), backward=True)


def _one_pass(op: str, *targets: Target) -> Iterator[Workload]:
    yield from _sizes(op, "per tensor", (256 * KI, 4 * MI), *targets)
    yield from _granularities(op, MATRICES[-1], *targets)


def _sizes(
    op: str, table: str, sizes: tuple[int, ...], *targets: Target, **options: Any
) -> Iterator[Workload]:
    for size in sizes:
        workload = Workload(op, "", elements((size,)), (size,), targets=targets, **options)
        one_thread = not workload.backward and size in (256 * KI, 4 * MI, 64 * MI)
        yield replace(workload, table=f"{_passes(workload)}, {table}", one_thread=one_thread)


def _granularities(op: str, shape: tuple[int, ...], *targets: Target) -> Iterator[Workload]:
    table = f"{FORWARD}, {elements(shape)} elements"
    for name, granularity in GRANULARITIES.items():
        yield Workload(op, table, name, shape, granularity=granularity, targets=targets)


def _passes(workload: Workload) -> str:
    if not workload.backward:
        return FORWARD
    return BOTH if workload.forward else BACKWARD


def _qat_linear() -> Iterator[Workload]:
    tutorial, int8, static, learned = CONFIGS
    for shape in TUTORIAL_LAYERS:
        yield _layer(tutorial, STEP, shape, Target(1.05), backward=True)
    for shape in TUTORIAL_LAYERS[1:]:
        yield _layer(tutorial, "inference", shape)
    for config in (tutorial, int8):
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
            Target(1.05),
            Target(0.6, "kept"),
            backward=True,
            autocast=True,
        )
    for size, (of_step, of_gemm) in STATIC_LIMITS.items():
        yield _layer(static, STEP, size, Target(of_step), backward=True)
        if of_gemm is not None:
            yield _layer(static, "inference", size, Target(of_gemm, provider=CACHED, of=INT8_GEMM))
    yield _layer(learned, STEP, MIDDLE_LAYER, Target(0.95), backward=True)


def _layer(config: str, table: str, shape: tuple[int, ...], *targets: Target, **options: Any) -> Workload:
    reduced = LARGE_SIZE if shape == LONG_LAYER else ""
    one_thread = table == STEP and shape == MIDDLE_LAYER
    column = ", ".join(map(str, shape))
    return Workload(
        "qat_linear",
        f"{config}, {table}",
        column,
        shape,
        config=config,
        one_thread=one_thread,
        reduced=reduced,
        targets=targets,
        **options,
    )


class ConvolutionShape(NamedTuple):
    """The shape of a workload of ``qat_conv2d``, whose images are squares."""

    batch: int
    in_channels: int
    out_channels: int
    size: int
    kernel_size: int
    stride: int = 1
    groups: int = 1

    @property
    def arguments(self) -> tuple[int, int, int, int]:
        """The arguments of nn.Conv2d from ``in_channels`` to ``stride``."""
        return self.in_channels, self.out_channels, self.kernel_size, self.stride


# Limits as shares of nn.Conv2d: time of a step and of inference with cached weights
CONVOLUTIONS = {
    "64 channels, 56x56, 3x3": (ConvolutionShape(8, 64, 64, 56, 3), 0.88, 0.38),
    "256 channels, 14x14, 3x3": (ConvolutionShape(8, 256, 256, 14, 3), 0.90, 0.38),
    "256 to 64 channels, 56x56, 1x1": (ConvolutionShape(8, 256, 64, 56, 1), 1.05, 0.38),
    "128 channels, 28x28, depthwise 3x3": (ConvolutionShape(8, 128, 128, 28, 3, groups=128), 1.10, 0.65),
    "3 to 64 channels, 224x224, 7x7": (ConvolutionShape(8, 3, 64, 224, 7, stride=2), None, 0.55),
}


def _qat_conv2d() -> Iterator[Workload]:
    for table in (STEP, "inference"):
        for column, (shape, step, cached) in CONVOLUTIONS.items():
            is_step = table == STEP
            targets = [Target(cached, provider=CACHED)]
            if is_step:
                targets = [] if step is None else [Target(step)]
            yield Workload(
                "qat_conv2d",
                f"static config, {table}",
                column,
                tuple(shape),
                backward=is_step,
                channels_last=True,
                targets=tuple(targets),
            )


def _network() -> Iterator[Workload]:
    yield Workload("network", f"{STEP} with Adam", "batch 32", (32,), True, targets=(Target(1.10),))


def _import() -> Iterator[Workload]:
    yield Workload("import", "after torch", "a fresh process", targets=(Target(0.1, "seconds"),))


_ALL: dict[str, Callable[[], Iterator[Workload]]] = {
    "fake_quantize": _fake_quantize,
    "fake_quantize_affine": _fake_quantize_affine,
    "fake_quantize_learned": _fake_quantize_learned,
    "search_qparams": _search_qparams,
    "choose_qparams": partial(_one_pass, "choose_qparams", Target(0.6)),
    "quantize": partial(_one_pass, "quantize", Target(0.9)),
    "dequantize": partial(_one_pass, "dequantize", Target(0.9)),
    "qat_linear": _qat_linear,
    OBSERVED: _fake_quantize_observed,
    "qat_conv2d": _qat_conv2d,
    "network": _network,
    "import": _import,
}


def elements(shape: tuple[int, ...]) -> str:
    """Returns the number of elements as a text such as ``4 Ki`` or ``32 Mi``."""
    count = math.prod(shape)
    for unit, name in ((MI, "Mi"), (KI, "Ki")):
        if count % unit == 0:
            return f"{count // unit} {name}"
    return str(count)
