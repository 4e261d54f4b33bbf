"""Checks of Python arguments. Each message names the function, the rule and the value."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch


def integer(op: str, name: str, value: Any) -> int:
    if type(value) is int:
        return value
    if isinstance(value, bool) or not hasattr(type(value), "__index__") or isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: expected {name} to be an int, got {value!r}")
    return operator.index(value)


def number(op: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{op}: expected {name} to be a number, got {value!r}")
    return float(value)


def boolean(op: str, name: str, value: Any) -> bool:
    if value is True or value is False:
        return value
    raise TypeError(f"{op}: expected {name} to be a bool, got {value!r}")


def num_bits(op: str, value: Any) -> int:
    if type(value) is int and 2 <= value <= 16:  # the common case, first to save time in eager mode
        return value
    value = integer(op, "num_bits", value)
    if not 2 <= value <= 16:
        raise ValueError(f"{op}: expected num_bits to be from 2 to 16, got {value}")
    return value
