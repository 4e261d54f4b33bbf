"""Post-training quantization and the errors of each layer."""

import copy

import pytest
import torch
from torch import nn

import qatfast
from qatfast.study import (
    ThreeLayerNet,
    ThreeLayerNetQAT,
    evaluate_model,
    layer_errors,
    quantize_layers,
    quantize_model,
    quantize_model_weights,
)
from qatfast.study.networks import model_config
from qatfast.study.ptq import linear_outputs, relative_error
from qatfast.study.training import seeded


def network():
    with seeded(3):
        return ThreeLayerNet()


def inputs(count=64):
    return torch.randn(count, 10, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_weights_are_quantized_in_a_copy(bits):
    model = network()
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_model_weights(model, bits)
    assert quantized is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert torch.equal(quantized.state_dict()[name], qatfast.fake_quantize(value, bits))
        assert quantized.state_dict()[name].unique().numel() <= 2**bits


def test_in_place_when_asked():
    model = network()
    expected = quantize_model_weights(model, 3)
    assert quantize_model_weights(model, 3, inplace=True) is model
    assert all(
        torch.equal(actual, exact)
        for actual, exact in zip(model.parameters(), expected.parameters(), strict=True)
    )


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_are_checked(bits):
    with pytest.raises(ValueError, match="num_bits"):
        quantize_model_weights(network(), bits)


def test_the_whole_model_is_quantized_with_ranges_of_the_calibration_inputs():
    model, calibration, values = network(), inputs(), 3 * inputs(8)
    quantized = quantize_model(model, 4, calibration)
    by_hand = quantize_model_weights(model, 4)

    def fixed(seen, x):
        return qatfast.fake_quantize_affine(x, *qatfast.choose_qparams(seen, 4), 0, 15)

    with torch.no_grad():
        # The ranges are those of float activations behind quantized weights.
        seen, x = fixed(calibration, calibration), fixed(calibration, values)
        for layer in (by_hand.fc1, by_hand.fc2, by_hand.fc3):
            seen = layer(seen)
            x = fixed(seen, layer(x))
            if layer is not by_hand.fc3:
                seen, x = torch.relu(seen), torch.relu(x)
        assert torch.equal(quantized(values), x)
    assert not quantized.training


def test_calibrated_models_do_not_depend_on_the_batch():
    quantized, values = quantize_model(network(), 3, inputs()), inputs()
    labels = torch.zeros(len(values), dtype=torch.int64)
    results = {evaluate_model(quantized, values, labels, batch_size=size).accuracy for size in (1, 5, 64)}
    assert len(results) == 1
    scores = torch.cat([quantized(row) for row in values.split(1)])
    torch.testing.assert_close(scores, quantized(values), atol=1e-6, rtol=0)


def test_on_its_own_calibration_batch_fixed_ranges_are_nearly_dynamic_ones():
    model, values = network(), inputs(256)
    dynamic = ThreeLayerNetQAT(num_bits=8)
    dynamic.load_state_dict(model.state_dict())
    torch.testing.assert_close(quantize_model(model, 8, values)(values), dynamic(values), atol=0.02, rtol=0)


def test_float_scores():
    quantized = quantize_model(network(), 2, inputs(), float_scores=True)
    assert isinstance(quantized.get_submodule("model.fc3"), nn.Linear)
    assert quantized(inputs()).unique().numel() > 4
    assert quantize_model(network(), 2, inputs())(inputs()).unique().numel() <= 4


def test_the_float_model_keeps_its_parameters_hooks_and_gradients():
    model = network()
    before = copy.deepcopy(model.state_dict())
    quantize_model(model, 4, inputs())
    linear_outputs(model, inputs())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_layer_errors_fall_with_the_bits():
    model = network()
    coarse, fine = (
        layer_errors("ptq_mse", bits, model, quantize_layers(model, bits, inputs(), edge_bits=2), inputs())
        for bits in (2, 8)
    )
    assert [error.layer for error in fine] == ["fc1", "fc2", "fc3"]
    for at_2_bits, at_8_bits in zip(coarse, fine, strict=True):
        assert at_2_bits.weight_error > 10 * at_8_bits.weight_error > 0
        assert at_2_bits.output_error > 10 * at_8_bits.output_error > 0
    weight = model.fc2.weight
    grid = {"symmetric": True, "granularity": qatfast.PerChannel(0)}
    scale, zero_point = qatfast.search_qparams(weight, 2, **grid)
    on_grid = qatfast.fake_quantize_affine(
        weight, scale, zero_point, -1, 1, granularity=qatfast.PerChannel(0)
    )
    assert coarse[1].weight_error == relative_error(on_grid, weight)


RANGES = {
    "ptq_minmax": (qatfast.MinMax(), qatfast.Dynamic()),
    "ptq_mse": (qatfast.Learned(), qatfast.Learned()),
    "qat_moving_average": (qatfast.MovingAverage(), qatfast.Dynamic()),
    "qat_learned": (qatfast.Learned(), qatfast.Learned()),
}


@pytest.mark.parametrize("name", RANGES)
def test_each_model_has_its_ranges_and_8_bits_at_its_edges(name):
    model = nn.Sequential(nn.Linear(10, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_layers(model, 3, inputs(), name=name)
    layers = [module for module in quantized.modules() if isinstance(module, qatfast.QATLinear)]
    assert [layer.config.weight.num_bits for layer in layers] == [8, 3, 8]
    assert [layer.config.input.num_bits for layer in layers] == [8, 3, 8]
    for config in (layer.config for layer in layers):
        assert (config.input.range, config.weight.range) == RANGES[name]
        assert config.input.granularity == qatfast.PerTensor() and not config.input.symmetric
        assert config.weight.granularity == qatfast.PerChannel(0) and config.weight.symmetric
        assert config.bias is None and config.output is None
    every = quantize_layers(model, 3, name=name, edge_bits=3)[0]
    assert every.config.weight.num_bits == 3
    assert quantize_layers(model, 12, name=name)[0].config.weight.num_bits == 12
    quantized[0].weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_below_8_bits_the_learned_model_is_the_static_config():
    for bits in (2, 4, 7):
        assert model_config("qat_learned", bits) == qatfast.QATConfig.static(bits)


def test_ranges_are_those_of_the_inputs():
    model, values = network(), inputs()
    spec = {"num_bits": 8, "symmetric": False}
    minmax = quantize_layers(model, 4, values, name="ptq_minmax").fc1.input_quantizer
    assert (minmax.running_min, minmax.running_max) == (values.min(), values.max())
    mse = quantize_layers(model, 4, values, name="ptq_mse").fc1.input_quantizer
    scale, zero_point = qatfast.search_qparams(values, **spec)
    assert mse.scale == scale and mse.zero_point == zero_point
    quantized = quantize_layers(model, 3, values).eval()
    rows = inputs(16)
    assert torch.equal(torch.cat([quantized(row) for row in rows.split(1)]), quantized(rows))


def test_the_tutorials_model_takes_its_ranges_from_the_batch():
    quantized, values = quantize_layers(network(), 3, inputs(), name="qat_tutorial").eval(), inputs(16)
    assert quantized.fc2.config == qatfast.QATConfig.tutorial(3)
    assert quantized.fc1.config == quantized.fc3.config == qatfast.QATConfig.tutorial(8)
    assert not torch.equal(torch.cat([quantized(row) for row in values.split(1)]), quantized(values))


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
