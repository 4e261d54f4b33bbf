"""The fixtures and options of the tests."""

import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

import cases
from operators import IMPLEMENTATIONS, Operator

settings.register_profile("qatfast", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("qatfast")


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", help="device of the tensors in the tests: cpu (default) or cuda"
    )


def pytest_configure(config):
    if cases.why_no_kernels(config.getoption("--device")):
        config.addinivalue_line(
            "filterwarnings", "ignore:qatfast (runs without|has no) .*kernels:RuntimeWarning"
        )


def pytest_runtest_setup(item):
    """Seeds torch; skips a test of an operator on a device for which the operator has no kernels."""
    torch.manual_seed(0)
    op = item.callspec.params.get("op") if hasattr(item, "callspec") else None
    device = item.config.getoption("--device")
    if isinstance(op, Operator) and device not in op.devices:
        pytest.skip(f"{op} has no kernels for {device} tensors")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def kernels(device):
    """Returns the extension module; skips the test if there are no kernels for the device."""
    reason = cases.why_no_kernels(device)
    if reason:
        pytest.skip(reason)
    from qatfast import kernels

    return kernels.extension


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request, device):
    """Returns the implementations in turn: the public functions, the reference and torch.ops."""
    if request.param == "torch.ops" and (reason := cases.why_no_kernels(device)):
        pytest.skip(reason)
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def fresh_compiler():
    """Clears the caches of torch.compile; every test that compiles uses it.

    A cached graph hides changes of the fake kernels, and a function that other tests compiled too
    often runs in eager mode.
    """
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def threads():
    """Returns ``torch.set_num_threads``; resets the number of threads after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
