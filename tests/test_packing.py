"""pack uses no extra bits, and unpack is its inverse."""

import pytest
import torch

from qatfast.packing import pack, unpack


@pytest.mark.parametrize("bits", range(1, 17))
def test_packing_is_exact_and_dense(bits):
    integers = torch.randint(0, 2**bits, (3, 7), generator=torch.Generator().manual_seed(0))
    integers[0, 0], integers[2, 6] = 0, 2**bits - 1
    integers = integers.to(torch.uint8 if bits <= 8 else torch.uint16)
    packed = pack(integers, bits)
    assert packed.dtype == torch.uint8 and packed.numel() == -(-21 * bits // 8)
    unpacked = unpack(packed, bits, [3, 7])
    assert unpacked.dtype == integers.dtype and torch.equal(unpacked.int(), integers.int())


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_the_lowest_bit_comes_first_and_the_last_byte_ends_in_zeros(bits):
    integers = [1, 0, 2**bits - 1]
    number = sum(value << (index * bits) for index, value in enumerate(integers))
    packed = pack(torch.tensor(integers), bits)
    assert bytes(packed.tolist()) == number.to_bytes(-(-3 * bits // 8), "little")


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3)])
def test_scalars_and_empty_tensors(shape):
    integers = torch.ones(shape, dtype=torch.uint8)
    assert torch.equal(unpack(pack(integers, 3), 3, shape), integers)


@pytest.mark.parametrize("bits", [0, 17])
def test_the_number_of_bits_is_checked(bits):
    with pytest.raises(ValueError, match=f"^pack: expected num_bits to be from 1 to 16, got {bits}$"):
        pack(torch.zeros(3, dtype=torch.uint8), bits)
    with pytest.raises(ValueError, match=f"^unpack: expected num_bits to be from 1 to 16, got {bits}$"):
        unpack(torch.zeros(3, dtype=torch.uint8), bits, [3])


@pytest.mark.parametrize("integers, bits", [([0, 4], 2), ([-1, 1], 4), ([2**16, 0], 16)])
def test_an_integer_that_does_not_fit_is_an_error(integers, bits):
    low, high = min(integers), max(integers)
    message = f"^pack: expected integers from 0 to {2**bits - 1} for num_bits={bits}, got {low} to {high}$"
    with pytest.raises(ValueError, match=message):
        pack(torch.tensor(integers), bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_only_integers_are_packed(dtype):
    with pytest.raises(TypeError, match=r"^pack: expected integers, got "):
        pack(torch.ones(3, dtype=dtype), 8)


def test_bytes_of_another_type_or_number_are_an_error():
    with pytest.raises(TypeError, match=r"^unpack: expected packed to be uint8, got int32$"):
        unpack(torch.zeros(3, dtype=torch.int32), 8, [3])
    for count in (2, 4):
        with pytest.raises(
            ValueError, match=rf"^unpack: expected 3 bytes for 3 integers of 7 bits, got {count}$"
        ):
            unpack(torch.zeros(count, dtype=torch.uint8), 7, [3])
