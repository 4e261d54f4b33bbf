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
        layer_errors("ptq", bits, model, quantize_layers(model, bits, edge_bits=2), inputs())
        for bits in (2, 8)
    )
    assert [error.layer for error in fine] == ["fc1", "fc2", "fc3"]
    for at_2_bits, at_8_bits in zip(coarse, fine, strict=True):
        assert at_2_bits.weight_error > 10 * at_8_bits.weight_error > 0
        assert at_2_bits.output_error > 10 * at_8_bits.output_error > 0
    weight = model.fc2.weight
    on_grid = qatfast.fake_quantize(weight, 2, symmetric=True, granularity=qatfast.PerChannel(0))
    assert coarse[1].weight_error == relative_error(on_grid, weight)


def test_recommended_layers():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.Linear(4, 2))
    before = copy.deepcopy(model.state_dict())
    quantized = quantize_layers(model, 3)
    layers = [module for module in quantized.modules() if isinstance(module, qatfast.QATLinear)]
    assert [layer.config.weight.num_bits for layer in layers] == [8, 3, 8]
    assert [layer.config.input.num_bits for layer in layers] == [8, 3, 8]
    assert all(layer.config.bias is None and layer.config.output is None for layer in layers)
    every = quantize_layers(model, 3, edge_bits=3)[0]
    assert every.config.weight.num_bits == 3 and quantize_layers(model, 12)[0].config.weight.num_bits == 12
    quantized[0].weight.data.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    assert torch.equal(torch.cat([quantized(row) for row in rows.split(1)]), quantized(rows))


def test_relative_error():
    assert relative_error(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])) == pytest.approx(0.2)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
