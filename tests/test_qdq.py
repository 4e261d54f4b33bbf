"""convert(form="quantized_decomposed"): PyTorch's operators that quantize and dequantize."""

import pytest
import torch
from torch import nn

import qatfast
from qatfast import QATConfig, QuantSpec
