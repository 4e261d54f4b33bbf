"""The results of all operators on sizes around the boundaries of vectors and blocks.

``python tests/digests.py public|reference`` prints a digest of each result as JSON.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import cases
from operators import IMPLEMENTATIONS, OPERATORS
from qatfast import PerChannel, PerGroup, PerTensor, PerToken, QATConfig, QuantSpec

SIZES = (
    *range(1, 71),
    *(size + near for size in (128, 256, 1024, 4096, 65536) for near in (-1, 0, 1)),
    2**18 + 3,
)
BLOCKS = (
    *(
        ((rows, columns), PerToken())
        for rows, columns in ((67, 19), (5, 4097), (2, 65537), (300, 64), (1025, 1))
    ),
    *(((rows, columns), PerChannel(0)) for rows, columns in ((3, 257), (129, 33), (2, 65537))),
    *(
        ((rows, columns), PerChannel(1))
        for rows, columns in ((257, 3), (33, 129), (65537, 2), (1, 70), (5, 1027), (33, 2064))
    ),
    *(((rows, columns), PerGroup(size)) for rows, columns, size in ((3, 256, 32), (9, 4104, 27), (2, 70, 1))),
    ((7, 5, 33), PerChannel(1)),
    ((2, 300, 65), PerChannel(1)),
    ((3, 64, 17, 17), PerChannel(1)),
    ((40, 7, 5), PerChannel(-1)),
    # short blocks, whose rows or columns share vectors
    *(((23, 1260), PerGroup(size)) for size in (1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14, 15, 18, 20, 21, 28, 30)),
    *(((37, 16 * size), PerGroup(size)) for size in (8, 11, 13, 16, 17, 23, 31, 33)),
    *(((rows, columns), PerToken()) for rows, columns in ((2049, 3), (700, 6), (130, 31))),
    *(((rows, columns), PerChannel(1)) for rows, columns in ((3001, 5), (900, 17), (3, 20000), (70, 1100))),
    *(
        ((6, blocks, inner), PerChannel(1))
        for blocks, inner in ((70, 9), (1200, 3), (2, 31), (3, 32), (5, 250))
    ),
    ((150, 3, 2), PerChannel(1)),
    ((2, 40, 300), PerChannel(1)),
)
# Blocks that are not contiguous in memory: (shape, order of the dimensions in memory, granularity)
ACROSS = (
    *(
        ((rows, columns), (1, 0), granularity)
        for rows, columns in ((70, 96), (3, 4104), (1030, 24), (5, 72))
        for granularity in (PerToken(), *(PerGroup(size) for size in (1, 2, 3, 8, 24)))
    ),
    *(
        ((3, 10, 16, 8), order, granularity)
        for order in ((0, 2, 1, 3), (0, 1, 3, 2), (3, 2, 1, 0), (1, 3, 0, 2))
        for granularity in (PerToken(), PerGroup(4), PerGroup(1), PerChannel(1), PerChannel(-1))
    ),
    ((300, 400), (1, 0), PerToken()),
    ((256, 512), (1, 0), PerGroup(32)),
)
OFFSETS = (1, 3, 5)
# (rows, in_features, out_features) of layers with int8 GEMM: around the sizes of vectors and tiles.
LAYERS = (
    *((5, inputs, 67) for inputs in (1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 64, 65, 130, 1027)),
    *((17, 48, outputs) for outputs in (*range(1, 20), 31, 32, 33, 70)),
    *((rows, 130, 33) for rows in (1, 2, 3, 16, 17, 33, 64, 129, 1000)),
    (3, 33026, 19),
    (33001, 5, 64),
)
LAYER_CONFIGS = (
    QATConfig.int8(),
    QATConfig(QuantSpec(8, granularity=PerToken()), QuantSpec(7), QuantSpec(8), None),
    QATConfig(
        QuantSpec(8, True, narrow_range=False), QuantSpec(8, True, PerToken(), narrow_range=False), None, None
    ),
    QATConfig(QuantSpec(5, True, PerToken()), QuantSpec(8, False, PerToken()), None, QuantSpec(8)),
)


def inputs(dtype: torch.dtype) -> Iterator[tuple[str, Tensor, Any]]:
    """Yields (label, tensor, granularity)."""
    sizes = SIZES if dtype == torch.float32 else SIZES[::3] + SIZES[-3:]
    for size in sizes:
        yield f"{size}", mixed_with_ties((size,), dtype), PerTensor()
    for offset in OFFSETS:
        for size in (1, 7, 63, 64, 4099):
            yield f"{size} from {offset}", mixed_with_ties((size + offset,), dtype)[offset:], PerTensor()
        x = mixed_with_ties((offset + 61 * 67,), dtype)[offset:].view(61, 67)
        for granularity in (PerToken(), PerChannel(0), PerChannel(1)):
            yield f"61x67 from {offset} {granularity}", x, granularity
    for shape, granularity in BLOCKS:
        yield f"{cases.name(shape)} {granularity}", mixed_with_ties(shape, dtype), granularity
        yield f"{cases.name(shape)} {granularity} finite", cases.normal(shape, dtype), granularity
    for shape, order, granularity in ACROSS:
        in_memory = mixed_with_ties(tuple(shape[dim] for dim in order), dtype)
        x = in_memory.permute([order.index(dim) for dim in range(len(shape))])
        yield f"{cases.name(shape)} in order {order} {granularity}", x, granularity
    yield "67x61 transposed", mixed_with_ties((67, 61), dtype).t(), PerChannel(0)
    yield (
        "2x3x17x19 channels last",
        mixed_with_ties((2, 3, 17, 19), dtype).to(memory_format=torch.channels_last),
        PerChannel(1),
    )


def mixed_with_ties(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns normally distributed numbers.

    Tensors of at least 8 elements also contain special values and exact ties for the scale 1/16.
    """
    x = cases.mixed(shape, dtype)
    if x.numel() < 8:
        return cases.normal(shape, dtype)
    x.view(-1)[::3] = cases.ties((-(-x.numel() // 3),), torch.tensor(0.0625), dtype)
    return x


def results(
    ops: Any, dtype: torch.dtype, least: int = 0, most: float = math.inf
) -> Iterator[tuple[str, Tensor]]:
    """Yields (label, result) for all operators on all inputs with ``least`` to ``most`` elements."""
    for label, x, granularity in inputs(dtype):
        if not least <= x.numel() <= most:
            continue
        label = f"{cases.name(dtype)} {label}"
        for num_bits, grid in ((8, "affine"), (4, "symmetric"), (8, "full_range")):
            options = {**cases.GRIDS[grid], "granularity": granularity}
            yield f"fake_quantize {num_bits} {grid} {label}", ops.fake_quantize(x, num_bits, **options)
            for name, qparam in zip(
                ("scale", "zero point"), ops.choose_qparams(x, num_bits, **options), strict=True
            ):
                yield f"choose_qparams {num_bits} {grid} {name} {label}", qparam
        for quant_range in ((0, 255), (-128, 127), (0, 65535), (-32768, 32767)):
            grid = cases.grid(tuple(x.shape), granularity, dtype, quant_range)
            if granularity == PerTensor():
                grid = grid._replace(scale=torch.full_like(grid.scale, 0.0625))
            q = ops.quantize(x, *grid, granularity=granularity)
            yield f"quantize {quant_range} {label}", q
            y = ops.dequantize(q, *grid[:2], granularity=granularity, dtype=dtype)
            yield f"dequantize {quant_range} {label}", y
        leaf = x.detach().requires_grad_()
        y = ops.fake_quantize_affine(
            leaf,
            *grid._replace(quant_min=-99, quant_max=99, zero_point=grid.zero_point % 99),
            granularity=granularity,
        )
        yield f"fake_quantize_affine {label}", y
        (gradient,) = torch.autograd.grad(y, leaf, x.flatten().flip(0).view(x.shape))
        yield f"fake_quantize_affine gradient {label}", gradient
    yield from layers(ops, dtype, least, most)
    yield from registered(ops, dtype, least, most)
    if dtype in (torch.float16, torch.bfloat16):
        yield from cast_weights(ops, dtype, least, most)


def registered(
    ops: Any, dtype: torch.dtype, least: int = 0, most: float = math.inf
) -> Iterator[tuple[str, Tensor]]:
    """Yields (label, result or gradient) for the calls of every operator in the registry."""
    for operator in OPERATORS.values():
        differentiable = bool(operator.differentiable)
        for call in operator.calls(
            dtype, blocks=(*cases.FEW_BLOCKS, *BLOCKS[::4]), requires_grad=differentiable
        ):
            if not least <= call.arguments["input"].numel() <= most:
                continue
            found = call.through(ops)
            found = list(found) if isinstance(found, tuple) else [found]
            if differentiable and found[0].requires_grad:
                leaves = [leaf for leaf in call.tensors.values() if leaf.requires_grad]
                dy = found[0].detach().flatten().flip(0).view(found[0].shape)
                found += torch.autograd.grad(found[0], leaves, dy)
            for index, value in enumerate(found):
                yield f"{call} {cases.name(dtype)} {index}", value.detach()


def cast_weights(
    ops: Any, dtype: torch.dtype, least: int = 0, most: float = math.inf
) -> Iterator[tuple[str, Tensor]]:
    """Yields (label, w_hat) for float32 weights, fake-quantized and then cast to ``dtype``."""
    for shape, granularity in (*BLOCKS, ((70, 61), PerTensor()), ((2, 4099), PerTensor())):
        if len(shape) != 2 or not least <= math.prod(shape) <= most:
            continue
        kinds = {"any": mixed_with_ties(shape, torch.float32), "normal": cases.normal(shape)}
        for kind, values in {**kinds, "tiny": kinds["normal"] * 1e-8}.items():
            if ops is IMPLEMENTATIONS["reference"]:
                w_hat = ops.fake_quantize(values, 8, granularity=granularity).to(dtype)
            else:
                code = QuantSpec(8, granularity=granularity).code
                x = torch.zeros(1, shape[1])
                _, w_hat = torch.ops.qatfast.qat_linear_forward(
                    x, values, None, (*[0] * 4, *code, *[0] * 8), dtype=dtype
                )
            yield f"weight as {cases.name(dtype)} {cases.name(shape)} {granularity} {kind}", w_hat


def layers(
    ops: Any, dtype: torch.dtype, least: int = 0, most: float = math.inf
) -> Iterator[tuple[str, Tensor]]:
    """Yields (label, output) for layers with int8 GEMM and ``least`` to ``most`` outputs."""
    for rows, inputs, outputs in LAYERS:
        if not least <= rows * outputs <= most:
            continue
        input, weight, bias = cases.linear(((rows,), inputs, outputs), dtype)
        if rows > 1:
            input[-1] = cases.mixed((inputs,), dtype)
        for config in LAYER_CONFIGS if rows < 2000 else LAYER_CONFIGS[:1]:
            y = ops.qat_linear(input, weight, None if outputs % 3 == 0 else bias, config=config)
            yield f"qat_linear {cases.name(dtype)} {rows}x{inputs}x{outputs} {config}", y


def digest(x: Tensor) -> str:
    return hashlib.sha256(cases.bits(x).numpy().tobytes()).hexdigest()[:16]


def main() -> None:
    ops = IMPLEMENTATIONS[sys.argv[1]]
    print(
        json.dumps({label: digest(value) for dtype in cases.FLOATS for label, value in results(ops, dtype)})
    )


if __name__ == "__main__":
    main()
