"""The module FakeQuantize."""

import copy
import pickle

import pytest
import torch

import cases
from qatfast import FakeQuantize, PerChannel, PerToken, fake_quantize
from qatfast.config import Granularity


@pytest.mark.parametrize("shape, granularity", cases.FEW_BLOCKS, ids=cases.name)
@pytest.mark.parametrize("symmetric", [False, True], ids=["affine", "symmetric"])
def test_it_is_the_function(shape, granularity, symmetric, device):
    x = cases.mixed(shape, device=device)
    module = FakeQuantize(5, symmetric=symmetric, granularity=granularity)
    cases.assert_same(module(x), fake_quantize(x, 5, symmetric=symmetric, granularity=granularity))


def test_it_has_no_state_and_no_modes(device):
    module, x = FakeQuantize(), cases.normal((9,), device=device)
    assert module.state_dict() == {}
    training = module.train()(x)
    module(x * 100)
    cases.assert_same(module.eval()(x), training)
    cases.assert_same(training, fake_quantize(x))


def test_gradients_pass(device):
    x = cases.normal((9,), device=device, requires_grad=True)
    torch.nn.Sequential(FakeQuantize(2), torch.nn.ReLU(inplace=True))(x).sum().backward()
    assert torch.equal(x.grad, (fake_quantize(x, 2) > 0).float())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(duplicate):
    module = duplicate(FakeQuantize(3, symmetric=True, granularity=PerToken()))
    x = cases.normal((4, 9))
    cases.assert_same(module(x), fake_quantize(x, 3, symmetric=True, granularity=PerToken()))


def test_repr():
    assert repr(FakeQuantize()) == "FakeQuantize(num_bits=8, symmetric=False, granularity=PerTensor())"
    assert (
        repr(FakeQuantize(4, symmetric=True, granularity=PerChannel(-1)))
        == "FakeQuantize(num_bits=4, symmetric=True, granularity=PerChannel(axis=-1))"
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"num_bits": 1}, ValueError, "expected num_bits to be from 2 to 16, got 1"),
        ({"num_bits": 17}, ValueError, "expected num_bits to be from 2 to 16, got 17"),
        ({"num_bits": 2.5}, TypeError, "expected num_bits to be an int, got 2.5"),
        ({"num_bits": True}, TypeError, "expected num_bits to be an int, got True"),
        ({"symmetric": 1}, TypeError, "expected symmetric to be a bool, got 1"),
        ({"granularity": 0}, TypeError, "expected granularity to be PerTensor(), PerChannel(axis)"),
        ({"granularity": PerToken}, TypeError, "expected granularity to be PerTensor(), PerChannel(axis)"),
        (
            {"granularity": Granularity()},
            TypeError,
            "expected granularity to be PerTensor(), PerChannel(axis)",
        ),
    ],
)
def test_errors_come_at_construction(arguments, error, message):
    with pytest.raises(error) as caught:
        FakeQuantize(**arguments)
    assert message in str(caught.value)


def test_the_settings_after_num_bits_are_keyword_only():
    with pytest.raises(TypeError):
        FakeQuantize(8, True)
