"""The granularities, QuantSpec for a tensor and QATConfig for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from . import arguments


class _Arguments:
    """A dataclass whose copies and pickles hold only its constructor arguments.

    Derived fields are computed again when a copy is made or a pickle is loaded.
    """

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._argument_names()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        names = self._argument_names()
        self.__init__(**{name: value for name, value in state.items() if name in names})  # type: ignore[misc]

    def _argument_names(self) -> list[str]:
        return [field.name for field in fields(self) if field.init]  # type: ignore[arg-type]


@dataclass(frozen=True)
class Granularity(_Arguments):
    """The base class of the granularities, which say which elements share a scale and a zero point.

    ``code`` is the pair (kind, argument) that the operators take as ``int[2] granularity``.
    """

    code: tuple[int, int] = field(init=False, repr=False, compare=False)

    def _set_code(self, kind: int, argument: int = 0) -> None:
        object.__setattr__(self, "code", (kind, argument))


@dataclass(frozen=True)
class PerTensor(Granularity):
    """One scale for the whole tensor."""

    def __post_init__(self) -> None:
        self._set_code(0)


@dataclass(frozen=True)
class PerChannel(Granularity):
    """One scale per index along ``axis``, which may be negative.

    Raises:
        TypeError: ``axis`` is not an int.
    """

    axis: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", arguments.integer("PerChannel", "axis", self.axis))
        self._set_code(1, self.axis)


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale per ``group_size`` consecutive elements of the last dimension.

    ``group_size`` must divide the size of the last dimension.

    Raises:
        TypeError: ``group_size`` is not an int.
        ValueError: ``group_size`` is less than 1.
    """

    group_size: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_size", arguments.integer("PerGroup", "group_size", self.group_size))
        if self.group_size < 1:
            raise ValueError(f"PerGroup: expected group_size to be at least 1, got {self.group_size}")
        self._set_code(2, self.group_size)


@dataclass(frozen=True)
class PerToken(Granularity):
    """One scale per row of the last dimension."""

    def __post_init__(self) -> None:
        self._set_code(3)


def checked_granularity(op: str, value: Any) -> Granularity:
    """Returns ``value`` if it is a granularity.

    Raises:
        TypeError: ``value`` is not a granularity.
    """
    if isinstance(value, Granularity):
        return value
    raise TypeError(
        f"{op}: expected granularity to be PerTensor(), PerChannel(axis), PerGroup(group_size) or PerToken(), "
        f"got {value!r}"
    )


def granularity_from_code(code: Sequence[int]) -> Granularity:
    """Returns the granularity whose ``code`` is ``code``."""
    kind, argument = code
    return (PerTensor, lambda: PerChannel(argument), lambda: PerGroup(argument), PerToken)[kind]()


@dataclass(frozen=True)
class QuantSpec(_Arguments):
    """The number of bits, the grid and the granularity of a quantized tensor.

    Args:
        num_bits: number of bits, 2 to 16.
        symmetric: if False, the grid is affine: ``[0, 2^b - 1]`` with a zero point. If True, it is
            ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` with zero point 0.
        granularity: which elements share a scale.
        narrow_range: if False, a symmetric grid is ``[-2^(b-1), 2^(b-1) - 1]``, as in int4
            kernels. It has no effect on an affine grid.

    ``code`` holds the spec as the operators take it: (num_bits, grid, granularity kind,
    granularity argument). Grid 0 is affine, 1 is symmetric and 2 is symmetric with the full range.

    Raises:
        TypeError: an argument has the wrong type, including ``num_bits=True`` and ``num_bits=2.5``.
        ValueError: ``num_bits`` is not from 2 to 16.
    """

    num_bits: int = 8
    symmetric: bool = False
    granularity: Granularity = PerTensor()
    narrow_range: bool = field(default=True, kw_only=True)
    code: tuple[int, int, int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bits", arguments.num_bits("QuantSpec", self.num_bits))
        arguments.boolean("QuantSpec", "symmetric", self.symmetric)
        arguments.boolean("QuantSpec", "narrow_range", self.narrow_range)
        checked_granularity("QuantSpec", self.granularity)
        grid = (1 if self.narrow_range else 2) if self.symmetric else 0
        object.__setattr__(self, "code", (self.num_bits, grid, *self.granularity.code))

    @property
    def quant_min(self) -> int:
        return quant_range(self.num_bits, self.symmetric, self.narrow_range)[0]

    @property
    def quant_max(self) -> int:
        return quant_range(self.num_bits, self.symmetric, self.narrow_range)[1]

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments of ``fake_quantize`` and ``choose_qparams`` except the tensor."""
        return {
            "num_bits": self.num_bits,
            "symmetric": self.symmetric,
            "granularity": self.granularity,
            "narrow_range": self.narrow_range,
        }

    def __str__(self) -> str:
        granularity = {PerTensor: "per tensor", PerToken: "per token"}.get(type(self.granularity))
        if isinstance(self.granularity, PerChannel):
            granularity = f"per channel {self.granularity.axis}"
        elif isinstance(self.granularity, PerGroup):
            granularity = f"per group of {self.granularity.group_size}"
        symmetric = "symmetric" if self.narrow_range else "symmetric full range"
        return f"{self.num_bits}-bit {symmetric if self.symmetric else 'affine'} {granularity}"


def quant_range(num_bits: int, symmetric: bool, narrow_range: bool) -> tuple[int, int]:
    """Returns (quant_min, quant_max) of a grid; see :class:`QuantSpec`."""
    if symmetric:
        return int(narrow_range) - 2 ** (num_bits - 1), 2 ** (num_bits - 1) - 1
    return 0, 2**num_bits - 1


@dataclass(frozen=True)
class QATConfig(_Arguments):
    """The specs of a linear layer's tensors; None leaves a tensor in float.

    The default quantizes weight, bias and output to 8 bits, affine, per tensor.

    ``codes`` holds the specs as the operators take them: the codes of input, weight, bias and
    output, concatenated. The code of None is (0, 0, 0, 0).

    Raises:
        TypeError: a field is neither a QuantSpec nor None.
    """

    input: QuantSpec | None = None
    weight: QuantSpec | None = QuantSpec()
    bias: QuantSpec | None = QuantSpec()
    output: QuantSpec | None = QuantSpec()
    codes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _int8_gemm_features: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        specs = {"input": self.input, "weight": self.weight, "bias": self.bias, "output": self.output}
        for name, spec in specs.items():
            if spec is not None and not isinstance(spec, QuantSpec):
                raise TypeError(f"QATConfig: expected {name} to be a QuantSpec or None, got {spec!r}")
        codes = [(0, 0, 0, 0) if spec is None else spec.code for spec in specs.values()]
        object.__setattr__(self, "codes", sum(codes, ()))
        object.__setattr__(self, "_int8_gemm_features", _int8_gemm_features(self.input, self.weight))

    def uses_int8_gemm(self, in_features: int) -> bool:
        """Returns whether a layer with this config multiplies integers (an int8 GEMM).

        It does if its input is quantized per tensor or per token and its weight per tensor or per
        row (output channel), by any granularity that means it, both to at most 8 bits.
        """
        return self._int8_gemm_features in (0, in_features)

    @classmethod
    def tutorial(cls, num_bits: int = 8) -> QATConfig:
        """Returns a config with weight, bias and output affine per tensor, as tutorials teach it.

        With 8 bits it is the default config.
        """
        spec = QuantSpec(num_bits)
        return cls(weight=spec, bias=spec, output=spec)

    @classmethod
    def int8(cls) -> QATConfig:
        """Returns an 8-bit config: input affine per tensor, weight symmetric per output channel.

        Bias and output stay in float.
        """
        weight = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
        return cls(input=QuantSpec(8), weight=weight, bias=None, output=None)

    @classmethod
    def dynamic(cls, num_bits: int = 8) -> QATConfig:
        """Returns a config with input affine per token and weight symmetric per output channel.

        Bias and output stay in float. Each row of the result depends only on the same row of the
        input: nothing leaks between the samples of a batch or along a causal sequence, as it does
        through the range per tensor of ``int8()``. Up to 8 bits, the layer runs as an int8 GEMM.
        """
        weight = QuantSpec(num_bits, symmetric=True, granularity=PerChannel(0))
        return cls(input=QuantSpec(num_bits, granularity=PerToken()), weight=weight, bias=None, output=None)

    @classmethod
    def weight_only(cls, num_bits: int = 4, group_size: int = 32) -> QATConfig:
        """Returns a config with the weight affine per group of ``group_size`` input features.

        All other tensors stay in float.
        """
        return cls(weight=QuantSpec(num_bits, granularity=PerGroup(group_size)), bias=None, output=None)


def _int8_gemm_features(input: QuantSpec | None, weight: QuantSpec | None) -> int | None:
    """Returns the in_features for which a layer runs as an int8 GEMM: 0 for any, None for none."""
    if input is None or weight is None or max(input.num_bits, weight.num_bits) > 8:
        return None
    if input.granularity not in (PerTensor(), PerToken()):
        return None
    if isinstance(weight.granularity, PerGroup):
        return weight.granularity.group_size
    rows = (PerTensor(), PerChannel(0), PerChannel(-2), PerToken())
    return 0 if weight.granularity in rows else None


def describe(config: QATConfig) -> str:
    """Returns a repr of ``config``: ``num_bits=8, input=float, weight=affine per tensor, ...``."""
    specs: dict[str, Any] = {name: getattr(config, name) for name in ("input", "weight", "bias", "output")}
    bits = {spec.num_bits for spec in specs.values() if spec is not None}
    texts = {name: "float" if spec is None else str(spec) for name, spec in specs.items()}
    if len(bits) != 1:
        return ", ".join(f"{name}={text}" for name, text in texts.items())
    num_bits = bits.pop()
    return f"num_bits={num_bits}, " + ", ".join(
        f"{name}={text.removeprefix(f'{num_bits}-bit ')}" for name, text in texts.items()
    )
