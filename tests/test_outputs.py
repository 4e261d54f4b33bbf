"""The quantizers of results that add, cat and pooling read: prepare(outputs=)."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import cases
from qatfast import (
    Fixed,
    QATConfig,
    QuantSpec,
    cached_weights,
    calibrate,
    convert,
    fake_quantize_affine,
    kernels,
    prepare,
    quantization_disabled,
    summary,
)
from test_flow import oracle

# How a network calls its activations.
STYLES = {
    "module": lambda network: network.relu,
    "in place": lambda network: nn.ReLU(inplace=True),
    "method": lambda network: lambda x: x.relu_(),
    "statement": lambda network: lambda x: (F.relu_(x), x)[1],
    "relu6": lambda network: F.relu6,
}


class Residual(nn.Module):
    """1x1 convolutions, so that the oracle of linear layers holds for them."""

    def __init__(self, style="module"):
        super().__init__()
        torch.manual_seed(0)
        self.relu = nn.ReLU()
        self.stem, self.norm = nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1, bias=False)
        self.b_norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        for norm in (self.norm, self.b_norm):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.style, self.joins = style, torch.add

    def forward(self, x):
        relu = STYLES[self.style](self)
        x = F.max_pool2d(relu(self.norm(self.stem(x))), 1)
        y = self.b_norm(self.b(relu(self.a(x))))
        self.joined = (x, y)
        y = relu(self.joins(y, x))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


def prepared(style="module", steps=2, batch=64, **kwargs):
    x = cases.normal((batch, 6, 2, 1)) * 4
    model = prepare(Residual(style), example_inputs=x, **kwargs)
    for _ in range(steps):
        model.train()(x).square().mean().backward()
    return model, x


def rows(tensor):
    return tensor.detach().permute(0, 2, 3, 1).flatten(0, 2)


def reader(quantizer):
    return SimpleNamespace(input_quantizer=quantizer)


@pytest.mark.parametrize("style", STYLES)
def test_results_that_an_addition_reads_are_integers(style):
    batch = 2**16 if style == "module" else 64  # 2 million integers
    model, x = prepared(style, batch=batch)
    found = [name for name, module in model.named_modules() if name.endswith("output_quantizer")]
    assert found == ["stem.output_quantizer", "b.output_quantizer"]
    assert all(model.get_submodule(name).num_batches == 2 for name in found)
    assert model.stem.config.output is None
    model.eval()
    taken = []
    model.b._forward_pre_hooks["take"] = lambda module, args: taken.append(args[0]._plain())
    with torch.no_grad():
        y = model(x)
    after_stem, after_b = model.joined
    assert type(after_stem) is type(after_b) is torch.Tensor
    activation = "relu6" if style == "relu6" else "relu"
    for layer in (model.stem, model.b):
        layer.weight = nn.Parameter(layer.weight.detach().flatten(1))  # as the oracle takes it
    expected = oracle(model.stem, model.norm, activation, reader(model.stem.output_quantizer), rows(x))
    cases.assert_same(rows(after_stem), expected)
    expected = oracle(model.b, model.b_norm, None, reader(model.b.output_quantizer), rows(taken[0]))
    cases.assert_same(rows(after_b), expected)
    for layer in (model.stem, model.b):
        layer.weight = nn.Parameter(layer.weight.detach()[:, :, None, None])
    del model.b._forward_pre_hooks["take"], model.joined
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        cases.assert_same(twin(x.clone().requires_grad_()).detach(), y)


@pytest.mark.parametrize("style", STYLES)
def test_training_quantizes_after_batch_norm_and_activation(style):
    model, x = prepared(style)
    dy = cases.normal((64, 8, 2, 1), seed=1)
    inputs = copy.deepcopy(model.stem.input_quantizer), copy.deepcopy(model.stem.output_quantizer)
    norm = copy.deepcopy(model.norm)
    model.zero_grad()
    model(x)
    y = model.joined[0]
    y.backward(dy)
    found = model.stem.weight.grad, model.norm.weight.grad, y.detach()
    del model.joined
    layer = copy.deepcopy(model.stem)
    layer._chain, layer._modules["input_quantizer"] = None, inputs[0]
    model.zero_grad()
    layer.zero_grad()
    norm.zero_grad()
    grid = inputs[1].eval().grid(x)  # the range as it was
    activation = F.relu6 if style == "relu6" else F.relu
    y = fake_quantize_affine(activation(norm(layer(x))), *grid, 0, 255)
    y.backward(dy)
    for ours, theirs in zip(found, (layer.weight.grad, norm.weight.grad, y.detach()), strict=True):
        cases.assert_same(ours, theirs)


@pytest.mark.skipif(
    kernels.extension is None, reason="without kernels torch.compile traces no range that moves"
)
@pytest.mark.parametrize("style", ["module", "in place", "method", "relu6"])
def test_compilers_and_exporters_take_chains(style, fresh_compiler):
    model, x = prepared(style, steps=0)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    for step in range(2):
        for run in (model, compiled):
            run(x + step).square().mean().backward()
    del model.joined, twin.joined
    for ours, theirs in zip(twin.state_dict().values(), model.state_dict().values(), strict=True):
        cases.assert_same(ours, theirs)
    cases.assert_same(twin.stem.weight.grad, model.stem.weight.grad)
    model.eval()
    twin.eval()
    with torch.no_grad():
        y = model(x)
        cases.assert_same(compiled(x), y)
        model.joined = None
        for strict in (False, True) if style == "in place" else ():
            exported = torch.export.export(model, (x,), strict=strict)
            cases.assert_same(exported.module()(x), y)
            model.joined = None


def test_a_step_that_torch_compile_does_not_see_is_an_error(fresh_compiler):
    model, x = prepared("statement", steps=0)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="expected the flow that prepare recorded"):
        compiled(x)


def test_outputs_selects_the_layers():
    class Joins(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.conv = nn.Linear(4, 4), nn.Conv1d(4, 4, 1)
            self.silu, self.last, self.head = nn.Conv1d(4, 4, 1), nn.Conv1d(4, 4, 1), nn.Linear(4, 2)

        def forward(self, x):
            a = torch.cat([self.linear(x), x], -1)
            b = F.avg_pool1d(self.conv(x), 2).repeat(1, 1, 2)
            c = F.silu(self.silu(x)) + 1
            y = self.head(a[..., :4] + b + c)
            return y, self.last(x) + 1  # no quantized layer reads it

    def found(**kwargs):
        model = prepare(Joins(), example_inputs=cases.normal((2, 4, 4)), **kwargs)
        model(cases.normal((2, 4, 4)))
        names = [name for name, _ in model.named_modules() if name.endswith("output_quantizer")]
        assert all(model.get_submodule(name).num_batches == 1 for name in names)
        chains = {row.name: row.chain for row in summary(model).rows if row.chain}
        assert chains == {name.partition(".")[0]: "output_quantizer" for name in names}
        return [name.partition(".")[0] for name in names]

    assert found() == ["conv"]
    assert found(outputs=True) == ["linear", "conv"]
    assert found(outputs=False) == []
    own = QATConfig(
        input=QuantSpec(range=Fixed(-1, 1)), weight=QuantSpec(symmetric=True), bias=None, output=None
    )
    assert found(layers={"conv": own}) == []  # the range of the input is not that of the result


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"outputs": 1}, TypeError, "expected outputs to be a bool or None, got 1"),
        ({"outputs": True}, ValueError, "expected example_inputs with outputs=True"),
    ],
)
def test_outputs_that_mean_nothing(arguments, error, text):
    with pytest.raises(error, match=f"prepare: {text}"):
        prepare(Residual(), **arguments)


def test_modes_and_hooks():
    model, x = prepared(steps=0)
    seen = []
    for layer in (model.stem, model.norm):
        layer.register_forward_hook(
            lambda module, args, y: seen.append(y.detach().mean() + y.flatten().std())
        )
    with torch.no_grad(), quantization_disabled(model):
        float_model = model.eval()(x)
    assert model.stem.output_quantizer.num_batches == 0
    cases.assert_same(float_model, Residual().eval()(x).detach())
    with torch.no_grad(), calibrate(model):
        cases.assert_same(model(x), float_model)
    assert model.stem.output_quantizer.num_batches == 1
    model.train()(x).sum().backward()
    assert len(seen) == 6 and all(type(value) is torch.Tensor for value in seen)


def test_hooks_on_the_last_step_of_a_chain_see_what_the_reader_takes():
    model, x = prepared()
    seen = []
    model.a.register_forward_hook(lambda module, args, y: seen.append(y))
    model.relu.register_forward_hook(lambda module, args, y: seen.append(y.detach()))
    with torch.no_grad():
        model.eval()(x)
    with pytest.raises(RuntimeError, match="in which relu reads this result, got detach"):
        seen[1].detach()  # that of the layer is not its own result
    assert type(seen[2]) is torch.Tensor and seen[2].min() == 0


def test_another_config_removes_the_quantizer():
    model, x = prepared()
    config = model.stem.config
    model.stem.config = config
    assert "output_quantizer" not in model.stem._modules
    assert torch.isfinite(model.eval()(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_result_has_the_dtype_of_the_layer(dtype):
    x = (cases.normal((64, 6, 2, 1)) * 4).to(dtype)
    model = prepare(Residual().to(dtype), example_inputs=x)
    assert model(x).dtype == dtype
    model.eval()
    assert model(x).dtype == dtype
    assert [value.dtype for value in model.joined] == [dtype] * 2


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("num_bits", [8, 4])
def test_converted_models_have_the_same_bits(style, num_bits):
    x = cases.normal((64, 6, 2, 1)) * 4
    model = Residual(style)
    with torch.no_grad():
        model.norm.weight.mul_(10)
    model = prepare(model, QATConfig.static(num_bits), example_inputs=x, edges=None)
    model(x)
    if num_bits < 8:
        with torch.no_grad():
            model.stem.output_quantizer.scale.mul_(1.37)  # half a step beyond 6
    model.eval()
    with torch.no_grad():
        expected = model(x), *model.joined
        model.joined = None
        deployed = convert(model, example_inputs=x)
        for found, value in zip((deployed(x), *deployed.joined), expected, strict=True):
            cases.assert_same(found, value)
    assert (num_bits, style) != (4, "relu6") or expected[1].max() > 6


def test_a_model_that_takes_another_way_is_not_converted():
    model, x = prepared("module")
    model.joins = lambda y, x: y * 2 + x
    with pytest.raises(ValueError, match="in which 'b' goes batch_norm -> output_quantizer, got another way"):
        convert(model, example_inputs=x)


def test_cached_chains_follow_all_that_they_depend_on():
    model, x = prepared()
    model.eval()
    with torch.no_grad(), cached_weights(model):
        for change in (
            lambda: None,
            lambda: model.stem.weight.mul_(1.5),
            lambda: model.stem.bias.add_(0.5),
            lambda: model.norm.running_mean.add_(0.5),
            lambda: model.norm.weight.mul_(-1),
            lambda: model.stem.output_quantizer.running_max.mul_(0.5),
            lambda: model.stem.input_quantizer.running_min.mul_(0.5),
            lambda: model.norm.running_var.mul_(2.0),
        ):
            change()
            for _ in range(2):
                y = model(x)
            cases.assert_same(y, copy.deepcopy(model)(x))
