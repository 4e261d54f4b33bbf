"""Checks of Python arguments. Each message names the function, the rule and the value."""

from __future__ import annotations

import numbers
import operator
from typing import Any

import torch
from torch import nn


def module(op: str, name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is an nn.Module."""
    if not isinstance(value, nn.Module):
        got = "a Tensor" if isinstance(value, torch.Tensor) else repr(value)
        raise TypeError(f"{op}: expected {name} to be an nn.Module, got {got}")


def example_inputs(op: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the positional and the keyword arguments of a model."""
    if isinstance(value, dict):
        return (), value
    if isinstance(value, tuple):
        return value, {}
    if isinstance(value, torch.Tensor):
        return (value,), {}
    raise TypeError(
        f"{op}: expected example_inputs to be a tensor, a tuple of positional or a dict of keyword arguments, got "
        f"{type(value).__name__}"
    )


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
