"""Model files have the reported size and contain the model."""

import pytest
import torch

from qatfast import PerChannel, QATConfig, QATLinear, QuantSpec, fake_quantize, fake_quantize_affine
from qatfast.study import (
    ThreeLayerNet,
    calculate_model_size,
    load_quantized,
    quantize_layers,
    quantize_model,
    quantize_model_weights,
    save_quantized,
)


@pytest.mark.parametrize("bits", [None, 2, 3, 8, 11])
def test_size_is_that_of_the_file(tmp_path, bits):
    path = tmp_path / "model.pt"
    size = calculate_model_size(ThreeLayerNet(), bits, path=path)
    assert size == path.stat().st_size
    assert size == calculate_model_size(
        ThreeLayerNet(), bits, path=tmp_path / "a_much_longer_name_of_a_file.pt"
    )
    assert size == calculate_model_size(ThreeLayerNet(), bits)


def test_float_file_is_a_state_dict(tmp_path):
    model = ThreeLayerNet()
    calculate_model_size(model, path=tmp_path / "model.pt")
    other = ThreeLayerNet()
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert torch.equal(other.fc3.bias, model.fc3.bias)


def test_integers_take_their_bits_and_no_more():
    model = ThreeLayerNet(512, 512, 10)
    numbers = sum(parameter.numel() for parameter in model.parameters())
    for bits in (2, 3, 4, 8, 12):
        overhead = calculate_model_size(model, bits) - numbers * bits / 8
        assert 0 < overhead < 4000


@pytest.mark.parametrize("bits", range(2, 17))
def test_file_holds_the_quantized_weights(tmp_path, bits):
    model = ThreeLayerNet(7, 5, 3)
    path = tmp_path / "model.pt"
    save_quantized(model, bits, path)
    expected = quantize_model_weights(model, bits).state_dict()
    loaded = load_quantized(path)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.items())


def test_a_layer_is_stored_as_its_config_says(tmp_path):
    affine = QATConfig(weight=QuantSpec(5, granularity=PerChannel(1)), bias=None, output=None)
    model = torch.nn.Sequential(
        QATLinear(6, 4, config=QATConfig.int8()), QATLinear(4, 3, config=affine), torch.nn.Linear(3, 2)
    )
    save_quantized(model, 3, tmp_path / "model.pt")
    loaded = load_quantized(tmp_path / "model.pt")
    assert torch.equal(
        loaded["0.weight"], fake_quantize(model[0].weight, 8, symmetric=True, granularity=PerChannel(0))
    )
    assert torch.equal(loaded["1.weight"], fake_quantize(model[1].weight, 5, granularity=PerChannel(1)))
    assert torch.equal(loaded["0.bias"], model[0].bias) and torch.equal(
        loaded["2.bias"], fake_quantize(model[2].bias, 3)
    )
    grouped = torch.nn.Sequential(QATLinear(64, 4, config=QATConfig.weight_only()))
    with pytest.raises(ValueError, match="save_quantized: expected weights per tensor or per channel"):
        save_quantized(grouped, 3, tmp_path / "model.pt")


@pytest.mark.parametrize("name", ["ptq_minmax", "ptq_mse", "qat_moving_average", "qat_learned"])
def test_a_file_holds_the_weights_and_the_ranges_that_a_layer_uses(tmp_path, name):
    inputs = torch.randn(20, 10)
    model = quantize_layers(ThreeLayerNet(), 3, inputs, name=name)
    for quantizer in (module for module in model.modules() if hasattr(module, "scale")):
        quantizer.scale.data.mul_(-0.5)  # as training could change it; only its size counts
    save_quantized(model, 3, tmp_path / "model.pt")
    stored = torch.load(tmp_path / "model.pt", weights_only=True)
    loaded = load_quantized(tmp_path / "model.pt")
    assert loaded.keys() == ThreeLayerNet().state_dict().keys()
    x = inputs
    for number, layer in (("fc1", model.fc1), ("fc2", model.fc2), ("fc3", model.fc3)):
        scale, zero_point = stored["activations"][f"{number}.input_quantizer"]
        on_grid = fake_quantize_affine(x, torch.tensor(scale), zero_point, 0, layer.config.input.quant_max)
        expected = torch.nn.functional.linear(on_grid, loaded[f"{number}.weight"], loaded[f"{number}.bias"])
        torch.testing.assert_close(layer.eval()(x), expected, atol=1e-5, rtol=1e-5)
        x = torch.relu(expected)


def test_calibrated_ranges_are_stored(tmp_path):
    model, inputs = ThreeLayerNet(), torch.randn(20, 10)
    calibrated = quantize_model(model, 4, inputs)
    save_quantized(model, 4, tmp_path / "model.pt", calibrated=calibrated)
    stored = torch.load(tmp_path / "model.pt", weights_only=True)["activations"]
    assert list(stored) == ["input", "model.fc1.output", "model.fc2.output", "model.fc3.output"]
    assert stored["input"] == (float(calibrated.input.scale), int(calibrated.input.zero_point))
