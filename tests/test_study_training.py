"""The networks of the study and their training."""

import io
import math
import sys

import pytest
import torch
from rich.console import Console
from torch import nn

from qatfast import FakeQuantize, QATLinear
from qatfast.bench.timer import one_thread
from qatfast.study import (
    History,
    ThreeLayerNet,
    ThreeLayerNetQAT,
    count_parameters,
    evaluate_model,
    generate_dataset,
    load_samples,
    split,
    train_model,
    training,
)
from qatfast.study.networks import TITLES
from qatfast.study.training import (
    Epoch,
    StudyBar,
    StudyLines,
    divergence,
    seeded,
    study_progress,
)

DATA = generate_dataset(400)


@pytest.fixture(autouse=True)
def small_networks_on_one_thread():
    with one_thread():
        yield


def silent(_epoch):
    pass


def train(network=ThreeLayerNet, seed=1, epochs=2, **options):
    with seeded(seed):
        model = network(**options)
    return model, train_model(model, DATA, epochs=epochs, seed=seed, on_epoch=silent)


def test_networks_have_the_same_parameters():
    with seeded(7):
        plain = ThreeLayerNet()
    with seeded(7):
        qat = ThreeLayerNetQAT(num_bits=4)
    assert count_parameters(plain) == count_parameters(qat) == 10 * 64 + 64 + 64 * 64 + 64 + 64 * 2 + 2
    assert plain.state_dict().keys() == qat.state_dict().keys()
    assert all(torch.equal(value, qat.state_dict()[name]) for name, value in plain.state_dict().items())


def test_qat_network_quantizes_its_input_and_every_layer():
    network = ThreeLayerNetQAT(12, 6, 3, num_bits=3)
    assert isinstance(network.quantize_input, FakeQuantize) and network.quantize_input.spec.num_bits == 3
    for layer, sizes in ((network.fc1, (12, 6)), (network.fc2, (6, 6)), (network.fc3, (6, 3))):
        assert isinstance(layer, QATLinear) and (layer.in_features, layer.out_features) == sizes
        specs = (layer.config.weight, layer.config.bias, layer.config.output)
        assert [spec.num_bits for spec in specs] == [3, 3, 3]
    scores = network(torch.randn(50, 12))
    assert scores.unique().numel() <= 8


def test_float_scores_leave_only_the_last_output_in_float():
    network = ThreeLayerNetQAT(num_bits=3, float_scores=True)
    assert network.fc3.config.output is None and network.fc3.config.weight.num_bits == 3
    assert network.fc2.config.output.num_bits == 3
    assert network(torch.randn(50, 10)).unique().numel() > 8


@pytest.mark.parametrize("network, options", [(ThreeLayerNet, {}), (ThreeLayerNetQAT, {"num_bits": 4})])
def test_training_learns_and_is_deterministic(network, options):
    model, history = train(network, epochs=6, **options)
    again, same = train(network, epochs=6, **options)
    assert history == same
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    assert all(torch.equal(actual, expected) for actual, expected in pairs)
    assert [len(values) for values in vars(history).values()] == [6] * 4
    assert history.train_loss[-1] < 0.8 * history.train_loss[0]
    assert history.test_accuracy[-1] > 0.75
    other, _ = train(network, seed=2, epochs=6, **options)
    assert not torch.equal(model.fc1.weight, other.fc1.weight)


def test_the_seed_decides_the_order_of_the_samples():
    histories = []
    for seed in (1, 2):
        with seeded(0):
            model = ThreeLayerNet()
        histories.append(train_model(model, DATA, epochs=1, seed=seed, on_epoch=silent))
    assert histories[0] != histories[1]


def test_training_leaves_the_callers_random_numbers_and_threads_alone(threads):
    threads(2)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(epochs=1)
    assert torch.get_num_threads() == 2
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == 2


def test_history_of_test_samples_is_what_evaluate_model_says():
    model, history = train()
    result = evaluate_model(model, DATA.test_inputs, DATA.test_labels)
    assert (result.loss, result.accuracy) == (history.test_loss[-1], history.test_accuracy[-1])
    scores = model(DATA.test_inputs).detach()
    assert result.accuracy == float((scores.argmax(1) == DATA.test_labels).double().mean())
    assert result.loss == pytest.approx(
        float(nn.functional.cross_entropy(scores, DATA.test_labels)), rel=1e-5
    )


def test_evaluation_restores_the_mode_and_takes_no_gradient():
    model = nn.Sequential(nn.Dropout(0.5), ThreeLayerNet())
    first = evaluate_model(model, DATA.test_inputs, DATA.test_labels)
    assert model.training and first == evaluate_model(model, DATA.test_inputs, DATA.test_labels)
    model.eval()
    evaluate_model(model, DATA.test_inputs, DATA.test_labels)
    assert not model.training


def test_only_dynamic_ranges_make_the_batch_matter():
    plain, _ = train(epochs=1)
    quantized = ThreeLayerNetQAT(num_bits=2)
    quantized.load_state_dict(plain.state_dict())
    losses = {
        model: {
            evaluate_model(model, DATA.test_inputs, DATA.test_labels, batch_size=size).loss
            for size in (1, 7, 256)
        }
        for model in (plain, quantized)
    }
    assert max(losses[plain]) - min(losses[plain]) < 1e-5
    assert max(losses[quantized]) - min(losses[quantized]) > 1e-3


def flat(*losses, accuracy=0.9, test_loss=0.5):
    return History(list(losses), [0.9] * len(losses), [test_loss] * len(losses), [accuracy] * len(losses))


@pytest.mark.parametrize(
    "history, said",
    [
        (flat(1.0, 0.5, 0.4), ""),
        (flat(0.001, 0.002), ""),  # twice as large, but tiny
        (flat(0.95, 1.0, 1.06), ""),
        (flat(1.15, 0.87, 1.49), "the loss rose"),
        (flat(1.0, math.nan, 0.5), "the loss is not finite"),
        (flat(1.0, 0.5, test_loss=math.inf), "the loss is not finite"),
        (flat(1.0, 0.9, accuracy=0.13), "the accuracy is that of guessing"),
        (flat(1.0, 0.9, accuracy=0.17), ""),
    ],
)
def test_divergence(history, said):
    assert divergence(history, 0.1, 100 * 2) == said


def test_a_learning_rate_that_is_too_large_diverges():
    digits = split(load_samples("digits"), seed=42)
    with seeded(42):
        model = ThreeLayerNet(64, 64, 10)
    history = train_model(model, digits, epochs=2, learning_rate=1.0, seed=42, on_epoch=silent)
    assert divergence(history, 0.1, len(digits.test_labels)) == "the accuracy is that of guessing"


def test_the_learning_rate_falls_to_zero(monkeypatch):
    rates = []

    class Watched(torch.optim.SGD):
        def __init__(self, parameters, lr, fused):
            super().__init__(parameters, lr=lr)

        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    train_model(ThreeLayerNet(), DATA, epochs=2, learning_rate=0.1, batch_size=100, on_epoch=silent)
    expected = [0.05 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates == pytest.approx(expected)


def test_lines_of_progress(capsys, monkeypatch):
    with study_progress(12, 2) as progress:
        assert isinstance(progress, StudyLines)
        for name in ("FP32", "QAT, 4 bits"):
            show = progress.training(name)
            for number in (1, 2):
                show(Epoch(number, 0.5, 0.5, 0.125, 0.75))
    figures = "loss 0.125  accuracy 75.0%"
    assert capsys.readouterr() == (f" 1/12  FP32: {figures}\n 2/12  QAT, 4 bits: {figures}\n", "")
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert isinstance(study_progress(12, 2), StudyBar)


def test_without_a_terminal_training_says_nothing(capfd):
    train_model(ThreeLayerNet(), DATA, epochs=1)
    assert capfd.readouterr() == ("", "")


def test_the_bars_fit_into_80_columns(monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=80)
    monkeypatch.setattr(training, "Console", lambda **_: console)
    name = f"{max(TITLES.values(), key=len)}, 16 bits, seed 42"
    with StudyBar(560, 20) as bar:
        bar.training(name)(Epoch(7, 0.5, 0.5, 0.125, 0.75))
    shown = screen.getvalue()
    for words in (name, "1/560", " 7/20", "loss 0.125", "accuracy 75.0%", "-:--:-- left"):
        assert words in shown
    assert "…" not in shown
