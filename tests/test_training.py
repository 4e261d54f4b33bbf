"""Twenty training steps: a wrong gradient of any tensor changes the trajectory."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cases
from qatfast import QATConfig, QATLinear, reference

SIZES = (10, 24, 24, 2)
STEPS = 20


class Plain(nn.Linear):
    """The layer of tutorials in plain PyTorch, with a quantizer of five lines."""

    num_bits = 8

    def forward(self, input):
        return self.quantized(F.linear(input, self.quantized(self.weight), self.quantized(self.bias)))

    def quantized(self, x):
        top = 2**self.num_bits - 1
        low, high = x.detach().amin().clamp(max=0), x.detach().amax().clamp(min=0)
        scale = (high - low) / top
        zero_point = (0 - (low / scale).round()).clamp(0, top)
        y = (((x / scale).round() + zero_point).clamp(0, top) - zero_point) * scale
        return x + (y - x).detach()


class Reference(QATLinear):
    def forward(self, input):
        return reference.qat_linear(input, self.weight, self.bias, config=self.config)


def network(kind, dtype, **kwargs):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in pairwise(SIZES):
        layers += [kind(inputs, outputs, dtype=dtype, **kwargs), nn.ReLU(inplace=kind is not Plain)]
    return nn.Sequential(*layers[:-1])


def trajectory(model, optimizer, dtype, device):
    model = model.to(device)
    optimizer = optimizer(model.parameters())
    x = cases.normal((64, SIZES[0]), dtype, device=device)
    target = (x.sum(1) > 0).long()
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(model(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses), [parameter.detach().clone() for parameter in model.parameters()]


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def adam(parameters):
    return torch.optim.Adam(parameters, lr=1e-2)


@pytest.mark.parametrize("optimizer", [sgd, adam])
@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("other", [Plain, Reference])
def test_a_trajectory_is_that_of_plain_pytorch(other, num_bits, optimizer, device):
    dtype = torch.float64
    if other is Plain:
        theirs = network(Plain, dtype)
        for layer in theirs[::2]:
            layer.num_bits = num_bits
    else:
        theirs = network(other, dtype, num_bits=num_bits)
    start = [parameter.detach().clone() for parameter in theirs.parameters()]
    their_losses, their_weights = trajectory(theirs, optimizer, dtype, device)
    losses, weights = trajectory(network(QATLinear, dtype, num_bits=num_bits), optimizer, dtype, device)
    torch.testing.assert_close(losses, their_losses, rtol=1e-6, atol=1e-6)
    for weight, their_weight, first in zip(weights, their_weights, start, strict=True):
        moved = (their_weight.cpu() - first).abs().max()
        assert moved > 1e-2
        assert (weight - their_weight).abs().max() <= 1e-6 * moved
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("config", cases.CONFIGS.values(), ids=cases.CONFIGS)
def test_a_trajectory_of_every_config_is_that_of_the_reference(config, device):
    dtype = torch.float64
    x = cases.normal((40, 16), dtype, device=device)
    target = cases.normal((40, 6), dtype, seed=1, device=device)

    def train(kind):
        torch.manual_seed(0)
        layer = kind(16, 6, dtype=dtype, device=device, config=config)
        before = layer.weight.detach().clone()
        optimizer = sgd(layer.parameters())
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.mse_loss(layer(x), target).backward()
            optimizer.step()
        return layer.weight - before, layer.bias.detach()

    for ours, theirs in zip(train(QATLinear), train(Reference), strict=True):
        assert theirs.abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_a_float32_trajectory_learns_as_the_reference_does(device):
    losses, _ = trajectory(network(QATLinear, torch.float32), adam, torch.float32, device)
    their_losses, _ = trajectory(network(Reference, torch.float32), adam, torch.float32, device)
    torch.testing.assert_close(losses, their_losses, rtol=0.02, atol=0.02)


def test_weight_only_and_int8_learn(device):
    for config in (QATConfig.weight_only(4, 2), QATConfig.int8()):
        losses, _ = trajectory(network(QATLinear, torch.float32, config=config), adam, torch.float32, device)
        assert losses[-1] < losses[0] / 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")
def test_distributed_data_parallel_gives_the_same_gradients():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        alone = network(QATLinear, torch.float32)
        parallel = nn.parallel.DistributedDataParallel(network(QATLinear, torch.float32))
        x = cases.normal((8, SIZES[0]))
        alone(x).square().sum().backward()
        parallel(x).square().sum().backward()
        for one, other in zip(alone.parameters(), parallel.parameters(), strict=True):
            cases.assert_same(other.grad, one.grad)
    finally:
        cases.end_process_group()
