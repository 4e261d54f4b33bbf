"""ReLU and ReLU6 before a quantizer: training keeps one bit per element instead of the result."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import kernels


def keeps_bits(x: Tensor) -> bool:
    """Returns whether :func:`relu` computes the activation of ``x``, and not torch's own operator.

    The next quantizer keeps integers, so that nothing else needs the result of the activation in memory.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return False
    ops = kernels.route(x)
    return ops is not None and ops is kernels.extension


def relu(x: Tensor, name: str) -> Tensor:
    """Returns ``F.relu(x)`` or, if the name is ``"relu6"``, ``F.relu6(x)``, with the same gradient."""
    extension: Any = kernels.extension
    return extension.relu(x, 6.0 if name == "relu6" else None)
