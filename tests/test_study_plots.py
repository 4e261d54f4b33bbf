"""Figures show the results and do not change the matplotlib settings of the caller."""

import matplotlib
import numpy as np
import pytest
import torch

import qatfast
from qatfast.study import (
    History,
    LayerError,
    ThreeLayerNet,
    plot_accuracy_over_bits,
    plot_layer_errors,
    plot_training_history,
    quantize_layers,
    quantize_signal,
    visualize_quantization,
    visualize_weight_distributions,
)
from qatfast.study.insights import Spread
from qatfast.study.plots import DARK, darkened, svg
from qatfast.study.ptq import quantized_weight


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_signal_is_the_tutorials_and_its_error_is_measured(bits):
    signal = quantize_signal(bits)
    assert signal.x.shape == (1000,) and signal.x[0] == -5 and signal.x[-1] == 5
    noise = signal.original - 2 * torch.sin(signal.x)
    assert abs(float(noise.mean())) < 0.02 and float(noise.std()) == pytest.approx(0.1, rel=0.1)
    assert signal.levels == 2**bits and signal.quantized.unique().numel() <= signal.levels
    assert torch.equal(signal.quantized, qatfast.fake_quantize(signal.original, bits))
    error = (signal.quantized - signal.original).abs()
    assert (signal.mean_error, signal.max_error) == (float(error.mean()), float(error.max()))
    assert signal.max_error <= signal.scale / 2 * 1.0001
    assert torch.equal(signal.original, quantize_signal(16).original)
    assert not torch.equal(signal.original, quantize_signal(bits, seed=1).original)


def test_visualize_prints_the_figures_and_saves_the_picture(tmp_path, capsys):
    figure = visualize_quantization(4, path=tmp_path / "signal.png")
    signal, printed = quantize_signal(4), capsys.readouterr().out
    for name, value in (("scale", f"{signal.scale:.6g}"), ("zero point", "8"), ("levels", "16")):
        assert any(line.split() == [*name.split(), value] for line in printed.splitlines())
    assert f"{signal.mean_error:.6g}" in printed and f"{signal.max_error:.6g}" in printed
    assert (tmp_path / "signal.png").read_bytes().startswith(b"\x89PNG")
    above, below = figure.axes
    np.testing.assert_array_equal(above.lines[1].get_ydata(), signal.quantized)
    assert sum(bar.get_height() for bar in below.patches) == 1000


def history(length):
    return History(*([float(length - step) / length for step in range(length)] for _ in range(4)))


def test_training_curves():
    figure = plot_training_history({"fp32_longer": history(5), "qat_learned": history(3)})
    above, below = figure.axes
    assert [len(line.get_xdata()) for line in above.lines] == [5, 5, 3, 3]
    assert [len(line.get_xdata()) for line in below.lines] == [5, 5, 3, 3]
    assert list(above.lines[1].get_ydata()) == history(5).test_loss
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["FP32", "QAT learned", "on training samples"]
    assert len(plot_training_history(history(1)).axes[0].lines) == 2


@pytest.mark.parametrize("bits, levels", [(2, 4), (4, 16), (8, 0)])
def test_weights_with_their_grid_at_few_bits(bits, levels):
    fp32, qat = ThreeLayerNet(), ThreeLayerNet()
    figures = visualize_weight_distributions(fp32, qat, bits)
    assert len(figures) == 3
    for figure, layer in zip(figures, (fp32.fc1, fp32.fc2, fp32.fc3), strict=True):
        before, after, _ = figure.axes
        assert sum(before.patches[0].get_data().values) == layer.weight.numel()
        assert len(after.lines) == levels
        if levels:
            (bars,) = after.collections
            heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
            values = qatfast.fake_quantize(layer.weight.detach(), bits).flatten()
            assert sum(heights) == values.numel()
            for segment, height in zip(bars.get_segments(), heights, strict=True):
                assert height == int(np.isclose(values.numpy(), segment[0][0], atol=1e-6).sum())


def test_weights_of_layers_with_a_config():
    fp32 = ThreeLayerNet()
    qat = quantize_layers(fp32, 2, torch.randn(50, 10), edge_bits=2)
    drawn = panels(fp32, qat)
    # PTQ has the scales with which QAT starts. Each output channel has a grid of its own, so there are no levels.
    for before, after, trained in drawn:
        assert before.get_title("left") == "FP32" and not after.lines
        assert counts(after) == counts(trained)
    for name in ("fc1", "fc2", "fc3"):
        qat.get_submodule(name).weight_quantizer.scale.data.mul_(
            -2
        )  # only the size of a learned scale counts
    for name, (_, after, trained) in zip(("fc1", "fc2", "fc3"), panels(fp32, qat), strict=True):
        weight = quantized_weight(qat.get_submodule(name))
        assert counts(trained) != counts(after) and sum(counts(trained)) == weight.numel()
        assert trained.get_title("left") == f"QAT learned: {weight.unique().numel()} values used"


def panels(fp32, qat):
    return [figure.axes for figure in visualize_weight_distributions(fp32, qat, 2)]


def counts(axes):
    return axes.patches[0].get_data().values.tolist()


def test_accuracy_over_bits():
    spread = {8: Spread.of([0.9, 0.92]), 2: Spread.of([0.5, 0.6])}
    (axes,) = plot_accuracy_over_bits({"ptq_mse": spread, "qat_learned": spread}, Spread.of([0.95])).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "2"]
    assert "mean ± standard deviation" in axes.get_title("left")
    middle, _, (bars,) = axes.containers[0]
    np.testing.assert_allclose(np.asarray(middle.get_ydata(), float), [0.91, 0.55])
    heights = [segment[1][1] - segment[0][1] for segment in bars.get_segments()]
    np.testing.assert_allclose(heights, [2 * spread[8].std, 2 * spread[2].std])


def test_the_accuracy_axis_shows_single_points_and_says_what_is_below_it():
    good, bad = {8: Spread.of([0.968]), 4: Spread.of([0.960])}, {8: Spread.of([0.966]), 4: Spread.of([0.41])}
    (axes,) = plot_accuracy_over_bits({"ptq_mse": good, "qat_learned": good}, Spread.of([0.97])).axes
    low, high = axes.get_ylim()
    assert 0.94 <= low < 0.96 and 0.97 < high <= 0.99
    assert axes.get_title("left").endswith(f"axis from {100 * low:.0f}%") and not axes.texts
    (axes,) = plot_accuracy_over_bits({"ptq_mse": good, "qat_tutorial": bad}, Spread.of([0.97])).axes
    low, high = axes.get_ylim()
    assert high - low <= 0.111
    assert [text.get_text() for text in axes.texts] == ["41%"]


def test_percentages_beside_the_axis_are_the_positions_of_its_ticks():
    for low, high in ((0.7, 0.895), (0.94, 0.96), (0.1, 0.98)):
        figures = {"ptq_mse": {2: Spread.of([low]), 8: Spread.of([high])}}
        (axes,) = plot_accuracy_over_bits(figures, None).axes
        assert axes.get_title("left").startswith("Test accuracy, one seed; axis from ")
        for tick, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
            assert float(label.get_text().rstrip("%").replace("−", "-")) == pytest.approx(100 * tick)


def test_layer_errors():
    errors = [
        LayerError(model, bits, layer, 1 / bits, 2 / bits)
        for model in ("ptq_mse", "qat_learned")
        for layer in ("a", "b")
        for bits in (8, 2)
    ]
    (axes,) = plot_layer_errors(errors, "output_error", "title").axes
    assert len(axes.lines) == 4 and all(list(line.get_ydata()) == [0.25, 1.0] for line in axes.lines)


def test_svg_is_the_same_every_time_and_dark_has_no_light_colour():
    first, second = (svg(plot_training_history(history(4))) for _ in range(2))
    assert first == second
    dark = darkened(first)
    assert any(color in first for color in DARK) and not any(color in dark for color in DARK)
    assert not set(DARK) & set(DARK.values())


def test_the_callers_matplotlib_is_left_alone():
    before = dict(matplotlib.rcParams)
    svg(plot_training_history(history(2)))
    visualize_weight_distributions(ThreeLayerNet(), ThreeLayerNet(), 2)
    assert dict(matplotlib.rcParams) == before
