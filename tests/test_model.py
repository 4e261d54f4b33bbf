"""prepare, summary and unused_layers."""

import copy
import gc
import io
import itertools
import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import cases
import qatfast
from qatfast import (
    Learned,
    MinMax,
    PerChannel,
    PerGroup,
    QATConfig,
    QATLinear,
    QuantSpec,
    cached_weights,
    calibrate,
    prepare,
    qat_linear,
    summary,
    unused_layers,
)

DYNAMIC = QATConfig.dynamic()
SMALL = QATConfig.dynamic(4)


def mlp(*sizes):
    torch.manual_seed(0)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Block(nn.Module):
    """A block of a GPT."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(x)


class GPT(nn.Module):
    def __init__(self, width=16, tokens=11):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks = nn.Embedding(tokens, width), nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, tokens, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.first

    def forward(self, x):
        return self.again(self.middle(self.first(x)))


def encoder(**kwargs):
    torch.manual_seed(0)
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2, **kwargs
    )


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.scale = nn.Parameter(torch.zeros(3, 4)), nn.Parameter(torch.ones(4))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def kinds(model):
    return {name: type(module) for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def configs(model):
    return {name: module.config for name, module in model.named_modules() if isinstance(module, QATLinear)}


def reasons(model):
    return {row.name: row.reason for row in summary(model).rows if row.reason is not None}


# prepare


@pytest.mark.parametrize("config", [None, DYNAMIC], ids=["default", "dynamic"])
def test_each_linear_becomes_a_quantized_one_on_its_parameters(config):
    model = mlp(16, 32, 32, 4)
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    keys = list(model.state_dict())
    assert prepare(model, config) is model
    config = config or QATConfig.static()
    assert configs(model) == dict.fromkeys("024", config)
    assert [key for key in model.state_dict() if "quantizer" not in key] == keys
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert all(
        module is modules[name]
        for name, module in model.named_modules()
        if name in modules and (name not in "024" or not name)
    )
    x = cases.normal((5, 16))
    expected = x
    for layer in model:
        if isinstance(layer, QATLinear):
            int8 = (
                DYNAMIC if config is DYNAMIC else QATConfig.int8()
            )  # a first batch is quantized with its own range
            expected = qat_linear(expected, layer.weight, layer.bias, config=int8)
        else:
            expected = layer(expected)
    cases.assert_same(model(x), expected)


def test_a_root_that_is_a_layer_is_a_new_one():
    linear = nn.Linear(16, 6).eval()
    layer = prepare(linear, SMALL, edges=None)
    assert type(layer) is QATLinear
    assert type(linear) is nn.Linear
    assert layer.weight is linear.weight
    assert not layer.training
    assert layer.config == SMALL
    assert [row.name for row in summary(layer).rows] == [""]
    assert prepare(nn.Linear(16, 6), layers={"*": SMALL}).config == SMALL


def test_an_optimizer_made_before_goes_on():
    model = prepare(before := mlp(8, 16, 2))
    optimizer = torch.optim.SGD(before.parameters(), lr=0.1, momentum=0.9)
    torch.manual_seed(1)
    x, y = torch.randn(64, 8), torch.randint(2, (64,))
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


def test_checkpoints_load_both_ways():
    before, other = mlp(8, 16, 2), mlp(8, 16, 2)
    nn.init.ones_(other[0].weight)
    state = {name: value.clone() for name, value in before.state_dict().items()}
    prepare(other).load_state_dict(state, strict=True)
    cases.assert_same(other[0].weight, before[0].weight)
    state = {name: value for name, value in other.state_dict().items() if "quantizer" not in name}
    mlp(8, 16, 2).load_state_dict(state, strict=True)


def test_modes_flags_dtype_and_attributes_stay():
    model = mlp(8, 16, 2).double().eval()
    model[0].requires_grad_(False)
    model[0].train()
    model[2].lr_scale = 3
    prepare(model, DYNAMIC)
    assert model[0].training
    assert not model[2].training
    assert not model[0].weight.requires_grad
    assert model[2].weight.requires_grad
    assert model[2].lr_scale == 3
    assert model(cases.normal((5, 8), torch.float64)).dtype == torch.float64


def test_hooks_stay_and_their_handles_remove_them():
    model, calls = mlp(8, 16, 2), []
    linear = model[0]
    handles = [
        linear.register_forward_pre_hook(lambda *_: calls.append("pre")),
        linear.register_forward_hook(lambda *_, **__: calls.append("post"), with_kwargs=True),
        linear.register_full_backward_hook(lambda *_: calls.append("backward")),
        linear.register_state_dict_post_hook(lambda *_: calls.append("state_dict")),
        linear.register_load_state_dict_pre_hook(lambda *_: calls.append("load")),
    ]
    model.register_forward_hook(lambda *_: calls.append("root"))
    del linear
    prepare(model)
    gc.collect()

    def use():
        model(cases.normal((5, 8), requires_grad=True)).sum().backward()
        model.load_state_dict(model.state_dict())

    use()
    assert calls == ["pre", "post", "root", "backward", "state_dict", "load"]
    for handle in handles:
        handle.remove()
    use()
    assert calls[6:] == ["root"]
    assert type(model[0])(3, 2)._forward_pre_hooks is not model[0]._forward_pre_hooks


def test_a_module_used_twice_is_one_layer():
    model = prepare(Shared(), layers={"again": SMALL})
    assert model.first is model.again
    assert model.first.config == SMALL
    assert [row.name for row in summary(model).rows] == ["first", "middle"]
    x = cases.normal((5, 8))
    model(x).sum().backward()
    once = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    other = Shared()
    other.again = copy.deepcopy(other.first)
    other = prepare(other, layers={"again": SMALL, "first": SMALL})
    other(x).sum().backward()
    cases.assert_same(once["first.weight"], other.again.weight.grad + other.first.weight.grad)


@pytest.mark.parametrize("is_tied", [True, False])
def test_tied_weights_of_attention_share_a_learned_scale(is_tied):
    model = encoder()
    first, second = (layer.self_attn for layer in model.layers)
    if is_tied:
        second.in_proj_weight = first.in_proj_weight
    prepare(model, QATConfig.static(4), edges=None)
    first, second = (layer.self_attn for layer in model.layers)
    assert (first.weight_quantizer is second.weight_quantizer) == is_tied
    assert torch.isfinite(model(cases.normal((2, 5, 16)))).all()


def test_tied_weights_stay_tied():
    model = prepare(GPT())
    assert model.head.weight is model.embed.weight
    assert type(model.head) is QATLinear
    tokens = torch.tensor([[1, 2, 3, 4]])
    before = model(tokens)
    model(tokens).sum().backward()
    # Later tokens do not affect earlier ones.
    cases.assert_same(before[:, :3], model(torch.tensor([[1, 2, 3, 9]]))[:, :3])
    assert model.embed.weight.grad is model.head.weight.grad


def test_plain_attributes_that_hold_a_layer_hold_the_new_one():
    model = mlp(8, 16, 2)
    object.__setattr__(model, "alias", model[0])
    model.in_list, model.in_tuple = [model[0], 1], (model[2], None)
    model.in_dict, other = {"head": model[2]}, ["untouched"]
    model.other = other
    prepare(model)
    assert model.alias is model[0]
    assert model.in_list[0] is model[0]
    assert model.in_tuple == (model[2], None)
    assert model.in_dict["head"] is model[2]
    assert model.other is other


@pytest.mark.parametrize("num_bits", [2, 4])
def test_the_first_and_the_last_layer_have_more_bits(num_bits):
    small = QATConfig.dynamic(num_bits)
    assert list(configs(prepare(mlp(8, 8, 8, 8), small)).values()) == [DYNAMIC, small, DYNAMIC]
    six = QATConfig.dynamic(6)
    assert list(configs(prepare(mlp(8, 8, 8, 8), small, edges=6)).values()) == [six, small, six]
    assert list(configs(prepare(mlp(8, 8, 8, 8), small, edges=None)).values()) == [small, small, small]
    assert list(configs(prepare(mlp(8, 8), small)).values()) == [DYNAMIC]


def test_edges_change_the_bits_of_specs_that_have_fewer_and_nothing_else():
    config = QATConfig(QuantSpec(10), QuantSpec(3, True, PerGroup(4)), None, QuantSpec(4))
    first = configs(prepare(mlp(8, 8, 8, 8), config))["0"]
    assert first == QATConfig(QuantSpec(10), QuantSpec(8, True, PerGroup(4)), None, QuantSpec(8))


def test_edges_leave_layers_alone_that_are_named_or_placed_by_hand():
    assert configs(prepare(mlp(8, 8, 8, 8), SMALL, layers={"0": QATConfig.dynamic(3)})) == {
        "0": QATConfig.dynamic(3),
        "2": SMALL,
        "4": DYNAMIC,
    }
    model = mlp(8, 8, 8, 8)
    model[4] = hand = QATLinear(8, 8, num_bits=2)
    assert configs(prepare(model, SMALL)) == {"0": DYNAMIC, "2": SMALL, "4": QATConfig.tutorial(2)}
    assert model[4] is hand
    # the first quantized layer
    assert configs(prepare(mlp(8, 8, 8, 8), SMALL, layers={"0": None})) == {"2": DYNAMIC, "4": DYNAMIC}


def test_patterns_choose_and_the_last_match_wins():
    layers = {"blocks.*": SMALL, "blocks.1.*": None, "*.mlp.2": QATConfig.int8()}
    model = prepare(GPT(), layers=layers)
    assert configs(model) == {
        "blocks.0.qkv": SMALL,
        "blocks.0.out": SMALL,
        "blocks.0.mlp.0": SMALL,
        "blocks.0.mlp.2": QATConfig.int8(),
        "blocks.1.mlp.2": QATConfig.int8(),
        "head": QATConfig.static(),
    }
    assert reasons(model) == {
        "blocks.1.qkv": "layers['blocks.1.*'] is None",
        "blocks.1.out": "layers['blocks.1.*'] is None",
        "blocks.1.mlp.0": "layers['blocks.1.*'] is None",
    }


def test_a_config_that_does_not_fit_is_decided_for_each_layer():
    model = prepare(mlp(256, 288, 256, 4), QATConfig.weight_only(8, 256))
    assert list(configs(model)) == ["0", "4"]
    reason = "expected in_features to be divisible by group_size=256 of config.weight, got 288"
    assert reasons(model) == {"2": reason}
    with pytest.raises(ValueError) as caught:
        prepare(mlp(256, 288, 256, 4), layers={"2": QATConfig.weight_only(8, 256)})
    assert f"prepare: layers['2'] does not fit '2': {reason}; write" in str(caught.value)


def transformer():
    model = nn.Module()
    model.encoder = encoder()
    model.convolution, model.rnn = nn.Conv2d(3, 4, 3), nn.LSTM(4, 4)
    model.scaled, model.lazy = Scaled(4, 4), nn.LazyLinear(4)
    model.normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model.pruned = nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5)
    model.complex = nn.Linear(4, 4, dtype=torch.complex64)
    model.own = nn.Linear(4, 4)
    model.own.forward = lambda x: x
    model.table = Table()
    model.norm, model.batch_norm = nn.LayerNorm((3, 4)), nn.BatchNorm1d(4)
    return model


def test_what_stays_in_float_and_why():
    model = transformer()
    before = {name: id(module) for name, module in model.named_modules()}
    prepare(model)
    computed = "weight is computed from other parameters"
    expected = {
        "rnn": "no quantized layer for LSTM yet",
        "scaled": "Scaled has a forward of its own",
        "lazy": "lazy: run the model once first",
        "normed": computed,
        "pruned": computed,
        "complex": "weight is complex64",
        "own": "forward is set on the instance",
        "table": "has weights of its own: positions",
    }
    assert reasons(model) == expected
    blocks = [f"encoder.layers.{i}" for i in (0, 1)]
    parts = ("self_attn", "self_attn.out_proj", "linear1", "linear2")
    quantized = [f"{block}.{part}" for block in blocks for part in parts] + ["convolution"]
    linear = [name for name in quantized if "linear" in name or "out_proj" in name]
    assert list(configs(model)) == linear
    after = {name: id(module) for name, module in model.named_modules()}
    assert [name for name in before if before[name] != after[name]] == quantized


def test_layers_that_a_parent_of_torch_reads_are_never_replaced():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    if hasattr(nn, "LinearCrossEntropyLoss"):
        model.append(nn.LinearCrossEntropyLoss(8, 4))
    model.append(nn.Linear(8, 8))
    prepare(model)
    assert list(configs(model)) == ["0.out_proj", str(len(model) - 1)]
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = QATLinear(8, 8)  # set by the user; its parent does not call it
    assert reasons(attention)["out_proj"] == "its parent reads .weight"


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "whole"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
def test_every_layer_of_a_transformer_encoder_runs(training, padded):
    model = prepare(encoder().train(training), DYNAMIC)
    x = cases.normal((3, 5, 16))
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]]) if padded else None
    with torch.set_grad_enabled(training), unused_layers(model) as unused:
        y = model(x, src_key_padding_mask=padding)
    assert unused == []
    assert y.shape == x.shape
    with cached_weights(model), torch.no_grad():
        cases.assert_same(model(x, src_key_padding_mask=padding), y.detach())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.skipif(
    torch.torch_version.TorchVersion(torch.__version__) < (2, 13),
    reason="this torch cannot trace the fast path of its own attention",
)
def test_a_compiled_transformer_encoder_in_evaluation():
    model = prepare(encoder().eval(), DYNAMIC)
    x = cases.normal((3, 5, 16))
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), expected, atol=1e-5)
        program = torch.export.export(model, (x,))
        targets = {str(node.target) for node in program.graph.nodes}
        assert torch.allclose(program.module()(x), expected, atol=1e-5)
    if not cases.why_no_kernels("cpu"):
        assert any(target.startswith("qatfast.qat_linear") for target in targets)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_runs_the_new_layers():
    for compiled in (mlp(8, 16, 2), torch.compile(mlp(8, 16, 2), backend="eager")):
        if not hasattr(compiled, "_orig_mod"):
            compiled.compile(backend="eager")
        x = cases.normal((5, 8))
        before = compiled(x)
        assert prepare(compiled, QATConfig.dynamic(3), edges=None) is compiled
        expected = prepare(mlp(8, 16, 2), QATConfig.dynamic(3), edges=None)(x)
        cases.assert_same(compiled(x), expected)
        assert not torch.equal(before, expected)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_layer_that_torch_compile_wraps_is_refused():
    model = nn.Sequential(torch.compile(nn.Linear(8, 8)), nn.Linear(8, 8))
    with pytest.raises(
        ValueError, match=r"prepare: expected layers that torch.compile does not wrap, got '0'"
    ):
        prepare(model)
    assert type(model[1]) is nn.Linear


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_know_what_prepare_did(duplicate):
    model = prepare(mlp(8, 16, 2), layers={"0": None})
    before = repr(model), list(model.state_dict())
    other = duplicate(model)
    assert (repr(other), list(other.state_dict())) == before
    assert str(summary(other)) == str(summary(model))
    assert reasons(other) == {"0": "layers['0'] is None"}
    with pytest.raises(
        TypeError, match="prepare: expected a model that is not prepared, got one whose layer '2'"
    ):
        prepare(other)


def test_a_part_that_is_prepared_is_refused_by_its_name():
    model = nn.Sequential(prepare(mlp(8, 16, 2)), nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"whose layer '0.0' prepare made"):
        prepare(model)
    assert type(model[1]) is nn.Linear


def test_a_layer_taken_back_to_float_can_be_prepared_again():
    model = prepare(mlp(8, 2), SMALL)
    model[0] = model[0].to_float()
    assert configs(prepare(model, SMALL, edges=None)) == {"0": SMALL}


def test_a_saved_model_loads_with_weights_only():
    buffer = io.BytesIO()
    torch.save(prepare(mlp(8, 16, 2), layers={"0": None}), buffer)
    buffer.seek(0)
    with torch.serialization.safe_globals([nn.Sequential, nn.ReLU, nn.Linear]):
        other = torch.load(buffer, weights_only=True)
    assert reasons(other) == {"0": "layers['0'] is None"}


def test_a_model_without_a_layer_to_quantize_says_so():
    with pytest.warns(UserWarning, match="prepare: no layer of Sequential is quantized"):
        prepare(nn.Sequential(nn.LSTM(3, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare(mlp(8, 2), layers={"*": None})
        prepare(nn.Sequential(QATLinear(8, 2)))


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("model",), TypeError, "prepare: expected model to be an nn.Module, got 'model'"),
        ((nn.Linear,), TypeError, "prepare: expected model to be an nn.Module, got <class"),
        (
            (..., 4),
            TypeError,
            "prepare: expected config to be a QATConfig or None, got 4; for a number of bits write",
        ),
        ((..., QuantSpec()), TypeError, "prepare: expected config to be a QATConfig or None, got QuantSpec("),
        (
            (..., None, {"layers": ["0"]}),
            TypeError,
            "prepare: expected layers to be a dict from patterns to a QATConfig or None, got ['0']",
        ),
        (
            (..., None, {"layers": {0: None}}),
            TypeError,
            "prepare: expected the patterns of layers to be strings, got 0",
        ),
        (
            (..., None, {"layers": {"head": 8}}),
            TypeError,
            "prepare: expected layers['head'] to be a QATConfig or None, got 8",
        ),
        (
            (..., None, {"edges": 1}),
            ValueError,
            "prepare: expected edges to be from 2 to 16 bits or None, got 1",
        ),
        ((..., None, {"edges": True}), TypeError, "prepare: expected edges to be an int, got True"),
        ((..., None, {"edges": 8.0}), TypeError, "prepare: expected edges to be an int, got 8.0"),
        (
            (..., None, {"layers": {"haed": None}}),
            ValueError,
            "prepare: expected each pattern of layers to match a layer, got 'haed'; the nearest name is 'head'",
        ),
        (
            (..., None, {"layers": {"blocks.7.*": SMALL}}),
            ValueError,
            "got 'blocks.7.*'; the nearest name is 'blocks.",
        ),
        (
            (..., None, {"layers": {"blocks.0": None}}),
            ValueError,
            "prepare: expected the patterns of layers to match layers, got 'blocks.0', which contains layers; write "
            "'blocks.0.*'",
        ),
        (
            (..., None, {"example_inputs": 3}),
            TypeError,
            "prepare: expected example_inputs to be a tensor, a tuple of positional or a dict of keyword arguments, "
            "got int",
        ),
    ],
)
def test_errors_change_nothing(arguments, error, message):
    model = GPT()
    before = {name: id(module) for name, module in model.named_modules()}
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error) as caught:
        prepare(*(model if value is ... else value for value in positional), **keywords)
    assert message in str(caught.value)
    assert {name: id(module) for name, module in model.named_modules()} == before


@pytest.mark.parametrize("name", ["scaled", "lazy", "normed", "own", "rnn"])
def test_a_name_of_a_layer_that_cannot_be_quantized_is_an_error(name):
    with pytest.raises(
        ValueError, match=r"prepare: expected layers\['.*'\] to match a layer that can be quantized"
    ):
        prepare(transformer(), layers={name: SMALL})
    assert name in reasons(prepare(transformer(), layers={name: None, "encoder.*": SMALL}))


def test_a_name_of_a_layer_that_is_quantized_by_hand_is_an_error():
    with pytest.raises(ValueError, match=r"got '0', a QATLinear already, .*; set its .config"):
        prepare(nn.Sequential(QATLinear(2, 2), nn.Linear(2, 2)), layers={"0": None})


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_script_modules_are_refused():
    with pytest.raises(TypeError, match=r"got a ScriptModule; prepare it before torch.jit.script"):
        prepare(torch.jit.script(mlp(8, 2)))


# summary


def test_rows_of_a_summary():
    model = prepare(nn.Sequential(nn.Bilinear(3, 4, 9, bias=False), nn.Flatten(), nn.Linear(16, 8)), SMALL)
    first, second = summary(model).rows
    assert first._asdict() == {
        "name": "0",
        "kind": "Bilinear",
        "weight": "float",
        "input": "float",
        "chain": None,
        "range": None,
        "clipped": None,
        "bytes": 4 * 3 * 9 * 4,
        "reason": "no quantized layer for Bilinear yet",
    }
    assert second._asdict() == {
        "name": "2",
        "kind": "QATLinear",
        "weight": "8-bit symmetric per channel 0",
        "input": "8-bit affine per token",
        "chain": None,
        "range": "dynamic",
        "clipped": None,
        "bytes": 8 * 16 + 8 * 4 + 8 * 4,  # integers, scales, bias
        "reason": None,
    }


def test_a_summary_after_calibration_has_the_share_of_clipped_elements():
    model = prepare(nn.Sequential(nn.Linear(4, 2)), QATConfig.static())
    outlier = torch.ones(8, 4)
    outlier[:4] = 3.0  # the mean of both batches' ranges ends at 2
    for _ in range(2):
        with torch.no_grad(), calibrate(model):
            model(torch.ones(8, 4))
            assert summary(model).rows[0].clipped == 0
            model(outlier)
        assert summary(model).rows[0].clipped == 0.25
        model[0].input_quantizer.reset_parameters()
    text = str(summary(model)).splitlines()
    assert "  clipped  bytes" in text[0] and " 25.00%  " in text[1]
    rich = pytest.importorskip("rich.console").Console(width=200, record=True, file=io.StringIO())
    rich.print(summary(model))
    assert [line.split() for line in rich.export_text().splitlines()] == [line.split() for line in text]


@pytest.mark.parametrize(
    "config, expected",
    [
        (QATConfig.dynamic(16), 2 * 6 * 18 + 4 * 6 + 4 * 6),
        (QATConfig.dynamic(3), 6 * 9 + 4 * 6 + 4 * 6),
        (QATConfig.dynamic(2), 6 * 5 + 4 * 6 + 4 * 6),  # rows are padded
        (QATConfig.weight_only(4, 9), 6 * 9 + 2 * 6 * 8 + 4 * 6),
        (QATConfig.tutorial(8), (6 * 18 + 8) + (6 + 8)),
        (cases.CONFIGS["float"], 4 * 6 * 18 + 4 * 6),
    ],
    ids=str,
)
def test_bytes_of_a_layer(config, expected):
    assert summary(QATLinear(18, 6, config=config)).rows[0].bytes == expected


def test_a_summary_is_a_table():
    model = prepare(nn.Sequential(nn.Bilinear(3, 4, 3), nn.Linear(16, 1000)), layers={"1": QATConfig.int8()})
    assert str(summary(model)) == (
        "layer  kind       input                    weight                         range     bytes  in float because\n"
        "0      Bilinear   float                    float                                      156  no quantized layer "
        "for Bilinear yet\n"
        "1      QATLinear  8-bit affine per tensor  8-bit symmetric per channel 0  dynamic  24,000\n"
        "1 of 2 layers are quantized. To check that each of them runs, run the model once inside "
        "qatfast.unused_layers."
    )
    assert repr(summary(model)) == str(summary(model))


def test_a_summary_of_models_that_are_not_prepared():
    assert reasons(mlp(8, 2)) == {"0": "not prepared"}
    assert summary(nn.Sequential(nn.ReLU())).rows == ()
    assert str(summary(nn.ReLU())).endswith("0 of 0 layers are quantized.")
    assert reasons(transformer())["lazy"] == "lazy: run the model once first"
    with pytest.raises(TypeError, match=r"summary: expected model to be an nn.Module, got 3"):
        summary(3)


# unused_layers


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.called, self.read = QATLinear(8, 8), QATLinear(8, 8)

    def forward(self, x):
        return nn.functional.linear(self.called(x), self.read.weight)


def test_layers_whose_weight_is_read_are_named():
    model, x = nn.Sequential(Reads(), QATLinear(8, 8)), cases.normal((5, 8))
    with unused_layers(model) as unused:
        model(x)
        assert unused == []
    assert unused == ["0.read"]
    with torch.no_grad(), unused_layers(model) as unused:
        model(x)
    assert unused == ["0.read"]
    attention = nn.MultiheadAttention(8, 2)
    attention.out_proj = QATLinear(8, 8)
    with unused_layers(attention) as unused:
        attention(x, x, x)
    assert unused == ["out_proj"]


def test_a_direct_call_of_forward_runs_a_layer():
    layer = QATLinear(8, 8)
    with unused_layers(layer) as unused:
        layer.forward(cases.normal((5, 8)))
    assert unused == []


def test_a_shared_layer_is_named_once():
    model = prepare(Shared())
    with unused_layers(model) as unused:
        pass
    assert unused == ["first", "middle"]
    with unused_layers(model) as unused:
        model.again(cases.normal((5, 8)))
    assert unused == ["middle"]


def test_the_list_is_filled_where_the_block_raises():
    model = prepare(mlp(8, 16, 2))
    with pytest.raises(KeyError), unused_layers(model) as unused:
        model[0](cases.normal((5, 8)))
        raise KeyError
    assert unused == ["2"]


def test_blocks_nest_and_leave_nothing_behind():
    model, x = prepare(mlp(8, 16, 2), DYNAMIC), cases.normal((5, 8))
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with unused_layers(model) as outer:
        model[0](x)
        with unused_layers(model) as inner, unused_layers(model[2]) as part:
            pass
        with unused_layers(model) as second:
            model(x)
    assert (outer, inner, part, second) == ([], ["0", "2"], [""], [])
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert qatfast.modules.linear.open_recordings == []


def test_blocks_overlap_between_threads():
    model, x, results = prepare(mlp(8, 16, 2)), cases.normal((5, 8)), []
    barrier = threading.Barrier(4)

    def work(which):
        for _ in range(50):
            barrier.wait()
            with unused_layers(model[which]) as unused:
                model[which](x if which == 0 else cases.normal((5, 16)))
            results.append(unused)

    threads = [threading.Thread(target=work, args=(2 * (i % 2),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[]] * 200
    assert qatfast.modules.linear.open_recordings == []


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("when", ["before", "inside"])
def test_compiled_models_tell_too(when):
    model = nn.Sequential(Reads(), QATLinear(8, 8))
    x = cases.normal((5, 8))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    if when == "before":
        expected = compiled(x)
    for _ in range(3):
        with unused_layers(compiled) as unused:
            y = compiled(x)
        assert unused == ["_orig_mod.0.read"]
        cases.assert_same(compiled(x), y)
    if when == "before":
        cases.assert_same(y, expected)


def test_unused_layers_takes_a_module():
    with (
        pytest.raises(TypeError, match=r"unused_layers: expected model to be an nn.Module, got None"),
        unused_layers(None),
    ):
        pass


@pytest.mark.parametrize("size", [4, 24])
def test_chains_are_evaluated_without_kernels(size, monkeypatch):
    x = torch.randn(2, 3, size, size)
    layers = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 40, 3), nn.ReLU()]
    layers += [nn.Conv2d(40, 40, 2, groups=40), nn.ReLU6(), nn.Conv2d(40, 20, 1, groups=10), nn.ReLU()]
    layers += [nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 2)]
    model = nn.Sequential(*layers)
    model(x)
    prepare(model, example_inputs=x)(x)
    model.eval()
    y = model(x)
    with cached_weights(model):
        assert torch.equal(model(x), y)
    converted = qatfast.convert(model)
    assert torch.equal(converted(x), y)
    monkeypatch.setattr(qatfast.kernels, "extension", None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # once per process, of the missing kernels
        assert torch.equal(model(x), y)
        assert torch.equal(converted(x), y)


@pytest.mark.parametrize("channels", [(4, 8), (8, 8)])
@pytest.mark.parametrize("range", [Learned(), MinMax()], ids=str)
def test_a_convolution_and_its_transposed_twin_have_scales_of_their_own_channels(channels, range):
    """Their output channels are different dimensions of the one weight."""
    torch.manual_seed(0)
    down, up = nn.Conv2d(*channels, 3), nn.ConvTranspose2d(*channels[::-1], 3)
    up.weight = down.weight
    model, x = nn.Sequential(down, up), cases.normal((2, channels[0], 6, 6))
    expected = model(x)
    rows = QuantSpec(8, symmetric=True, granularity=PerChannel(0), range=range)
    model = prepare(model, QATConfig(QuantSpec(8, range=MinMax()), rows, None, None))
    assert model[0].weight is model[1].weight
    assert (model(x) - expected).abs().max() < 0.02 * expected.abs().max()


def test_bytes_of_transposed_convolutions_and_attention():
    up = prepare(nn.Sequential(nn.ConvTranspose2d(4, 64, 3)), QATConfig.int8())
    assert summary(up).rows[0].bytes == 4 * 64 * 9 + 4 * 64 + 4 * 64  # integers, scales, bias
    attention = prepare(nn.Sequential(nn.MultiheadAttention(16, 2, kdim=8, vdim=8)), QATConfig.int8())
    assert summary(attention).rows[0].bytes == 16 * (16 + 8 + 8) + 3 * 4 * 16 + 4 * 3 * 16


def test_a_summary_of_a_converted_model_is_an_error():
    converted = qatfast.convert(prepare(mlp(8, 2), DYNAMIC))
    with pytest.raises(TypeError, match="summary: expected a float or a prepared model, got a converted one"):
        summary(converted)


def test_edges_that_do_not_fit_are_named():
    config = QATConfig(QuantSpec(4, range=MinMax()), QuantSpec(4, True, PerChannel(0)), "int32", None)
    model = mlp(8, 16, 2)
    with pytest.raises(ValueError, match="prepare: edges=16 does not fit the config: QATConfig: expected an"):
        prepare(model, config, edges=16)
    assert type(model[0]) is nn.Linear


def test_chains_and_converted_models_load_with_weights_only():
    x = cases.normal((2, 3, 8, 8))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    model = prepare(model, example_inputs=x)
    model(x)
    for saved in (model.eval(), qatfast.convert(model)):
        buffer = io.BytesIO()
        torch.save(saved, buffer)
        buffer.seek(0)
        with torch.serialization.safe_globals([nn.Sequential, nn.ReLU]):
            other = torch.load(buffer, weights_only=True)
        cases.assert_same(other(x), saved(x))
