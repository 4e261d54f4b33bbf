"""Ranges that modules keep: FakeQuantize and QATLinear with observed, learned and fixed ranges."""

import copy
import io
import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cases
from qatfast import (
    Dynamic,
    FakeQuantize,
    Fixed,
    Learned,
    MinMax,
    MovingAverage,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATConv2d,
    QATLinear,
    QuantSpec,
    checks,
    choose_qparams,
    fake_quantize,
    fake_quantize_affine,
    fake_quantize_learned,
    qat_linear,
    ranges,
    reference,
    search_qparams,
)
from qatfast.config import Range

EXAMPLES = json.loads(Path(__file__).with_name("worked_examples.json").read_text())
KEPT = {"moving_average": MovingAverage(), "min_max": MinMax(), "learned": Learned()}
kept = pytest.mark.parametrize("range", KEPT.values(), ids=KEPT)
observed = pytest.mark.parametrize("range", [MovingAverage(), MinMax()], ids=["moving_average", "min_max"])


def close(actual, expected):
    torch.testing.assert_close(actual.detach().cpu(), torch.tensor(expected), rtol=1e-6, atol=1e-6)


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        cases.assert_same(actual[name].detach(), value.detach())


def grid(quantizer, x):
    """The values of a given range."""
    spec = quantizer.spec
    scale, zero_point = reference.qparams_of_range(
        quantizer.running_min.to(torch.float64 if x.dtype == torch.float64 else torch.float32),
        quantizer.running_max.to(torch.float64 if x.dtype == torch.float64 else torch.float32),
        spec.quant_min,
        spec.quant_max,
        spec.symmetric,
    )
    return fake_quantize_affine(
        x, scale, zero_point, spec.quant_min, spec.quant_max, granularity=spec.granularity
    )


# worked examples


@pytest.mark.parametrize("case", [case for case in EXAMPLES["T1"]["cases"] if "lo" in case], ids=str)
def test_fixed_ranges(case, device):
    quantizer = FakeQuantize(case["num_bits"], range=Fixed(case["lo"], case["hi"]))
    x = torch.tensor(case["x"], device=device, requires_grad=True)
    y = quantizer(x)
    close(y, case["values"])
    y.sum().backward()
    assert x.grad.tolist() == case["gradient"]
    cases.assert_same(quantizer.eval()(x), y)
    assert quantizer.state_dict() == {}


def test_a_moving_average(device):
    case = EXAMPLES["T2"]["cases"][0]
    quantizer = FakeQuantize(range=MovingAverage(0.01), device=device)
    first, second = (torch.tensor(batch, device=device) for batch in case["batches"])
    cases.assert_same(quantizer(first), fake_quantize(first))
    close(torch.stack([quantizer.running_min, quantizer.running_max]), case["range_after"][0])
    close(quantizer(second), case["second_batch_is_quantized_with"]["values"])
    close(torch.stack([quantizer.running_min, quantizer.running_max]), case["range_after"][1])
    assert quantizer.num_batches.item() == 2
    quantizer.eval()
    x = torch.tensor(case["evaluation"]["x"], device=device, requires_grad=True)
    before = state_of(quantizer)
    y = quantizer(x)
    close(y, case["evaluation"]["values"])
    y.sum().backward()
    assert x.grad.tolist() == case["evaluation"]["gradient"]
    assert_same_state(quantizer.state_dict(), before)


@pytest.mark.parametrize("index, range", [(1, MovingAverage(0.5)), (2, MinMax())], ids=["average", "min_max"])
def test_observed_ranges_per_channel(index, range, device):
    case = EXAMPLES["T2"]["cases"][index]
    quantizer = FakeQuantize(
        symmetric=True, granularity=PerChannel(1), range=range, shape=(2,), device=device
    )
    for batch, after in zip(case["batches"], case["range_after"], strict=True):
        quantizer(torch.tensor(batch, device=device))
        close(torch.stack([quantizer.running_min, quantizer.running_max]), after)


@pytest.mark.parametrize("case", EXAMPLES["T3"]["cases"], ids=lambda case: case["title"])
def test_learned_scales(case, device):
    shape = torch.tensor(case["scale"]).shape
    num_bits = (case["quant_max"] - case["quant_min"]).bit_length()
    quantizer = FakeQuantize(
        num_bits,
        symmetric=case["quant_min"] < 0,
        narrow_range=False,
        granularity=PerChannel(1) if shape else FakeQuantize().spec.granularity,
        range=Learned(),
        shape=shape,
        device=device,
    )
    state = {
        "scale": torch.tensor(case["scale"]).reshape(shape or 1),
        "zero_point": torch.full(shape or (1,), case["zero_point"], dtype=torch.int32),
        "num_batches": torch.tensor(1),
    }
    quantizer.load_state_dict(state)
    x = torch.tensor(case["x"], device=device, requires_grad=True)
    y = quantizer(x)
    close(y, case["y"])
    y.sum().backward()
    assert x.grad.tolist() == case["dx"]
    close(quantizer.scale.grad, torch.tensor(case["ds"]).reshape(shape or 1).tolist())


def test_a_learned_scale_stays_usable(device):
    quantizer = FakeQuantize(4, range=Learned(), device=device)
    x = cases.normal((64,), device=device)
    quantizer(x)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=1.0)
    for _ in range_of_steps(1000):
        optimizer.zero_grad()
        y = quantizer(x)
        (y * y).sum().backward()
        optimizer.step()
    assert y.isfinite().all()
    assert quantizer(x).isfinite().all()


def range_of_steps(count):
    return range(count)


# observed ranges


@observed
def test_training_quantizes_with_the_range_before_it_moves(range, device):
    quantizer = FakeQuantize(5, range=range, device=device)
    batches = [scale * cases.normal((64,), device=device) for scale in (1, 0.5, 3)]
    cases.assert_same(quantizer(batches[0]), fake_quantize(batches[0], 5))
    for batch in batches[1:]:
        expected = grid(quantizer, batch)
        low, high = quantizer.running_min.clone(), quantizer.running_max.clone()
        cases.assert_same(quantizer(batch), expected)
        assert quantizer.running_min < low or batch.min() >= low
        assert quantizer.running_max > high or batch.max() <= high
    assert quantizer.num_batches.item() == 3


@kept
@pytest.mark.parametrize("values", [[], [float("nan")] * 3, [float("inf"), float("nan")]], ids=str)
def test_a_batch_without_a_finite_value_changes_nothing(range, values, device):
    quantizer = FakeQuantize(range=range, device=device)
    empty = torch.tensor(values, device=device)
    before = state_of(quantizer)
    assert quantizer(empty).shape == empty.shape
    assert_same_state(quantizer.state_dict(), before)
    with pytest.raises(RuntimeError, match="expected a range that has been observed"):
        quantizer.eval()(empty)
    x = cases.normal((9,), device=device)
    quantizer.train()(x)
    assert quantizer.num_batches.item() == 1
    before = state_of(quantizer)
    quantizer(empty)
    assert_same_state(quantizer.state_dict(), before)


@observed
def test_only_finite_values_enter_the_range(range, device):
    quantizer = FakeQuantize(range=range, device=device)
    y = quantizer(torch.tensor([float("inf"), 2.0, float("nan"), -1.0], device=device))
    assert (quantizer.running_min.item(), quantizer.running_max.item()) == (-1.0, 2.0)
    assert y.isnan().tolist() == [False, False, True, False]


@observed
def test_a_channel_without_a_range_takes_that_of_the_batch(range, device):
    quantizer = FakeQuantize(granularity=PerChannel(0), range=range, shape=(2,), device=device)
    quantizer(torch.tensor([[0.0, 0.0], [-1.0, 1.0]], device=device))
    batch = torch.tensor([[-2.0, 6.0], [-1.0, 1.0]], device=device)
    cases.assert_same(quantizer(batch), fake_quantize(batch, granularity=PerChannel(0)))
    assert quantizer.running_max.tolist() == [6.0, 1.0]
    assert quantizer.num_batches.item() == 2


@observed
def test_a_batch_of_zeros_counts_and_the_state_is_never_minus_zero(range, device):
    quantizer = FakeQuantize(range=range, device=device)
    quantizer(torch.tensor([-0.0, 0.0], device=device))
    assert quantizer.num_batches.item() == 1
    assert torch.stack([quantizer.running_min, quantizer.running_max]).signbit().tolist() == [False, False]
    quantizer.eval()(torch.ones(2, device=device))


@observed
def test_float64_computes_in_float64_from_the_stored_numbers(range, device):
    quantizer = FakeQuantize(12, range=range, device=device).double()
    x = torch.tensor([-0.1, 0.7, 1e300], dtype=torch.float64, device=device)
    quantizer(x)
    assert quantizer.running_max.item() == torch.finfo(torch.float32).max
    quantizer.reset_parameters()
    quantizer(x[:2])
    assert quantizer.running_min.item() == torch.tensor(-0.1).item()
    cases.assert_same(quantizer.eval()(x), grid(quantizer, x))
    assert quantizer(x).dtype == torch.float64


def test_the_grad_mode_does_not_matter(device):
    quantizer = FakeQuantize(range=MinMax(), device=device)
    with torch.no_grad():
        quantizer(torch.ones(2, device=device))
    with torch.inference_mode():
        quantizer(torch.full((2,), 3.0, device=device))
    assert (quantizer.num_batches.item(), quantizer.running_max.item()) == (2, 3.0)


@observed
def test_the_gradient_is_that_of_a_given_range(range, device):
    quantizer = FakeQuantize(range=range, device=device)
    quantizer(torch.tensor([-1.0, 1.0], device=device))
    x = torch.tensor([-9.0, 0.3, 9.0, float("nan")], device=device, requires_grad=True)
    quantizer(x).backward(torch.full((4,), 2.0, device=device))
    assert x.grad.tolist() == [0, 2, 0, 0]


# learned ranges


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_the_first_input_sets_a_learned_scale(dtype, device):
    quantizer = FakeQuantize(4, range=Learned(), device=device)
    x = cases.normal((64,), dtype, device=device)
    y = quantizer(x)
    scale, zero_point = search_qparams(x, 4)
    close(quantizer.scale, [scale.float().item()])
    assert quantizer.zero_point.tolist() == [zero_point.item()]
    assert quantizer.num_batches.item() == 1
    cases.assert_same(
        y,
        fake_quantize_learned(x, quantizer.scale.to(scale.dtype), quantizer.zero_point, 0, 15),
    )
    before = state_of(quantizer)
    quantizer(3 * x)
    assert_same_state(quantizer.state_dict(), before)


def test_a_first_batch_of_zeros_sets_no_scale(device):
    quantizer = FakeQuantize(4, range=Learned(), device=device)
    x = torch.zeros(5, device=device, requires_grad=True)
    y = quantizer(x)
    y.sum().backward()
    assert y.tolist() == [0] * 5
    assert x.grad.tolist() == [1] * 5
    assert quantizer.scale.grad.tolist() == [0]  # DistributedDataParallel waits for it
    assert quantizer.num_batches.item() == 0
    quantizer(torch.ones(5, device=device))
    assert quantizer.num_batches.item() == 1


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_an_error(scale):
    quantizer = FakeQuantize(4, range=Learned())
    quantizer(torch.ones(3))
    nn.init.constant_(quantizer.scale, scale)
    with pytest.raises(ValueError, match="expected scale to be positive and finite"):
        quantizer(torch.ones(3))


# frozen, evaluation


@kept
def test_a_frozen_range_stays(range, device):
    quantizer = FakeQuantize(range=range, device=device)
    x = cases.normal((9,), device=device, requires_grad=True)
    quantizer(x)
    before = state_of(quantizer)
    quantizer.frozen = True
    y = quantizer(3 * x)
    assert_same_state(quantizer.state_dict(), before)
    cases.assert_same(y, quantizer.eval()(3 * x))
    y.sum().backward()
    assert all(parameter.grad is None for parameter in quantizer.parameters())
    assert copy.deepcopy(quantizer).frozen
    assert pickle.loads(pickle.dumps(quantizer)).frozen
    assert "frozen" not in quantizer.state_dict()
    assert repr(quantizer).endswith(f"range={range}, frozen=True)")


@kept
def test_evaluation_of_nothing_observed_is_an_error(range):
    quantizer = FakeQuantize(range=range)
    message = "^FakeQuantize: expected a range that has been observed, got none; train .* qatfast.calibrate"
    with pytest.raises(RuntimeError, match=message):
        quantizer.eval()(torch.ones(3))
    quantizer.train().frozen = True
    with pytest.raises(RuntimeError, match=message):
        quantizer(torch.ones(3))


@kept
def test_whether_something_was_observed_is_read_rarely(range, monkeypatch):
    quantizer = FakeQuantize(range=range)
    x, reads = torch.ones(3), []
    to_bool = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda value: reads.append(value.numel()) or to_bool(value))
    quantizer.spec  # noqa: B018
    quantizer(x)
    quantizer.train(False)
    state = quantizer.num_batches
    reads.clear()
    for _ in (1, 2, 3):
        quantizer._has_observed()
    assert reads == []
    quantizer.train(False)
    assert len(reads) == 1
    quantizer.load_state_dict(quantizer.state_dict())
    assert len(reads) == 2
    assert state is quantizer.num_batches


# state


@pytest.mark.parametrize("move", ["half", "bfloat16", "double"])
@kept
def test_the_state_stays_in_float32(range, move, device):
    quantizer = FakeQuantize(4, range=range, device=device)
    quantizer(torch.tensor([-0.1, 0.7], device=device))
    before = state_of(quantizer)
    dtypes = {name: value.dtype for name, value in before.items()}
    assert set(dtypes.values()) <= {torch.float32, torch.int64, torch.int32}
    parameters = list(quantizer.parameters())
    layer = getattr(nn.Sequential(quantizer), move)()
    assert_same_state(quantizer.state_dict(), before)
    layer.to(torch.float16)
    layer.type(torch.float64)
    assert_same_state(quantizer.state_dict(), before)
    assert all(a is b for a, b in zip(parameters, quantizer.parameters(), strict=True))


@kept
def test_the_state_moves_between_devices(range):
    quantizer = FakeQuantize(4, range=range)
    quantizer.to("meta")
    assert {value.device.type for value in quantizer.state_dict().values()} == {"meta"}
    assert quantizer.eval()(torch.empty(3, device="meta")).shape == (3,)


def duplicate_by_file(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@kept
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), duplicate_by_file],
    ids=["deepcopy", "pickle", "weights_only"],
)
def test_copies_and_files(range, duplicate, device):
    quantizer = FakeQuantize(4, range=range, device=device)
    x = cases.normal((9,), device=device)
    quantizer(x)
    other = duplicate(quantizer)
    assert_same_state(other.state_dict(), state_of(quantizer))
    cases.assert_same(other.eval()(x), quantizer.eval()(x))
    other.train()(100 * x)
    assert other.num_batches is not quantizer.num_batches


@kept
def test_a_float_checkpoint_leaves_it_unobserved(range):
    model = nn.Sequential(nn.Linear(3, 3), FakeQuantize(range=range))
    model(cases.normal((9, 3)))
    result = model.load_state_dict(nn.Sequential(nn.Linear(3, 3)).state_dict(), strict=True)
    assert result.missing_keys == []
    assert model[1].num_batches.item() == 0
    with pytest.raises(RuntimeError, match="expected a range that has been observed"):
        model.eval()(cases.normal((9, 3)))


@kept
def test_part_of_the_keys_and_other_shapes_are_the_usual_errors(range):
    quantizer = FakeQuantize(range=range)
    state = state_of(quantizer)
    for name in state:
        part = {key: value for key, value in state.items() if key != name}
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            quantizer.load_state_dict(part)
    wide = FakeQuantize(range=range, granularity=PerChannel(0), shape=(3,)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        quantizer.load_state_dict(wide)


def test_another_kind_of_range_is_the_usual_error():
    learned, average = FakeQuantize(range=Learned()), FakeQuantize(range=MovingAverage())
    for target, source in ((learned, average), (average, learned), (FakeQuantize(), average)):
        with pytest.raises(RuntimeError, match="Unexpected key"):
            target.load_state_dict(source.state_dict())


def test_moving_average_and_min_max_load_each_other():
    average, widest = FakeQuantize(range=MovingAverage()), FakeQuantize(range=MinMax())
    x = cases.normal((9,))
    average(x)
    widest.load_state_dict(average.state_dict())
    cases.assert_same(widest.eval()(x), average.eval()(x))


@kept
def test_what_makes_it_unobserved(range):
    def unobserved(quantizer):
        return quantizer.num_batches.item() == 0 and not quantizer._has_observed()

    quantizer = FakeQuantize(range=range)
    fresh = state_of(quantizer)
    for forget in (quantizer.reset_parameters, lambda: quantizer.to_empty(device="cpu")):
        quantizer(torch.ones(3))
        quantizer.eval()(torch.ones(3))
        quantizer.train()
        assert not unobserved(quantizer)
        forget()
        assert unobserved(quantizer)
        assert_same_state(quantizer.state_dict(), fresh)
    model = nn.Sequential(FakeQuantize(range=range, device="meta")).to_empty(device="cpu")
    assert unobserved(model[0])
    assert_same_state(model[0].state_dict(), fresh)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"granularity": PerChannel(0), "range": MinMax()}, "expected shape to be the shape of the scale"),
        ({"granularity": PerGroup(4), "range": Learned()}, "expected shape to be the shape of the scale"),
        ({"range": MinMax(), "shape": (3,)}, "expected shape to be (), that of one scale, for PerTensor()"),
        ({"granularity": PerToken(), "range": MinMax()}, "expected Dynamic() for PerToken()"),
        ({"granularity": PerChannel(0), "range": MinMax(), "shape": (4, 5)}, "expected shape to be (C,) for"),
        (
            {"granularity": PerChannel(0), "range": MinMax(), "shape": (-4,)},
            "sizes of shape to be at least 0",
        ),
        (
            {"granularity": PerChannel(0), "range": MinMax(), "shape": 4},
            "expected shape to be a tuple of ints",
        ),
        ({"range": Range()}, "expected range to be Dynamic(), MovingAverage(), MinMax(), Learned() or Fixed"),
    ],
)
def test_errors_come_at_construction(arguments, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        FakeQuantize(**arguments)
    assert message in str(caught.value)


@pytest.mark.parametrize("range", [MovingAverage(), MinMax(), Learned(), Fixed(-1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_an_input_that_is_no_tensor_is_an_error(range, training):
    quantizer = FakeQuantize(range=range).train(training)
    with pytest.raises(TypeError, match=r"expected (input to be a torch.Tensor|a tensor), got ndarray"):
        quantizer(np.ones(3))


@kept
def test_an_input_of_other_channels_is_an_error(range):
    quantizer = FakeQuantize(granularity=PerChannel(0), range=range, shape=(4,))
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    with pytest.raises(ValueError, match=r"(shape \(5,\).* got (float32 of shape )?\(4,\)|with 4 blocks)"):
        quantizer(cases.normal((5, 3)))
    assert_same_state(quantizer.state_dict(), before)


# training


class Twice(nn.Module):
    def __init__(self, range):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.quantizer = nn.Linear(6, 6), FakeQuantize(4, range=range)

    def forward(self, x):
        return self.quantizer(self.linear(self.quantizer(x)))


@kept
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved_tensors", "reentrant"])
@pytest.mark.parametrize("steps", [1, 2])
def test_activation_checkpointing_changes_nothing(range, use_reentrant, steps):
    results = []
    for function in (lambda f, x: f(x), lambda f, x: checkpoint(f, x, use_reentrant=use_reentrant)):
        model = nn.Sequential(nn.Linear(6, 6), FakeQuantize(4, range=range), nn.ReLU())
        torch.manual_seed(0)
        nn.init.normal_(model[0].weight)
        nn.init.zeros_(model[0].bias)
        for step in torch.arange(steps):
            x = (cases.normal((5, 6)) * (step + 1)).requires_grad_()
            function(model, x).sum().backward()
        results.append((state_of(model), x.grad, model[0].weight.grad))
    assert_same_state(results[1][0], results[0][0])
    cases.assert_same(results[1][1], results[0][1])
    cases.assert_same(results[1][2], results[0][2])
    assert results[0][0]["1.num_batches"].item() == (1 if range == Learned() else steps)


@observed
def test_one_quantizer_that_serves_two_calls_moves_at_each(range):
    model = Twice(range)
    model(cases.normal((5, 6)))
    assert model.quantizer.num_batches.item() == 2


@kept
def test_gradients_accumulate(range):
    quantizer = FakeQuantize(4, range=range)
    quantizer(cases.normal((9,)))
    quantizer.frozen = range != Learned()
    x = cases.normal((9,), requires_grad=True)
    quantizer(x).sum().backward()
    once = [tensor.grad.clone() for tensor in (x, *quantizer.parameters())]
    quantizer(x).sum().backward()
    for tensor, grad in zip((x, *quantizer.parameters()), once, strict=True):
        cases.assert_same(tensor.grad, 2 * grad)


@kept
def test_compiled_training_moves_the_state(range, fresh_compiler):
    eager = FakeQuantize(4, range=range)
    batches = [scale * cases.normal((33,)) for scale in (1.0, 2.0, 0.5)]
    if range == Learned():
        eager(batches[0])  # before torch.compile, as its documentation says
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True)
    for batch in batches:
        x, y = batch.clone().requires_grad_(), batch.clone().requires_grad_()
        expected, actual = eager(x), compiled(y)
        cases.assert_same(actual, expected)
        expected.sum().backward()
        actual.sum().backward()
        cases.assert_same(y.grad, x.grad)
        assert_same_state(other.state_dict(), state_of(eager))
    eager.eval(), other.eval()
    cases.assert_same(compiled(batches[1]), eager(batches[1]))


@kept
def test_a_compiled_evaluation_of_nothing_observed_is_an_error(range, fresh_compiler):
    compiled = torch.compile(FakeQuantize(range=range).eval())
    with pytest.raises(RuntimeError, match="expected a range that has been observed"):
        compiled(torch.ones(3))


@kept
def test_export(range):
    quantizer, x = FakeQuantize(4, range=range), cases.normal((9,))
    quantizer(x)
    program = torch.export.export(quantizer.eval(), (x,))
    assert set(program.state_dict) == set(quantizer.state_dict())
    cases.assert_same(program.module()(3 * x), quantizer(3 * x))


# layers


def layer_with(**ranges):
    torch.manual_seed(0)
    specs = {"input": None, "weight": None, "bias": None, "output": None}
    for name, range in ranges.items():
        granularity = PerChannel(0) if name == "weight" else QuantSpec().granularity
        specs[name] = QuantSpec(8, name == "weight", granularity, range)
    return QATLinear(16, 6, config=QATConfig(**specs))


STATIC = {
    "static": QATConfig.static(),
    "static_4": QATConfig.static(4),
    "symmetric": QATConfig.static(activations="symmetric"),
    "fixed": QATConfig(QuantSpec(range=Fixed(-3, 3)), QuantSpec(4, range=Fixed(-1, 1)), None, None),
    "output": QATConfig(None, QuantSpec(), None, QuantSpec(range=MinMax())),
    "learned_output": QATConfig(None, QuantSpec(), QuantSpec(), QuantSpec(range=Learned())),
    "all_observed": QATConfig(*(QuantSpec(range=MinMax()),) * 2, None, QuantSpec(range=MovingAverage())),
    "per_channel": QATConfig(
        QuantSpec(granularity=PerChannel(-1), range=MovingAverage()),
        QuantSpec(4, granularity=PerChannel(1), range=Learned()),
        None,
        QuantSpec(granularity=PerChannel(-1), range=MinMax()),
    ),
    "groups": QATConfig(
        weight=QuantSpec(4, granularity=PerGroup(4), range=Learned()), bias=None, output=None
    ),
}
configs = pytest.mark.parametrize("config", STATIC.values(), ids=STATIC)


def formula(layer, x):
    """The layer by its quantizers one after the other."""
    own = dict(layer.named_children())
    config = layer.config

    def apply(name, tensor):
        spec = getattr(config, name)
        if spec is None:
            return tensor
        if f"{name}_quantizer" in own:
            return own[f"{name}_quantizer"](tensor)
        return fake_quantize(tensor, **spec.arguments)

    y = F.linear(apply("input", x), apply("weight", layer.weight), apply("bias", layer.bias))
    return apply("output", y)


@configs
def test_a_layer_is_its_quantizers_around_the_product(config, device):
    torch.manual_seed(0)
    layer = QATLinear(16, 6, config=config, device=device)
    other = copy.deepcopy(layer)
    for scale in (1, 2):
        x, z = (scale * cases.normal((5, 16), device=device)).requires_grad_(), None
        z = x.detach().clone().requires_grad_()
        y, expected = layer(x), formula(other, z)
        tolerance = 1e-5 if config.output is None else 0.1  # one step, where the int8 GEMM rounds elsewhere
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=tolerance)
        dy = cases.normal((5, 6), device=device)
        y.backward(dy)
        expected.backward(dy)
        if config.output is None:
            torch.testing.assert_close(x.grad, z.grad)
            for (name, parameter), reference_ in zip(
                layer.named_parameters(), other.parameters(), strict=True
            ):
                torch.testing.assert_close(parameter.grad, reference_.grad, msg=name)
    if config.output is None:
        assert_same_state(layer.state_dict(), state_of(other))
    layer.eval()
    before = state_of(layer)
    torch.testing.assert_close(layer(x), formula(other.eval(), x), rtol=1e-5, atol=0.1)
    assert_same_state(layer.state_dict(), before)


def test_a_layer_with_a_static_input_multiplies_integers(device):
    layer = QATLinear(16, 6, bias=False, config=QATConfig.static(), device=device)
    x = cases.normal((5, 16), device=device)
    y = layer(x)  # the first batch is quantized with its own range
    cases.assert_same(y, qat_linear(x, layer.weight, config=QATConfig.int8()))
    cases.assert_same(layer.eval()(x), y)


def test_which_quantizers_a_layer_has():
    layer = layer_with(input=MovingAverage(), weight=Dynamic(), bias=Dynamic(), output=Fixed(-1, 1))
    assert [name for name, _ in layer.named_children()] == ["input_quantizer", "output_quantizer"]
    assert list(layer.state_dict()) == [
        "weight",
        "bias",
        "input_quantizer.running_min",
        "input_quantizer.running_max",
        "input_quantizer.num_batches",
    ]
    shapes = {
        name: tuple(value.shape)
        for name, value in QATLinear(16, 6, config=STATIC["per_channel"]).state_dict().items()
    }
    assert shapes["input_quantizer.running_min"] == (16,)
    assert shapes["weight_quantizer.scale"] == (16,)
    assert shapes["output_quantizer.running_max"] == (6,)
    assert QATLinear(16, 6, config=STATIC["groups"]).weight_quantizer.scale.shape == (6, 4)
    assert QATLinear(16, 6, config=STATIC["static_4"]).input_quantizer.scale.shape == (1,)
    assert list(QATLinear(16, 6).children()) == []


def test_setting_the_config_changes_what_does_not_fit():
    layer = QATLinear(16, 6, config=QATConfig.static(4))
    layer(cases.normal((5, 16)))
    kept, weight = layer.input_quantizer, layer.weight_quantizer
    layer.config = QATConfig(layer.config.input, QuantSpec(4, True, PerChannel(0)), None, None)
    assert layer.input_quantizer is kept
    assert not hasattr(layer, "weight_quantizer")
    layer.config = QATConfig.static(4)
    assert layer.weight_quantizer is not weight
    layer.config = QATConfig.dynamic()
    assert list(layer.children()) == []
    x = cases.normal((5, 16))
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias, config=QATConfig.dynamic()))


@configs
def test_checkpoints_of_nn_linear_load(config):
    layer, linear = QATLinear(16, 6, config=config), nn.Linear(16, 6)
    layer(cases.normal((5, 16)))
    layer.load_state_dict(linear.state_dict(), strict=True)
    cases.assert_same(layer.weight, linear.weight)
    assert all(quantizer.num_batches.item() == 0 for quantizer in layer.children() if quantizer.state_dict())


@configs
def test_a_checkpoint_without_the_layer_leaves_its_ranges(config):
    model = nn.ModuleDict({"layer": QATLinear(16, 6, config=config), "adapter": nn.Linear(16, 6)})
    layer = model["layer"]
    layer(cases.normal((5, 16)))
    state = state_of(layer)
    adapter = {f"adapter.{name}": value for name, value in nn.Linear(16, 6).state_dict().items()}
    model.load_state_dict(adapter, strict=False)
    assert_same_state(layer.state_dict(), state)
    model.load_state_dict({"layer.weight": layer.weight.detach()}, strict=False)
    assert all(quantizer.num_batches.item() == 0 for quantizer in layer.children() if quantizer.state_dict())


@configs
def test_copies_and_files_of_layers(config):
    layer = QATLinear(16, 6, config=config)
    x = cases.normal((5, 16))
    layer(x)
    layer.eval()
    for duplicate in (copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))):
        cases.assert_same(duplicate(layer)(x), layer(x))
    other = QATLinear(16, 6, config=config)
    other.load_state_dict(layer.state_dict())
    cases.assert_same(other.eval()(x), layer(x))


@pytest.mark.parametrize("device_type", ["cpu", "meta"])
def test_from_float_and_to_float(device_type):
    linear = nn.Linear(16, 6, device=device_type).eval()
    layer = QATLinear.from_float(linear, config=QATConfig.static(4))
    assert layer.weight is linear.weight
    assert not layer.input_quantizer.training
    assert {value.device.type for value in layer.state_dict().values()} == {device_type}
    again = QATLinear.from_float(layer)
    assert again.input_quantizer is layer.input_quantizer
    assert QATLinear.from_float(layer, config=QATConfig.dynamic()).state_dict().keys() == {"weight", "bias"}
    back = again.to_float()
    assert type(back) is nn.Linear
    assert list(back.children()) == []
    assert list(again.children()) != []
    assert back.state_dict().keys() == {"weight", "bias"}


def test_a_learned_weight_is_set_in_evaluation_too(device):
    layer = layer_with(weight=Learned()).to(device).eval()
    x = cases.normal((5, 16), device=device)
    y = layer(x)
    assert layer.weight_quantizer.num_batches.item() == 1
    scale, zero_point = search_qparams(layer.weight, symmetric=True, granularity=PerChannel(0))
    cases.assert_same(layer.weight_quantizer.scale.detach(), scale)
    w = fake_quantize_affine(layer.weight, scale, zero_point, -127, 127, granularity=PerChannel(0))
    cases.assert_same(y.detach(), F.linear(x, w, layer.bias).detach())


@pytest.mark.parametrize("name", ["input", "weight", "output"])
def test_the_error_names_the_class_and_the_role(name):
    layer = layer_with(**{name: MinMax()}).eval()
    with pytest.raises(RuntimeError, match=f"^QATLinear.{name}_quantizer: expected a range that has been"):
        layer(cases.normal((5, 16)))


@pytest.mark.parametrize("name", ["input", "output"])
def test_channels_of_input_and_output_are_the_last_axis(name):
    spec = QuantSpec(granularity=PerChannel(1), range=MinMax())
    with pytest.raises(
        ValueError, match=rf"expected the axis of config.{name} to be -1 for MinMax\(\), got 1"
    ):
        QATLinear(16, 6, config=QATConfig(**{name: spec}))
    QATLinear(16, 6, config=QATConfig(**{name: QuantSpec(granularity=PerChannel(1))}))


def test_a_wrong_input_is_not_observed():
    layer = QATLinear(16, 6, config=QATConfig.static())
    with pytest.raises(ValueError, match="expected input to have shape"):
        layer(cases.normal((5, 15)))
    assert layer.input_quantizer.num_batches.item() == 0


@kept
def test_the_function_takes_no_range_that_a_module_keeps(range, ops):
    config = QATConfig(QuantSpec(range=range))
    with pytest.raises(ValueError, match="whose state a module keeps; use QATLinear") as caught:
        qat_linear(torch.ones(2, 3), torch.ones(4, 3), config=config)
    with pytest.raises(ValueError) as other:
        reference.qat_linear(torch.ones(2, 3), torch.ones(4, 3), config=config)
    assert str(other.value) == str(caught.value)


def test_the_function_takes_fixed_ranges(device):
    config = QATConfig(
        QuantSpec(range=Fixed(-1, 1)), QuantSpec(range=Fixed(-0.5, 0.5)), None, QuantSpec(range=Fixed(-2, 2))
    )
    layer = QATLinear(16, 6, config=config, device=device)
    x = cases.normal((5, 16), device=device)
    expected = layer(x)
    assert expected.detach().abs().max() < 2.01
    for function in (qat_linear, reference.qat_linear):
        cases.assert_same(function(x, layer.weight, layer.bias, config=config), expected)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@configs
def test_dtypes_of_layers(config, dtype, device):
    layer = QATLinear(16, 6, config=config, device=device).to(dtype)
    x = cases.normal((5, 16), dtype, device=device)
    y = layer(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert layer.eval()(x).dtype == dtype
    floats = {
        name: value.dtype
        for name, value in layer.state_dict().items()
        if "quantizer" in name and value.is_floating_point()
    }
    assert set(floats.values()) <= {torch.float32}


@configs
def test_layers_under_checkpointing(config):
    torch.manual_seed(0)
    layer = QATLinear(16, 6, config=config)
    other, x = copy.deepcopy(layer), cases.normal((5, 16), requires_grad=True)
    for _ in (1, 2):
        layer(x).sum().backward()
    expected, x.grad = x.grad, None
    for _ in (1, 2):
        checkpoint(other, x, use_reentrant=False).sum().backward()
    cases.assert_same(x.grad, expected)
    assert_same_state(other.state_dict(), state_of(layer))


def test_a_compiled_layer(fresh_compiler):
    torch.manual_seed(0)
    layer = QATLinear(16, 6, config=QATConfig.static())
    other = copy.deepcopy(layer)
    compiled = torch.compile(other, fullgraph=True)
    for scale in (1, 2):
        x = scale * cases.normal((5, 16))
        a, b = layer(x), compiled(x)
        torch.testing.assert_close(b, a)
        a.sum().backward()
        b.sum().backward()
        assert_same_state(other.state_dict(), state_of(layer))
    torch.testing.assert_close(other.weight.grad, layer.weight.grad)


def test_cached_weights_are_never_stale():
    import qatfast

    layer, x = QATLinear(16, 6, config=QATConfig.static(4)), cases.normal((5, 16))
    layer(x)
    layer.eval()
    with torch.no_grad(), qatfast.cached_weights(layer):
        layer(x)
        layer.weight.data.mul_(0.5)
        layer.weight_quantizer.scale.mul_(2)
        y = layer(x)
    with torch.no_grad():
        cases.assert_same(y, layer(x))


def test_the_fast_path_of_dynamic_layers_stays(monkeypatch):
    layer = QATLinear(16, 6, config=QATConfig.int8())
    monkeypatch.setattr(QATLinear, "_of_ranges", None)
    layer(cases.normal((5, 16)))


OBSERVED_BLOCKS = (
    ((600, 700), PerTensor()),
    ((40, 300), PerChannel(0)),
    ((40, 30), PerChannel(1)),
    ((3, 4, 5, 6), PerChannel(-3)),
    ((6, 64), PerGroup(16)),
    ((0, 4), PerTensor()),
    ((), PerTensor()),
)


def batches_of(shape, dtype):
    for seed, factor in ((0, 1.0), (1, 0.5), (2, 2.0)):
        x = cases.normal(shape, dtype, seed=seed) * factor
        if x.numel() > 8 and seed:
            x.view(-1)[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
        yield x


def fresh_state(shape, granularity):
    size = checks.shape_of_qparams(torch.Size(shape), granularity)
    return [torch.zeros(size), torch.zeros(size), torch.zeros((), dtype=torch.int64)]


@pytest.mark.parametrize("case", OBSERVED_BLOCKS, ids=cases.name)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
@pytest.mark.parametrize("range", (MovingAverage(0.1), MinMax()), ids=str)
def test_the_kernels_that_observe_give_the_bits_of_the_reference(kernels, case, dtype, range):
    shape, granularity = case
    spec = QuantSpec(4, granularity=granularity, range=range)
    alone, fused, forward, expected = (fresh_state(shape, granularity) for _ in "abcd")
    constant = getattr(range, "averaging_constant", 0.0)
    for x in batches_of(shape, dtype):
        grid = reference.observe_range(x, *expected, constant, **spec.arguments)
        ends = (spec.quant_min, spec.quant_max)
        y = fake_quantize_affine(x, *grid, *ends, granularity=granularity)
        cases.assert_all_same((*ranges.observe_range(x, *alone, spec), *alone), (*grid, *expected))
        cases.assert_all_same(
            (*ranges.fake_quantize_observed(x, *fused, spec), *fused), (y, *grid, *expected)
        )
        leaf, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        observed = ranges.fake_quantize_observed(leaf, *forward, spec)
        cases.assert_all_same((*(value.detach() for value in observed), *forward), (y, *grid, *expected))
        assert [value.requires_grad for value in observed] == [True, False, False]
        dy = cases.normal(shape, dtype, seed=5)
        observed[0].backward(dy)
        fake_quantize_affine(other, *grid, *ends, granularity=granularity).backward(dy)
        cases.assert_same(leaf.grad, other.grad)


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=str)
def test_every_distance_between_tensors_gives_the_same_bits(kernels, dtype):
    """Loops go down through memory where their stores would delay their loads, which the addresses decide."""
    size, page = 2 * 4096 + 333, 4096 // dtype.itemsize
    values, upstream = (cases.normal((size + page,), dtype, seed=seed) for seed in (0, 1))
    values[4096 + 500 :] *= 0.1  # so that some pieces of the mask have no zeros
    spec = QuantSpec(4, range=MinMax())
    for start in range(0, page, page // 8):  # whatever the addresses of the results
        x, dy = values[start : start + size].requires_grad_(), upstream[start : start + size]
        state = [torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(1)]
        y, scale, zero_point = ranges.fake_quantize_observed(x, *state, spec)
        expected, inside = reference._fake_quantize(x.detach(), scale, zero_point, 0, 15, PerTensor())
        assert state[0] == x.min().float() and state[1] == x.max().float()
        for result in (y, fake_quantize_affine(x, scale, zero_point, 0, 15)):
            cases.assert_same(result.detach(), expected)
            cases.assert_same(torch.autograd.grad(result, x, dy)[0], torch.where(inside, dy, 0))


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("granularity", (PerTensor(), PerChannel(1), PerGroup(1)), ids=str)
def test_the_strides_of_what_is_observed(kernels, layout, granularity):
    change, shape = cases.LAYOUTS[layout]
    if len(shape) < 2 and granularity != PerTensor():
        pytest.skip("the tensor has no such axis")
    spec = QuantSpec(4, granularity=granularity, range=MinMax())
    states = [fresh_state(shape, granularity) for _ in "ab"]
    for factor in (1, 2):
        x = change(factor * cases.normal(shape)).requires_grad_()
        y, scale, zero_point = ranges.fake_quantize_observed(x, *states[0], spec)
        grid = reference.observe_range(x, *states[1], 0.0, **spec.arguments)
        expected = fake_quantize_affine(x, *grid, 0, 15, granularity=granularity)
        cases.assert_all_same((y.detach(), scale, zero_point), (expected.detach(), *grid))
        assert y.stride() == torch.empty_like(x).stride()
        dy = cases.normal(shape, seed=1)
        gradients = (torch.autograd.grad(value, x, dy)[0] for value in (y, expected))
        cases.assert_same(*gradients)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
@pytest.mark.parametrize("op", ["observe_range", "fake_quantize_observed"])
def test_opcheck_of_what_observes(kernels, op, requires_grad):
    for shape, granularity in OBSERVED_BLOCKS[2:5]:
        x = cases.normal(shape, requires_grad=requires_grad)
        state = fresh_state(shape, granularity)
        arguments = (x, *state, 0.1, 4, False, granularity.code, True)
        torch.library.opcheck(getattr(torch.ops.qatfast, op).default, arguments)


@pytest.mark.parametrize("granularity", [PerChannel(0), PerToken()], ids=str)
def test_no_blocks_have_no_ranges(kernels, granularity):
    """Nothing is divided by their number."""
    x = torch.empty(0, 3, requires_grad=True)
    arguments = (0.1, 4, False, granularity.code, True)
    for op in ("observe_range", "fake_quantize_observed"):
        state = fresh_state(x.shape, granularity)
        *y, scale, zero_point = getattr(torch.ops.qatfast, op)(x, *state, *arguments)
        assert scale.shape == zero_point.shape == (0,)
        assert state[2].item() == 0
        for result in y:
            assert torch.autograd.grad(result.sum(), x)[0].shape == (0, 3)
    assert search_qparams(x, granularity=granularity)[0].shape == (0,)
    one = torch.ones(0, requires_grad=True)
    y = fake_quantize_learned(x, one, torch.zeros(0, dtype=torch.int32), 0, 15, granularity=granularity)
    assert [grad.shape for grad in torch.autograd.grad(y.sum(), (x, one))] == [(0, 3), (0,)]


@pytest.mark.parametrize("range", [MinMax(), MovingAverage(), Learned()], ids=str)
def test_a_layer_without_outputs(kernels, range):
    spec = QuantSpec(granularity=PerChannel(0), symmetric=True, range=range)
    layer = QATLinear(4, 0, config=QATConfig(QuantSpec(range=MinMax()), spec, None, None))
    for _ in "ab":
        y = layer(torch.randn(3, 4))
        assert y.shape == (3, 0)
        y.sum().backward()


@pytest.mark.parametrize("constant", [torch.nan, -0.1, 1.5])
def test_a_range_moves_by_a_part_of_the_distance(kernels, constant):
    """A range that became NaN would stay NaN."""
    state = fresh_state((), PerTensor())
    words = f"expected averaging_constant to be from 0 to 1, got {constant}"
    for op in ("observe_range", "fake_quantize_observed"):
        with pytest.raises(ValueError, match=f"{op}: {words}"):
            getattr(torch.ops.qatfast, op)(torch.ones(3), *state, constant, 8, False, (0, 0), True)
    with pytest.raises(ValueError, match=f"int8_conv_input: {words}"):
        torch.ops.qatfast.int8_conv_input(
            torch.ones(1, 1, 2, 2), None, None, *state, constant, QuantSpec().code, False
        )
    assert [value.item() for value in state] == [0, 0, 0]


def test_forward_mode_of_what_is_observed(kernels):
    spec, state = QuantSpec(4, range=MinMax()), [torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(1)]
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(torch.tensor([-9.0, 0.3, 9.0]), torch.full((3,), 2.0))
        y, _, _ = ranges.fake_quantize_observed(x, *state, spec)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent.tolist() == [0, 2, 0]
    assert state[2].item() == 2


def test_autograd_sees_that_the_state_moves(kernels):
    spec, state = QuantSpec(4, range=MinMax()), [torch.tensor(-1.0), torch.tensor(1.0), torch.tensor(1)]
    weight = torch.ones((), requires_grad=True)
    loss = weight * state[1]
    ranges.fake_quantize_observed(torch.tensor([3.0]), *state, spec)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("symmetric, narrow_range", [(False, True), (True, True), (True, False)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_qparams_of_range(kernels, dtype, symmetric, narrow_range):
    spec = QuantSpec(4, symmetric, narrow_range=narrow_range)
    most = torch.finfo(torch.float32).max
    lo = torch.tensor([[0.0, -1.0, -0.3, -most], [0.0, 0.0, -1e-45, -0.1]])
    hi = torch.tensor([[0.0, 2.0, 0.7, most], [5.0, 1e-45, 0.0, 0.7]])
    ends = (spec.quant_min, spec.quant_max, symmetric)
    for x, y in ((lo, hi), (lo.t(), hi.t()), (lo[0, 1], hi[0, 1])):
        expected = reference.qparams_of_range(x.to(dtype), y.to(dtype), *ends)
        cases.assert_all_same(ranges.qparams_of_range(x, y, spec, dtype), expected)
    arguments = (lo, hi, 4, symmetric, narrow_range, dtype)
    torch.library.opcheck(torch.ops.qatfast.qparams_of_range.default, arguments)
    op = torch.ops.qatfast.qparams_of_range
    with pytest.raises(ValueError, match="qparams_of_range: expected lo and hi to have one shape, got"):
        op(lo, hi[0], 4, symmetric, narrow_range, dtype)
    with pytest.raises(TypeError, match="qparams_of_range: expected dtype to be float32 or float64, got"):
        op(lo, hi, 4, symmetric, narrow_range, torch.float16)


def test_evaluation_is_two_operators(kernels):
    quantizer, x = FakeQuantize(range=MinMax()), torch.ones(5)
    quantizer(x)
    quantizer.eval()
    with torch.profiler.profile() as profile:
        quantizer(x)
    names = {event.key for event in profile.key_averages() if event.key.startswith("qatfast::")}
    assert names == {"qatfast::qparams_of_range", "qatfast::fake_quantize_affine"}


GRIDS = {"input": (torch.tensor(0.02), torch.tensor(100, dtype=torch.int32))}
LAYERS_OF_STATIC_INPUTS = {
    "static": QATConfig.static(),
    "symmetric": QATConfig.static(activations="symmetric"),
    "bias": QATConfig(QuantSpec(range=MinMax()), QuantSpec(), QuantSpec(), None),
}


def operands_of_static_inputs(dtype=torch.float32, shape=(5, 3), requires_grad=True):
    x, weight = 2 * cases.normal((*shape, 17), dtype), cases.normal((6, 17), dtype, seed=1)
    x.view(-1)[:2] = torch.tensor([torch.inf, -torch.inf])
    return [t.requires_grad_(requires_grad) for t in (x, weight, cases.normal((6,), dtype, seed=2))]


def results_of_static_inputs(function, config, operands, grids):
    y = function(*operands, config, grids)
    dy = cases.normal(y.shape, y.dtype, seed=3)
    return y.detach(), *torch.autograd.grad(y, [t for t in operands if t.requires_grad], dy)


@pytest.mark.parametrize("config", LAYERS_OF_STATIC_INPUTS.values(), ids=LAYERS_OF_STATIC_INPUTS)
@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_a_layer_of_a_static_input_is_that_of_the_reference(kernels, config, dtype):
    scale, zero_point = GRIDS["input"]
    zero_point = zero_point * (0 if config.input.symmetric else 1)
    grids = {"input": (scale.to(checks.compute_dtype(dtype)), zero_point)}
    operands = operands_of_static_inputs(dtype)
    found = results_of_static_inputs(ranges.qat_linear, config, operands, grids)
    expected = results_of_static_inputs(reference.qat_linear_static, config, operands, grids)
    cases.assert_same(found[0], expected[0])
    tolerance = 3e-2 if dtype.itemsize == 2 else 1e-5  # the reference rounds x_hat
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=3 * tolerance)
    assert (found[1] == 0).any()  # the range clips
    spec = config.weight
    int8_weight = torch.ops.qatfast.qat_linear_int8_weight(operands[1], spec.code)
    cached = results_of_static_inputs(
        lambda *given: ranges.qat_linear(*given, int8_weight=tuple(int8_weight)), config, operands, grids
    )
    cases.assert_all_same(cached, found)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)], ids=str)
def test_each_gradient_of_a_layer_of_a_static_input(kernels, wanted):
    operands = operands_of_static_inputs(requires_grad=False)
    everything = results_of_static_inputs(
        ranges.qat_linear, QATConfig.static(), operands_of_static_inputs(), GRIDS
    )
    for index in wanted:
        operands[index].requires_grad_()
    found = results_of_static_inputs(ranges.qat_linear, QATConfig.static(), operands, GRIDS)
    for ours, index in zip(found[1:], wanted, strict=True):
        torch.testing.assert_close(ours, everything[1 + index])


def test_second_derivatives_of_a_layer_of_a_static_input(kernels):
    found = []
    for function in (ranges.qat_linear, reference.qat_linear_static):
        operands = operands_of_static_inputs()
        y = function(*operands, QATConfig.static(), GRIDS)
        first = torch.autograd.grad(y.square().mean(), operands, create_graph=True)
        total = sum(gradient.square().sum() for gradient in first)
        found.append(torch.autograd.grad(total, operands))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_forward_mode_of_a_layer_of_a_static_input(kernels):
    operands, tangents = operands_of_static_inputs(requires_grad=False), []
    x = operands[0].nan_to_num(posinf=9.0, neginf=-9.0)
    for function in (ranges.qat_linear, reference.qat_linear_static):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            y = function(dual, *operands[1:], QATConfig.static(), GRIDS)
            tangents.append(torch.autograd.forward_ad.unpack_dual(y).tangent)
    torch.testing.assert_close(*tangents)


def test_what_a_layer_of_a_static_input_keeps(kernels):
    operands, kept = operands_of_static_inputs(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ranges.qat_linear(*operands, QATConfig.static(), GRIDS)
    (weight,) = [t for t in kept if t.data_ptr() == operands[1].data_ptr()]
    others = {t.dtype: t.numel() for t in kept if t is not weight and t.numel() > 15}
    assert others == {torch.int8: 255, torch.uint8: 32}


@pytest.mark.parametrize("requires_grad", [False, True], ids=["", "requires_grad"])
def test_opcheck_of_a_layer_of_a_static_input(kernels, requires_grad):
    operands = operands_of_static_inputs(requires_grad=requires_grad)
    arguments = (*operands, [], *GRIDS["input"], None, None, QATConfig.static().codes)
    torch.library.opcheck(torch.ops.qatfast.qat_linear_int8_static.default, arguments)


def test_cached_weights_of_a_static_layer(kernels):
    import qatfast

    layer, x = QATLinear(16, 6, config=QATConfig.static()), cases.normal((5, 16))
    layer(x)
    expected = layer.eval()(x)
    with torch.no_grad(), qatfast.cached_weights(layer), torch.profiler.profile() as profile:
        for _ in (1, 2, 3):
            cases.assert_same(layer(x), expected.detach())
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["qatfast::qat_linear_int8_weight"] == 1
    with torch.no_grad(), qatfast.cached_weights(layer):
        layer(x)
        layer.weight.mul_(2)
        y = layer(x)
    cases.assert_same(y, layer(x).detach())


INT32 = {
    "dynamic": replace(QATConfig.int8(), bias="int32"),
    "static": replace(QATConfig.static(), bias="int32"),
    "learned": replace(QATConfig.static(4), bias="int32"),
}


@pytest.mark.parametrize(
    "layer", [lambda c: QATLinear(12, 5, config=c), lambda c: QATConv2d(3, 5, 2, config=c)]
)
@pytest.mark.parametrize("config", INT32.values(), ids=INT32)
def test_an_int32_bias_is_a_multiple_of_the_steps_of_the_product(config, layer):
    layer = layer(config)
    x = cases.normal((7, 12)) if isinstance(layer, QATLinear) else cases.normal((7, 3, 4, 4))
    y = layer(x)
    (gradient,) = torch.autograd.grad(y.sum(), layer.bias)
    assert torch.allclose(gradient, torch.full((5,), float(y.numel() / 5)))
    layer.eval()
    own = layer._modules
    of_input = own["input_quantizer"].grid(x) if "input_quantizer" in own else choose_qparams(x)
    rows = layer.weight.detach().flatten(1)
    of_weight = (
        own["weight_quantizer"].grid(rows)
        if "weight_quantizer" in own
        else choose_qparams(rows, symmetric=True, granularity=PerChannel(0))
    )
    step = (of_input[0].detach() * of_weight[0].detach()).double().numpy()
    twin = copy.deepcopy(layer)
    twin.config = replace(config, bias=None)
    with torch.no_grad():
        twin.bias.copy_(torch.from_numpy(np.rint(layer.bias.double().numpy() / step) * step))
        assert not torch.equal(twin.bias, layer.bias)
        cases.assert_same(layer(x), twin(x))


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (TypeError, {"bias": "int33"}),
        (ValueError, {"bias": "int32"}),
        (ValueError, {"input": QuantSpec(granularity=PerToken()), "bias": "int32"}),
        (ValueError, {"input": QuantSpec(), "weight": QuantSpec(9), "bias": "int32"}),
        (ValueError, {"input": QuantSpec(), "weight": QuantSpec(granularity=PerGroup(4)), "bias": "int32"}),
    ],
)
def test_an_int32_bias_needs_an_int8_gemm_with_one_input_scale(error, arguments):
    with pytest.raises(error, match="int32"):
        QATConfig(**arguments)


@observed
@pytest.mark.parametrize("bias", (True, False))
def test_a_layer_that_observes_in_one_call_gives_the_bits_of_two(monkeypatch, range, bias):
    config = QATConfig.static()
    config = replace(config, input=replace(config.input, range=range))
    made = QATLinear(8, 4, bias, config=config)
    results = []
    for layer in (made, copy.deepcopy(made)):
        x = cases.normal((3, 5, 8)).requires_grad_()
        outputs = [layer(x * scale) for scale in (1.0, 0.5, 3.0)]
        sum(y.square().sum() for y in outputs).backward()
        gradients = [tensor.grad for tensor in (x, *layer.parameters())]
        results.append(
            (*outputs, *gradients, *state_of(layer).values(), *layer.input_quantizer._latest[id(layer)])
        )
        monkeypatch.setattr(ranges, "qat_linear_observed", lambda *arguments: None)
    cases.assert_all_same(*results)


@pytest.mark.parametrize(
    "bad", (torch.ones(2, 7), torch.ones(2, 8, dtype=torch.float64), torch.ones(2, 8, dtype=torch.int64))
)
def test_a_bad_input_of_a_layer_moves_no_range(kernels, bad):
    layer = QATLinear(8, 4, config=QATConfig.static())
    layer(torch.ones(2, 8))
    before = state_of(layer)
    with pytest.raises((TypeError, ValueError), match="qat_linear: expected"):
        layer(bad)
    assert_same_state(state_of(layer), before)
