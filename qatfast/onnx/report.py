"""Report, the result of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Report:
    """What :func:`qatfast.onnx.export` wrote, and how onnxruntime runs it with all optimizations.

    Attributes:
        nodes: the number of nodes in the file.
        bytes: the size of the file, with its external data.
        fused: by layer the kernel of onnxruntime that multiplies integers, or ``"float"`` if it multiplies floats.
        compared: how many numbers were compared: integers of quantizations and numbers of the results that follow by
            exact arithmetic from the integers before them.
        differing: how many of them are not those of the model in PyTorch.
        float_compared: how many integers of quantizations were compared whose input comes from operators with the
            library's own rounding, such as LayerNormalization.
        float_differing: how many of them are not those of the model in PyTorch.
        error: the largest difference of a result that such operators give, relative to the largest result.
        notes: what to know about the file.

    Each layer is compared on the integers that onnxruntime has before it. Nothing is compared, and ``fused`` is empty,
    where onnxruntime is not installed.
    """

    nodes: int
    bytes: int
    fused: Mapping[str, str] = field(default_factory=dict)
    compared: int = 0
    differing: int = 0
    float_compared: int = 0
    float_differing: int = 0
    error: float = 0.0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, self.fused), default=0)
        lines = [f"{self.nodes} nodes, {self.bytes:,} bytes"]
        lines += [f"{name.ljust(width)}  {kind}" for name, kind in self.fused.items()]
        if self.fused:
            lines.append(f"{self.compared:,} numbers compared, {self.differing:,} differ")
        if self.float_compared:
            lines.append(
                f"{self.float_compared:,} integers behind float operators compared, {self.float_differing:,} differ"
            )
        return "\n".join([*lines, *self.notes])

    __repr__ = __str__
