"""The time of the import, in a fresh process for each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial

from .names import OURS
from .providers import Run
from .works import Work

CODE = "import time; {before}; start = time.perf_counter(); import {name}; print(time.perf_counter() - start)"


def names(work: Work) -> list[str]:
    """What is imported, the baseline first."""
    return [work.baseline, OURS]


def runs(work: Work, inside: ExitStack) -> Callable[[str], Run]:
    """Gives the call that says how long an import took, in seconds."""
    torch, ours = CODE.format(before="pass", name="torch"), CODE.format(before="import torch", name="qatfast")
    return lambda name: partial(_seconds, ours if name == OURS else torch)


def _seconds(code: str) -> float:
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
