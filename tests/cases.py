"""The inputs that tests and benchmarks share: tensors, grids and layers.

``operators.py`` builds calls from them. The numbers come from numpy because those of
``torch.randn`` depend on the instruction set.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qatfast import (
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QuantSpec,
    checks,
    kernels,
)

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.uint16)

# Every granularity on shapes of 0 to 4 dimensions, empty shapes, and sizes that are no multiple of
# a vector register.
BLOCKS = (
    ((), PerTensor()),
    ((1,), PerTensor()),
    ((0,), PerTensor()),
    ((3, 0), PerTensor()),
    ((2, 0, 4), PerTensor()),
    ((131,), PerTensor()),
    ((5, 7), PerTensor()),
    ((2, 3, 4, 5), PerTensor()),
    ((5,), PerChannel(0)),
    ((5, 7), PerChannel(0)),
    ((5, 7), PerChannel(1)),
    ((5, 19), PerChannel(-2)),
    ((2, 3, 17), PerChannel(1)),
    ((2, 3, 4, 5), PerChannel(-3)),
    ((0, 3), PerChannel(0)),
    ((0, 3), PerChannel(1)),
    ((2, 0, 4), PerChannel(0)),
    ((12,), PerGroup(4)),
    ((3, 34), PerGroup(17)),
    ((2, 3, 8), PerGroup(1)),
    ((3, 20), PerGroup(20)),
    ((0, 8), PerGroup(4)),
    ((3, 0), PerGroup(4)),
    ((9,), PerToken()),
    ((5, 1), PerToken()),
    ((4, 33), PerToken()),
    ((2, 3, 7), PerToken()),
    ((0, 3), PerToken()),
    ((2, 0, 4), PerToken()),
    ((3, 0), PerToken()),
)
# The arguments of the three integer grids.
GRIDS = {
    "affine": {},
    "symmetric": {"symmetric": True},
    "full_range": {"symmetric": True, "narrow_range": False},
}
# A few shapes with every granularity, for tests that also vary other parameters.
FEW_BLOCKS = (
    ((67,), PerTensor()),
    ((5, 19), PerChannel(0)),
    ((2, 3, 17), PerChannel(1)),
    ((3, 34), PerGroup(17)),
    ((2, 3, 7), PerToken()),
)
# (quant_min, quant_max): for every dtype that quantize returns; also ends that are not those of a
# dtype.
RANGES = ((0, 255), (-128, 127), (0, 3), (-7, 7), (0, 65535), (-32768, 32767), (3, 300), (-300, -2))

CONFIGS = {
    "tutorial": QATConfig.tutorial(),
    "tutorial_2_bits": QATConfig.tutorial(2),
    "int8": QATConfig.int8(),
    "weight_only": QATConfig.weight_only(4, 8),
    "float": QATConfig(weight=None, bias=None, output=None),
    "input_only": QATConfig(input=QuantSpec(6), weight=None, bias=None, output=None),
    "output_only": QATConfig(weight=None, bias=None, output=QuantSpec(5, symmetric=True)),
    "bias_only": QATConfig(weight=None, output=None),
    "per_token": QATConfig(
        input=QuantSpec(8, granularity=PerToken()),
        weight=QuantSpec(4, symmetric=True, granularity=PerToken()),
        bias=QuantSpec(16),
        output=QuantSpec(8, granularity=PerToken()),
    ),
    "per_channel": QATConfig(
        input=QuantSpec(8, granularity=PerChannel(-1)),
        weight=QuantSpec(3, granularity=PerChannel(1)),
        bias=QuantSpec(8, granularity=PerChannel(0)),
        output=QuantSpec(8, symmetric=True, granularity=PerChannel(-1)),
    ),
    "per_group": QATConfig(
        input=QuantSpec(8, granularity=PerGroup(4)),
        weight=QuantSpec(4, symmetric=True, granularity=PerGroup(8)),
        bias=QuantSpec(8, granularity=PerGroup(3)),
        output=QuantSpec(8, granularity=PerGroup(2)),
    ),
}
# (leading shape, in_features, out_features)
LINEAR_SHAPES = (
    ((5,), 16, 6),
    ((), 16, 6),
    ((1,), 8, 6),
    ((2, 3), 16, 12),
    ((2, 1, 3), 24, 6),
    ((0,), 16, 6),
    ((2, 0), 16, 6),
    ((4,), 0, 6),
    ((4,), 16, 0),
)


def name(value: Any) -> str:
    """Returns a test id such as ``float32`` or ``5x7-PerChannel(0)``."""
    if isinstance(value, torch.dtype):
        return checks.dtype_name(value)
    if isinstance(value, tuple) and all(isinstance(size, int) for size in value):
        return "x".join(map(str, value)) or "scalar"
    if isinstance(value, tuple):
        return "-".join(map(name, value))
    return str(value)


def normal(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    device: str = "cpu",
    requires_grad: bool = False,
) -> Tensor:
    values = np.random.default_rng(seed).standard_normal(shape) * 3
    return torch.tensor(values).to(device, dtype).requires_grad_(requires_grad)


def special_values(dtype: torch.dtype) -> list[float]:
    """Returns zeros, denormals, the smallest and largest normal numbers, infinities and NaN."""
    info = torch.finfo(dtype)
    positive = [
        0.0,
        info.smallest_normal * info.eps,
        info.smallest_normal * (1 - info.eps),
        info.tiny,
        1.0,
        info.max,
    ]
    return [*positive, *(-value for value in positive), math.inf, -math.inf, math.nan]


def mixed(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, *, seed: int = 0, device: str = "cpu"
) -> Tensor:
    """Returns normally distributed numbers; about a fifth is zero, denormal, infinite or NaN."""
    values = normal(shape, dtype, seed=seed)
    special = torch.tensor([value for value in special_values(dtype) if abs(value) != torch.finfo(dtype).max])
    rng = np.random.default_rng([seed, 1])
    index = torch.tensor(rng.choice(len(special), size=shape))
    return torch.where(torch.tensor(rng.random(shape) < 0.2), special[index].to(dtype), values).to(device)


def integers(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int = 0, device: str = "cpu") -> Tensor:
    info = torch.iinfo(dtype)
    values = np.random.default_rng(seed).integers(info.min, info.max, size=shape, endpoint=True)
    return torch.tensor(values, dtype=torch.int32).to(dtype).to(device)


class Grid(NamedTuple):
    """A static range: the arguments between ``input`` and ``granularity``."""

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int


def grid(
    shape: tuple[int, ...],
    granularity: Any,
    dtype: torch.dtype = torch.float32,
    quant_range: tuple[int, int] = (0, 255),
    *,
    seed: int = 0,
    device: str = "cpu",
    width: float = 12.0,
) -> Grid:
    """Returns a static range with a random grid per block.

    The range is about ``width`` wide, so that normally distributed inputs are inside and outside of
    it. Every third scale is a power of two, so that inputs at multiples of it are exact ties.
    """
    quant_min, quant_max = quant_range
    rng = np.random.default_rng([seed, 2])
    blocks = checks.shape_of_qparams(torch.Size(shape), granularity)
    scale = np.exp2(rng.uniform(-1.5, 0.5, blocks)) * width / (quant_max - quant_min)
    scale = np.where(rng.random(blocks) < 0.33, np.exp2(np.round(np.log2(scale))), scale)
    zero_point = rng.integers(quant_min, quant_max, size=blocks, endpoint=True)
    return Grid(
        torch.tensor(scale).to(device, compute_dtype(dtype)),
        torch.tensor(zero_point, dtype=torch.int32, device=device),
        quant_min,
        quant_max,
    )


def ties(shape: tuple[int, ...], scale: Tensor, dtype: torch.dtype, *, seed: int = 0) -> Tensor:
    """Returns multiples of half an interval of the first scale, rounded to ``dtype``.

    About half of them are replaced by the next larger or smaller number.
    """
    rng = np.random.default_rng([seed, 3])
    interval = scale.flatten()[0].item() if scale.numel() else 1.0
    halves = torch.tensor(rng.integers(-600, 600, size=shape) * (interval / 2)).to(dtype)
    infinite = torch.tensor(np.where(rng.random(shape) < 0.5, -math.inf, math.inf)).to(dtype)
    return torch.where(torch.tensor(rng.random(shape) < 0.5), halves, torch.nextafter(halves, infinite))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Linear(NamedTuple):
    input: Tensor
    weight: Tensor
    bias: Tensor | None


def linear(
    shape: tuple[tuple[int, ...], int, int],
    dtype: torch.dtype = torch.float32,
    *,
    bias: bool = True,
    seed: int = 0,
    device: str = "cpu",
    requires_grad: bool = False,
) -> Linear:
    """Returns the tensors of a layer; ``shape`` is (leading shape, in_features, out_features)."""
    leading, inputs, outputs = shape

    def tensor(*size: int, offset: int) -> Tensor:
        return normal(size, dtype, seed=seed + offset, device=device, requires_grad=requires_grad)

    return Linear(
        tensor(*leading, inputs, offset=0),
        tensor(outputs, inputs, offset=1),
        tensor(outputs, offset=2) if bias else None,
    )


def _offset(elements: int) -> Callable[[Tensor], Tensor]:
    def layout(x: Tensor) -> Tensor:
        buffer = torch.empty(x.numel() + elements, dtype=x.dtype, device=x.device)
        return buffer[elements:].view(x.shape).copy_(x)

    return layout


def _strided(x: Tensor) -> Tensor:
    buffer = torch.empty((*x.shape[:-1], 3 * x.shape[-1]), dtype=x.dtype, device=x.device)
    return buffer[..., 1::3].copy_(x)


def _reversed_dims(x: Tensor) -> Tensor:
    dims = tuple(reversed(range(x.dim())))
    return x.permute(dims).contiguous().permute(dims)


def _rows_of_a_wider_tensor(x: Tensor) -> Tensor:
    buffer = torch.empty((*x.shape[:-1], x.shape[-1] + 5), dtype=x.dtype, device=x.device)
    return buffer[..., : x.shape[-1]].copy_(x)


def _every_other_row(x: Tensor) -> Tensor:
    buffer = torch.empty((2 * x.shape[0], *x.shape[1:]), dtype=x.dtype, device=x.device)
    return buffer[::2].copy_(x)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format={4: torch.channels_last, 5: torch.channels_last_3d}[x.dim()])


# {name: (function that copies a tensor to this memory layout, shape to test)}
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "contiguous": (Tensor.contiguous, (6, 35)),
    "offset_1": (_offset(1), (6, 35)),
    "offset_3": (_offset(3), (6, 35)),
    "transposed": (_reversed_dims, (6, 35)),
    "transposed_3d": (_reversed_dims, (3, 4, 10)),
    "strided": (_strided, (6, 35)),
    "rows_of_a_wider_tensor": (_rows_of_a_wider_tensor, (6, 35)),
    "every_other_row": (_every_other_row, (6, 35)),
    "channels_last": (_channels_last, (2, 3, 4, 5)),
    "channels_last_3d": (_channels_last, (2, 3, 4, 5, 5)),
    "one_channel": (_channels_last, (2, 1, 4, 5)),
    "strided_scalar": (lambda x: _offset(1)(x.expand(2))[1], ()),
}


def why_no_kernels(device: str) -> str:
    """Returns why the kernels do not serve tensors on ``device``; empty if they do."""
    if kernels.extension is None:
        return f"kernels are not loaded: {kernels.reason()}"
    if device == "cpu" or (device == "cuda" and kernels.extension.has_cuda):
        return ""
    return f"there are no kernels for {device} tensors"


def bits(x: Tensor) -> Tensor:
    """Returns the bit patterns as integers, with the same pattern for every NaN."""
    x = x.detach().cpu()
    if not x.is_floating_point():
        return x.to(torch.int32) if x.dtype == torch.uint16 else x.clone()
    patterns = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    quiet = torch.where(x.isnan(), torch.full_like(x, math.nan), x)
    return quiet.contiguous().view(patterns)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Asserts equal dtypes, shapes and bits: -0.0 differs from 0.0; all NaN are equal."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    different = bits(actual) != bits(expected)
    if different.any():
        index = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{int(different.sum())} of {different.numel()} elements differ, first at {index}: "
            f"{actual.detach().cpu()[index].item()!r} instead of {expected.detach().cpu()[index].item()!r}"
        )


def assert_all_same(actual: Any, expected: Any) -> None:
    """Applies ``assert_same`` to tensors or to tuples of tensors."""
    if isinstance(expected, Tensor):
        return assert_same(actual, expected)
    assert len(actual) == len(expected)
    for actual_tensor, expected_tensor in zip(actual, expected, strict=True):
        assert_same(actual_tensor, expected_tensor)


def end_process_group() -> None:
    """Destroys the default process group when the threads of gloo are idle.

    These threads take the GIL to free the last collective, and destroying a group waits for them
    without releasing the GIL.
    """
    time.sleep(0.5)
    torch.distributed.destroy_process_group()


def kept(function):
    """Returns the storages that autograd saves in ``function()``, as {address: bytes}."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    return storages, result
