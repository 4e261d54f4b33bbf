"""torch.compile without graph breaks, torch.export and fake tensors."""

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import cases
import counted
from operators import operators
from qatfast import (
    FakeQuantize,
    PerChannel,
    PerGroup,
    PerTensor,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    functional,
)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def results_and_gradients(function, tensors):
    """Returns the results of ``function`` and the gradient of each tensor that requires grad."""
    leaves = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
    result = function(*leaves)
    results = result if isinstance(result, tuple) else (result,)
    if results[0].requires_grad:
        results[0].backward(
            cases.normal(tuple(results[0].shape), results[0].dtype, seed=9, device=results[0].device)
        )
    return *results, *(leaf.grad for leaf in leaves if leaf.grad is not None)


def assert_compiles(function, *tensors, backend="aot_eager", **options):
    expected = results_and_gradients(function, tensors)
    actual = results_and_gradients(compiled(function, backend, **options), tensors)
    for one, other in zip(actual, expected, strict=True):
        cases.assert_same(one, other)
        assert one.stride() == other.stride()


@pytest.mark.parametrize(
    "op, label", [(op, call.label) for op in operators() for call in op.calls()], ids=str
)
def test_every_operator(op, label, device):
    (call,) = (call for call in op.calls(device=device, requires_grad=True) if call.label == label)
    function, names = getattr(functional, op.name), list(call.tensors)
    others = {name: value for name, value in call.arguments.items() if name not in names}
    assert_compiles(
        lambda *tensors: function(**dict(zip(names, tensors, strict=True)), **others), *call.tensors.values()
    )


def test_python_numbers_for_the_grid(device):
    x = cases.normal((9,), device=device, requires_grad=True)
    assert_compiles(lambda x: functional.fake_quantize_affine(x, 0.5, 3, 0, 15), x)


@pytest.mark.parametrize("layout", ["transposed", "strided", "channels_last", "offset_1"])
@pytest.mark.parametrize("op", operators(elementwise=True), ids=str)
def test_strides_of_the_compiled_result(op, layout, device):
    place, shape = cases.LAYOUTS[layout]
    for call in op.calls(blocks=((shape, PerTensor()),), device=device):
        function, x = getattr(functional, op.name), place(call.arguments["input"])
        others = {name: value for name, value in call.arguments.items() if name != "input"}

        def and_one(x, function=function, others=others):
            return function(x, **others) + 1

        y = compiled(and_one)(x)
        cases.assert_same(y, and_one(x))
        assert y.stride() == and_one(x).stride()


def strided_operands(device):
    """Returns typical layouts: (input, weight) as functions of contiguous leaves."""
    x = cases.normal((5, 16), device=device, requires_grad=True)
    weight = cases.normal((6, 16), seed=1, device=device, requires_grad=True)
    wide = cases.normal((5, 2, 32), seed=2, device=device, requires_grad=True)
    conv1d = cases.normal((16, 6), seed=3, device=device, requires_grad=True)
    row = cases.normal((1, 16), seed=4, device=device, requires_grad=True)

    def places(x, weight, wide, conv1d, row):
        return {
            "weight of GPT-2's Conv1D": (x, conv1d.t()),
            "rows of a larger weight": (x, weight[1:5]),
            "columns of a larger weight": (wide[..., 16:], weight),
            "every other row": (x, weight[::2]),
            "every other column": (x[:, ::2], wide[:, 0, ::4]),
            "expanded": (row.expand(4, 16), row.expand(6, 16)),
            "permuted input": (wide.permute(1, 0, 2)[..., ::2], weight),
            "transposed input": (conv1d.t(), weight),
        }

    return (x, weight, wide, conv1d, row), places


def every_place(places, config):
    """Applies a layer to every pair in a single function, so that it is compiled only once."""

    def function(*leaves):
        return tuple(
            functional.qat_linear(input, weight, config=config) for input, weight in places(*leaves).values()
        )

    return function


def assert_trains_compiled(function, leaves, backend):
    found = []
    for one in (compiled(function, backend), function):
        results = one(*leaves)
        upstream = [
            cases.normal(tuple(y.shape), seed=9, device=y.device.type).mT.contiguous().mT for y in results
        ]
        gradients = torch.autograd.grad(results, leaves, upstream, allow_unused=True, materialize_grads=True)
        found.append([*results, *gradients])
    for ours, eager in zip(*found, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-4)
        assert ours.stride() == eager.stride()


STRIDED_CONFIGS = {
    **{name: cases.CONFIGS[name] for name in ("tutorial", "int8", "weight_only", "float", "input_only")},
    "per_channel_weight": QATConfig(None, QuantSpec(3, granularity=PerChannel(1)), None, QuantSpec(8)),
    "per_token_weight": QATConfig(None, QuantSpec(9, granularity=PerToken()), None, None),
}


@pytest.mark.parametrize("config", STRIDED_CONFIGS.values(), ids=STRIDED_CONFIGS)
def test_training_with_strided_operands(config, device):
    leaves, places = strided_operands(device)
    assert_trains_compiled(every_place(places, config), leaves, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(counted.SIMULATED, reason="a simulated device does not run what Triton compiles")
def test_inductor_trains_with_strided_operands(device):
    """The graphs of Inductor assert the strides of the fake kernels."""
    leaves, places = strided_operands(device)
    configs = [STRIDED_CONFIGS[name] for name in ("tutorial", "int8", "weight_only")]
    functions = [every_place(places, config) for config in configs]
    grid = cases.grid((16,), PerChannel(0), quant_range=(0, 15), device=device)

    def every_config(*leaves):
        inputs = [input for input, _ in places(*leaves).values() if input.shape[-1] == 16]
        given = [functional.fake_quantize_affine(x, *grid, granularity=PerChannel(-1)) for x in inputs] + [
            functional.fake_quantize(x, 4, granularity=PerGroup(4)) for x in inputs
        ]
        return *(y for function in functions for y in function(*leaves)), *given

    assert_trains_compiled(every_config, leaves, "inductor")


EITHER = pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8()], ids=["tutorial", "int8"])


@EITHER
@pytest.mark.parametrize("shape", [((), 16, 6), ((2, 3), 16, 6), ((0,), 16, 6)], ids=cases.name)
def test_qat_linear_shapes_without_a_bias(config, shape, device):
    input, weight, _ = cases.linear(shape, device=device, bias=False, requires_grad=True)
    assert_compiles(lambda *operands: functional.qat_linear(*operands, config=config), input, weight)


@EITHER
def test_qat_linear_under_autocast(config, device):
    def function(*operands):
        with torch.autocast(device, torch.bfloat16):
            return functional.qat_linear(*operands, config=config)

    assert_compiles(function, *cases.linear(((5,), 16, 6), device=device, requires_grad=True))


def network(device="cpu", config=None):
    torch.manual_seed(0)
    layers = [
        FakeQuantize(),
        QATLinear(16, 12, config=config),
        nn.ReLU(inplace=True),
        QATLinear(12, 4, bias=False),
    ]
    return nn.Sequential(*layers).to(device)


@pytest.mark.parametrize(
    "config", [QATConfig.tutorial(4), QATConfig.int8(), QATConfig.weight_only(4, 8)], ids=str
)
def test_a_training_step_of_a_network(config, device):
    model, x = network(device, config), cases.normal((7, 16), device=device)

    def step(model):
        model.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

    loss, gradients = step(model)
    compiled_loss, compiled_gradients = step(compiled(model))
    torch.testing.assert_close(compiled_loss, loss)
    for one, other in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.slow
@pytest.mark.skipif(counted.SIMULATED, reason="a simulated device does not run what Triton compiles")
def test_inductor(device):
    model, x = network(device), cases.normal((7, 16), device=device)
    grid = cases.grid((7, 4), PerChannel(0), quant_range=(0, 15), device=device)

    def forward(x):
        return functional.fake_quantize_affine(model(x) * 2, *grid, granularity=PerChannel(0)).relu()

    def values_and_gradients(forward):
        model.zero_grad()
        y = forward(x)
        y.square().mean().backward()
        return y, *(parameter.grad.clone() for parameter in model.parameters())

    found, expected = values_and_gradients(compiled(forward, "inductor")), values_and_gradients(forward)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", [PerTensor(), PerToken(), PerChannel(1), PerGroup(4)], ids=str)
def test_one_graph_serves_every_batch_size(granularity, device):
    count = CompileCounterWithBackend("aot_eager")

    def function(x):
        return functional.fake_quantize(x, 4, granularity=granularity) * 2

    dynamic = torch.compile(function, fullgraph=True, dynamic=True, backend=count)
    for rows in (5, 8, 33):
        x = cases.normal((rows, 12), device=device, requires_grad=True)
        y = dynamic(x)
        cases.assert_same(y, function(x))
        y.sum().backward()
        assert torch.equal(x.grad, torch.full_like(x, 2))
    assert count.frame_count == 1


@EITHER
def test_one_graph_of_a_layer_serves_every_batch_size(config, device):
    count = CompileCounterWithBackend("aot_eager")
    model = network(device, config)
    dynamic = torch.compile(model, fullgraph=True, dynamic=True, backend=count)
    for rows in (5, 8, 33):
        x = cases.normal((rows, 16), device=device)
        torch.testing.assert_close(dynamic(x), model(x))
        dynamic(x).sum().backward()
    assert count.frame_count == 1


def test_a_given_grid_with_every_batch_size(device):
    scale, zero_point, low, high = cases.grid((12,), PerChannel(0), quant_range=(0, 15), device=device)

    def function(x):
        return functional.fake_quantize_affine(x, scale, zero_point, low, high, granularity=PerChannel(-1))

    dynamic = compiled(function, dynamic=True)
    for rows in (5, 8, 33):
        x = cases.normal((rows, 12), device=device, requires_grad=True)
        y = dynamic(x)
        cases.assert_same(y, function(x))
        (gradient,) = torch.autograd.grad(y.sum(), x)
        cases.assert_same(gradient, torch.autograd.grad(function(x).sum(), x)[0])


@EITHER
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_export(dynamic, config):
    model, x = network(config=config).eval(), cases.normal((7, 16))
    shapes = ({0: torch.export.Dim("batch", min=2)},) if dynamic else None
    exported = torch.export.export(model, (x,), dynamic_shapes=shapes).module()
    torch.testing.assert_close(exported(x), model(x))
    if dynamic:
        x = cases.normal((31, 16), seed=1)
        torch.testing.assert_close(exported(x), model(x))


@EITHER
def test_an_exported_graph_holds_the_layer_as_one_operator(kernels, config):
    graph = torch.export.export(network(config=config).eval(), (cases.normal((7, 16)),)).graph
    targets = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert targets.count("qatfast.qat_linear.default") == 2
    assert targets.count("qatfast.fake_quantize.default") == 1


@pytest.mark.parametrize("op", operators(), ids=str)
def test_shapes_on_the_meta_device(op):
    for call in op.calls():
        expected = call.through(functional)
        meta = {name: tensor.to("meta") for name, tensor in call.tensors.items()}
        results = call.replaced(**meta).through(functional)
        for one, other in zip(
            results if isinstance(results, tuple) else (results,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        ):
            assert one.is_meta
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


@pytest.mark.parametrize("op", operators(), ids=str)
def test_shapes_of_fake_tensors(op):
    for call in op.calls():
        expected = call.through(functional)
        with FakeTensorMode() as mode:
            fake = {name: mode.from_tensor(tensor) for name, tensor in call.tensors.items()}
            results = call.replaced(**fake).through(functional)
        results, expected = (value if isinstance(value, tuple) else (value,) for value in (results, expected))
        for one, other in zip(results, expected, strict=True):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
            assert one.device.type == "cpu"


@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8(), STRIDED_CONFIGS["input_only"]], ids=str)
def test_transforms_of_a_layer_under_compile(config, device):
    """In transforms, torch.compile drops the backward of autograd functions."""
    operands = tuple(cases.linear(((5,), 16, 6), device=device))
    tangents = tuple(cases.normal(tuple(x.shape), seed=8, device=device) for x in operands)

    def layer(*operands):
        return functional.qat_linear(*operands, config=config)

    def loss(*operands):
        return layer(*operands).pow(2).sum()

    assert_transforms_compile(
        lambda *operands: torch.func.jvp(layer, operands, tangents),
        lambda *operands: torch.func.grad(loss, (0, 1, 2))(*operands),
        lambda *operands: torch.vmap(torch.func.grad(loss, (0, 1)), (0, None, None))(*operands),
        lambda *operands: torch.vmap(layer, (0, None, None))(*operands),
        arguments=operands,
    )


def assert_transforms_compile(*functions, arguments):
    for function in functions:
        expected, found = function(*arguments), compiled(function, "eager")(*arguments)
        if isinstance(expected, torch.Tensor):
            expected, found = (expected,), (found,)
        for one, other in zip(found, expected, strict=True):
            assert other.abs().sum() > 0
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_transforms_of_the_quantizers_under_compile(device):
    x = cases.normal((5, 8), device=device)
    direction = cases.normal((5, 8), seed=8, device=device)
    grid = cases.grid((5, 8), PerChannel(1), quant_range=(0, 7), device=device)
    for quantizer in (
        functional.fake_quantize,
        lambda x: functional.fake_quantize_affine(x, *grid, granularity=PerChannel(1)),
    ):
        assert_transforms_compile(
            lambda x, quantizer=quantizer: torch.func.jvp(quantizer, (x,), (direction,)),
            lambda x, quantizer=quantizer: torch.func.grad(lambda x: quantizer(x).pow(3).sum())(x),
            lambda x, quantizer=quantizer: torch.func.jacfwd(quantizer)(x),
            lambda x, quantizer=quantizer: torch.func.jacrev(quantizer)(x),
            arguments=(x,),
        )


def test_errors_under_compile_are_errors(device):
    x = cases.normal((4, 6), device=device)
    for function in (
        lambda x: functional.fake_quantize(x, 8, granularity=PerGroup(4)),
        lambda x: functional.fake_quantize(x, 8, granularity=PerChannel(2)),
        lambda x: functional.fake_quantize_affine(x, torch.ones(3), torch.zeros(3, dtype=torch.int32), 0, 15),
        lambda x: functional.qat_linear(x, x.new_zeros(3, 5)),
    ):
        with pytest.raises(Exception, match="expected"):
            compiled(function)(x)


def test_an_aot_inductor_package_of_every_preset(kernels, tmp_path):
    """A package passes an empty list of integers to an operator as None.

    No spec is an empty list.
    """
    configs = [QATConfig(), QATConfig.int8(), QATConfig.weight_only(4, 8), QATConfig(None, None, None, None)]
    layers = [QATLinear(16, 16, bias=index % 2 == 0, config=config) for index, config in enumerate(configs)]
    model = torch.nn.Sequential(*layers, FakeQuantize(4)).eval()
    x = cases.normal((5, 16))
    with torch.no_grad():
        batch = torch.export.Dim.DYNAMIC
        program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        package = torch._inductor.aoti_load_package(path)
        for rows in (5, 9):
            x = cases.normal((rows, 16))
            cases.assert_same(package(x), model(x))
