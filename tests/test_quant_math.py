"""The division by multiplication in csrc/common/quant_math.h, on all critical quotients."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parent.parent
HEADERS = ROOT / "csrc"


@pytest.mark.skipif(not HEADERS.exists(), reason="the sources are not beside the tests")
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="this processor has no FMA"
)
def test_divide_rounds_as_ieee_division(tmp_path):
    program = tmp_path / "quant_math"
    subprocess.run(
        ["g++", "-std=c++20", "-O2", "-mfma", "-ffp-contract=off", f"-I{HEADERS}"]
        + [f"-I{path}" for path in include_paths()]
        + ["-o", program, Path(__file__).with_name("quant_math.cpp")],
        check=True,
    )
    result = subprocess.run([program], capture_output=True, text=True)
    tried, wrong = map(int, re.fullmatch(r"(\d+) tried, (\d+) wrong\n", result.stdout).groups())
    assert tried > 50_000_000
    assert wrong == 0
