"""Autocast: inputs are cast once, at the operation's boundary; inside, products keep the dtype of their operands."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def autocast_holds(device_type: str) -> bool:
    """Return whether autocast is on for the device."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def autocast(x: Tensor) -> Tensor:
    """Cast floats narrower than float64 to the autocast dtype, as PyTorch does for its own attention."""
    if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16, torch.float32):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def without_autocast(f: Callable[P, R]) -> Callable[P, R]:
    """Return f with autocast off, which would lower the products of float32 states; a backward may run under it too."""

    @functools.wraps(f)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if first is None or not autocast_holds(first.device.type):
            return f(*args, **kwargs)
        with torch.autocast(first.device.type, enabled=False):
            return f(*args, **kwargs)

    return wrapped
