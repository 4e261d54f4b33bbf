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
        "--device", default="cpu", help="where the tensors of the tests live: cpu (default) or cuda"
    )


def pytest_configure(config):
    if cases.why_no_kernels(config.getoption("--device")):
        config.addinivalue_line(
            "filterwarnings", "ignore:qatfast (runs without|has no) .*kernels:RuntimeWarning"
        )


def pytest_runtest_setup(item):
    """Skips a test of an operator on a device that the operator does not name."""
    op = item.callspec.params.get("op") if hasattr(item, "callspec") else None
    device = item.config.getoption("--device")
    if isinstance(op, Operator) and device not in op.devices:
        pytest.skip(f"{op} has no kernels for {device} tensors")


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def kernels(device):
    """Returns the extension module; skips the test if the reference serves."""
    reason = cases.why_no_kernels(device)
    if reason:
        pytest.skip(reason)
    from qatfast import kernels

    return kernels.extension


@pytest.fixture(params=IMPLEMENTATIONS)
def ops(request, device):
    """Returns each way to an operator in turn: the public functions, the reference, torch.ops."""
    if request.param == "torch.ops" and (reason := cases.why_no_kernels(device)):
        pytest.skip(reason)
    return IMPLEMENTATIONS[request.param]


@pytest.fixture
def fresh_compiler():
    """Clears the compiler's caches; every test that compiles uses it.

    A cached graph hides what the fake kernels say now. A function that other tests compiled too often runs in eager
    mode.
    """
    import torch._inductor.config

    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
