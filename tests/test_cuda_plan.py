"""The plans of the CUDA kernels, which are host arithmetic and are tested without a device."""

import math

import pytest

H100 = {"multiprocessors": 132, "shared_memory": 232448 - 2048, "cooperative": True}
SMALL = {"multiprocessors": 2, "shared_memory": 64 * 1024, "cooperative": True}
ALONE = {"multiprocessors": 132, "shared_memory": 232448 - 2048, "cooperative": False}
HELD_UNITS = {2: 6, 4: 6, 8: 4}  # units of 16 bytes that a thread holds in registers, by element size

# (outer, blocks, inner): per tensor, rows, inner channels, channels last, a single channel, huge
# sizes
LAYOUTS = [
    (1, 1, 1),
    (1, 1, 4097),
    (1, 1, 1 << 20),
    (1, 1, 3 << 31),
    (1, 100_000, 32),
    (1, 3 << 31, 1),
    (1, 64, 4096),
    (1, 3, 5 << 30),
    (256, 64, 49),
    (8, 3, 1 << 30),
    (4096, 64, 1),
    (3 << 30, 3, 1),
    (64, 128, 9),
    (1, 7, 0),
]
LIMITS = pytest.mark.parametrize(
    "limits", [H100, SMALL, ALONE], ids=["H100", "small", "no cooperative launch"]
)


@pytest.fixture
def plan(kernels):
    return lambda layout, item_size=4, quantizes=True, skipped=0, **limits: kernels.cuda_plan(
        *layout, item_size, skipped, quantizes, **(limits or H100)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("item_size", [2, 4, 8])
@pytest.mark.parametrize("quantizes", [True, False])
@LIMITS
def test_it_fits_the_device_and_covers_the_tensor(plan, layout, item_size, quantizes, limits):
    p = plan(layout, item_size, quantizes, **limits)
    outer, blocks, inner = layout
    assert p["threads"] in (128, 256, 512)
    assert 1 <= p["grid"] < 2**31
    assert 0 <= p["shared_bytes"] <= limits["shared_memory"]
    assert p["tiles"] * p["tile_blocks"] >= blocks > (p["tiles"] - 1) * p["tile_blocks"]
    assert p["width"] == p["threads"] or (p["width"] <= 32 and p["width"] & (p["width"] - 1) == 0)
    if p["team"] > 1:
        # All CTAs must be resident, because they wait for each other.
        assert p["grid"] == p["tiles"] * p["team"] <= limits["multiprocessors"]
        assert p["barrier"] == limits["cooperative"]
        assert p["partials"] == p["grid"] * p["tile_blocks"] * 2
    if p["all_held"]:
        assert p["team"] == 1 and not p["columns"] and p["shared_bytes"] == 0
        assert outer * p["units_per_run"] <= HELD_UNITS[item_size] * p["width"]
    assert p["launches"] == (2 if p["team"] > 1 and not limits["cooperative"] else 1)
    if p["columns"]:
        assert p["tile_blocks"] * inner <= 128
    else:
        lanes = 16 // item_size
        starts = {(run * inner) % lanes for run in range(min(outer * blocks, lanes))} if inner else {}
        assert p["units_per_run"] >= max(((start + inner - 1) // lanes + 1 for start in starts), default=0)
        assert p["units_per_run"] <= inner // lanes + 2


@pytest.mark.parametrize("item_size", [2, 4, 8])
def test_what_fits_on_the_chip_is_kept_there(plan, item_size):
    a_block = 512 * 16 * HELD_UNITS[item_size] + H100["shared_memory"] // (512 * 16) * 512 * 16
    fits = plan((1, 1, 132 * a_block // item_size - 132 * 512 * 16), item_size)
    assert fits["barrier"] and fits["team"] == 132
    units = math.ceil(fits["units_per_run"] / fits["team"])
    assert units <= (HELD_UNITS[item_size] + fits["cached"]) * fits["threads"]
    larger = plan((1, 1, 2 * 132 * a_block // item_size), item_size)
    assert (
        larger["units_per_run"] / larger["team"]
        > (HELD_UNITS[item_size] + larger["cached"]) * larger["threads"]
    )


@pytest.mark.parametrize("size", [1 << 31, 1 << 33, 3 << 34, 1 << 45], ids=str)
def test_a_huge_tensor_keeps_every_multiprocessor_busy(plan, size):
    p = plan((1, 1, size))
    assert (p["grid"], p["team"], p["width"], p["threads"]) == (132, 132, 512, 512)
    rows = plan((1, 3, size))
    assert (rows["grid"], rows["team"], rows["threads"]) == (132, 44, 512)


def test_small_work_takes_no_barrier(plan):
    for size in (1, 1000, 512 * HELD_UNITS[4] * 4 - 8):
        p = plan((1, 1, size))
        assert (p["grid"], p["team"], p["barrier"], p["shared_bytes"]) == (1, 1, False, 0)


def test_rows_share_a_thread_block_or_have_their_own(plan):
    assert plan((1, 1000, 8))["width"] == 1  # two units of 16 bytes per thread
    assert plan((1, 1000, 8), skipped=1)["width"] == 2  # each row overlaps three units
    assert plan((1, 1000, 9))["width"] == 2
    assert plan((1, 1000, 32))["width"] == 4
    assert plan((1, 1000, 256))["width"] == 32
    assert plan((1, 1000, 4096))["width"] == 256
    assert plan((1, 1000, 2048))["width"] == 128
    assert all(plan((1, 1000, size))["all_held"] for size in (8, 9, 4096, 12_288))
    assert not plan((1, 1000, 12_289))["all_held"]


def test_nothing_is_kept_where_only_the_range_is_wanted(plan):
    for layout in LAYOUTS:
        p = plan(layout, quantizes=False)
        assert (p["cached"], p["shared_bytes"]) == (0, 0)
