"""QATLinear: nn.Linear that trains on the integer grid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import weight_cache
from .config import PerChannel, PerGroup, QATConfig, QuantSpec, describe
from .functional import qat_linear


class QATLinear(nn.Linear):
    """An ``nn.Linear`` that fake-quantizes its tensors as ``config`` says; see :func:`qatfast.qat_linear`.

    Parameters, ``state_dict`` keys and initial values are those of ``nn.Linear``.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the output.
        bias: whether to learn a bias; a bool.
        device: of the parameters.
        dtype: of the parameters.
        num_bits: short for ``config=QATConfig.tutorial(num_bits)``; None means 8.
        config: what is quantized how.

    Raises:
        TypeError: ``bias`` is no bool; ``config`` is no QATConfig.
        ValueError: both ``num_bits`` and ``config`` are given; ``config`` does not divide a parameter.

    Example:
        >>> QATLinear(10, 64)
        QATLinear(in_features=10, out_features=64, bias=True, num_bits=8, input=float, weight=affine per tensor, \
bias=affine per tensor, output=affine per tensor)
    """

    config: QATConfig

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        num_bits: int | None = None,
        config: QATConfig | None = None,
    ) -> None:
        if not isinstance(bias, bool):
            raise TypeError(
                f"QATLinear: expected bias to be a bool, got {bias!r}; for a bit width write "
                f"QATLinear({in_features}, {out_features}, num_bits={bias!r})"
            )
        config = _config(num_bits, config)
        _check_parameters(config, in_features, out_features, bias)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.config = config

    @classmethod
    def from_float(
        cls, linear: nn.Linear, *, num_bits: int | None = None, config: QATConfig | None = None
    ) -> QATLinear:
        """A QATLinear on the parameters of ``linear`` themselves, with its training mode, device and dtype.

        Raises:
            TypeError: ``linear`` is no nn.Linear, or its weight or bias is computed from other parameters.
            ValueError: as the constructor.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"QATLinear.from_float: expected linear to be an nn.Linear, got {type(linear).__name__}"
            )
        _check_own_parameters("QATLinear.from_float", linear)
        has_bias = linear.bias is not None
        layer = cls(
            linear.in_features, linear.out_features, has_bias, device="meta", num_bits=num_bits, config=config
        )
        return _share(linear, layer)

    def to_float(self) -> nn.Linear:
        """An nn.Linear on the parameters themselves (raw, not quantized), with the training mode, device and dtype.

        Raises:
            TypeError: weight or bias is computed from other parameters.
        """
        _check_own_parameters("QATLinear.to_float", self)
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        return _share(self, linear)

    def forward(self, input: Tensor) -> Tensor:
        own: dict[str, Any] = self._parameters
        if "weight" in own and "bias" in own:  # nn.Module's own way to them takes 0.5 us each
            weight, bias = own["weight"], own["bias"]
        else:  # computed from others, by a parametrization
            weight, bias = self.weight, self.bias
        if weight_cache.serves(self):
            return weight_cache.linear(self, input, weight, bias, self.config)
        return qat_linear(input, weight, bias, config=self.config)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {describe(self.config)}"


def _config(num_bits: int | None, config: QATConfig | None) -> QATConfig:
    if config is None:
        return QATConfig.tutorial(8 if num_bits is None else num_bits)
    if not isinstance(config, QATConfig):
        raise TypeError(f"QATLinear: expected config to be a QATConfig, got {config!r}")
    if num_bits is not None:
        raise ValueError(
            f"QATLinear: expected num_bits or config, got both; write num_bits={num_bits!r} alone, which is short for "
            f"config=QATConfig.tutorial({num_bits!r}), or put the bits into config"
        )
    return config


def _check_parameters(config: QATConfig, in_features: int, out_features: int, bias: bool) -> None:
    """The granularities of ``config`` fit the layer's sizes: found out at construction, not in the first batch."""
    weight = (out_features, in_features)
    shapes: list[tuple[str, QuantSpec | None, tuple[int, ...]]] = [("weight", config.weight, weight)]
    shapes += [("bias", config.bias, (out_features,))] if bias else []
    for name, spec, shape in shapes:
        if spec is not None and isinstance(spec.granularity, PerChannel):
            axis = spec.granularity.axis
            if not -len(shape) <= axis < len(shape):
                raise ValueError(
                    f"QATLinear: expected the axis of config.{name} to be from {-len(shape)} to {len(shape) - 1} for "
                    f"its {len(shape)} dimensions, got {axis}; write PerChannel(0) for one scale an output channel"
                )
    last = {"input": in_features, "weight": in_features, "bias": out_features, "output": out_features}
    for name, size in last.items():
        spec = getattr(config, name)
        if spec is None or not isinstance(spec.granularity, PerGroup) or (name == "bias" and not bias):
            continue
        group_size = spec.granularity.group_size
        if size % group_size != 0:
            features = "in_features" if name in ("input", "weight") else "out_features"
            raise ValueError(
                f"QATLinear: expected {features} to be divisible by group_size={group_size} of config.{name}, got "
                f"{size}; write a group_size that divides {size}"
            )


def _check_own_parameters(op: str, linear: nn.Linear) -> None:
    """Pruning and parametrizations make a tensor from other parameters at each call; it cannot be shared."""
    for name in ("weight", "bias"):
        if not isinstance(getattr(linear, name), nn.Parameter | None):
            raise TypeError(
                f"{op}: expected {name} to be an nn.Parameter, got a tensor computed from other parameters; call "
                "torch.nn.utils.parametrize.remove_parametrizations or torch.nn.utils.prune.remove first, or apply "
                "these to the new layer"
            )


def _share(source: nn.Linear, target: Any) -> Any:
    """``target`` on the parameters of ``source``, in its training mode."""
    target.weight, target.bias = source.weight, source.bias
    return target.train(source.training)
