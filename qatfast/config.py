"""How tensors are quantized: the granularities, QuantSpec for one tensor, QATConfig for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from . import arguments


class _Arguments:
    """Copies and files of a dataclass hold the arguments of its constructor, and nothing that it makes of them."""

    def __getstate__(self) -> dict[str, Any]:
        return {each.name: getattr(self, each.name) for each in fields(self) if each.init}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = {each.name for each in fields(self) if each.init}  # type: ignore[arg-type]
        self.__init__(**{name: value for name, value in state.items() if name in known})  # type: ignore[misc]


@dataclass(frozen=True)
class Granularity(_Arguments):
    """Which elements share a scale and a zero point; the base of the four below.

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
    """One scale for each index along ``axis`` (negative as in torch).

    Raises:
        TypeError: ``axis`` is not an int.
    """

    axis: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "axis", arguments.integer("PerChannel", "axis", self.axis))
        self._set_code(1, self.axis)


@dataclass(frozen=True)
class PerGroup(Granularity):
    """One scale for each run of ``group_size`` elements of the last dimension, which it must divide.

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
    """One scale for each row of the last dimension."""

    def __post_init__(self) -> None:
        self._set_code(3)


def checked_granularity(op: str, value: Any) -> Granularity:
    """``value`` if it is a granularity.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Granularity):
        return value
    raise TypeError(
        f"{op}: expected granularity to be PerTensor(), PerChannel(axis), PerGroup(group_size) or PerToken(), "
        f"got {value!r}"
    )


def granularity_from_code(code: Sequence[int]) -> Granularity:
    """The granularity that a pair (kind, argument) stands for."""
    kind, argument = code
    return (PerTensor, lambda: PerChannel(argument), lambda: PerGroup(argument), PerToken)[kind]()


@dataclass(frozen=True)
class QuantSpec(_Arguments):
    """How one tensor is quantized.

    Args:
        num_bits: 2 to 16.
        symmetric: False: affine, the grid ``[0, 2^b - 1]`` with a zero point.
            True: the grid ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` with zero point 0.
        granularity: which elements share a scale.
        narrow_range: of a symmetric grid; False: the grid ``[-2^(b-1), 2^(b-1) - 1]``, as int4 kernels have it. It has
            no effect on an affine grid.

    ``code`` holds the spec as the operators take it: (num_bits, grid, granularity kind, granularity argument), grid 0
    affine, 1 symmetric, 2 symmetric in full range.

    Raises:
        TypeError: an argument has the wrong type (``num_bits=True`` and ``num_bits=2.5`` too).
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
        """What ``fake_quantize`` and ``choose_qparams`` take beside the tensor."""
        return {
            "num_bits": self.num_bits,
            "symmetric": self.symmetric,
            "granularity": self.granularity,
            "narrow_range": self.narrow_range,
        }

    def __str__(self) -> str:
        words = {PerTensor: "per tensor", PerToken: "per token"}.get(type(self.granularity))
        if isinstance(self.granularity, PerChannel):
            words = f"per channel {self.granularity.axis}"
        elif isinstance(self.granularity, PerGroup):
            words = f"per group of {self.granularity.group_size}"
        symmetric = "symmetric" if self.narrow_range else "symmetric full range"
        return f"{self.num_bits}-bit {symmetric if self.symmetric else 'affine'} {words}"


def quant_range(num_bits: int, symmetric: bool, narrow_range: bool) -> tuple[int, int]:
    """(quant_min, quant_max): affine ``[0, 2^b - 1]``, symmetric ``[-(2^(b-1) - 1), 2^(b-1) - 1]``, symmetric without
    ``narrow_range`` ``[-2^(b-1), 2^(b-1) - 1]``.
    """
    if symmetric:
        return int(narrow_range) - 2 ** (num_bits - 1), 2 ** (num_bits - 1) - 1
    return 0, 2**num_bits - 1


@dataclass(frozen=True)
class QATConfig(_Arguments):
    """What a linear layer quantizes, and how; None leaves that tensor in float.

    The default quantizes weight, bias and output to 8 bits, affine, per tensor.

    ``codes`` holds the four specs as the operators take them: the codes of input, weight, bias and output one after the
    other, (0, 0, 0, 0) for None.

    Raises:
        TypeError: a field is neither a QuantSpec nor None.
    """

    input: QuantSpec | None = None
    weight: QuantSpec | None = QuantSpec()
    bias: QuantSpec | None = QuantSpec()
    output: QuantSpec | None = QuantSpec()
    codes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _integer_features: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        specs = {"input": self.input, "weight": self.weight, "bias": self.bias, "output": self.output}
        for name, spec in specs.items():
            if spec is not None and not isinstance(spec, QuantSpec):
                raise TypeError(f"QATConfig: expected {name} to be a QuantSpec or None, got {spec!r}")
        codes = [(0, 0, 0, 0) if spec is None else spec.code for spec in specs.values()]
        object.__setattr__(self, "codes", sum(codes, ()))
        object.__setattr__(self, "_integer_features", _integer_features(self.input, self.weight))

    def uses_int8_gemm(self, in_features: int) -> bool:
        """Whether a layer multiplies integers: its input is quantized per tensor or per token and its weight per tensor
        or per output channel (its rows, however that is spelled), both to at most 8 bits.
        """
        return self._integer_features in (0, in_features)

    @classmethod
    def tutorial(cls, num_bits: int = 8) -> QATConfig:
        """Weight, bias and output, affine, per tensor: what tutorials teach, and the default."""
        spec = QuantSpec(num_bits)
        return cls(weight=spec, bias=spec, output=spec)

    @classmethod
    def int8(cls) -> QATConfig:
        """Input affine per tensor, weight symmetric per output channel, both 8 bits; bias and output in float."""
        weight = QuantSpec(8, symmetric=True, granularity=PerChannel(0))
        return cls(input=QuantSpec(8), weight=weight, bias=None, output=None)

    @classmethod
    def dynamic(cls, num_bits: int = 8) -> QATConfig:
        """Input affine per token, weight symmetric per output channel; bias and output in float.

        A row of the result depends on that row of the input only: nothing leaks between the samples of a batch or along
        a causal sequence, as it does through the one range per tensor of ``int8()``. Up to 8 bits the layer multiplies
        integers.
        """
        weight = QuantSpec(num_bits, symmetric=True, granularity=PerChannel(0))
        return cls(input=QuantSpec(num_bits, granularity=PerToken()), weight=weight, bias=None, output=None)

    @classmethod
    def weight_only(cls, num_bits: int = 4, group_size: int = 32) -> QATConfig:
        """Weight affine per group of ``group_size`` input features; the rest in float."""
        return cls(weight=QuantSpec(num_bits, granularity=PerGroup(group_size)), bias=None, output=None)


def _integer_features(input: QuantSpec | None, weight: QuantSpec | None) -> int | None:
    """The in_features with which a layer multiplies integers: 0 for any, None for none."""
    if input is None or weight is None or max(input.num_bits, weight.num_bits) > 8:
        return None
    if input.granularity not in (PerTensor(), PerToken()):
        return None
    if isinstance(weight.granularity, PerGroup):
        return weight.granularity.group_size
    rows = (PerTensor(), PerChannel(0), PerChannel(-2), PerToken())
    return 0 if weight.granularity in rows else None


def describe(config: QATConfig) -> str:
    """What is quantized how, for a repr: ``num_bits=8, input=float, weight=affine per tensor, ...``."""
    specs: dict[str, Any] = {name: getattr(config, name) for name in ("input", "weight", "bias", "output")}
    bits = {spec.num_bits for spec in specs.values() if spec is not None}
    words = {name: "float" if spec is None else str(spec) for name, spec in specs.items()}
    if len(bits) != 1:
        return ", ".join(f"{name}={word}" for name, word in words.items())
    shared = bits.pop()
    return f"num_bits={shared}, " + ", ".join(
        f"{name}={word.removeprefix(f'{shared}-bit ')}" for name, word in words.items()
    )
