"""calibrate, freeze, unfreeze, quantization_disabled and sync_ranges."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import cases
import qatfast
from qatfast import (
    FakeQuantize,
    Learned,
    MinMax,
    MovingAverage,
    QATConfig,
    QATLinear,
    calibrate,
    freeze,
    quantization_disabled,
    sync_ranges,
    unfreeze,
)

FUNCTIONS = ("calibrate", "freeze", "quantization_disabled", "sync_ranges", "unfreeze")


def network(config=None):
    torch.manual_seed(0)
    config = config or QATConfig.static()
    layers = QATLinear(6, 8, config=config), nn.BatchNorm1d(8), nn.ReLU(), QATLinear(8, 3, config=config)
    return nn.Sequential(*layers)


def float_network(model):
    layers = [layer.to_float() if isinstance(layer, QATLinear) else layer for layer in model]
    return copy.deepcopy(nn.Sequential(*layers))


@pytest.mark.parametrize("num_bits", (4, 8))
def test_calibration_is_float_and_observes(num_bits):
    model = network(QATConfig.static(num_bits)).train()
    model[1].eval()
    batches = [cases.normal((32, 6), seed=seed) for seed in range(3)]
    expected = float_network(model).eval()(batches[0])
    with torch.no_grad(), calibrate(model) as same:
        assert same is model
        assert not any(module.training for module in model.modules())
        torch.testing.assert_close(model(batches[0]), expected)
        for batch in batches[1:]:
            model(batch)
    assert model.training and not model[1].training
    model.eval()
    assert (model(batches[0]) - expected).abs().max() > 0
    torch.testing.assert_close(model(batches[0]), expected, atol=0.5, rtol=0.5)


def test_a_moving_average_becomes_the_mean_of_the_batches():
    quantizer = FakeQuantize(range=MovingAverage())
    batches = [torch.tensor([-float(i), 2.0 * i]) for i in (1, 2, 6)]
    with calibrate(quantizer):
        for batch in batches:
            assert torch.equal(quantizer(batch), batch)
    torch.testing.assert_close(quantizer.running_min, torch.tensor(-3.0))
    torch.testing.assert_close(quantizer.running_max, torch.tensor(6.0))
    assert quantizer.num_batches == 3


def test_min_max_holds_all_and_learned_takes_the_first():
    batches = [torch.tensor([-1.0, 1.0]), torch.tensor([-4.0, 9.0])]
    for range in (MinMax(), Learned()):
        quantizer = FakeQuantize(4, range=range)
        with calibrate(quantizer):
            quantizer(batches[0])
            first = copy.deepcopy(quantizer.state_dict())
            quantizer(batches[1])
        if isinstance(range, MinMax):
            assert (quantizer.running_min, quantizer.running_max) == (-4, 9)
        else:
            assert all(torch.equal(first[name], value) for name, value in quantizer.state_dict().items())


def test_modes_are_restored_after_an_exception():
    model = network().train()
    for context in (calibrate, quantization_disabled):
        with pytest.raises(KeyError), context(model):
            raise KeyError
        assert all(module.training for module in model.modules())
        assert model[0]._mode == model[0].input_quantizer._mode == "quantize"


def test_disabled_quantization_is_the_float_model():
    model = network().train()
    x = cases.normal((32, 6))
    model(x)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    with quantization_disabled(model):
        torch.testing.assert_close(model(x), float_network(model)(x))
    assert not torch.equal(model(x), float_network(model)(x))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_dynamic_layer_can_be_disabled_too():
    layer, x = QATLinear(6, 4, config=QATConfig.int8()), cases.normal((5, 6))
    with quantization_disabled(layer):
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("num_bits", (4, 8))
def test_frozen_ranges_do_not_move(num_bits):
    model = network(QATConfig.static(num_bits)).train()
    model(cases.normal((32, 6)))
    assert freeze(model) is model
    ranges = {name: value.clone() for name, value in model.state_dict().items() if "quantizer" in name}
    model(cases.normal((32, 6), seed=1) * 5).sum().backward()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in ranges.items())
    assert all(parameter.grad is None for name, parameter in model.named_parameters() if "scale" in name)
    assert pickle.loads(pickle.dumps(model))[0].input_quantizer.frozen
    assert unfreeze(model) is model
    model(cases.normal((32, 6), seed=1) * 5).sum().backward()
    if num_bits == 8:
        assert not torch.equal(model[0].input_quantizer.running_max, ranges["0.input_quantizer.running_max"])
    else:
        assert model[0].input_quantizer.scale.grad is not None


def test_frozen_batch_norm_survives_train():
    model = network().train()
    model(cases.normal((32, 6)))
    norm = model[1]
    freeze(model, batch_norm=True)
    model.train()
    before = copy.deepcopy(norm.state_dict())
    x = cases.normal((7, 8)) * 3
    torch.testing.assert_close(norm(x), copy.deepcopy(norm).eval()(x))
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())
    again = pickle.loads(pickle.dumps(model)).train()
    torch.testing.assert_close(again[1](x), copy.deepcopy(norm).eval()(x))
    unfreeze(model).train()
    norm(x)
    assert not torch.equal(norm.running_mean, before["running_mean"])
    assert norm.training


def test_sync_without_a_group_changes_nothing():
    model = network().train()
    model(cases.normal((32, 6)))
    before = copy.deepcopy(model.state_dict())
    sync_ranges(model)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


def _sync(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.manual_seed(rank)
    model = network(QATConfig(QATConfig.static().input, QATConfig.static(4).weight, None, None)).train()
    idle = FakeQuantize(range=MinMax())
    model.append(idle)
    model[:4](torch.tensor([[-1.0 - rank, 1.0, 0, 0, 0, 3.0 * (2 - rank)]]).repeat(4, 1))
    if rank == 0:
        idle(torch.tensor([-2.0, 5.0]))
    sync_ranges(model)
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    cases.end_process_group()


def test_ranges_of_all_processes_become_equal(tmp_path):
    torch.multiprocessing.start_processes(_sync, (str(tmp_path),), 2, start_method="spawn")
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for name, value in states[0].items():
        if "quantizer" in name or name.startswith("4."):
            assert torch.equal(value, states[1][name]), name
    assert states[1]["0.input_quantizer.running_min"] == -2
    assert states[1]["0.input_quantizer.running_max"] == 6
    assert states[1]["4.running_min"] == -2 and states[1]["4.num_batches"] == 1


@pytest.mark.parametrize("name", FUNCTIONS)
def test_only_modules_have_ranges(name):
    with pytest.raises(TypeError, match=f"{name}: expected model to be an nn.Module, got 3"):
        result = getattr(qatfast, name)(3)
        if hasattr(result, "__enter__"):
            result.__enter__()
