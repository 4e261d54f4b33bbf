"""QATLinear and its compatibility with nn.Linear."""

import copy
import io
import pickle
import warnings
from collections import OrderedDict

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import cases
from qatfast import (
    FakeQuantize,
    PerChannel,
    PerGroup,
    PerToken,
    QATConfig,
    QATLinear,
    QuantSpec,
    fake_quantize,
    qat_linear,
)


def small(**kwargs):
    torch.manual_seed(0)
    return QATLinear(16, 6, **kwargs)


@pytest.mark.parametrize("config", cases.CONFIGS.values(), ids=cases.CONFIGS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_it_computes_qat_linear_on_its_parameters(config, bias, device):
    layer = small(bias=bias, config=config, device=device)
    x = cases.normal((2, 3, 16), device=device)
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias, config=config))
    cases.assert_same(layer.eval()(x), layer.train()(x))


def test_num_bits_is_short_for_the_tutorial_config():
    assert QATLinear(4, 3).config == QATConfig.tutorial(8) == QATConfig()
    assert QATLinear(4, 3, num_bits=5).config == QATConfig.tutorial(5)
    assert QATLinear(4, 3, config=QATConfig.int8()).config == QATConfig.int8()


def test_it_is_an_nn_linear():
    layer = small()
    assert isinstance(layer, nn.Linear)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    assert list(layer.buffers()) == []
    assert (layer.in_features, layer.out_features) == (16, 6)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["default", "float64"])
def test_the_same_seed_gives_the_weights_of_nn_linear(bias, dtype):
    torch.manual_seed(3)
    ours = QATLinear(16, 6, bias, None, dtype)
    torch.manual_seed(3)
    theirs = nn.Linear(16, 6, bias, None, dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, value in theirs.state_dict().items():
        cases.assert_same(ours.state_dict()[name], value)
    torch.manual_seed(4)
    ours.reset_parameters()
    torch.manual_seed(4)
    theirs.reset_parameters()
    cases.assert_same(ours.weight, theirs.weight)


def test_checkpoints_load_both_ways():
    ours, theirs = small(num_bits=4), nn.Linear(16, 6)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    cases.assert_same(theirs.weight, ours.weight)
    nn.init.ones_(theirs.weight)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    cases.assert_same(ours.weight, theirs.weight)
    assert ours.config == QATConfig.tutorial(4)


def test_a_file_of_the_state_loads_with_weights_only():
    buffer = io.BytesIO()
    torch.save(small().state_dict(), buffer)
    buffer.seek(0)
    nn.Linear(16, 6).load_state_dict(torch.load(buffer, weights_only=True), strict=True)


def saved_and_loaded(layer):
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer)), saved_and_loaded]
)
@pytest.mark.parametrize("config", [QATConfig.int8(), cases.CONFIGS["per_group"], QATConfig()], ids=str)
def test_copies_and_files_of_the_module(duplicate, config):
    layer = small(config=config).eval()
    other = duplicate(layer)
    assert type(other) is QATLinear
    assert other.config == config
    assert other.config.codes == config.codes
    assert not other.training
    x = cases.normal((5, 16))
    cases.assert_same(other(x), layer(x))


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
def test_dtype_moves(dtype, device):
    layer = small().to(device, dtype)
    assert layer.weight.dtype == dtype
    x = cases.normal((5, 16), dtype, device=device)
    assert layer(x).dtype == dtype
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias))


def test_meta_device():
    layer = QATLinear(16, 6, device="meta")
    assert layer(torch.empty(2, 3, 16, device="meta")).shape == (2, 3, 6)
    assert layer.to_empty(device="cpu").weight.device.type == "cpu"
    assert nn.utils.skip_init(QATLinear, 16, 6, num_bits=4).config == QATConfig.tutorial(4)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_from_float_and_to_float_share_the_parameters(bias):
    linear = nn.Linear(16, 6, bias, dtype=torch.float64).eval()
    layer = QATLinear.from_float(linear, num_bits=4)
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.config == QATConfig.tutorial(4)
    back = layer.to_float()
    assert type(back) is nn.Linear
    assert back.weight is linear.weight
    assert back.bias is linear.bias
    assert not back.training
    assert (back.in_features, back.out_features) == (16, 6)
    assert QATLinear.from_float(nn.Linear(16, 6), config=QATConfig.int8()).training


def pruned(layer):
    return nn.utils.prune.l1_unstructured(layer, "weight", 0.5)


@pytest.mark.parametrize("compute", [pruned, nn.utils.parametrizations.weight_norm])
def test_computed_weights_train_but_cannot_be_shared(compute):
    layer = compute(small())
    layer(torch.ones(2, 16)).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
    message = "expected weight to be an nn.Parameter, got a tensor computed from other parameters"
    with pytest.raises(TypeError, match=f"QATLinear.to_float: {message}"):
        layer.to_float()
    with pytest.raises(TypeError, match=f"QATLinear.from_float: {message}"):
        QATLinear.from_float(compute(nn.Linear(16, 6)))


def test_from_float_draws_no_random_number():
    linear = nn.Linear(16, 6)
    before = torch.get_rng_state()
    QATLinear.from_float(linear).to_float()
    assert torch.equal(torch.get_rng_state(), before)


def test_frozen_parameters_stay_frozen():
    linear = nn.Linear(16, 6).requires_grad_(False)
    assert not QATLinear.from_float(linear).weight.requires_grad
    assert not QATLinear.from_float(linear).to_float().bias.requires_grad


@pytest.mark.parametrize(
    "layer, expected",
    [
        (
            lambda: QATLinear(10, 64),
            "QATLinear(in_features=10, out_features=64, bias=True, num_bits=8, input=float, weight=affine per tensor, "
            "bias=affine per tensor, output=affine per tensor)",
        ),
        (
            lambda: QATLinear(10, 64, bias=False, config=QATConfig.int8()),
            "QATLinear(in_features=10, out_features=64, bias=False, num_bits=8, input=affine per tensor, "
            "weight=symmetric per channel 0, bias=float, output=float)",
        ),
        (
            lambda: QATLinear(64, 10, config=QATConfig.weight_only()),
            "QATLinear(in_features=64, out_features=10, bias=True, num_bits=4, input=float, "
            "weight=affine per group of 32, bias=float, output=float)",
        ),
        (
            lambda: QATLinear(
                4,
                2,
                config=QATConfig(
                    QuantSpec(8, granularity=PerToken()), QuantSpec(4, symmetric=True), None, None
                ),
            ),
            "QATLinear(in_features=4, out_features=2, bias=True, input=8-bit affine per token, "
            "weight=4-bit symmetric per tensor, bias=float, output=float)",
        ),
        (
            lambda: QATLinear(4, 2, config=cases.CONFIGS["float"]),
            "QATLinear(in_features=4, out_features=2, bias=True, input=float, weight=float, bias=float, output=float)",
        ),
    ],
)
def test_repr_shows_sizes_and_what_is_quantized_how(layer, expected):
    assert repr(layer()) == expected


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: QATLinear(10, 64, 8),
            TypeError,
            "QATLinear: expected bias to be a bool, got 8; for a bit width write QATLinear(10, 64, num_bits=8)",
        ),
        (lambda: QATLinear(10, 64, None), TypeError, "QATLinear: expected bias to be a bool, got None"),
        (
            lambda: QATLinear(10, 64, num_bits=4, config=QATConfig.int8()),
            ValueError,
            "QATLinear: expected num_bits or config, got both; write num_bits=4 alone, which is short for "
            "config=QATConfig.tutorial(4), or put the bits into config",
        ),
        (
            lambda: QATLinear(10, 64, config=QuantSpec(8)),
            TypeError,
            "QATLinear: expected config to be a QATConfig, got QuantSpec(num_bits=8",
        ),
        (lambda: QATLinear(10, 64, num_bits=17), ValueError, "expected num_bits to be from 2 to 16, got 17"),
        (lambda: QATLinear(10, 64, num_bits=2.5), TypeError, "expected num_bits to be an int, got 2.5"),
        (lambda: QATLinear(10, 64, num_bits=True), TypeError, "expected num_bits to be an int, got True"),
        (
            lambda: QATLinear(10, 64, config=QATConfig.weight_only(4, 32)),
            ValueError,
            "QATLinear: expected in_features to be divisible by group_size=32 of config.weight, got 10; write a "
            "group_size that divides 10",
        ),
        (
            lambda: QATLinear(10, 64, config=QATConfig(output=QuantSpec(granularity=PerGroup(3)))),
            ValueError,
            "QATLinear: expected out_features to be divisible by group_size=3 of config.output, got 64",
        ),
        (
            lambda: QATLinear(10, 64, config=QATConfig(weight=QuantSpec(granularity=PerChannel(2)))),
            ValueError,
            "QATLinear: expected the axis of config.weight to be from -2 to 1 for its 2 dimensions, got 2; write "
            "PerChannel(0) for one scale per output channel",
        ),
        (
            lambda: QATLinear(10, 64, config=QATConfig(bias=QuantSpec(granularity=PerChannel(1)))),
            ValueError,
            "QATLinear: expected the axis of config.bias to be from -1 to 0 for its 1 dimensions, got 1",
        ),
        (
            lambda: QATLinear.from_float(nn.ReLU()),
            TypeError,
            "QATLinear.from_float: expected linear to be an nn.Linear, got ReLU",
        ),
        (
            lambda: QATLinear.from_float(nn.Linear(2, 2), num_bits=4, config=QATConfig()),
            ValueError,
            "QATLinear: expected num_bits or config, got both",
        ),
    ],
)
def test_errors_say_what_to_write(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_a_bias_that_is_not_there_needs_no_granularity():
    QATLinear(10, 7, bias=False, config=QATConfig(bias=QuantSpec(granularity=PerGroup(3))))


def test_the_settings_after_bias_are_keyword_only():
    with pytest.raises(TypeError):
        QATLinear(10, 64, True, None, None, 8)
    with pytest.raises(TypeError):
        QATLinear.from_float(nn.Linear(2, 2), 8)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_it_trains_in_a_sequence_with_inplace_relu(bias, device):
    model = nn.Sequential(
        small(bias=bias, device=device), nn.ReLU(inplace=True), QATLinear(6, 2, device=device)
    )
    model(cases.normal((5, 16), device=device)).square().mean().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_weights_swapped_for_a_call_are_used():
    layer, x = small(), cases.normal((5, 16))
    weight, bias = cases.normal((6, 16), seed=1), cases.normal((6,), seed=2)
    y = torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))
    cases.assert_same(y, qat_linear(x, weight, bias))


def test_parametrized_weights_are_used():
    layer, x = small(), cases.normal((5, 16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.parametrizations.weight_norm(layer)
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias))
    layer(x).sum().backward()
    assert layer.parametrizations.weight.original0.grad is not None


def test_the_output_lies_on_its_grid():
    y = small(num_bits=3)(cases.normal((50, 16)))
    assert y.unique().numel() <= 8
    cases.assert_same(fake_quantize(y.detach(), 3), y)


def encoder_layer(**kwargs):
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, **kwargs)


def with_quantized_linears(layer):
    layer = copy.deepcopy(layer)
    layer.linear1 = QATLinear.from_float(layer.linear1, config=QATConfig.dynamic(2))
    layer.linear2 = QATLinear.from_float(layer.linear2, config=QATConfig.dynamic(2))
    return layer


def without_fast_path(module, *args, **kwargs):
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


SAME = {
    "itself": lambda module: module,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "file": lambda module: saved_and_loaded(module),
    "from_float": lambda layer: replaced(layer, QATLinear.from_float),
    "after a hook was removed": lambda layer: replaced(layer, hooked_and_unhooked),
}


def replaced(layer, make):
    layer.linear1, layer.linear2 = make(layer.linear1), make(layer.linear2)
    return layer


def hooked_and_unhooked(linear):
    linear.register_forward_pre_hook(lambda *_: None).remove()
    return linear


@pytest.mark.parametrize("same", SAME.values(), ids=SAME)
@pytest.mark.parametrize("which", ["linear1", "linear2"])
def test_a_transformer_layer_calls_it_in_evaluation(same, which):
    """The fast path of torch reads the weights; the forward pre-hook of QATLinear disables it."""
    plain = encoder_layer().eval()
    quantized = same(with_quantized_linears(plain)).eval()
    setattr(quantized, which, copy.deepcopy(getattr(plain, which)))  # the other QATLinear is enough
    x = cases.normal((2, 5, 16))
    with torch.no_grad():
        expected = without_fast_path(quantized, x)
        assert not torch.allclose(expected, plain(x), atol=1e-3)
        assert torch.allclose(quantized(x), expected, atol=1e-5)


def test_the_float_layer_of_it_takes_the_fast_path_again():
    plain = encoder_layer().eval()
    back = replaced(with_quantized_linears(plain), lambda layer: layer.to_float())
    assert type(back.linear1._forward_pre_hooks) is OrderedDict
    assert len(back.linear1._forward_pre_hooks) == 0
    x = cases.normal((2, 5, 16))
    with torch.no_grad(), torch.profiler.profile() as profile:
        assert torch.equal(back(x), plain(x))
    assert [event.name for event in profile.events()].count("aten::_transformer_encoder_layer_fwd") == 2


@pytest.mark.parametrize("nested", [True, False])
def test_a_transformer_encoder_on_padded_batches(nested):
    """In evaluation, nn.TransformerEncoder packs a padded batch into a nested tensor."""
    encoder = nn.TransformerEncoder(
        with_quantized_linears(encoder_layer()), 2, enable_nested_tensor=nested
    ).eval()
    x = cases.normal((3, 5, 16))
    padding = torch.arange(5) >= torch.tensor([[5], [3], [1]])
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that nested tensors are a prototype
        y = encoder(x, src_key_padding_mask=padding)
        expected = without_fast_path(encoder, x, src_key_padding_mask=padding)
    # attention differs in the last bits, which may change a level by one
    assert ((y - expected).abs()[~padding] < 1e-5).float().mean() > 0.95


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
@pytest.mark.parametrize("config", [QATConfig(), QATConfig.int8(), QATConfig.dynamic(4)], ids=str)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors_are_their_rows(layout, config):
    layer = small(config=config)
    parts = [cases.normal((3, 16)), cases.normal((1, 16), seed=1)]
    nested = torch.nested.as_nested_tensor(parts, layout=layout).requires_grad_()
    y = layer(nested)
    rows = torch.cat(parts).requires_grad_()
    expected = qat_linear(rows, layer.weight, layer.bias, config=config)
    for actual, wanted in zip(y.unbind(), expected.split([3, 1]), strict=True):
        cases.assert_same(actual, wanted)
    (gradient,) = torch.autograd.grad(sum(part.square().sum() for part in y.unbind()), nested)
    (wanted,) = torch.autograd.grad(expected.square().sum(), rows)
    cases.assert_same(torch.cat(gradient.unbind()), wanted)


def test_hooks_of_a_quantized_layer_run():
    layer, x, calls = small(), cases.normal((5, 16)), []
    handles = [
        layer.register_forward_pre_hook(lambda *_: calls.append("pre")),
        layer.register_forward_hook(lambda *_: calls.append("post")),
        layer.register_forward_pre_hook(lambda *_: calls.append("first"), prepend=True),
    ]
    layer(x)
    assert calls == ["first", "pre", "post"]
    for handle in handles:
        handle.remove()
    layer(x)
    assert len(calls) == 3
    layer._forward_pre_hooks.clear()  # removes the mark too
    layer.register_forward_pre_hook(lambda *_: calls.append("again"))
    layer(x)
    assert calls[3:] == ["again"]


HOOKS = [
    "register_forward_pre_hook",
    "register_forward_hook",
    "register_full_backward_pre_hook",
    "register_full_backward_hook",
]
GLOBAL_HOOKS = [name.replace("register_", "register_module_") for name in HOOKS]


@pytest.mark.parametrize("name", [*HOOKS, *GLOBAL_HOOKS])
def test_a_hook_runs_where_there_is_no_other(name):
    layer, calls = small(), []
    owner = layer if name in HOOKS else nn.modules.module
    handle = getattr(owner, name)(lambda *_: calls.append(1))
    try:
        layer(cases.normal((5, 16), requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert calls == [1]
    layer(cases.normal((5, 16), requires_grad=True)).sum().backward()
    assert calls == [1]


def recording_hooks(linear, calls):
    """Registers a hook of every kind of nn.Module; returns their handles."""

    def hook(kind):
        return lambda *_, **__: calls.append(kind)

    return [
        linear.register_forward_pre_hook(hook("pre")),
        linear.register_forward_pre_hook(hook("pre with kwargs"), with_kwargs=True),
        linear.register_forward_hook(hook("post")),
        linear.register_forward_hook(hook("post with kwargs"), with_kwargs=True, always_call=True),
        linear.register_full_backward_pre_hook(hook("backward pre")),
        linear.register_full_backward_hook(hook("backward")),
        linear.register_state_dict_pre_hook(hook("state_dict pre")),
        linear.register_state_dict_post_hook(hook("state_dict")),
        linear.register_load_state_dict_pre_hook(hook("load pre")),
        linear.register_load_state_dict_post_hook(hook("load")),
    ]


def used(layer):
    layer(cases.normal((5, 16), requires_grad=True)).sum().backward()
    layer.load_state_dict(layer.state_dict())


ALL_HOOKS = [
    "backward",
    "backward pre",
    "load",
    "load pre",
    "post",
    "post with kwargs",
    "pre",
    "pre with kwargs",
]
ALL_HOOKS += ["state_dict", "state_dict pre"]


@pytest.mark.parametrize(
    "make", [QATLinear.from_float, lambda linear: QATLinear.from_float(linear).to_float()]
)
def test_hooks_of_all_kinds_carry_over(make):
    linear, calls = nn.Linear(16, 6), []
    recording_hooks(linear, calls)
    layer = make(linear)
    assert layer._is_full_backward_hook is True
    del linear  # one kind of hook is bound to its module and fails if that is deleted
    used(layer)
    assert sorted(calls) == ALL_HOOKS


def test_the_handle_of_a_hook_belongs_to_the_layer_it_was_made_on():
    linear, calls = nn.Linear(16, 6), []
    handle = linear.register_forward_pre_hook(lambda *_: calls.append(1))
    layer = QATLinear.from_float(linear)
    layer.register_forward_hook(lambda *_: calls.append(2))
    handle.remove()
    x = cases.normal((5, 16))
    linear(x)
    assert calls == []
    layer(x)
    assert calls == [1, 2]


def test_a_hook_that_is_always_called_sees_an_error():
    linear, calls = nn.Linear(16, 6), []
    linear.register_forward_hook(lambda *_: calls.append(1), always_call=True)
    with pytest.raises(ValueError):
        QATLinear.from_float(linear)(cases.normal((5, 3)))
    assert calls == [1]


@pytest.mark.parametrize(
    "make", [QATLinear.from_float, lambda linear: QATLinear.from_float(linear).to_float()]
)
def test_all_else_that_a_layer_carries(make):
    linear = nn.Linear(16, 6)
    linear.lr_scale, linear.tags = 0.5, ["head"]
    linear.register_buffer("seen", torch.ones(2))
    linear.register_buffer("scratch", torch.ones(3), persistent=False)
    linear.register_parameter("gamma", nn.Parameter(torch.ones(6)))
    linear.dropout = nn.Dropout()
    linear.dropout.eval()
    layer = make(linear)
    assert (layer.lr_scale, layer.tags) == (0.5, ["head"])
    assert layer.seen is linear.seen
    assert layer.gamma is linear.gamma
    assert layer.dropout is linear.dropout
    assert not layer.dropout.training
    assert layer.state_dict().keys() == linear.state_dict().keys()
    layer.register_buffer("more", torch.ones(1))
    assert not hasattr(linear, "more")


def test_a_quantized_layer_keeps_its_config_unless_another_is_given():
    layer = small(config=QATConfig.dynamic(4))
    assert QATLinear.from_float(layer).config == QATConfig.dynamic(4)
    assert QATLinear.from_float(layer, num_bits=3).config == QATConfig.tutorial(3)
    assert QATLinear.from_float(layer, config=QATConfig.int8()).config == QATConfig.int8()


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class ScaledQAT(QATLinear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_subclasses_with_the_same_forward_are_taken():
    class Named(nn.Linear):
        pass

    out_proj = nn.MultiheadAttention(16, 2).out_proj
    assert type(QATLinear.from_float(out_proj)) is QATLinear
    assert QATLinear.from_float(Named(16, 6)).out_features == 6
    layer = ScaledQAT.from_float(nn.Linear(16, 6), config=QATConfig.int8())
    assert type(layer) is ScaledQAT
    other = ScaledQAT.from_float(layer)
    assert other.config == QATConfig.int8()
    x = cases.normal((5, 16))
    cases.assert_same(other(x), 2 * qat_linear(x, layer.weight, layer.bias, config=layer.config))


def with_own_forward(linear):
    linear.forward = lambda input: input
    return linear


def in_complex_numbers():
    return nn.Linear(16, 6, dtype=torch.complex64)


def of_a_tensor_subclass():
    class Int8Weight(nn.Parameter):
        pass

    linear = nn.Linear(16, 6)
    linear.weight = Int8Weight(linear.weight.detach())
    return linear


def with_attribute_config():
    linear = nn.Linear(16, 6)
    linear.config = {}
    return linear


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: nn.LazyLinear(6),
            "expected initialized parameters, got LazyLinear before its first forward; run the model once first",
        ),
        (
            lambda: Scaled(16, 6),
            "expected the forward of nn.Linear, got Scaled, which has a forward of its own; write a subclass of",
        ),
        (lambda: ScaledQAT(16, 6), "expected the forward of nn.Linear, got ScaledQAT"),
        (
            lambda: with_own_forward(nn.Linear(16, 6)),
            "expected the forward of the class, got one that is set on the instance; remove it first",
        ),
        (
            in_complex_numbers,
            "expected weight to be float32, float64, float16 or bfloat16, got torch.complex64",
        ),
        (
            of_a_tensor_subclass,
            "expected weight to be an nn.Parameter, got Int8Weight; convert it to a plain one",
        ),
        (with_attribute_config, "expected no attribute config, which a QATLinear has of its own"),
        (lambda: nn.utils.spectral_norm(nn.Linear(16, 6)), "got a tensor computed from other parameters"),
    ],
)
def test_from_float_refuses_what_would_be_lost(make, message):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        linear = make()
    with pytest.raises(TypeError) as caught:
        QATLinear.from_float(linear)
    assert str(caught.value).startswith("QATLinear.from_float: expected ")
    assert message in str(caught.value)


def test_to_float_refuses_a_forward_of_the_instance():
    with pytest.raises(TypeError, match=r"QATLinear.to_float: expected the forward of the class"):
        with_own_forward(small()).to_float()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_call_is_left_behind():
    linear = nn.Linear(16, 6)
    linear.compile(backend="eager")
    layer, x = QATLinear.from_float(linear), cases.normal((5, 16))
    cases.assert_same(layer(x), qat_linear(x, layer.weight, layer.bias))


def test_a_group_size_is_checked_with_the_weight_there_is():
    linear = nn.Linear(16, 6)
    linear.weight = nn.Parameter(linear.weight.detach()[:, :10].clone())
    with pytest.raises(
        ValueError, match=r"in_features to be divisible by group_size=16 of config.weight, got 10"
    ):
        QATLinear.from_float(linear, config=QATConfig.weight_only(4, 16))


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("training", [True, False])
def test_with_dynamic_a_row_depends_on_that_row_only(num_bits, training):
    layer = QATLinear(64, 64, config=QATConfig.dynamic(num_bits)).train(training)
    x = cases.normal((8, 64)) * torch.arange(1.0, 9).unsqueeze(1)
    for row in range(8):
        cases.assert_same(layer(x[row : row + 1]), layer(x)[row : row + 1])


def changed_last_token(config):
    """Returns the logits of a causal model before the last token, for two different last tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(QATLinear(32, 64, config=config), nn.ReLU(), QATLinear(64, 32, config=config))
    x = cases.normal((2, 6, 32))
    other = x.clone()
    other[:, -1] *= 10
    return model(x)[:, :-1], model(other)[:, :-1]


def test_with_dynamic_nothing_leaks_along_a_sequence():
    cases.assert_same(*changed_last_token(QATConfig.dynamic()))
    before, after = changed_last_token(QATConfig.int8())
    assert not torch.equal(before, after)


@pytest.mark.parametrize("config", [None, QATConfig.int8(), QATConfig.weight_only(4, 16)], ids=str)
def test_a_whole_model_loads_with_weights_only(config):
    model = nn.Sequential(QATLinear(16, 8, config=config), nn.ReLU(), FakeQuantize(4, granularity=PerToken()))
    model[0].register_buffer("seen", torch.ones(1))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    # the user must allow classes of torch.nn; importing qatfast allows its own classes
    with torch.serialization.safe_globals([nn.Sequential, nn.ReLU]):
        other = torch.load(buffer, weights_only=True)
    assert other[0].config == model[0].config
    assert other[0].config.codes == model[0].config.codes
    x = cases.normal((5, 16))
    cases.assert_same(other(x), model(x))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("config", [QATConfig(), QATConfig.dynamic()], ids=str)
def test_compilers_take_the_layer_as_it_is(config):
    layer, x = small(config=config), cases.normal((5, 16))
    expected = layer(x)
    cases.assert_same(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    cases.assert_same(torch.export.export(layer, (x,)).module()(x), expected)
    cases.assert_same(torch.jit.trace(layer, (x,))(x), expected)
