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
    if not (x.requires_grad and torch.is_grad_enabled()) or kernels.is_forward_mode():
        return False
    ops = kernels.route(x)
    return ops is not None and ops is kernels.extension


def relu(x: Tensor, name: str, inplace: bool = False) -> Tensor:
    """Returns ``F.relu(x, inplace)`` or, if the name is ``"relu6"``, ``F.relu6(x, inplace)``."""
    extension: Any = kernels.extension
    limit = 6.0 if name == "relu6" else None
    return _ReLUInPlace.apply(x, limit) if inplace else extension.relu(x, limit)


class _ReLUInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float | None) -> Tensor:
        extension: Any = kernels.extension
        y, mask = extension.relu_forward(x, limit)
        ctx.mark_dirty(x.copy_(y))
        ctx.save_for_backward(mask)
        ctx.stride = y.stride()
        return x

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return torch.ops.qatfast.fake_quantize_affine_backward(dy, mask, ctx.stride), None
