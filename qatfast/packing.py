"""Dense storage of integers whose bits do not fill whole bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arguments import integer

MAX_BITS = 16


def pack(integers: Tensor, num_bits: int) -> Tensor:
    """Packs integers from 0 to ``2^num_bits - 1`` one after another without gaps, lowest bit first.

    Args:
        integers: Tensor of integers, of any shape.
        num_bits: Number of bits that each integer takes, 1 to 16.

    Returns:
        One-dimensional uint8 tensor of ``ceil(integers.numel() * num_bits / 8)`` bytes on the CPU.
        The unused bits of the last byte are 0.

    Raises:
        TypeError: ``integers`` does not hold integers, or ``num_bits`` is not an int.
        ValueError: ``num_bits`` is not from 1 to 16, or an integer does not fit into ``num_bits``
            bits.

    Example:
        >>> pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), num_bits=2).tolist()
        [57]
    """
    num_bits = _checked_bits("pack", num_bits)
    values = integers.detach().cpu().numpy()
    if values.dtype.kind not in "iu":
        raise TypeError(f"pack: expected integers, got {values.dtype}")
    if values.size and not 0 <= int(values.min()) <= int(values.max()) < 2**num_bits:
        raise ValueError(
            f"pack: expected integers from 0 to {2**num_bits - 1} for num_bits={num_bits}, "
            f"got {int(values.min())} to {int(values.max())}"
        )
    bits = values.astype(np.uint16).reshape(-1, 1) >> np.arange(num_bits, dtype=np.uint16) & 1
    return torch.from_numpy(np.packbits(bits.astype(np.uint8), bitorder="little"))


def unpack(packed: Tensor, num_bits: int, shape: Sequence[int]) -> Tensor:
    """Unpacks the integers that :func:`pack` has packed.

    Args:
        packed: uint8 tensor of ``ceil(prod(shape) * num_bits / 8)`` bytes.
        num_bits: Number of bits that each integer takes, 1 to 16.
        shape: Shape of the result.

    Returns:
        Tensor of ``shape`` on the CPU, uint8 for at most 8 bits and uint16 for more.

    Raises:
        TypeError: ``packed`` is not uint8, or ``num_bits`` is not an int.
        ValueError: ``num_bits`` is not from 1 to 16, or ``packed`` has another number of bytes than
            ``shape`` needs.

    Example:
        >>> unpack(torch.tensor([57], dtype=torch.uint8), num_bits=2, shape=[4]).tolist()
        [1, 2, 3, 0]
    """
    num_bits = _checked_bits("unpack", num_bits)
    if packed.dtype != torch.uint8:
        raise TypeError(
            f"unpack: expected packed to be uint8, got {str(packed.dtype).removeprefix('torch.')}"
        )
    count = math.prod(shape)
    num_bytes = -(-count * num_bits // 8)
    if packed.numel() != num_bytes:
        raise ValueError(
            f"unpack: expected {num_bytes} bytes for {count} integers of {num_bits} bits, got {packed.numel()}"
        )
    data = packed.detach().cpu().numpy().reshape(-1)
    bits = np.unpackbits(data, count=count * num_bits, bitorder="little").reshape(count, num_bits)
    integers = (bits.astype(np.uint32) << np.arange(num_bits, dtype=np.uint32)).sum(axis=1)
    return torch.from_numpy(integers.astype(np.uint8 if num_bits <= 8 else np.uint16).reshape(tuple(shape)))


def values_per_byte(num_bits: int) -> int:
    """Returns how many integers :func:`pack_rows` puts into a byte: 1 if it does not pack them."""
    return 4 if num_bits == 2 else 2 if num_bits <= 4 else 1


def pack_rows(integers: Tensor, num_bits: int) -> Tensor:
    """Packs each row of a matrix by itself: four integers of 2 bits per byte, two of 3 or 4 bits.

    The first integer has the lowest bits. Negative integers are in two's complement. A row that does not fill its
    last byte is padded with zeros.

    Args:
        integers: of 2 to 4 bits, signed or unsigned; shape ``(rows, columns)``.
        num_bits: 2 to 4.

    Returns:
        uint8, ``(rows, ceil(columns / values_per_byte(num_bits)))``.

    Example:
        >>> pack_rows(torch.tensor([[1, -1, 7]]), num_bits=4).tolist()
        [[241, 7]]
    """
    count = values_per_byte(num_bits)
    width = 8 // count
    values = integers.to(torch.int32) & (2**width - 1)
    values = F.pad(values, (0, -values.shape[1] % count)).unflatten(1, (-1, count))
    shifts = torch.arange(0, 8, width, dtype=torch.int32, device=values.device)
    return (values << shifts).sum(-1).to(torch.uint8)


def unpack_rows(packed: Tensor, num_bits: int, columns: int, is_signed: bool) -> Tensor:
    """Returns the integers that :func:`pack_rows` has packed, as int8.

    Args:
        packed: ``(..., bytes)``, of which each last dimension is a row.
        num_bits: 2 to 4.
        columns: of a row.
        is_signed: whether the integers are in two's complement.

    Example:
        >>> unpack_rows(torch.tensor([[241, 7]], dtype=torch.uint8), num_bits=4, columns=3, is_signed=True).tolist()
        [[1, -1, 7]]
    """
    count = values_per_byte(num_bits)
    width = 8 // count
    # a wide integer per byte, whose bytes become the integers: they are in little-endian order
    wide = packed.to(torch.int16 if count == 2 else torch.int32)
    spread = wide
    for i in range(1, count):
        spread = spread | wide << i * (8 - width)
    mask = 2**width - 1
    values = (spread & sum(mask << 8 * i for i in range(count))).contiguous().view(torch.int8)
    if is_signed:
        half = 2 ** (width - 1)
        values = values.bitwise_xor_(half).sub_(half)
    return values[..., :columns]


def _checked_bits(function: str, num_bits: int) -> int:
    num_bits = integer(function, "num_bits", num_bits)
    if not 1 <= num_bits <= MAX_BITS:
        raise ValueError(f"{function}: expected num_bits to be from 1 to {MAX_BITS}, got {num_bits}")
    return num_bits
