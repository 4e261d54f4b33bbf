"""Who reads whose output: one recorded forward of a model, and what follows from it.

Values are numbered. A tensor object has the number of the value that it holds; an operation that
writes in place gives it a new one, and its views too.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from .calibration import evaluation, quantization_disabled
from .chain import BATCH_NORM, JOINS, METADATA, MOVERS, RELUS, Chain, function_name, is_active_dropout
from .config import Fixed, PerTensor, QuantSpec
from .modules.base import QuantizedLayer
from .modules.fake_quantize import FakeQuantize

_HOOK = "qatfast: the forward is recorded"


@dataclass(eq=False)
class Operation:
    """A call of a layer, of a BatchNorm or of a function on tensors.

    ``module`` is the one that computes it; of a function, the innermost module that called it.
    """

    name: str
    module: nn.Module | None
    inputs: list[int]
    outputs: list[int]
    dim: int = 0  # of the first result


@dataclass(eq=False)
class Flow:
    """What a recorded forward did.

    Attributes:
        operations: in the order of their calls.
        called: how often each layer ran, in the order of the first calls.
        read: the layers whose weight a function read.
        results: the values that the model returned.
        passed: the modules that returned a value as it is, by the value.
    """

    operations: list[Operation] = field(default_factory=list)
    called: dict[nn.Module, int] = field(default_factory=dict)
    read: set[nn.Module] = field(default_factory=set)
    results: set[int] = field(default_factory=set)
    passed: dict[int, list[nn.Module]] = field(default_factory=dict)

    def readers(self, value: int) -> list[Operation]:
        return [operation for operation in self.operations if value in operation.inputs]


def record(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], layers: set[nn.Module]) -> Flow:
    """Runs a model once in evaluation and records what it does.

    Modes, buffers, random number generators and the grad mode are as before afterwards.

    Args:
        model: computed in float.
        args: positional arguments of the model.
        kwargs: keyword arguments.
        layers: the modules whose calls are single operations.
    """
    recorder = _Recorder(model, layers)
    with (
        evaluation(model),
        _as_before(model),
        quantization_disabled(model),
        torch.no_grad(),
        recorder.installed(),
    ):
        with recorder:
            result = model(*args, **kwargs)
        recorder.flow.results = {recorder.value(leaf) for leaf in _tensors(result)}
    return recorder.flow


def _tensors(*trees: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, Tensor)]


@contextmanager
def _as_before(model: nn.Module) -> Iterator[None]:
    """Restores buffers, random number generators and the nested tensors of encoders when the block ends."""
    encoders = {encoder: encoder.use_nested_tensor for encoder in transformer_encoders(model)}
    buffers = {
        module: dict(module._buffers)
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)  # it keeps its buffers: only their values change
    }
    values = [(buffer, buffer.clone()) for buffer in model.buffers()]
    state = random.getstate()
    devices = {parameter.device for parameter in model.parameters() if parameter.is_cuda}
    try:
        for encoder in encoders:
            encoder.use_nested_tensor = False  # as prepare leaves it
        with torch.random.fork_rng([device.index or 0 for device in devices]):
            yield
    finally:
        random.setstate(state)
        for encoder, use_nested_tensor in encoders.items():
            encoder.use_nested_tensor = use_nested_tensor
        with torch.no_grad():
            for module, own in buffers.items():
                module._buffers.update(own)
            for buffer, value in values:
                if not buffer.is_meta and not torch.equal(buffer, value):
                    buffer.copy_(value)


def transformer_encoders(model: nn.Module) -> list[nn.TransformerEncoder]:
    return [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, layers: set[nn.Module]) -> None:
        super().__init__()
        self.flow = Flow()
        self.model = model
        norms = {module for module in model.modules() if is_batch_norm(module)}
        self.leaves = layers | norms
        self.layers = layers
        self.owners: dict[int, list[nn.Module]] = {}
        for layer in layers:
            for parameter in layer.parameters(recurse=False):
                if parameter.dim() > 1:
                    self.owners.setdefault(id(parameter), []).append(layer)
        self.alive: list[Tensor] = []  # so that no id is used twice
        self.numbers: dict[int, int] = {}
        self.aliases: dict[int, list[Tensor]] = {}  # tensors by their storage
        self.stale: dict[int, int] = {}  # views that were written through another: the value they had
        self.count = 0
        self.depth = 0  # > 0 within a layer or BatchNorm
        self.stack: list[nn.Module] = []

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Observes the calls of all modules in the block."""
        with ExitStack() as stack:
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            for module in list(self.model.modules()):
                self._wrap(module, stack)
            yield

    def _wrap(self, module: nn.Module, stack: ExitStack) -> None:
        own, had = vars(module), "forward" in vars(module)
        forward = module.forward

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._call(module, forward, args, kwargs)

        own["forward"] = wrapped
        # a hook keeps nn.TransformerEncoderLayer from the fast path that reads the weights
        module._forward_pre_hooks[_HOOK] = lambda *_: None  # type: ignore[index]

        def restore() -> None:
            module._forward_pre_hooks.pop(_HOOK)  # type: ignore[call-overload]
            own.pop("forward")
            if had:
                own["forward"] = forward

        stack.callback(restore)

    def _call(self, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if self.depth or module not in self.leaves:
            self.stack.append(module)
            try:
                return forward(*args, **kwargs)
            finally:
                self.stack.pop()
        if module in self.layers:
            self.flow.called[module] = self.flow.called.get(module, 0) + 1
        # attention may be called with keyword arguments in any order
        arguments = inspect.signature(forward).bind(*args, **kwargs).arguments.values() if kwargs else args
        inputs = [self.value(tensor) for tensor in _tensors(*arguments)]
        self.depth += 1
        try:
            result = forward(*args, **kwargs)
        finally:
            self.depth -= 1
        self._add(BATCH_NORM if is_batch_norm(module) else "layer", module, inputs, _tensors(result))
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function_name(func)
        if self.depth or name in METADATA:
            return func(*args, **kwargs)
        tensors = _tensors(args, kwargs)
        for tensor in tensors:
            self.flow.read.update(self.owners.get(id(tensor), ()))
        inputs = [self.value(tensor) for tensor in tensors]
        versions = [tensor._version if not tensor.is_inference() else 0 for tensor in tensors]
        result = func(*args, **kwargs)
        written = [
            tensor
            for tensor, version in zip(tensors, versions, strict=True)
            if not tensor.is_inference() and tensor._version != version
        ]
        module = self.stack[-1] if self.stack else None
        outputs = _tensors(result)
        if name == "hardtanh" and type(module) is nn.ReLU6 and (module.min_val, module.max_val) == (0, 6):
            name = "relu6"
        if is_active_dropout(name, args, kwargs):
            name = "active dropout"
        if name in MOVERS and any(out.dtype != tensors[0].dtype for out in outputs):
            name = "view as another dtype"
        if name in MOVERS and not written and len(outputs) == 1 and outputs[0] is tensors[0]:
            if module is not None:
                self.flow.passed.setdefault(inputs[0], []).append(module)
            return result
        for tensor in written:
            for alias in self.aliases.get(_storage(tensor), ()):
                if alias is not tensor and id(alias) in self.numbers:
                    self.stale.setdefault(id(alias), self.numbers.pop(id(alias)))
        self._add(
            name, module, inputs, [*written, *(out for out in outputs if out not in _Identities(written))]
        )
        return result

    def value(self, tensor: Tensor) -> int:
        """Returns the number of the value that a tensor holds."""
        if id(tensor) not in self.numbers:
            old = self.stale.pop(id(tensor), None)
            self._number(tensor)
            if old is not None:
                self.flow.operations.append(
                    Operation("written view", None, [old], [self.numbers[id(tensor)]])
                )
        return self.numbers[id(tensor)]

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self.numbers:
            self.alive.append(tensor)
            self.aliases.setdefault(_storage(tensor), []).append(tensor)
        self.stale.pop(id(tensor), None)
        self.count += 1
        self.numbers[id(tensor)] = self.count
        return self.count

    def _add(self, name: str, module: nn.Module | None, inputs: list[int], outputs: list[Tensor]) -> None:
        dim = outputs[0].dim() if outputs else 0
        numbers = [self._number(tensor) for tensor in outputs]
        self.flow.operations.append(Operation(name, module, inputs, numbers, dim))


class _Identities:
    """Membership by identity: tensors compare by value."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.ids = {id(tensor) for tensor in tensors}

    def __contains__(self, tensor: Any) -> bool:
        return id(tensor) in self.ids


def _storage(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage()._cdata
    except (NotImplementedError, RuntimeError):  # sparse and nested tensors have none
        return id(tensor)


def is_batch_norm(module: nn.Module) -> bool:
    """Returns whether the module is a BatchNorm of torch.nn with torch's own forward."""
    types = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    return isinstance(module, types) and type(module).forward is _BatchNorm.forward


# What follows from a flow


def connect(
    flow: Flow, replacements: Mapping[nn.Module, QuantizedLayer], outputs: bool | None = None
) -> None:
    """Shares input quantizers, and sets the chains of the new layers.

    Args:
        flow: recorded before the layers were replaced.
        replacements: the new layers.
        outputs: whether results that no quantized layer alone reads get a quantizer; None means those
            of convolutions.
    """
    calls = [op for op in flow.operations if op.name == "layer" and op.module in replacements]
    _share_input_quantizers(calls, replacements)
    _remove_attention_quantizers(calls, replacements)
    for call in calls:
        assert call.module is not None
        head = replacements[call.module]
        if head.config.output is None and head.is_head() and flow.called[call.module] == 1:
            has_output = isinstance(head, _ConvNd) if outputs is None else outputs
            chain = chain_from(call, head, flow, replacements, has_output)
            if chain is None:
                continue
            if not chain.has_readers:
                chain.quantizer = head.add_output_quantizer()
            head.set_chain(chain)


def _share_input_quantizers(calls: list[Operation], replacements: Mapping[nn.Module, QuantizedLayer]) -> None:
    """Layers that read one value share a quantizer if their specs are equal."""
    groups: dict[tuple[int, QuantSpec], list[QuantizedLayer]] = {}
    for call in calls:
        layer = replacements[call.module]  # type: ignore[index]
        quantizer = layer._modules.get("input_quantizer")
        if isinstance(quantizer, FakeQuantize) and call.inputs:
            groups.setdefault((call.inputs[0], quantizer.spec), []).append(layer)
    for layers in groups.values():
        first = layers[0]._modules["input_quantizer"]
        others = {id(layer._modules["input_quantizer"]) for layer in layers}
        for layer in replacements.values():
            if id(layer._modules.get("input_quantizer")) in others:
                layer._modules["input_quantizer"] = first


def _remove_attention_quantizers(
    calls: list[Operation], replacements: Mapping[nn.Module, QuantizedLayer]
) -> None:
    """Removes the quantizers of key and value where these are the same tensor as one before, in every call."""
    inputs: dict[QuantizedLayer, list[list[int]]] = {}
    for call in calls:
        layer = replacements[call.module]  # type: ignore[index]
        if isinstance(layer, nn.MultiheadAttention):
            inputs.setdefault(layer, []).append(call.inputs)
    for layer, all_inputs in inputs.items():
        for position, name in ((1, "key_quantizer"), (2, "value_quantizer")):
            if all(len(values) > 2 and values[position] in values[:position] for values in all_inputs):
                layer._modules.pop(name, None)


def chain_from(
    call: Operation,
    head: QuantizedLayer,
    flow: Flow,
    replacements: Mapping[nn.Module, QuantizedLayer],
    has_output: bool,
) -> Chain | None:
    """Returns the chain that starts at ``head``, if its end is a reader with integers or its own quantizer.

    If the head needs a quantizer of its own, ``Chain.quantizer`` is None and the caller sets it.
    """
    steps: list[str] = []
    members: list[nn.Module] = [head]
    norm: nn.Module | None = None
    activation: str | None = None
    value, dim = call.outputs[0], call.dim
    end = 0, 1  # the numbers of steps and members up to the last computed one
    while True:
        members += flow.passed.get(value, [])
        readers = flow.readers(value)
        if value in flow.results or not readers:
            return None
        if all(reader.name == "layer" for reader in readers):
            return _closed(steps, members, norm, activation, readers, replacements)
        step = readers[0]
        is_batch_norm = step.name == BATCH_NORM and not steps and _can_fold(step, head, dim, flow)
        is_activation = step.name in RELUS and activation is None
        if (
            len(readers) > 1
            or len(step.outputs) != 1
            or not (is_batch_norm or is_activation or step.name in MOVERS)
        ):
            break
        steps.append(step.name)
        if step.module is not None:
            members.append(step.module)
        if is_batch_norm:
            norm = step.module
        elif is_activation:
            activation = RELUS[step.name]
        if is_batch_norm or is_activation:
            end = len(steps), len(members)
        value = step.outputs[0]
    if not has_output or not any(reader.name in JOINS for reader in readers):
        return None
    assert head.config.input is not None  # of a head
    if isinstance(head.config.input.range, Fixed) or not _reaches_layer(value, flow, replacements):
        return None
    return Chain(norm, activation, None, tuple(steps[: end[0]]), tuple(dict.fromkeys(members[: end[1]])))


def _reaches_layer(value: int, flow: Flow, replacements: Mapping[nn.Module, QuantizedLayer]) -> bool:
    """Returns whether a new layer computes with what follows from the value."""
    reached = {value}
    for operation in flow.operations:
        if reached.isdisjoint(operation.inputs):
            continue
        if operation.name == "layer" and operation.module in replacements:
            return True
        reached.update(operation.outputs)
    return False


def _can_fold(step: Operation, head: QuantizedLayer, dim: int, flow: Flow) -> bool:
    norm: Any = step.module
    weight = head.config.weight
    return (
        norm.running_mean is not None
        and norm.running_var is not None
        and sum(operation.module is norm for operation in flow.operations) == 1
        and weight is not None
        and weight.symmetric
        and weight.narrow_range
        and (dim == 2 or not isinstance(head, nn.Linear))
    )


def _closed(
    steps: list[str],
    members: list[nn.Module],
    norm: nn.Module | None,
    activation: str | None,
    readers: list[Operation],
    replacements: Mapping[nn.Module, QuantizedLayer],
) -> Chain | None:
    layers = [replacements.get(reader.module) for reader in readers]  # type: ignore[arg-type]
    quantizers = [None if layer is None else layer._modules.get("input_quantizer") for layer in layers]
    first = quantizers[0]
    if any(quantizer is not first for quantizer in quantizers) or not isinstance(first, FakeQuantize):
        return None
    if not all(isinstance(layer, (nn.Linear, _ConvNd)) for layer in layers):
        return None
    if not isinstance(first.spec.granularity, PerTensor) or first.spec.num_bits > 8:
        return None
    unique: list[Any] = list(dict.fromkeys(layers))
    return Chain(
        norm, activation, first, tuple(steps), tuple(dict.fromkeys([*members, *unique])), tuple(unique)
    )


def describe_chain(layer: nn.Module, names: Mapping[nn.Module, str]) -> str | None:
    """Returns the way of a layer's result to its reader, for tables."""
    chain = vars(layer).get("_chain")
    return None if chain is None else chain_text(chain, names)


def chain_text(chain: Chain, names: Mapping[nn.Module, str]) -> str:
    readers = ", ".join(names.get(reader, "?") for reader in chain.readers)
    return " -> ".join([*chain.steps, readers or "output_quantizer"])
