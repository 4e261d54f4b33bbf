"""Deployed models as ONNX files: what was trained is what onnxruntime computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .export import export
from .translations import translations

if TYPE_CHECKING:
    from .report import Report

__all__ = ["Report", "export", "translations"]


def __getattr__(name: str) -> Any:
    if name != "Report":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .report import Report  # needs the extra

    return Report
