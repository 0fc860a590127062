"""Numbers in registers: PTX's types as NumPy's, and the formats that NumPy lacks to and from float32."""

from __future__ import annotations

from typing import Any

import numpy as np

from .faults import Unsupported
from .races import Array

BITS: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
FLOATS: dict[str, Any] = {"f16": np.uint16, "bf16": np.uint16, "tf32": np.uint32, "f32": np.float32}
HALVES = ("f16", "bf16")


def numpy_type(name: str) -> Any:
    """Return NumPy's type for PTX's: for pairs, one of the two; for halves and tf32, of the same bits."""
    if name == "pred":
        return np.bool_
    base = name.removesuffix("x2")
    if base in FLOATS:
        return FLOATS[base]
    if base[0] in "bus" and base[1:] in ("8", "16", "32", "64"):
        return (SIGNED if base[0] == "s" else BITS)[int(base[1:]) // 8]
    raise Unsupported(f"type .{name}")


def widen(bits: Array, name: str) -> Array:
    """Return the float32 values of numbers in a narrower format: f16, bf16 or tf32, of which 13 bits are ignored."""
    if name == "f16":
        return bits.view(np.float16).astype(np.float32)
    if name == "bf16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return (bits & np.uint32(0xFFFF_E000)).view(np.float32)


def narrow(values: Array, name: str) -> Array:
    """Return the bits of float32 values rounded to f16 or bf16, to nearest, ties to even."""
    values = np.asarray(values, np.float32)
    if name == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)


def tf32(values: Array) -> Array:
    """Return float32 values rounded to tf32, to nearest, ties away from zero."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFF_E000)
    return np.where(np.isfinite(values), rounded, bits).view(np.float32)


def flush(values: Array) -> Array:
    """Return float32 values, subnormal ones as zeros of their sign."""
    return np.where(np.abs(values) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), values), values)
