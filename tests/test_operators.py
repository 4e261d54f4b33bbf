"""The registry of operators, and tests of all its entries."""

import pytest
import torch

import cases
from operators import operators
from qatfast import functional, reference

EVERY = pytest.mark.parametrize("op", operators(), ids=str)
DTYPES = pytest.mark.parametrize("dtype", cases.FLOATS, ids=cases.name)


def results_of(call, implementation):
    results = call.through(implementation)
    return results if isinstance(results, tuple) else (results,)


@EVERY
def test_its_calls_have_labels_of_their_own(op):
    labels = [call.label for call in op.calls()]
    assert len(labels) == len({*labels}) > 0


def test_operators_are_selected_by_property():
    chosen, others = operators(elementwise=True), operators(elementwise=False)
    assert chosen and others
    assert {*chosen, *others} == {*operators()}
    assert operators("a device that nobody has") == ()


@EVERY
@DTYPES
def test_values_are_those_of_the_reference(op, dtype, device):
    for call in op.calls(dtype, device=device):
        cases.assert_all_same(call.through(functional), call.through(reference))


@EVERY
def test_it_is_elementwise_as_it_says(op, device):
    shapes = [
        [tuple(result.shape) for result in results_of(call, functional)] == [call.arguments["input"].shape]
        for call in op.calls(device=device)
    ]
    assert all(shapes) if op.elementwise else not all(shapes)


@EVERY
def test_the_differentiable_arguments_and_no_others_get_a_gradient(ops, op, device):
    for call in op.calls(device=device):
        assert {*op.differentiable} <= {*call.tensors}
        for name, value in call.tensors.items():
            if not value.is_floating_point():
                assert name not in op.differentiable
                continue
            leaf = value.clone().requires_grad_()
            changed = call.replaced(**{name: leaf})
            if name in op.differentiable:
                y = results_of(changed, ops)[0]
                (gradient,) = torch.autograd.grad(y, leaf, cases.normal(tuple(y.shape), device=device))
                assert gradient.shape == leaf.shape
                assert gradient.dtype == leaf.dtype
                assert gradient.abs().sum() > 0, (name, call.label)
                continue
            try:
                results = results_of(changed, ops)
            except ValueError as error:  # the operator rejects an argument that requires grad
                assert f"expected {name} not to require grad" in str(error)
            else:
                assert not any(result.requires_grad for result in results), (name, call.label)


@EVERY
@pytest.mark.parametrize(
    "dtype, requires_grad",
    [(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.bfloat16, True)],
    ids=cases.name,
)
def test_opcheck(kernels, op, dtype, requires_grad):
    operator = getattr(torch.ops.qatfast, op.name).default
    for call in op.calls(dtype, requires_grad=requires_grad):
        torch.library.opcheck(operator, call.schema_arguments)
