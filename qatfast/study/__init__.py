"""The study: compares a network in FP32, after PTQ and after QAT on the same data, and writes a report.

It needs matplotlib, scikit-learn and rich, which the extra ``study`` installs.
"""

# ruff: noqa: E402  (a missing package has to be reported before the imports that need it)
from importlib.util import find_spec


def _missing(package: str) -> bool:
    try:
        return find_spec(package) is None
    except ImportError:
        return True


for _package in ("matplotlib", "sklearn", "rich"):
    if _missing(_package):
        raise ModuleNotFoundError(
            f"qatfast.study needs {_package}: pip install matplotlib scikit-learn rich", name=_package
        )

from .data import DataError, Dataset, Samples, generate_dataset, load_samples, split
from .experiments import Settings, Study, run_study
from .insights import Insight, find_insights
from .networks import ThreeLayerNet, ThreeLayerNetQAT, count_parameters, quantize_layers
from .plots import (
    plot_accuracy_over_bits,
    plot_layer_errors,
    plot_training_history,
    visualize_weight_distributions,
)
from .ptq import FixedFakeQuantize, LayerError, layer_errors, quantize_model, quantize_model_weights
from .report import write_report
from .signals import quantize_signal, visualize_quantization
from .size import calculate_model_size, load_quantized, save_float, save_quantized
from .timing import time_training_steps
from .training import Epoch, Evaluation, History, evaluate_model, train_model

__all__ = [
    "DataError",
    "Dataset",
    "Epoch",
    "Evaluation",
    "FixedFakeQuantize",
    "History",
    "Insight",
    "LayerError",
    "Samples",
    "Settings",
    "Study",
    "ThreeLayerNet",
    "ThreeLayerNetQAT",
    "calculate_model_size",
    "count_parameters",
    "evaluate_model",
    "find_insights",
    "generate_dataset",
    "layer_errors",
    "load_quantized",
    "load_samples",
    "plot_accuracy_over_bits",
    "plot_layer_errors",
    "plot_training_history",
    "quantize_layers",
    "quantize_model",
    "quantize_model_weights",
    "quantize_signal",
    "run_study",
    "save_float",
    "save_quantized",
    "split",
    "time_training_steps",
    "train_model",
    "visualize_quantization",
    "visualize_weight_distributions",
    "write_report",
]
