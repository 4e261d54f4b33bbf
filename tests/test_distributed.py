"""Layers whose parameters are distributed over processes."""

import copy
import os
import socket
import time

import pytest
import torch
import torch.distributed
from torch import nn

import cases
from qatfast import QATConfig, QATLinear, prepare, sync_ranges, unused_layers

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="this torch has no gloo",
)

needs_rules = pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="tested from torch 2.13 on: in 2.6 DTensor cannot shard amin, and FSDP2 cannot run on the CPU",
)
CONFIGS = {
    "tutorial": QATConfig(),
    "int8": QATConfig.int8(),
    "dynamic": QATConfig.dynamic(),
    "weight_only": QATConfig.weight_only(4, 4),
}


def _in_a_group(rank, port, work, world):
    from torch.distributed.device_mesh import init_device_mesh

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    work(init_device_mesh("cpu", (world,)), rank)
    torch.distributed.barrier()
    time.sleep(0.5)  # until the other process has also passed the barrier
    os._exit(0)  # destroying the group may hang (see cases.end_process_group)


def in_two_processes(work):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_in_a_group, (port, work, 2), nprocs=2)


def layer_with_unequal_halves(config):
    torch.manual_seed(0)
    layer = QATLinear(16, 8, config=config)
    with torch.no_grad():
        layer.weight[7, 15], layer.bias[7] = 3, 2  # the range of a shard would be different
    return layer


def gradients(layer, x, y_grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * y_grad).sum().backward()
    grads = [layer.weight.grad, layer.bias.grad]
    return [y.detach(), x.grad, *(g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads)]


def tensor_parallel(mesh, rank):
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = [ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())]
    x, y_grad = cases.normal((4, 16)), cases.normal((4, 8), seed=1)
    for name, config in CONFIGS.items():
        for style in styles:
            layer = layer_with_unequal_halves(config)
            expected = gradients(copy.deepcopy(layer), x, y_grad)
            parallelize_module(layer, mesh, style)
            actual = gradients(layer, x, y_grad)
            exact = config.uses_int8_gemm(16) or isinstance(style, ColwiseParallel)
            assert torch.equal(actual[0], expected[0]) or not exact, (name, style)
            for a, b in zip(actual, expected, strict=True):
                assert torch.allclose(a, b, rtol=1e-5, atol=2e-6), (name, style, (a - b).abs().max())
            linear = parallelize_module(nn.Linear(16, 8), mesh, style)
            assert QATLinear.from_float(linear, config=config)(x).shape == (4, 8)


def fully_sharded(mesh, rank):
    from torch.distributed.fsdp import fully_shard

    x = cases.normal((4, 16), seed=rank)
    for config in (*CONFIGS.values(), QATConfig.static(), QATConfig.static(4)):
        torch.manual_seed(0)
        model = prepare(nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)), config, edges=None)
        model(cases.normal((4, 16)))  # learned scales are set before the parameters are distributed
        reference = copy.deepcopy(model)
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, reference)]
        for _ in range(2):
            with unused_layers(model) as unused:
                y = model(x)
            assert unused == []
            expected = reference(x)
            assert torch.equal(y, expected)
            y.square().sum().backward()
            expected.square().sum().backward()
            for parameter in reference.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= 2  # fully_shard averages over the ranks
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
            assert torch.allclose(ours.full_tensor(), theirs, atol=1e-6)
        for own in (model, reference):
            sync_ranges(own)
        assert torch.allclose(model.eval()(x), reference.eval()(x), atol=1e-6)
        results = [torch.empty(2, 4) for _ in range(2)]
        torch.distributed.all_gather(results, model(cases.normal((2, 16), seed=2)).detach())
        assert torch.equal(*results)  # observed ranges differ until they are shared
    with pytest.raises(TypeError, match="expected a layer outside of FSDP, got one that FSDP manages"):
        QATLinear.from_float(fully_shard(nn.Linear(16, 8), mesh=mesh))
    whole = fully_shard(nn.Sequential(nn.Linear(16, 8)), mesh=mesh)
    with pytest.raises(
        ValueError, match="prepare: expected a model that FSDP does not manage, got 'the root'"
    ):
        prepare(whole)


def data_parallel(mesh, rank):
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    wrapped = DistributedDataParallel(copy.deepcopy(model))
    with pytest.raises(ValueError, match="prepare the model first, then wrap it"):
        prepare(wrapped, QATConfig.static(4))
    expected = prepare(copy.deepcopy(model), QATConfig.dynamic())
    model = prepare(DistributedDataParallel(model), QATConfig.dynamic())
    xs = [cases.normal((4, 16), seed=other) for other in range(2)]
    assert torch.equal(model(xs[rank]), expected(xs[rank]))
    model(xs[rank]).square().sum().backward()
    (sum(expected(x).square().sum() for x in xs) / 2).backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-5)


@needs_rules
def test_tensor_parallel_layers_take_the_ranges_of_the_whole_tensors():
    in_two_processes(tensor_parallel)


@needs_rules
def test_fully_sharded_models_compute_the_same():
    in_two_processes(fully_sharded)


def test_a_model_is_prepared_inside_of_data_parallel():
    in_two_processes(data_parallel)
