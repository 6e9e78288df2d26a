"""Checks of arguments that are no operands of a loss: numbers, counts, and tensors of rewards or
scores."""

from __future__ import annotations

import math
import numbers

import torch
from torch import Tensor

from .context import readable


def check_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int, got a {type(value).__name__}")
    count = int(value)
    if count < 1:
        raise ValueError(f"{name} is {value}; expected at least 1")
    return count


def real_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a float, got a {type(value).__name__}")
    return float(value)


def check_number(name: str, value: object, from_0: bool = False, most: float = math.inf) -> float:
    """A finite number; from 0, or from 0 to `most`."""
    number = real_number(name, value)
    if not math.isfinite(number) or (from_0 and not 0.0 <= number <= most):
        needed = "a finite number, 0 or above" if from_0 else "a finite number"
        needed = needed if most == math.inf else f"a number in [0, {most:g}]"
        raise ValueError(f"{name} is {value}; expected {needed}")
    return number


def check_real(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got a {type(value).__name__}")
    if value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} has dtype {value.dtype}; expected a float or an integer dtype")
    return value.detach()


def check_finite(name: str, value: Tensor) -> None:
    """Only where that is cheap: on a device, reading would wait."""
    if not value.is_floating_point() or not readable(value):
        return
    outside = ~value.isfinite()
    if outside.any():
        at = tuple(outside.nonzero()[0].tolist())
        where = f" at {list(at)}" if at else ""
        raise ValueError(f"{name} contains {float(value[at])}{where}; expected finite numbers")


def dtype_of(value: Tensor) -> torch.dtype:
    """The dtype of results."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32
