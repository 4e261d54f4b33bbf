"""Benchmarks of the operators and the layer next to other implementations, and the command ``qatfast bench``.

workloads.py    what is measured: operators, sizes, passes, targets
providers.py    who runs an elementwise operator: qatfast, its reference, torch's own operators
layers.py       who runs the linear layer, other packages included, and the training step of a network
tutorial.py     fake quantization as tutorials write it
runner.py       runs the providers: comparison with the reference, time, memory
timer.py        the time of a call
results.py      the results as JSON and as tables, and whether the targets are met
plots.py        the results as pictures
machine.py      what was measured on
command.py      the command line
"""

from .command import add_arguments, main
from .results import Result, Timing
from .runner import Runner, WrongResult, measure, measurements, prepare
from .workloads import Workload, workloads_of

__all__ = [
    "Result",
    "Runner",
    "Timing",
    "Workload",
    "WrongResult",
    "add_arguments",
    "main",
    "measure",
    "measurements",
    "prepare",
    "workloads_of",
]
