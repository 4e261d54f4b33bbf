"""Deployed models as ONNX files: what was trained is what onnxruntime computes."""

from __future__ import annotations

from .export import export

__all__ = ["export"]
