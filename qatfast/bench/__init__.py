"""How fast the operators are next to other implementations: what is measured, by whom, how, and ``qatfast bench``.

works.py        what is measured: an operator, a size, the passes; and what qatfast is held to
providers.py    who does it: qatfast, its reference, the same compiled, the tutorials' formula, torch's own ops
layers.py       the same for the linear layer, with other packages where they are installed
network.py      the same for a training step of a whole network; importing.py: for the import
tutorial.py     fake quantization as tutorials write it
contest.py      the check against the reference, and the timer
memory.py       the bytes that a call allocates and keeps
device.py       the timer on a CUDA device
targets.py      whether the figures are met
table.py        the results as text
plots.py        the results as pictures
record.py       the results as JSON
machine.py      what they were measured on
command.py      the command line
"""

from .command import add_arguments, main
from .contest import Contest, Result, Timing, WrongResult, contestants, measure, prepare
from .works import Work, works

__all__ = [
    "Contest",
    "Result",
    "Timing",
    "Work",
    "WrongResult",
    "add_arguments",
    "contestants",
    "main",
    "measure",
    "prepare",
    "works",
]
