import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

import cases

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


@pytest.fixture(scope="session")
def device(request):
    return request.config.getoption("--device")


@pytest.fixture(scope="session")
def kernels(device):
    """The extension module; a test that takes it is skipped where the reference serves."""
    reason = cases.why_no_kernels(device)
    if reason:
        pytest.skip(reason)
    from qatfast import kernels

    return kernels.extension


@pytest.fixture(params=cases.IMPLEMENTATIONS)
def ops(request, device):
    """Each way to an operator: the public functions, the reference, torch.ops."""
    if request.param == "torch.ops" and (reason := cases.why_no_kernels(device)):
        pytest.skip(reason)
    return cases.IMPLEMENTATIONS[request.param]


@pytest.fixture
def threads():
    """``torch.set_num_threads``, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
