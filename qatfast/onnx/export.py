"""export: a prepared or an integer model becomes an ONNX file."""

from __future__ import annotations

import copy
import json
import os
import warnings
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .. import arguments
from ..config import describe
from ..convert import convert
from ..integer import IntegerLayer
from ..integer.base import is_converted
from .report import Report

FORMS = ("qdq", "integer")
OPSETS = range(21, 24)
_BFLOAT16 = "Nothing was compared: onnxruntime has no kernels for bfloat16 on the CPU."


def export(
    model: nn.Module,
    example_inputs: Any,
    path: str | os.PathLike[str],
    *,
    form: str = "qdq",
    opset: int = 21,
    dynamic_batch: bool = True,
) -> Report:
    """Writes a trained model as an ONNX file, and compares what onnxruntime computes with what PyTorch does.

    ``"qdq"``: QuantizeLinear and DequantizeLinear around the layers, which most runtimes read. onnxruntime multiplies
    integers, and the integers of each chain are those of ``model.eval()``. ``"integer"``: MatMulInteger and
    ConvInteger, with the arithmetic between them written out; dynamic ranges are possible.

    Args:
        model: after :func:`qatfast.prepare` and training, or of :func:`qatfast.convert`; it stays as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments of the model.
        path: of the file.
        form: ``"qdq"`` or ``"integer"``.
        opset: 21 to 23.
        dynamic_batch: whether the first dimension of the inputs may have any size.

    Returns:
        A :class:`Report`: ``print`` it.

    Raises:
        ImportError: the extra ``qatfast[onnx]`` is not installed.
        TypeError: an argument has the wrong type, or the model has no quantized layers.
        ValueError: ``form`` or ``opset`` is another; a range is dynamic in the form ``"qdq"``; the model is in float64.
        RuntimeError: a range has not been observed.
    """
    _check_arguments(model, example_inputs, form, opset, dynamic_batch)
    require_extra("qatfast.onnx.export")
    from . import graph
    from .deploy import check_static, deployed

    args, kwargs = _on_cpu(arguments.example_inputs("qatfast.onnx.export", example_inputs))
    integer_model = copy.deepcopy(model) if is_converted(model) else convert(model)
    integer_model = integer_model.cpu().eval()
    _check_dtypes(integer_model)
    if form == "qdq":
        check_static(integer_model)
    exported = deployed(integer_model, form)
    program = _program(exported, args, kwargs, opset, dynamic_batch)
    integers = graph.tidy(program.model)
    program.model.metadata_props.update(_metadata(integer_model, form))
    program.save(path)
    fields: dict[str, Any] = {}
    if any(
        module.dtype == torch.bfloat16
        for module in integer_model.modules()
        if isinstance(module, IntegerLayer)
    ):
        fields["notes"] = (_BFLOAT16,)
    elif find_spec("onnxruntime") is not None:
        from .verify import verify

        fields = verify(path, program.model, integers, integer_model, args, kwargs)
    return Report(nodes=len(program.model.graph), bytes=_bytes(path), **fields)


def require_extra(name: str) -> None:
    """Raises ImportError unless the packages are there that write ONNX files."""
    for package in ("onnx", "onnxscript"):
        try:
            import_module(package)
        except ImportError as error:
            raise ImportError(
                f"{name}: expected the package {package}, which is not installed; run pip install 'qatfast[onnx]'"
            ) from error


def _check_arguments(model: Any, example_inputs: Any, form: Any, opset: Any, dynamic_batch: Any) -> None:
    arguments.module("qatfast.onnx.export", "model", model)
    arguments.example_inputs("qatfast.onnx.export", example_inputs)
    if form not in FORMS:
        raise ValueError(f"qatfast.onnx.export: expected form to be 'qdq' or 'integer', got {form!r}")
    if arguments.integer("qatfast.onnx.export", "opset", opset) not in OPSETS:
        raise ValueError(f"qatfast.onnx.export: expected opset to be from 21 to 23, got {opset}")
    arguments.boolean("qatfast.onnx.export", "dynamic_batch", dynamic_batch)


def _check_dtypes(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if getattr(module, "dtype", None) == torch.float64:
            raise ValueError(
                f"qatfast.onnx.export: expected a model in float32, float16 or bfloat16, got float64 in "
                f"{name or 'the root'!r}; ONNX quantizes no float64"
            )


def _on_cpu(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.detach().cpu() if isinstance(leaf, Tensor) else leaf, tree)


def _program(model: nn.Module, args: Any, kwargs: Any, opset: int, dynamic_batch: bool) -> Any:
    """Returns what torch.onnx.export makes of the model."""
    shapes = None
    if dynamic_batch:
        args, kwargs, shapes = _with_dynamic_batch(args, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            optimize=False,  # graph.tidy does that, when it has seen all quantizations
            verbose=False,
        )


def _with_dynamic_batch(args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Returns arguments with a batch of at least two, as tracers take 1 for a constant, and their dynamic shapes."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    size = len(tensors[0]) if tensors else 0
    batch = torch.export.Dim("batch")

    def has_batch(leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size

    shapes = tree_map(lambda leaf: {0: batch} if has_batch(leaf) else None, (args, kwargs))
    if size == 1:
        args, kwargs = tree_map(
            lambda leaf: torch.cat([leaf, leaf]) if has_batch(leaf) else leaf, (args, kwargs)
        )
    return args, kwargs, shapes[1] if kwargs else shapes[0]


def _metadata(model: nn.Module, form: str) -> dict[str, str]:
    """Returns what the file says about its origin."""
    import qatfast

    configs = {
        name: describe(layer.config)
        for name, layer in model.named_modules()
        if isinstance(layer, IntegerLayer)
    }
    return {
        "qatfast.version": qatfast.__version__,
        "qatfast.form": form,
        "qatfast.config": json.dumps(configs),
    }


def _bytes(path: str | os.PathLike[str]) -> int:
    """Returns the size of a file and of its external data."""
    parts = [os.fspath(path), f"{os.fspath(path)}.data"]
    return sum(os.path.getsize(part) for part in parts if os.path.exists(part))
