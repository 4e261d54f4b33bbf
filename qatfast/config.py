"""Granularities, ranges, QuantSpec for a tensor and QATConfig for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import isfinite
from typing import Any, Literal

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
    if isinstance(value, Granularity) and type(value) is not Granularity:
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
class Range(_Arguments):
    """Where the range of a tensor comes from. This is the base of the five classes below."""


@dataclass(frozen=True)
class Dynamic(Range):
    """The range of the tensor at hand."""


@dataclass(frozen=True)
class MovingAverage(Range):
    """A stored range, which training moves towards the range of each batch after it has quantized the batch::

        running = running + averaging_constant * (range of the batch - running)

    The first batch sets the range and is quantized with it. Evaluation uses the stored range.

    Args:
        averaging_constant: greater than 0, at most 1.

    Raises:
        TypeError: ``averaging_constant`` is not a number.
        ValueError: ``averaging_constant`` is not in (0, 1].
    """

    averaging_constant: float = 0.01

    def __post_init__(self) -> None:
        value = arguments.number("MovingAverage", "averaging_constant", self.averaging_constant)
        if not 0 < value <= 1:
            raise ValueError(
                f"MovingAverage: expected averaging_constant to be greater than 0 and at most 1, got {value}"
            )
        object.__setattr__(self, "averaging_constant", value)


@dataclass(frozen=True)
class MinMax(Range):
    """A stored range, which training widens to hold each batch after it has quantized the batch.

    The first batch sets the range and is quantized with it. Evaluation uses the stored range.
    """


@dataclass(frozen=True)
class Learned(Range):
    """A scale that is trained as a parameter (LSQ; Esser et al. 2020, arXiv 1902.08153).

    The first tensor sets it to the scale of :func:`qatfast.search_qparams`.
    """


@dataclass(frozen=True)
class Fixed(Range):
    """A range that is known beforehand, as of a sensor, of ReLU6 or of an image in 0..1.

    Args:
        lo: finite, at most 0.
        hi: finite, at least 0; not 0 if ``lo`` is 0.

    Raises:
        TypeError: an argument is not a number.
        ValueError: ``lo <= 0 <= hi`` does not hold, an end is not finite, or both are 0.
    """

    lo: float
    hi: float

    def __post_init__(self) -> None:
        lo, hi = (arguments.number("Fixed", name, getattr(self, name)) for name in ("lo", "hi"))
        if not (isfinite(lo) and isfinite(hi) and lo <= 0 <= hi and lo < hi):
            raise ValueError(
                f"Fixed: expected finite lo <= 0 <= hi that are not both 0, got lo={lo}, hi={hi}"
            )
        object.__setattr__(self, "lo", lo)
        object.__setattr__(self, "hi", hi)


OBSERVED = (MovingAverage, MinMax)
# The modes of a module: as its range says; observe and return the input; return the input.
QUANTIZE, OBSERVE, FLOAT = "quantize", "observe", "float"


@dataclass(frozen=True)
class QuantSpec(_Arguments):
    """The number of bits, the grid and the granularity of a quantized tensor.

    Args:
        num_bits: number of bits, 2 to 16.
        symmetric: if False, the grid is affine: ``[0, 2^b - 1]`` with a zero point. If True, it is
            ``[-(2^(b-1) - 1), 2^(b-1) - 1]`` with zero point 0.
        granularity: which elements share a scale.
        range: where the range comes from: ``Dynamic()``, ``MovingAverage()``, ``MinMax()``,
            ``Learned()`` or ``Fixed(lo, hi)``.
        narrow_range: if False, a symmetric grid is ``[-2^(b-1), 2^(b-1) - 1]``, as in int4
            kernels. It has no effect on an affine grid.

    ``code`` holds the spec as the operators take it: (num_bits, grid, granularity kind,
    granularity argument). Grid 0 is affine, 1 is symmetric and 2 is symmetric with the full range.

    Raises:
        TypeError: an argument has the wrong type, including ``num_bits=True`` and ``num_bits=2.5``.
        ValueError: ``num_bits`` is not from 2 to 16; ``PerToken()`` with a range other than ``Dynamic()``.
    """

    num_bits: int = 8
    symmetric: bool = False
    granularity: Granularity = PerTensor()
    range: Range = Dynamic()
    narrow_range: bool = True
    code: tuple[int, int, int, int] = field(init=False, repr=False, compare=False)
    is_observed: bool = field(init=False, repr=False, compare=False)  # a quantizer asks in every forward
    has_state: bool = field(init=False, repr=False, compare=False)  # whether a module has to keep the range
    averaging_constant: float = field(init=False, repr=False, compare=False)  # of the operators: 0 for MinMax

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_bits", arguments.num_bits("QuantSpec", self.num_bits))
        arguments.boolean("QuantSpec", "symmetric", self.symmetric)
        arguments.boolean("QuantSpec", "narrow_range", self.narrow_range)
        checked_granularity("QuantSpec", self.granularity)
        if not isinstance(self.range, Range) or type(self.range) is Range:
            raise TypeError(
                "QuantSpec: expected range to be Dynamic(), MovingAverage(), MinMax(), Learned() or Fixed(lo, hi), "
                f"got {self.range!r}"
            )
        if isinstance(self.granularity, PerToken) and not self.is_dynamic:
            raise ValueError(f"QuantSpec: expected Dynamic() for PerToken(), got {self.range}")
        grid = (1 if self.narrow_range else 2) if self.symmetric else 0
        constant = self.range.averaging_constant if isinstance(self.range, MovingAverage) else 0.0
        object.__setattr__(self, "code", (self.num_bits, grid, *self.granularity.code))
        object.__setattr__(self, "is_observed", isinstance(self.range, OBSERVED))
        object.__setattr__(self, "has_state", isinstance(self.range, (*OBSERVED, Learned)))
        object.__setattr__(self, "averaging_constant", constant)

    @property
    def is_dynamic(self) -> bool:
        return isinstance(self.range, Dynamic)

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
        kind = "" if self.is_dynamic else f", {self.range}"
        return f"{self.num_bits}-bit {symmetric if self.symmetric else 'affine'} {granularity}{kind}"


def quant_range(num_bits: int, symmetric: bool, narrow_range: bool) -> tuple[int, int]:
    """Returns (quant_min, quant_max) of a grid; see :class:`QuantSpec`."""
    if symmetric:
        return int(narrow_range) - 2 ** (num_bits - 1), 2 ** (num_bits - 1) - 1
    return 0, 2**num_bits - 1


@dataclass(frozen=True)
class QATConfig(_Arguments):
    """The specs of a layer's tensors; None leaves a tensor in float.

    The default quantizes weight, bias and output to 8 bits, affine, per tensor.

    ``codes`` holds the specs as the operators take them: the codes of input, weight, bias and
    output, concatenated. The code of None and of ``"int32"`` is (0, 0, 0, 0). ``is_dynamic`` is
    True if all ranges are ``Dynamic()`` and the bias is not ``"int32"``: such a layer has no
    quantizer modules.

    Args:
        input: the spec of the input.
        weight: the spec of the weight.
        bias: the spec of the bias, or ``"int32"``: the bias is rounded to a multiple of
            ``scale_x * scale_w``, as integer runtimes have it.
        output: the spec of the output.

    Raises:
        TypeError: a field is neither a QuantSpec nor None, or ``bias`` is another string.
        ValueError: a range that is not ``Dynamic()`` for the bias, or for groups of input or output;
            ``bias="int32"`` unless the input is per tensor and the weight per tensor or output
            channel, both with at most 8 bits.
    """

    input: QuantSpec | None = None
    weight: QuantSpec | None = QuantSpec()
    bias: QuantSpec | Literal["int32"] | None = QuantSpec()
    output: QuantSpec | None = QuantSpec()
    codes: tuple[int, ...] = field(init=False, repr=False, compare=False)
    is_dynamic: bool = field(init=False, repr=False, compare=False)
    has_int32_bias: bool = field(init=False, repr=False, compare=False)
    _int8_gemm_features: int | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "has_int32_bias", isinstance(self.bias, str) and self.bias == "int32")
        specs = self.specs
        for name, spec in specs.items():
            if spec is not None and not isinstance(spec, QuantSpec):
                expected = 'a QuantSpec, "int32" or None' if name == "bias" else "a QuantSpec or None"
                raise TypeError(f"QATConfig: expected {name} to be {expected}, got {spec!r}")
            if spec is not None and not spec.is_dynamic:
                _check_static(name, spec)
        codes = [(0, 0, 0, 0) if spec is None else spec.code for spec in specs.values()]
        object.__setattr__(self, "codes", sum(codes, ()))
        is_dynamic = not self.has_int32_bias and all(
            spec is None or spec.is_dynamic for spec in specs.values()
        )
        object.__setattr__(self, "is_dynamic", is_dynamic)
        object.__setattr__(self, "_int8_gemm_features", _int8_gemm_features(self.input, self.weight))
        if self.has_int32_bias and (
            self._int8_gemm_features != 0 or self.input.granularity != PerTensor()  # type: ignore[union-attr]
        ):
            raise ValueError(
                "QATConfig: expected an input per tensor and a weight per tensor or output channel, of at most 8 bits, "
                'for bias="int32", got input='
                f"{self.input} and weight={self.weight}"
            )

    @property
    def specs(self) -> dict[str, QuantSpec | None]:
        """The specs by the name of the tensor; None for ``"int32"``."""
        bias: Any = None if self.has_int32_bias else self.bias
        return {"input": self.input, "weight": self.weight, "bias": bias, "output": self.output}

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
    def static(cls, num_bits: int = 8, *, activations: str = "affine") -> QATConfig:
        """Returns a config with the input per tensor in a stored range and the weight symmetric per output channel.

        Bias and output stay in float. At 8 bits and more the input's range is a moving average and the weight's that
        of the weight at hand. Below 8 bits both scales are learned. The deployed layer needs no ranges at run time.

        Args:
            num_bits: 2 to 16.
            activations: ``"affine"``, or ``"symmetric"`` for the full symmetric range ``[-2^(b-1), 2^(b-1) - 1]``
                without zero point, which TensorRT requires.

        Raises:
            ValueError: ``activations`` is neither.
        """
        if activations not in ("affine", "symmetric"):
            raise ValueError(
                f"QATConfig.static: expected activations to be 'affine' or 'symmetric', got {activations!r}"
            )
        is_low = arguments.num_bits("QATConfig.static", num_bits) < 8
        input_range, weight_range = (Learned(), Learned()) if is_low else (MovingAverage(), Dynamic())
        symmetric = activations == "symmetric"
        input = QuantSpec(num_bits, symmetric, range=input_range, narrow_range=not symmetric)
        weight = QuantSpec(num_bits, symmetric=True, granularity=PerChannel(0), range=weight_range)
        return cls(input=input, weight=weight, bias=None, output=None)

    @classmethod
    def for_target(cls, name: str) -> QATConfig:
        """Returns the config for a runtime: ``static()``, with symmetric activations for TensorRT.

        Args:
            name: ``"onnxruntime"``, ``"executorch"``, ``"litert"``, ``"openvino"``, ``"coreml"`` or ``"tensorrt"``.

        Raises:
            ValueError: ``name`` is another.
        """
        targets = ("onnxruntime", "executorch", "litert", "openvino", "coreml", "tensorrt")
        if name not in targets:
            raise ValueError(f"QATConfig.for_target: expected one of {', '.join(targets)}, got {name!r}")
        return cls.static(activations="symmetric" if name == "tensorrt" else "affine")

    @classmethod
    def weight_only(cls, num_bits: int = 4, group_size: int = 32) -> QATConfig:
        """Returns a config with the weight affine per group of ``group_size`` input features.

        All other tensors stay in float.
        """
        return cls(weight=QuantSpec(num_bits, granularity=PerGroup(group_size)), bias=None, output=None)


def _check_static(name: str, spec: QuantSpec) -> None:
    """Raises if a layer cannot keep the range of its tensor ``name``."""
    if name == "bias" and not isinstance(spec.range, Dynamic):
        raise ValueError(f"QATConfig: expected Dynamic() for the bias, got {spec.range}")
    if isinstance(spec.granularity, PerGroup) and name != "weight":
        raise ValueError(f"QATConfig: expected Dynamic() for groups of the {name}, got {spec.range}")


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
    specs = config.specs
    bits = {spec.num_bits for spec in specs.values() if spec is not None}
    texts = {name: "float" if spec is None else str(spec) for name, spec in specs.items()}
    if config.has_int32_bias:
        texts["bias"] = "int32"
    if len(bits) != 1:
        return ", ".join(f"{name}={text}" for name, text in texts.items())
    num_bits = bits.pop()
    return f"num_bits={num_bits}, " + ", ".join(
        f"{name}={text.removeprefix(f'{num_bits}-bit ')}" for name, text in texts.items()
    )
