"""QATLinear, which is an nn.Linear."""

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import cases
from qatfast import (
    PerChannel,
    PerGroup,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    fake_quantize,
    qat_linear,
)


def small(**kwargs):
    torch.manual_seed(0)
    return QATLinear(16, 6, **kwargs)


@pytest.mark.parametrize("config", cases.CONFIGS.values(), ids=cases.CONFIGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_it_computes_qat_linear_on_its_parameters(config, bias, device):
    layer = small(bias=bias, config=config, device=device)
    x = cases.normal((2, 3, 16), device=device)
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias, config=config))
    cases.assert_same(layer.eval()(x), layer.train()(x))


def test_num_bits_is_short_for_the_tutorial_config():
    assert QATLinear(4, 3).config == QATConfig.tutorial(8) == QATConfig()
    assert QATLinear(4, 3, num_bits=5).config == QATConfig.tutorial(5)
    assert QATLinear(4, 3, config=QATConfig.int8()).config == QATConfig.int8()


def test_it_is_an_nn_linear():
    layer = small()
    assert isinstance(layer, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.buffers()) == []
    assert (layer.in_features, layer.out_features) == (16, 6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["default", "float64"])
def test_the_same_seed_gives_the_weights_of_nn_linear(bias, dtype):
    torch.manual_seed(3)
    ours = QATLinear(16, 6, bias, None, dtype)
    torch.manual_seed(3)
    theirs = nn.Linear(16, 6, bias, None, dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        cases.assert_same(ours.state_dict()[name], value)
    torch.manual_seed(4)
    ours.reset_parameters()
    torch.manual_seed(4)
    theirs.reset_parameters()
    cases.assert_same(ours.weight, theirs.weight)


def test_checkpoints_load_both_ways():
    ours, theirs = small(num_bits=4), nn.Linear(16, 6)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    cases.assert_same(theirs.weight, ours.weight)
    nn.init.ones_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    cases.assert_same(ours.weight, theirs.weight)
    assert ours.config == QATConfig.tutorial(4)


def test_a_file_of_the_state_loads_with_weights_only():
    buffer = io.BytesIO()
    torch.save(small().state_dict(), buffer)
    buffer.seek(0)
    nn.Linear(16, 6).load_state_dict(torch.load(buffer, weights_only=True), strict=True)


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded]
)
@pytest.mark.parametrize("config", [QATConfig.int8(), cases.CONFIGS["per_group"], QATConfig()], ids=str)
def test_copies_and_files_of_the_module(duplicate, config):
    layer = small(config=config).eval()
    other = duplicate(layer)
    assert type(other) is QATLinear
    assert other.config == config
    assert other.config.codes == config.codes
    assert not other.training
    x = cases.normal((5, 16))
    cases.assert_same(other(x), layer(x))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_dtype_moves(dtype, device):
    layer = small().to(device, dtype)
    assert layer.weight.dtype == dtype
    x = cases.normal((5, 16), dtype, device=device)
    assert layer(x).dtype == dtype
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias))


def test_meta_device():
    layer = QATLinear(16, 6, device="meta")
    assert layer(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 6)
    assert layer.to_empty(device="cpu").weight.device.type == "cpu"
    assert nn.utils.skip_init(QATLinear, 16, 6, num_bits=4).config == QATConfig.tutorial(4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_from_float_and_to_float_share_the_parameters(bias):
    linear = nn.Linear(16, 6, bias, dtype=torch.float64).eval()
    layer = QATLinear.from_float(linear, num_bits=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.config == QATConfig.tutorial(4)
    back = layer.to_float()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight
    assert back.bias is linear.bias
    assert not back.training
    assert (back.in_features, back.out_features) == (16, 6)
    assert QATLinear.from_float(nn.Linear(16, 6), config=QATConfig.int8()).training


def pruned(layer):
    return nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("compute", [pruned, nn.utils.parametrizations.weight_norm])
def test_computed_weights_train_but_cannot_be_shared(compute):
    layer = compute(small())
    layer(torch.ones(2, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    message = "expected weight to be an nn.Parameter, got a tensor computed from other parameters"
    with pytest.raises(TypeError, match=f"QATLinear.to_float: {message}"):
        layer.to_float()
    with pytest.raises(TypeError, match=f"QATLinear.from_float: {message}"):
        QATLinear.from_float(compute(nn.Linear(16, 6)))


def test_from_float_draws_no_random_number():
    linear = nn.Linear(16, 6)
    before = torch.get_rng_state()
    QATLinear.from_float(linear).to_float()
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters_stay_frozen():
    linear = nn.Linear(16, 6).requires_grad_(False)
    assert not QATLinear.from_float(linear).weight.requires_grad
    assert not QATLinear.from_float(linear).to_float().bias.requires_grad


@pytest.mark.parametrize(
    "layer, expected",
    [
        (
            lambda: QATLinear(10, 64),
            "QATLinear(in_features=10, out_features=64, bias=True, num_bits=8, input=float, weight=affine per tensor, "
            "bias=affine per tensor, output=affine per tensor)",
        ),
        (
            lambda: QATLinear(10, 64, bias=False, config=QATConfig.int8()),
            "QATLinear(in_features=10, out_features=64, bias=False, num_bits=8, input=affine per tensor, "
            "weight=symmetric per channel 0, bias=float, output=float)",
        ),
        (
            lambda: QATLinear(64, 10, config=QATConfig.weight_only()),
            "QATLinear(in_features=64, out_features=10, bias=True, num_bits=4, input=float, "
            "weight=affine per group of 32, bias=float, output=float)",
        ),
        (
            lambda: QATLinear(
                4,
                2,
                config=QATConfig(
                    QuantSpec(8, granularity=PerToken()), QuantSpec(4, symmetric=True), None, None
                ),
            ),
            "QATLinear(in_features=4, out_features=2, bias=True, input=8-bit affine per token, "
            "weight=4-bit symmetric per tensor, bias=float, output=float)",
        ),
        (
            lambda: QATLinear(4, 2, config=cases.CONFIGS["float"]),
            "QATLinear(in_features=4, out_features=2, bias=True, input=float, weight=float, bias=float, output=float)",
        ),
    ],
)
def test_repr_shows_sizes_and_what_is_quantized_how(layer, expected):
    assert repr(layer()) == expected


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: QATLinear(10, 64, 8),
            TypeError,
            "QATLinear: expected bias to be a bool, got 8; for a bit width write QATLinear(10, 64, num_bits=8)",
        ),
        (lambda: QATLinear(10, 64, None), TypeError, "QATLinear: expected bias to be a bool, got None"),
        (
            lambda: QATLinear(10, 64, num_bits=4, config=QATConfig.int8()),
            ValueError,
            "QATLinear: expected num_bits or config, got both; write num_bits=4 alone, which is short for "
            "config=QATConfig.tutorial(4), or put the bits into config",
        ),
        (
            lambda: QATLinear(10, 64, config=QuantSpec(8)),
            TypeError,
            "QATLinear: expected config to be a QATConfig, got QuantSpec(num_bits=8",
        ),
        (lambda: QATLinear(10, 64, num_bits=17), ValueError, "expected num_bits to be from 2 to 16, got 17"),
        (lambda: QATLinear(10, 64, num_bits=2.5), TypeError, "expected num_bits to be an int, got 2.5"),
        (lambda: QATLinear(10, 64, num_bits=True), TypeError, "expected num_bits to be an int, got True"),
        (
            lambda: QATLinear(10, 64, config=QATConfig.weight_only(4, 32)),
            ValueError,
            "QATLinear: expected in_features to be divisible by group_size=32 of config.weight, got 10; write a "
            "group_size that divides 10",
        ),
        (
            lambda: QATLinear(10, 64, config=QATConfig(output=QuantSpec(granularity=PerGroup(3)))),
            ValueError,
            "QATLinear: expected out_features to be divisible by group_size=3 of config.output, got 64",
        ),
        (
            lambda: QATLinear(10, 64, config=QATConfig(weight=QuantSpec(granularity=PerChannel(2)))),
            ValueError,
            "QATLinear: expected the axis of config.weight to be from -2 to 1 for its 2 dimensions, got 2; write "
            "PerChannel(0) for one scale an output channel",
        ),
        (
            lambda: QATLinear(10, 64, config=QATConfig(bias=QuantSpec(granularity=PerChannel(1)))),
            ValueError,
            "QATLinear: expected the axis of config.bias to be from -1 to 0 for its 1 dimensions, got 1",
        ),
        (
            lambda: QATLinear.from_float(nn.ReLU()),
            TypeError,
            "QATLinear.from_float: expected linear to be an nn.Linear, got ReLU",
        ),
        (
            lambda: QATLinear.from_float(nn.Linear(2, 2), num_bits=4, config=QATConfig()),
            ValueError,
            "QATLinear: expected num_bits or config, got both",
        ),
    ],
)
def test_errors_say_what_to_write(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_a_bias_that_is_not_there_needs_no_granularity():
    QATLinear(10, 7, bias=False, config=QATConfig(bias=QuantSpec(granularity=PerGroup(3))))


def test_the_settings_after_bias_are_keyword_only():
    with pytest.raises(TypeError):
        QATLinear(10, 64, True, None, None, 8)
    with pytest.raises(TypeError):
        QATLinear.from_float(nn.Linear(2, 2), 8)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_it_trains_in_a_sequence_with_inplace_relu(bias, device):
    model = nn.Sequential(
        small(bias=bias, device=device), nn.ReLU(inplace=True), QATLinear(6, 2, device=device)
    )
    model(cases.normal((5, 16), device=device)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_weights_swapped_for_a_call_are_used():
    layer, x = small(), cases.normal((5, 16))
    weight, bias = cases.normal((6, 16), seed=1), cases.normal((6,), seed=2)
    y = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    cases.assert_same(y, qat_linear(x, weight, bias))


def test_parametrized_weights_are_used():
    layer, x = small(), cases.normal((5, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.parametrizations.weight_norm(layer)
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_the_output_lies_on_its_grid():
    y = small(num_bits=3)(cases.normal((50, 16)))
    assert y.unique().numel() <= 8
    cases.assert_same(fake_quantize(y.detach(), 3), y)


def test_a_transformer_layer_in_evaluation_needs_its_fast_path_switched_off():
    """The README says so; if torch learns to call the layers, its limitation can go."""
    plain = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    quantized = copy.deepcopy(plain)
    quantized.linear1 = QATLinear.from_float(quantized.linear1, num_bits=2)
    x = cases.normal((2, 5, 16))
    with torch.no_grad():
        expected = quantized.linear1(x)
        assert not torch.allclose(expected, plain.linear1(x), atol=1e-3)
        assert torch.allclose(quantized(x), plain(x), atol=1e-5)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            assert not torch.allclose(quantized(x), plain(x), atol=1e-3)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
