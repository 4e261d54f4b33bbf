"""CUDA: the kernels and bytes of the operators; streams, graphs, autocast and module.to.

The other tests check values, gradients and errors on a device: ``pytest --device cuda``.
"""

import copy
import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cases
import counted
import qatfast
from operators import operators
from qatfast import (
    FakeQuantize,
    MinMax,
    MovingAverage,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    choose_qparams,
    convert,
    dequantize,
    fake_quantize,
    fake_quantize_affine,
    fake_quantize_learned,
    functional,
    qat_linear,
    quantize,
    ranges,
    reference,
    search_qparams,
)
from qatfast.study.networks import ThreeLayerNetQAT


@pytest.fixture(autouse=True)
def on_a_device(device, kernels):
    if device != "cuda":
        pytest.skip("runs with --device cuda")


counts_bytes = pytest.mark.skipif(
    not counted.SIMULATED, reason="only a simulated device counts bytes and waits"
)

# (shape, granularity): from a single CTA to more elements than 16 multiprocessors hold
ON_CHIP = [
    ((1000,), PerTensor()),
    ((300_007,), PerTensor()),
    ((64, 4096), PerToken()),
    ((256, 512), PerGroup(32)),
    ((200, 20_000), PerChannel(0)),
    ((64, 16, 28, 28), PerChannel(1)),
    ((8192, 64), PerChannel(1)),
    ((64, 128, 3, 3), PerChannel(1)),
]
LARGER = [((3_000_001,), PerTensor()), ((2, 1_500_000), PerChannel(0)), ((700_003, 5), PerChannel(1))]
WORKSPACE = 144 * 1024  # bytes of partial ranges that CTAs exchange: of 64 columns, 16 times 16
DTYPES = pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)


def ours(counts):
    """Asserts that the call launches kernels of qatfast only."""
    assert all("qatfast" in kernel for kernel in counts.kernels), counts.kernels
    return len(counts.kernels)


def waits_for_nothing(counts):
    assert counts.host_syncs in (0, None)


@DTYPES
@pytest.mark.parametrize("shape, granularity", ON_CHIP + LARGER, ids=cases.name)
def test_fake_quantize_is_one_launch(shape, granularity, dtype):
    x = cases.normal(shape, dtype, device="cuda")
    counts = counted.counted(lambda: fake_quantize(x, granularity=granularity))
    assert ours(counts) == 1
    waits_for_nothing(counts)
    expected = reference.fake_quantize(x.cpu(), granularity=granularity)
    assert torch.equal(cases.bits(counts.result), cases.bits(expected))


@counts_bytes
@DTYPES
@pytest.mark.parametrize("shape, granularity", ON_CHIP, ids=cases.name)
def test_fake_quantize_reads_once_what_fits_on_the_chip(shape, granularity, dtype):
    x = cases.normal(shape, dtype, device="cuda")
    if dtype == torch.float64 and x.nbytes > 4 << 20:
        x = x[: len(x) // 4].contiguous()
    counts = counted.counted(lambda: fake_quantize(x, granularity=granularity))
    assert x.nbytes <= counts.read <= x.nbytes + WORKSPACE
    assert x.nbytes <= counts.written <= x.nbytes + WORKSPACE


@counts_bytes
@pytest.mark.parametrize("shape, granularity", LARGER, ids=cases.name)
def test_fake_quantize_reads_at_most_twice(shape, granularity):
    x = cases.normal(shape, device="cuda")
    counts = counted.counted(lambda: fake_quantize(x, granularity=granularity))
    assert x.nbytes < counts.read <= 2 * x.nbytes + WORKSPACE
    assert counts.written <= x.nbytes + WORKSPACE


@counts_bytes
@DTYPES
@pytest.mark.parametrize("offset", [0, 1, 5])
def test_accesses_are_16_bytes_wide_but_at_the_ends(dtype, offset):
    buffer = cases.normal((20_000,), dtype, device="cuda")
    x = buffer[offset:]
    counts = counted.counted(lambda: fake_quantize(x))
    (launch,) = counts.launches
    others = sum(number for width, number in launch["load_widths"].items() if width != "16")
    assert others <= 2 * 16 + 2 * launch["grid"][0] ** 2  # a head, a tail and the partial ranges
    if offset == 0:
        others = sum(number for width, number in launch["store_widths"].items() if width != "16")
        assert others <= 2 * 16 + 2 * launch["grid"][0]


@pytest.mark.parametrize("shape, granularity", ON_CHIP, ids=cases.name)
def test_the_backward_of_a_dynamic_fake_quantize_is_no_kernel(shape, granularity):
    x = cases.normal(shape, device="cuda", requires_grad=True)
    y, upstream = fake_quantize(x, granularity=granularity), torch.ones(shape, device="cuda")
    counts = counted.counted(lambda: torch.autograd.grad(y, x, upstream, retain_graph=True))
    assert counts.kernels == []


@DTYPES
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerToken(), PerGroup(64)], ids=str)
def test_fake_quantize_affine_is_one_launch_each_way(granularity, dtype):
    shape = (128, 512)
    x = cases.normal(shape, dtype, device="cuda", requires_grad=True)
    grid = cases.grid(shape, granularity, dtype, device="cuda")
    forward = counted.counted(lambda: fake_quantize_affine(x, *grid, granularity=granularity))
    upstream = cases.normal(shape, dtype, seed=1, device="cuda")
    backward = counted.counted(lambda: torch.autograd.grad(forward.result, x, upstream, retain_graph=True))
    assert ours(forward) == ours(backward) == 1
    waits_for_nothing(forward)
    waits_for_nothing(backward)
    if counted.SIMULATED:
        mask = x.numel() // 8
        # Scales are read repeatedly from the cache; only distinct sectors are read from memory.
        assert forward.launches[0]["unique_read_sectors"] * 32 <= x.nbytes + 16 * grid.scale.numel() + 64
        assert forward.written == x.nbytes + mask
        assert backward.read == x.nbytes + mask
        assert backward.written == x.nbytes


@pytest.mark.parametrize("shape, granularity", ON_CHIP + LARGER, ids=cases.name)
def test_choose_qparams_is_one_launch_and_one_read(shape, granularity):
    x = cases.normal(shape, device="cuda")
    counts = counted.counted(lambda: choose_qparams(x, granularity=granularity))
    assert ours(counts) == 1
    waits_for_nothing(counts)
    if counted.SIMULATED:
        assert x.nbytes <= counts.read <= x.nbytes + WORKSPACE


@DTYPES
def test_quantize_and_dequantize_are_one_launch_each(dtype):
    x = cases.normal((128, 512), dtype, device="cuda")
    grid = cases.grid(x.shape, PerTensor(), dtype, device="cuda")
    there = counted.counted(lambda: quantize(x, *grid))
    back = counted.counted(lambda: dequantize(there.result, *grid[:2], dtype=dtype))
    assert ours(there) == ours(back) == 1
    waits_for_nothing(there)
    waits_for_nothing(back)
    if counted.SIMULATED:
        assert there.launches[0]["unique_read_sectors"] * 32 <= x.nbytes + 64
        assert there.written == x.numel()
        assert back.launches[0]["unique_read_sectors"] * 32 <= x.numel() + 64
        assert back.written == x.nbytes


def test_given_ranges_for_more_elements_than_the_threads_of_a_device_take_at_a_time():
    x = cases.normal((3_000_001,), device="cuda")
    grid = cases.grid(x.shape, PerTensor(), x.dtype, device="cuda")

    def everything(functions, x, scale, zero_point, *ends):
        leaf = x.clone().requires_grad_()
        y = functions.fake_quantize_affine(leaf, scale, zero_point, *ends)
        q = functions.quantize(x, scale, zero_point, *ends)
        return y.detach(), *torch.autograd.grad(y, leaf, x), q, functions.dequantize(q, scale, zero_point)

    expected = everything(reference, x.cpu(), grid[0].cpu(), grid[1].cpu(), *grid[2:])
    cases.assert_all_same(everything(functional, x, *grid), expected)


def learned(x, grid, granularity):
    leaf, scale = x.detach().requires_grad_(), grid.scale.clone().requires_grad_()
    ends = (grid.quant_min, grid.quant_max)
    return fake_quantize_learned(leaf, scale, grid.zero_point, *ends, granularity=granularity), leaf, scale


# (shape, granularity, launches): blocks of a warp, of a CTA and of several CTAs, in rows and across memory
LEARNED = [
    ((300, 32), PerGroup(32), 1),
    ((40, 500, 1), PerChannel(1), 1),
    ((9000,), PerTensor(), 1),
    ((40, 2, 300), PerChannel(1), 1),
    ((300_007,), PerTensor(), 2),
    ((2000, 3, 11), PerChannel(1), 2),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=cases.name)
@pytest.mark.parametrize("shape, granularity, launches", LEARNED, ids=cases.name)
def test_the_backward_of_a_learned_scale(shape, granularity, launches, dtype):
    grid = cases.grid(shape, granularity, dtype, (-8, 7))
    grid = grid._replace(scale=torch.where(grid.zero_point > 0, grid.scale, -grid.scale))
    x, dy = cases.mixed(shape, dtype), cases.normal(shape, dtype, seed=1)
    y, *leaves = learned(
        x.cuda(), grid._replace(scale=grid.scale.cuda(), zero_point=grid.zero_point.cuda()), granularity
    )
    upstream = dy.cuda()
    counts = counted.counted(lambda: torch.autograd.grad(y, leaves, upstream, retain_graph=True))
    assert ours(counts) == launches
    waits_for_nothing(counts)
    if counted.SIMULATED:
        chunks = grid.scale.numel() * math.ceil(x.numel() / grid.scale.numel() / 512)
        assert x.nbytes <= counts.written <= x.nbytes + 32 * chunks
        assert (
            2 * x.nbytes <= counts.read <= 2 * x.nbytes + 512 * chunks
        )  # each lane reads scale and zero point
    leaf, scale = x.clone().requires_grad_(), grid.scale.clone().requires_grad_()
    expected = reference.fake_quantize_learned(leaf, scale, *grid[1:], granularity=granularity)
    cases.assert_same(y, expected)
    cases.assert_all_same(counts.result, torch.autograd.grad(expected, (leaf, scale), dy))


# (shape, granularity, launches): a warp, a CTA that holds its block, one that does not, several CTAs for a block
SEARCHED = [
    ((50, 32), PerGroup(32), 1),
    ((20, 700), PerToken(), 1),
    ((16, 16_500), PerChannel(0), 1),
    ((4, 3000), PerToken(), 3),
    ((270_000,), PerTensor(), 3),
]


@pytest.mark.parametrize("shape, granularity, launches", SEARCHED, ids=cases.name)
def test_a_search_reads_its_input_a_few_times(shape, granularity, launches):
    x = cases.mixed(shape)
    on_device = x.cuda()
    search_qparams(on_device[:1], 3)
    counts = counted.counted(lambda: search_qparams(on_device, 3, granularity=granularity))
    waits_for_nothing(counts)
    cases.assert_all_same(counts.result, reference.search_qparams(x, 3, granularity=granularity))
    if counted.SIMULATED:  # with 16 multiprocessors; more divide a block among more CTAs
        assert ours(counts) <= launches
        most = 1 if launches == 1 and x[0].numel() <= 16_384 else 12
        assert counts.read <= most * x.nbytes + 80 * 32 * 8 * counts.result[0].numel() * launches


def stored_range(shape, granularity, device):
    shape_of_scale = choose_qparams(torch.zeros(shape), granularity=granularity)[0].shape
    zeros = torch.zeros(shape_of_scale, device=device)
    return zeros, zeros.clone(), torch.zeros((), dtype=torch.int64, device=device)


OBSERVED = [
    ((7,), PerTensor()),
    ((300_007,), PerTensor()),
    ((20, 64), PerChannel(0)),
    ((2, 40_000), PerChannel(0)),
    ((40, 30), PerChannel(1)),
    ((8, 16, 9, 9), PerChannel(1)),
    ((6, 64), PerGroup(16)),
    ((0, 4), PerTensor()),
    ((0, 4), PerChannel(1)),
]


@DTYPES
@pytest.mark.parametrize("range", [MovingAverage(0.3), MinMax()], ids=str)
@pytest.mark.parametrize("shape, granularity", OBSERVED, ids=cases.name)
def test_observing_a_range_is_one_launch(shape, granularity, range, dtype):
    spec = QuantSpec(5, granularity=granularity, range=range)
    ours_, expected = (stored_range(shape, granularity, at) for at in ("cuda", "cpu"))
    nothing, zeros = torch.full(shape, torch.nan, dtype=dtype), torch.zeros(shape, dtype=dtype)
    batches = [
        nothing,
        zeros,
        *(scale * cases.mixed(shape, dtype, seed=scale) for scale in (1, 2, 3)),
        nothing,
    ]
    if dtype == torch.float64:
        batches.append(1e300 * cases.normal(shape, dtype))
    if len(shape) > 1 and shape[0]:
        batches[3][:, 0], batches[3][0] = torch.inf, torch.nan
    for batch in batches:
        on_device = batch.cuda()
        found = ranges.observe_range(on_device, *ours_, spec)
        constant = getattr(range, "averaging_constant", 0.0)
        cases.assert_all_same(found, reference.observe_range(batch, *expected, constant, **spec.arguments))
        cases.assert_all_same(ours_, expected)
    counts = counted.counted(lambda: ranges.observe_range(on_device, *ours_, spec))
    assert ours(counts) == 1
    waits_for_nothing(counts)
    if counted.SIMULATED:
        assert counts.read <= on_device.nbytes + 16 * 1024


def test_a_graph_can_capture_what_moves_a_range():
    spec = QuantSpec(range=MovingAverage(0.3))
    x, state = cases.normal((20_000,), device="cuda"), stored_range((20_000,), PerTensor(), "cuda")
    ranges.observe_range(x, *state, spec)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scale, zero_point = ranges.observe_range(x, *state, spec)
        searched = search_qparams(x, 4)
    expected = [value.cpu() for value in state]
    for seed in (5, 6):
        x.copy_(cases.normal((20_000,), seed=seed))
        graph.replay()
        found = reference.observe_range(x.cpu(), *expected, 0.3, **spec.arguments)
        cases.assert_all_same((scale, zero_point), found)
        cases.assert_all_same(state, expected)
        cases.assert_all_same(searched, reference.search_qparams(x.cpu(), 4))


@pytest.mark.parametrize("weight", [PerTensor(), PerChannel(0)], ids=str)
def test_a_layer_with_static_ranges_has_the_bits_of_the_cpu(weight):
    config = QATConfig(
        input=QuantSpec(8, range=MinMax()),
        weight=QuantSpec(8, symmetric=True, granularity=weight, range=MinMax()),
        bias=None,
        output=None,
    )
    operands = cases.linear(((5,), 48, 24))
    operands.input[1, 2] = torch.nan
    grids = {
        "input": choose_qparams(0.7 * operands.input),
        "weight": choose_qparams(0.7 * operands.weight, symmetric=True, granularity=weight),
    }
    there = {name: tuple(value.cuda() for value in grid) for name, grid in grids.items()}
    y = ranges.qat_linear(*(t.cuda() for t in operands), config, there)
    cases.assert_same(y, reference.qat_linear_static(*operands, config, grids))


def test_python_numbers_as_scales_wait_for_nothing():
    x = cases.normal((1000,), device="cuda")
    waits_for_nothing(counted.counted(lambda: fake_quantize_affine(x, 0.1, 3, 0, 255)))


@pytest.mark.parametrize("shape", [(32, 64, 64), (8, 300, 500)], ids=str)
def test_a_layer_is_two_launches_beside_its_product(shape):
    batch, inputs, outputs = shape
    x, weight, bias = cases.linear(((batch,), inputs, outputs), device="cuda", requires_grad=True)
    config = QATConfig.tutorial()
    forward = counted.counted(lambda: qat_linear(x, weight, bias, config=config))
    assert sum("qatfast" in kernel for kernel in forward.kernels) == 2
    waits_for_nothing(forward)
    if counted.SIMULATED:
        tensors = (weight, bias, forward.result)
        assert forward.read <= sum(t.nbytes for t in tensors) + WORKSPACE
        assert forward.written <= sum(t.nbytes for t in tensors) + WORKSPACE
    upstream = cases.normal((batch, outputs), seed=9, device="cuda")
    backward = counted.counted(
        lambda: torch.autograd.grad(forward.result, [x, weight, bias], upstream, retain_graph=True)
    )
    assert not [kernel for kernel in backward.kernels if "qatfast" in kernel]
    waits_for_nothing(backward)


def test_a_long_bias_beside_a_weight_of_small_groups():
    """Weight and bias have CTAs of the same size.

    The bias gets fewer threads than it would alone.
    """
    x, weight, bias = cases.linear(((2,), 32, 5000), device="cuda")
    config = QATConfig(weight=QuantSpec(granularity=PerGroup(32)), output=None)
    y = qat_linear(torch.zeros_like(x), weight, bias, config=config)
    assert torch.equal(y[1].cpu(), reference.fake_quantize(bias.cpu()))


def test_allocations_are_the_output_and_a_few_bytes():
    x = cases.normal((300_000,), device="cuda")
    fake_quantize(x)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = fake_quantize(x)
    assert torch.cuda.max_memory_allocated() - before <= y.nbytes + 16 * 1024


def test_every_launch_is_on_the_current_stream():
    x = cases.normal((100_000,), device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    calls = [call for op in operators("cuda") for call in op.calls(device="cuda")]

    def everything():
        with torch.cuda.stream(stream):
            fake_quantize(x)
            for call in calls:
                call.through(functional)

    counts = counted.counted(everything)
    stream.synchronize()
    assert sum("qatfast" in kernel for kernel in counts.kernels) >= len(calls)
    assert all(launch["stream"] != 0 for launch in counts.launches)


def test_a_graph_can_capture_and_replay_it():
    x = cases.normal((100_000,), device="cuda")
    fake_quantize(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        fake_quantize(x), choose_qparams(x)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fake_quantize(x)
        scale, _ = choose_qparams(x, 4)
    x.copy_(cases.normal((100_000,), seed=5))
    graph.replay()
    assert torch.equal(y.cpu(), reference.fake_quantize(x.cpu()))
    assert torch.equal(scale.cpu(), reference.choose_qparams(x.cpu(), 4)[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=cases.name)
def test_autocast(dtype):
    x, weight, bias = cases.linear(((8,), 32, 16), device="cuda", requires_grad=True)
    with torch.autocast("cuda", dtype):
        y = qat_linear(x, weight, bias)
    y.float().sum().backward()
    assert y.dtype == dtype
    assert weight.grad.dtype == torch.float32
    product = F.linear(x.to(dtype), fake_quantize(weight).to(dtype), fake_quantize(bias).to(dtype))
    torch.testing.assert_close(y, fake_quantize(product), rtol=0, atol=0.2)


def test_modules_move_between_devices():
    torch.manual_seed(0)
    model = torch.nn.Sequential(FakeQuantize(), QATLinear(10, 64), torch.nn.ReLU(), QATLinear(64, 2))
    x = cases.normal((32, 10))
    on_cpu = model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("cuda")
    torch.testing.assert_close(model(x.cuda()).cpu(), on_cpu, rtol=1e-4, atol=1e-4)
    model.load_state_dict(state)
    model.to("cpu").load_state_dict(model.to("cuda").state_dict())
    assert torch.equal(model.to("cpu")(x), on_cpu)


def test_twenty_steps_of_training_have_the_weights_of_the_cpu():
    """Losses are close (float GEMMs round differently).

    Equal weights are quantized to equal bits.
    """

    def network(device):
        torch.manual_seed(0)
        return ThreeLayerNetQAT().to(device)

    there, here = network("cuda"), network("cpu")
    optimizers = [torch.optim.Adam(model.parameters(), 1e-3) for model in (there, here)]
    x = cases.normal((32, 10))
    target = (x.sum(1) > 0).long()
    for _ in range(20):
        for ours, theirs in zip(there.parameters(), here.parameters(), strict=True):
            assert torch.equal(fake_quantize(ours).cpu(), fake_quantize(ours.cpu()))
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)
        losses = []
        for model, optimizer in zip((there, here), optimizers, strict=True):
            at = next(model.parameters()).device
            loss = F.cross_entropy(model(x.to(at)), target.to(at))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert abs(losses[0] - losses[1]) < 1e-3


WITHOUT_A_BARRIER = """
import sys
sys.path.insert(0, {tests!r})
import torch, cases, counted
from qatfast import *
for shape, granularity in (((300_007,), PerTensor()), ((3, 100_001), PerToken()), ((60_000, 5), PerChannel(1))):
    for dtype in cases.FLOATS:
        x = cases.normal(shape, dtype, device="cuda")
        counts = counted.counted(lambda: fake_quantize(x, granularity=granularity))
        assert sum("qatfast" in kernel for kernel in counts.kernels) == 2, counts.kernels
        expected = reference.fake_quantize(x.cpu(), granularity=granularity)
        assert torch.equal(cases.bits(counts.result), cases.bits(expected))
        expected = reference.choose_qparams(x.cpu(), granularity=granularity)
        for found, qparam in zip(choose_qparams(x, granularity=granularity), expected):
            assert torch.equal(found.cpu(), qparam)
w, b = cases.normal((300, 500), device="cuda"), cases.normal((300,), device="cuda")
y = qat_linear(torch.zeros(2, 500, device="cuda"), w, b, config=QATConfig(output=None))
assert torch.equal(y[0].cpu(), reference.fake_quantize(b.cpu()))
print("fine")
"""


def test_without_a_grid_barrier_two_launches_give_the_same_bits():
    script = WITHOUT_A_BARRIER.format(tests=os.path.dirname(__file__))
    run = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"QATFAST_CUDA_COOPERATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert run.stdout == "fine\n", run.stdout + run.stderr


# Convolutions: int8 GEMMs of the windows of the input, or with groups a kernel of their own

CONVOLUTIONS = {
    "2d": (2, False, QATConfig.static(), {"padding": 1, "stride": 2}),
    "1d, affine weight": (
        1,
        False,
        QATConfig(QuantSpec(8), QuantSpec(8, granularity=PerChannel(0)), None, None),
        {},
    ),
    "3d, learned": (3, False, QATConfig.static(4), {"dilation": 2, "padding": 2}),
    "per sample": (2, False, QATConfig.dynamic(), {"padding": 1}),
    "transposed": (2, True, QATConfig.int8(), {"stride": 2, "padding": 1, "output_padding": 1}),
    "groups": (2, False, QATConfig.int8(), {"groups": 2}),
    "depthwise": (2, False, QATConfig.static(), {"groups": 4, "out_channels": 4, "padding": 1}),
    "1d, groups per sample, affine weight": (
        1,
        False,
        QATConfig(QuantSpec(8, granularity=PerToken()), QuantSpec(8, granularity=PerChannel(0)), None, None),
        {"groups": 2},
    ),
    "transposed groups": (3, True, QATConfig.static(4), {"groups": 2, "stride": 2, "output_padding": 1}),
}


@pytest.mark.parametrize("case", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_convolution_has_the_bits_of_the_cpu(case):
    dims, transposed, config, arguments = case
    cls = getattr(qatfast, f"QATConv{'Transpose' if transposed else ''}{dims}d")
    layer = cls(4, **{"out_channels": 6, "kernel_size": 3, **arguments}, config=config)
    x, results = cases.normal((3, 4, *(7,) * dims)), []
    x[1, 2, 3] = float("nan")
    for device in ("cpu", "cuda"):
        layer_on = copy.deepcopy(layer).to(device)
        layer_on(x.nan_to_num().to(device))
        leaf = x.nan_to_num().to(device).requires_grad_()
        y = layer_on(leaf)
        dx, dw = torch.autograd.grad(y.square().sum(), [leaf, layer_on.weight])
        ys = [layer_on(x.to(device)), layer_on.eval()(x.to(device)), convert(layer_on)(x.to(device))]
        results.append(([value.detach().cpu() for value in ys], dx.cpu(), dw.cpu()))
    (on_cpu, *gradients_cpu), (on_cuda, *gradients_cuda) = results
    for expected, actual in zip(on_cpu, on_cuda, strict=True):
        assert expected.isnan().any() and not expected.isnan().all()
        cases.assert_same(actual, expected)
    for expected, actual in zip(gradients_cpu, gradients_cuda, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_chains_have_the_bits_of_the_cpu():
    layers = [
        *(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(
            nn.Conv2d(8, 6, 3, groups=2),
            nn.ReLU6(),
            nn.Flatten(),
            nn.Linear(24, 10),
            nn.ReLU(),
            nn.Linear(10, 4),
        ),
    ]
    x = cases.normal((2, 3, 8, 8))
    model = qatfast.prepare(nn.Sequential(*layers), example_inputs=x)
    model(x)
    x[1, 0, 2, 2] = float("nan")
    expected, device = model.eval()(x), "cuda"
    for one in (model, convert(model)):
        one = copy.deepcopy(one)
        cases.assert_same(one(x).detach(), expected.detach())
        cases.assert_same(one.to(device)(x.to(device)).detach().cpu(), expected.detach())


@counts_bytes
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("config", [QATConfig.int8(), QATConfig.static()], ids=["int8", "static"])
def test_a_convolution_waits_for_nothing(config, groups):
    layer = qatfast.QATConv2d(4, 8, 3, padding=1, groups=groups, config=config, device="cuda")
    x = cases.normal((2, 4, 8, 8), device="cuda").requires_grad_()
    counts = counted.counted(lambda: layer(x).sum().backward())
    assert counts.host_syncs == 0


@counts_bytes
@pytest.mark.parametrize("groups", [1, 16], ids=["", "depthwise"])
def test_the_launches_of_a_convolution(groups):
    """Its own kernels, one launch each: range, input, weight, then windows and epilogue, or groups."""
    arguments = {"padding": 1, "groups": groups, "config": QATConfig.static(), "device": "cuda"}
    layer = qatfast.QATConv2d(16, 16, 3, **arguments).to(memory_format=torch.channels_last)
    x = cases.normal((2, 16, 8, 8), device="cuda").contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    counts = counted.counted(lambda: layer(x))
    quantized = ["observe_range_kernel", "quantize_rows_kernel", "quantize_to_uint8_kernel"]
    products = ["windows_kernel", "int8_epilogue_kernel"] if groups == 1 else ["grouped_kernel"]
    expected = quantized + products
    assert len(counts.launches) == len(expected)
    for name in expected:
        assert sum(name in launch["kernel"] for launch in counts.launches) == 1, counts.kernels
    for launch in counts.launches:
        if "windows_kernel" in launch["kernel"]:  # integers, scale, zero point and sum of each row
            assert launch["global_store_bytes"] == 2 * 64 * (9 * 16 + 4 + 4 + 8)
