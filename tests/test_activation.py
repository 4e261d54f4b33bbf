"""ReLU and ReLU6 that keep one bit per element, and where prepared models use them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import cases
import qatfast
from qatfast import activation

FUNCTIONS = {"relu": (F.relu, None), "relu6": (F.relu6, 6.0)}
SPECIAL = [0.0, -0.0, 6.0, 7.0, -1.0, torch.inf, -torch.inf, 1e-40, torch.nan]


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def assert_same(y, expected):
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    known = ~y.isnan()
    assert torch.equal(torch.signbit(y)[known], torch.signbit(expected)[known])
    assert y.stride() == expected.stride()


@pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)
@pytest.mark.parametrize("size", [0, 1, 7, 8, 63, 65, 70001])
def test_values_and_gradients_are_those_of_torch(kernels, device, function, dtype, size):
    reference, limit = function
    x = 5 * torch.randn(size, dtype=dtype, device=device)
    x[: len(SPECIAL)] = torch.tensor(SPECIAL, dtype=dtype)[:size]
    x.requires_grad_()
    y, expected = torch.ops.qatfast.relu(x, limit), reference(x)
    assert_same(y, expected)
    dy = torch.randn_like(y)
    dx, other = (torch.autograd.grad(result, x, dy)[0] for result in (y, expected))
    # ATen's ReLU6 passes the gradient of a NaN in the last elements of a tensor only.
    other = torch.where(x.isnan(), dy, other)
    assert torch.equal(dx, other)


@pytest.mark.parametrize("layout", ["channels last", "transposed", "strided", "expanded"])
def test_results_lie_in_memory_as_those_of_torch(kernels, device, function, layout):
    reference, limit = function
    x = torch.randn(4, 6, 5, 7, device=device)
    x = {
        "channels last": lambda: x.to(memory_format=torch.channels_last),
        "transposed": lambda: x.transpose(0, 2),
        "strided": lambda: x[:, ::2],
        "expanded": lambda: x[:1].expand(4, 6, 5, 7),
    }[layout]()
    x = x.detach().requires_grad_()
    y, expected = torch.ops.qatfast.relu(x, limit), reference(x)
    assert torch.equal(y, expected) and y.stride() == torch.empty_like(x).stride()
    dy = torch.randn(y.shape, device=device)
    assert torch.equal(*(torch.autograd.grad(result, x, dy)[0] for result in (y, expected)))


def test_the_gradient_has_a_gradient_and_a_tangent(kernels, device, function):
    _, limit = function
    x = torch.tensor([-2.0, 0.5, 3.0, 8.0], dtype=torch.float64, device=device).requires_grad_()
    relu = lambda x: torch.ops.qatfast.relu(x, limit)  # noqa: E731
    assert torch.autograd.gradcheck(relu, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(relu, x)


def test_operators_fit_their_schemas(kernels, device, function):
    _, limit = function
    x = torch.randn(3, 20, device=device)
    torch.library.opcheck(torch.ops.qatfast.relu, (x.requires_grad_(), limit))
    torch.library.opcheck(torch.ops.qatfast.relu_forward, (x.detach(), limit))


def test_other_dtypes_are_errors(kernels, device):
    with pytest.raises(TypeError, match="relu: expected"):
        torch.ops.qatfast.relu(torch.ones(3, dtype=torch.int32, device=device))


@pytest.mark.parametrize("limit", [-1.0, -torch.inf, torch.nan])
def test_limits_below_0_are_errors(kernels, device, limit):
    for op in (torch.ops.qatfast.relu, torch.ops.qatfast.relu_forward):
        with pytest.raises(ValueError, match=f"relu: expected limit to be at least 0, got {limit:g}"):
            op(torch.ones(3, device=device), limit)


# Chains


class Net(nn.Module):
    """Chains with readers and with a quantizer of their own."""

    def __init__(self, activation, norm=True):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.activation = activation
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.linear1, self.linear2 = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        x = self.activation(self.norm(self.conv1(x)))
        x = self.activation(self.conv2(x)) + x
        return self.linear2(self.activation(self.linear1(x.mean((2, 3)))))


ACTIVATIONS = {
    "module": nn.ReLU(),
    "in place": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "relu6 in place": nn.ReLU6(inplace=True),
    "function": F.relu,
    "method": torch.Tensor.relu,
    "method in place": torch.Tensor.relu_,
}
BY_ACTIVATION = pytest.mark.parametrize("name", ACTIVATIONS)


class Wrapped(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def prepared(name, x, norm=True):
    found = ACTIVATIONS[name]
    torch.manual_seed(0)
    net = Net(found if isinstance(found, nn.Module) else Wrapped(found), norm)
    nn.init.constant_(net.conv1.bias, 5.0)  # results on both sides of 6
    if norm:
        nn.init.constant_(net.norm.weight, 6.0)
    return qatfast.prepare(net.to(x.device), example_inputs=x)


def nodes_of(tensor):
    """Returns the names of the nodes of a graph."""
    names, stack, seen = [], [tensor.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.append(node.name())
        stack += [other for other, _ in node.next_functions]
    return names


def saved_bytes(forward):
    """Returns the number of bytes that autograd keeps."""
    storages, _ = cases.kept(forward)
    return sum(storages.values())


@BY_ACTIVATION
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_training_computes_what_torchs_activations_compute(kernels, device, monkeypatch, name, norm):
    x = torch.randn(2, 3, 8, 8, device=device)
    results = []
    for keeps_bits in (activation.keeps_bits, lambda _: False):
        monkeypatch.setattr(activation, "keeps_bits", keeps_bits)
        net, input = prepared(name, x, norm), x.clone().requires_grad_()
        for _ in range(2):
            y = net(input)
            y.square().sum().backward()
        results.append((y, input.grad, *(p.grad for p in net.parameters()), *net.buffers()))
    assert all(map(torch.equal, *results))


@BY_ACTIVATION
def test_no_activation_before_a_quantizer_keeps_its_result(kernels, device, name):
    x = torch.randn(2, 3, 8, 8, device=device)
    net = prepared(name, x)
    assert not [node for node in nodes_of(net(x)) if "Relu" in node or "Hardtanh" in node]


def test_less_is_kept(kernels, device, monkeypatch):
    x = torch.randn(8, 3, 32, 32, device=device)
    net = prepared("in place", x)
    few = saved_bytes(lambda: net(x))
    monkeypatch.setattr(activation, "keeps_bits", lambda _: False)
    many = saved_bytes(lambda: net(x))
    result = 8 * 8 * 30 * 30 * 4  # bytes of one of the two results of a convolution's activation
    assert many - few > 1.5 * result


@pytest.mark.parametrize("layer", ["conv2", "linear1"])  # without a reader, with one
def test_gradients_and_hooks_belong_to_the_result_of_the_layer(kernels, device, monkeypatch, layer):
    x, results = torch.randn(2, 3, 8, 8, device=device), []
    for keeps_bits in (activation.keeps_bits, lambda _: False):
        monkeypatch.setattr(activation, "keeps_bits", keeps_bits)
        net, kept, seen = prepared("module", x), [], []

        def hook(module, args, output, kept=kept, seen=seen):
            output.retain_grad()
            output.register_hook(lambda grad: seen.append(grad) or 2 * grad)
            kept.append(output)

        net.get_submodule(layer).register_forward_hook(hook)
        net(x).sum().backward()
        results.append((kept[0].grad, seen[0], net.norm.weight.grad))
        kept[0].grad = None
        assert kept[0].grad is None
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][0], 2 * results[0][1])


class Copy(torch.autograd.Function):
    """Calls of ``apply`` do not reach ``__torch_function__``."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


class InPlace(nn.Module):
    """Nobody takes what the activation returns. The recorded forward, without ``through``, has no view."""

    def __init__(self):
        super().__init__()
        self.a, self.relu, self.b = nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.Conv2d(8, 4, 1)
        self.through = None

    def forward(self, x):
        y = self.a(x)
        view = y.flatten(1) if self.through else None
        self.relu(y)
        if self.through:
            y.retain_grad()
        self.kept = y, view
        if self.through == "checkpoint":
            return checkpoint(self.b, y, use_reentrant=True)
        return self.b(Copy.apply(y) if self.through == "function" else y)


@pytest.mark.parametrize("through", ["layer", "function", "checkpoint"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "autocast"])
def test_in_place_means_in_place(kernels, device, monkeypatch, through, dtype):
    x, results = torch.randn(2, 3, 8, 8, device=device), []
    for keeps_bits in (activation.keeps_bits, lambda _: False):
        torch.manual_seed(0)
        net = qatfast.prepare(InPlace().to(device), example_inputs=x)
        net.through = through
        monkeypatch.setattr(activation, "keeps_bits", keeps_bits)
        input = x.clone().requires_grad_()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
            output = net(input)
        output.float().square().sum().backward()
        y, view = net.kept
        assert view.min() == 0
        assert ("_ReLUInPlaceBackward" in nodes_of(output)) == (not results)
        results.append((output, y.grad, y, view, input.grad, *(p.grad for p in net.parameters())))
    for lean, plain in zip(*results, strict=True):
        assert torch.equal(lean.detach().as_subclass(torch.Tensor), plain.detach())


@pytest.mark.parametrize("layer", ["conv2", "linear1"])
def test_a_gradient_by_the_result_of_the_layer(kernels, device, monkeypatch, layer):
    x, results = torch.randn(2, 3, 8, 8, device=device), []
    for keeps_bits in (activation.keeps_bits, lambda _: False):
        monkeypatch.setattr(activation, "keeps_bits", keeps_bits)
        net, kept = prepared("module", x), []
        net.get_submodule(layer).register_forward_hook(lambda *args, kept=kept: kept.append(args[-1]))
        loss = net(x).square().sum()
        (grad,) = torch.autograd.grad(loss, kept[0], retain_graph=True)
        kept[0].retain_grad()
        loss.backward(inputs=[kept[0]])
        assert torch.equal(kept[0].grad, grad)
        results.append(grad)
    assert torch.equal(*results)


def test_without_a_gradient_torch_computes(kernels, device):
    net = prepared("module", torch.randn(2, 3, 8, 8, device=device))
    with torch.no_grad():
        assert type(net.linear1(torch.randn(2, 8, device=device))) is torch.Tensor
