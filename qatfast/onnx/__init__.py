"""Deployed models as ONNX files: what was trained is what onnxruntime computes."""

from .export import export
from .report import Report
from .translations import translations

__all__ = ["Report", "export", "translations"]
