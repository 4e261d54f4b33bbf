"""The convolutional network of the study, on images and on signals."""

import json

import pytest
import torch

from qatfast.bench import tutorial
from qatfast.study.command import run_compare
from qatfast.study.data import DataError
from qatfast.study.experiments import Settings
from qatfast.study.networks import FunctionalQATConvNet, SmallConvNet, quantize_layers
from qatfast.study.size import load_quantized, save_quantized
from qatfast.study.training import seeded


def network(shape=(8, 8), kind=SmallConvNet, *first):
    with seeded(1):
        return kind(*first, shape, 4, 3)


def inputs(features=64):
    return torch.randn(20, features, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("data, sizes", [("digits", [64, 32, 32, 10]), ("mnist1d", [40, 32, 32, 10])])
def test_compare_with_the_convolutional_network(data, sizes, tmp_path):
    if data == "mnist1d":
        pytest.importorskip("mnist1d")
    arguments = {"bits": (8,), "epochs": 1, "seeds": 1, "timing_repetitions": 1}
    settings = Settings(data=data, network="cnn", every_model=data == "digits", **arguments)
    assert run_compare(settings, tmp_path / "report", verbose=True) == 0
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["settings"]["network"] == "cnn"
    assert results["network"]["layers"] == sizes
    assert [run["model"] for run in results["runs"]][2:] == list(settings.quantized_models)
    assert all(run["accuracy"] > 0.2 for run in results["runs"])  # 0.1 is guessing
    assert {error["layer"] for error in results["layer_errors"]} == {"conv1", "conv2", "fc"}
    assert {step["model"] for step in results["timing"]["steps"]} == {"fp32", "tutorial", "qatfast"}
    for deployed in results["deployment"]:
        assert deployed["compared"] and deployed["differing"] == 0
        assert deployed["onnx"] is None or deployed["onnx"]["differing"] == 0
    assert len(results["deployment"]) == 1
    page = (tmp_path / "report" / "index.html").read_text()
    assert SmallConvNet.description in page
    assert "linear layers" not in page


def test_the_convolutional_network_needs_images_or_signals(tmp_path):
    with pytest.raises(DataError, match=r"expected images or signals .* got synthetic; write --network mlp"):
        run_compare(Settings(data="synthetic", network="cnn"), tmp_path / "report")


@pytest.mark.parametrize("shape", [(8, 8), (40,)], ids=["image", "signal"])
def test_the_tutorials_network_computes_what_ours_computes(shape):
    theirs = network(shape, FunctionalQATConvNet, tutorial.FakeQuantize.apply)
    ours = quantize_layers(network(shape), 8, name="qat_tutorial")
    x = inputs(theirs.sizes[0])
    expected, actual = theirs(x), ours(tutorial.FakeQuantize.apply(x))
    # The networks round to different levels only next to ties.
    difference = (actual - expected).detach().abs()
    assert float(difference.max()) < 0.1 and float(difference.mean()) < 5e-3


@pytest.mark.parametrize("name", ["qat_learned", "qat_moving_average"])
def test_a_model_file_has_the_convolutions_and_batch_norm(name, tmp_path):
    float_model = network()
    float_model(inputs())  # moves the statistics of BatchNorm
    model = quantize_layers(float_model, 4, inputs(), name=name)
    save_quantized(model, 4, tmp_path / "model.pt")
    loaded = load_quantized(tmp_path / "model.pt")
    other = network()
    other.load_state_dict(loaded)
    for key, value in float_model.state_dict().items():
        if "norm" in key:
            assert torch.equal(loaded[key], value)
        elif key.endswith("weight"):
            step = 2 * value.flatten(1).abs().amax(1) / (14 if key.startswith("conv2") else 254)
            assert (loaded[key] - value).flatten(1).abs().amax(1).le(2 * step).all()
            assert loaded[key].flatten(1)[0].unique().numel() <= (15 if key.startswith("conv2") else 255)
