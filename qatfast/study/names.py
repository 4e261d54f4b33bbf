"""The models of the study: their keys in results.json, their labels, and what each of them is."""

from __future__ import annotations

FLOAT_BITS = 32
"""The bits of a model without quantization."""

TITLES = {
    "fp32": "FP32 start",
    "fp32_longer": "FP32",
    "ptq": "PTQ",
    "qat_finetuned": "QAT",
    "ptq_every_layer": "PTQ every layer",
    "ptq_tutorial": "Tutorial PTQ",
    "qat_tutorial": "Tutorial QAT",
}
"""Label of each model, in the order of every table."""

EXPLANATIONS = {
    "fp32": "FP32 after the first half of the training: where QAT starts.",
    "fp32_longer": "The network in 32-bit floats; all others are compared with it.",
    "ptq": "Post-training quantization: FP32 with each layer's weights (per output channel) and inputs (per sample) "
    "rounded; biases and outputs stay float.",
    "qat_finetuned": "Quantization-aware training: the second half of the training has the rounding of PTQ.",
    "ptq_every_layer": "As PTQ, but the first and the last layer have the few bits too.",
    "ptq_tutorial": "FP32 on the grids of Tutorial QAT, and no further training.",
    "qat_tutorial": "As QAT, but as tutorials teach it (QATConfig.tutorial): one grid per tensor for weights, "
    "biases, the input and each layer's output, the class scores too.",
}
"""What each model is."""


def plural(count: int, word: str, many: str = "") -> str:
    """``1 epoch``, ``2 epochs``, ``2 classes`` (with ``many``)."""
    return f"{count:,} {word if count == 1 else many or word + 's'}"
