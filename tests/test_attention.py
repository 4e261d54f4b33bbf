"""QATMultiheadAttention."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cases
from qatfast import (
    FakeQuantize,
    Learned,
    MinMax,
    MovingAverage,
    PerChannel,
    QATConfig,
    QATLinear,
    QATMultiheadAttention,
    QuantSpec,
    cached_weights,
    calibrate,
    convert,
    fake_quantize,
    quantization_disabled,
)

FLOAT = QATConfig(None, None, None, None)


def inputs(kind="self", batch_first=False, unbatched=False):
    sizes = {
        "self": ((5, 16),) * 3,
        "cross": ((5, 16), (7, 16), (7, 16)),
        "dims": ((5, 16), (7, 12), (7, 20)),
    }
    tensors = []
    for i, (length, size) in enumerate(sizes[kind]):
        shape = (length, size) if unbatched else (3, length, size) if batch_first else (length, 3, size)
        tensors.append(tensors[0] if kind == "self" and tensors else cases.normal(shape, seed=i))
    return tensors


def layers(config=FLOAT, **arguments):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(16, 4, **arguments)
    with torch.no_grad():
        module.in_proj_bias.normal_() if module.in_proj_bias is not None else None
    return QATMultiheadAttention.from_float(module, config=config), module


@pytest.mark.parametrize(
    "kind, arguments",
    [
        ("self", {}),
        ("cross", {"batch_first": True}),
        ("dims", {"kdim": 12, "vdim": 20}),
        ("self", {"add_bias_kv": True, "add_zero_attn": True}),
        ("cross", {"add_zero_attn": True, "bias": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("masks", ["none", "bool", "float", "per_head"])
@pytest.mark.parametrize("need_weights", [False, True], ids=["", "weights"])
def test_the_arithmetic_is_that_of_torch(kind, arguments, masks, need_weights):
    layer, module = layers(**arguments)
    q, k, v = inputs(kind, arguments.get("batch_first", False))
    keys = 5 if kind == "self" else 7
    options = {"need_weights": need_weights, "average_attn_weights": masks == "bool"}
    if masks != "none":
        shape = (12, 5, keys) if masks == "per_head" else (5, keys)
        options["attn_mask"] = cases.normal(shape)
        options["key_padding_mask"] = torch.zeros(3, keys)
        options["key_padding_mask"][1, -1] = -torch.inf
        if masks == "bool":
            options = options | {
                "attn_mask": options["attn_mask"] > 2,
                "key_padding_mask": options["key_padding_mask"] < 0,
            }
    for actual, expected in zip(layer(q, k, v, **options), module(q, k, v, **options), strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", ["self", "cross", "dims"])
@pytest.mark.parametrize("config", [QATConfig.int8(), QATConfig.static(), QATConfig.static(4)], ids=str)
def test_projections_are_quantized(kind, config):
    sizes = {"kdim": 12, "vdim": 20} if kind == "dims" else {}
    layer, module = layers(config, **sizes)
    tensors = inputs(kind)
    y, _ = layer(*tensors)
    hats = [fake_quantize(x) for x in tensors]
    spec = QuantSpec(config.weight.num_bits, symmetric=True, granularity=PerChannel(0))
    if config.input.num_bits == 8:
        reference = copy.deepcopy(module)
        names = ["in_proj_weight"] if kind != "dims" else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
        with torch.no_grad():
            for name in names:
                getattr(reference, name).copy_(fake_quantize(getattr(module, name), **spec.arguments))
        reference.out_proj = QATLinear.from_float(reference.out_proj, config=QATConfig.int8())
        plain = QATMultiheadAttention.from_float(module, config=FLOAT)
        for name in names:
            plain._parameters[name] = reference._parameters[name]
        plain.out_proj = reference.out_proj
        torch.testing.assert_close(y, plain(*hats)[0], rtol=1e-4, atol=2e-2)
    y.square().sum().backward()
    assert all(
        p.grad is not None
        for name, p in layer.named_parameters()
        if "key_" not in name and "value_" not in name
    )
    if config.is_dynamic:
        return
    observed = {
        name for name, m in layer.named_modules() if isinstance(m, FakeQuantize) and m.num_batches > 0
    }
    own = {"input_quantizer"} | ({"key_quantizer", "value_quantizer"} if kind != "self" else set())
    assert own <= observed
    assert kind != "self" or "key_quantizer" not in observed
    expected = layer.eval()(*tensors)[0]
    for same in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        cases.assert_same(same(*tensors)[0], expected)


def test_one_tensor_is_observed_once():
    layer, _ = layers(QATConfig.static())
    layer(*inputs("self"))
    assert layer.input_quantizer.num_batches == 1
    q, k, _ = inputs("cross")
    layer(q, k, k)
    assert layer.key_quantizer.num_batches == 1 and layer.value_quantizer.num_batches == 0


@pytest.mark.parametrize("range", [QuantSpec().range, MovingAverage(), Learned()], ids=str)
def test_quantized_attention(range):
    torch.manual_seed(0)
    layer = QATMultiheadAttention(16, 4, config=QATConfig.int8(), attention=QuantSpec(8, range=range))
    (x, _, _) = inputs("self")
    y, _ = layer(x, x, x)
    plain = copy.deepcopy(layer)
    plain.attention = None
    expected, _ = plain(x, x, x)
    assert not torch.equal(y, expected)
    torch.testing.assert_close(y, expected, rtol=0.2, atol=0.2)
    if not layer.attention.has_state:
        cases.assert_same(layer(x, x, x, need_weights=False)[0].detach(), y.detach())
    per_head = layer(x, x, x, average_attn_weights=False)[1]
    assert per_head.unique().numel() <= 256
    y.sum().backward()


def test_modes():
    layer, module = layers(QATConfig.static())
    tensors = inputs("self")
    expected = module(*tensors)[0]
    with pytest.raises(RuntimeError, match=r"QATMultiheadAttention.input_quantizer: expected a range"):
        layer.eval()(*tensors)
    with torch.no_grad(), calibrate(layer):
        torch.testing.assert_close(layer(*tensors)[0], expected)
    layer(*tensors)
    with quantization_disabled(layer):
        torch.testing.assert_close(layer(*tensors)[0], expected)
    back = layer.to_float()
    assert type(back) is nn.MultiheadAttention and type(back.out_proj) is type(module.out_proj)
    assert back.state_dict().keys() == module.state_dict().keys()
    cases.assert_same(back(*tensors)[0], expected)
    assert QATMultiheadAttention(16, 4).config == QATConfig.static()
    layer.load_state_dict(module.state_dict())


@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_in_an_encoder_layer(padded):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True), 2).eval()
    for block in encoder.layers:
        block.self_attn = QATMultiheadAttention.from_float(block.self_attn, config=QATConfig.dynamic(3))
    (x, _, _) = inputs("self", batch_first=True)
    mask = torch.zeros(3, 5, dtype=torch.bool)
    mask[1, 3:] = padded
    with torch.no_grad():
        y = encoder(x, src_key_padding_mask=mask if padded else None)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            expected = encoder(x, src_key_padding_mask=mask if padded else None)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    torch.testing.assert_close(y[~mask], expected[~mask])


def test_unbatched_and_compiled(fresh_compiler):
    layer, module = layers()
    tensors = inputs("cross", unbatched=True)
    for actual, expected in zip(layer(*tensors), module(*tensors), strict=True):
        torch.testing.assert_close(actual, expected)
    layer.config = QATConfig.int8()
    tensors = inputs("self")
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(*tensors)[0]
    torch.testing.assert_close(y, layer(*tensors)[0])


def test_errors():
    with pytest.raises(
        TypeError, match="QATMultiheadAttention: expected attention to be a QuantSpec or None, got 8"
    ):
        QATMultiheadAttention(16, 4, attention=8)
    with pytest.raises(ValueError, match="expected attention per tensor or per token"):
        QATMultiheadAttention(16, 4, attention=QuantSpec(8, granularity=PerChannel(0)))
    layer, _ = layers()
    tensors = inputs("self")
    with pytest.raises(
        ValueError, match=r"expected attn_mask to have shape \(5, 5\) or \(12, 5, 5\), got \(4, 5\)"
    ):
        layer(*tensors, attn_mask=torch.zeros(4, 5))
    with pytest.raises(ValueError, match=r"expected key_padding_mask to have shape \(3, 5\), got \(3, 4\)"):
        layer(*tensors, key_padding_mask=torch.zeros(3, 4))
    with pytest.raises(RuntimeError, match="expected attn_mask if is_causal is True, got None"):
        layer(*tensors, is_causal=True)


def test_from_float_with_another_config_leaves_its_argument():
    source = QATMultiheadAttention(16, 4)
    other = QATMultiheadAttention.from_float(source, config=QATConfig.int8())
    assert source.out_proj.config == source.config == QATConfig.static()
    assert other.out_proj.config == other.config == QATConfig.int8()
    assert other.out_proj.weight is source.out_proj.weight


@pytest.mark.parametrize("axis", [1, -1])
def test_ranges_of_the_columns_of_a_weight(axis):
    spec = QuantSpec(8, symmetric=True, granularity=PerChannel(axis), range=MinMax())
    layer, _ = layers(QATConfig(None, spec, None, None))
    q, k, v = inputs("cross")
    y = layer(q, k, v)[0]
    packed = fake_quantize(layer.in_proj_weight, 8, symmetric=True, granularity=PerChannel(axis)).chunk(3)
    expected = layers()[0]
    with torch.no_grad():
        expected.in_proj_weight.copy_(torch.cat(packed))
        expected.out_proj.weight.copy_(
            fake_quantize(layer.out_proj.weight, 8, symmetric=True, granularity=PerChannel(axis))
        )
    torch.testing.assert_close(y, expected(q, k, v)[0])
    cases.assert_same(convert(layer)(q, k, v)[0], layer.eval()(q, k, v)[0])


def test_the_gradient_of_a_learned_scale_counts_the_whole_weight():
    """It does not depend on whether query, key and value are one tensor."""
    layer, _ = layers(QATConfig(None, QuantSpec(4, range=Learned()), None, None))
    q, _, _ = inputs("self")
    gradients = []
    for operands in ((q, q, q), (q, q.clone(), q.clone())):
        layer.zero_grad()
        layer(*operands)[0].square().sum().backward()
        gradients.append(layer.weight_quantizer.scale.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    "config",
    [
        QATConfig.int8(),
        QATConfig.static(),
        QATConfig.static(4),
        QATConfig(None, QuantSpec(4, range=Learned()), None, None),
        QATConfig(None, QuantSpec(4), None, None),
    ],
    ids=["int8", "static", "learned", "weight only", "weight only, dynamic"],
)
def test_cached_weights_change_no_bit(config):
    layer, _ = layers(config)
    q, _, _ = inputs("self")
    for operands in ((q, q, q), (q, q.clone(), q.clone())):
        layer(*operands)
    layer.eval()
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            expected = [layer(*operands)[0] for operands in ((q, q, q), (q, q.clone(), q))]
            with cached_weights(layer):
                for _ in range(2):
                    found = [layer(*operands)[0] for operands in ((q, q, q), (q, q.clone(), q))]
                    for ours, theirs in zip(found, expected, strict=True):
                        cases.assert_same(ours, theirs)
                with torch.no_grad():
                    layer.in_proj_weight.mul_(0.5)
                    found = layer(q, q, q)[0]
            cases.assert_same(found, layer(q, q, q)[0].detach())
