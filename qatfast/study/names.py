"""The models of the study: their keys in results.json, their titles, and what each of them is."""

from __future__ import annotations

FLOAT_BITS = 32
"""The bits of a model without quantization."""

TITLES = {
    "fp32": "FP32",
    "fp32_longer": "FP32, trained longer",
    "ptq_weights": "PTQ, weights only",
    "ptq": "PTQ, weights + activations",
    "qat_scratch": "QAT from scratch",
    "qat_finetuned": "QAT, fine-tuned",
    "ptq_float_scores": "PTQ, scores in float",
    "qat_finetuned_float_scores": "QAT, fine-tuned, scores in float",
}
"""Title of each model, in the order of every table."""

EXPLANATIONS = {
    "fp32": "The network in 32-bit floats.",
    "fp32_longer": "FP32 with as many further epochs as fine-tuning gets, to compare fine-tuned QAT with.",
    "ptq_weights": "FP32 with weights and biases rounded afterwards; activations in float (what tutorials call PTQ).",
    "ptq": "FP32 with everything rounded afterwards: input, weights, biases and the output of each layer (what a "
    "device runs).",
    "qat_scratch": "Everything rounded during training, from random weights.",
    "qat_finetuned": "Everything rounded during further training of the FP32 weights (what practitioners do).",
    "ptq_float_scores": "As PTQ, weights + activations, but the last layer's outputs, the class scores, stay float.",
    "qat_finetuned_float_scores": "As QAT, fine-tuned, but the class scores stay in float.",
}
"""What each model is."""
