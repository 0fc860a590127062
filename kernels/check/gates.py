"""How large an error may be: one measure and one table of tolerances for `segattn check`, tests and benchmarks."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .calls import Call

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OUTPUTS = ("out", "memory", "normalizer")


class Gate(NamedTuple):
    """The largest relative RMS errors allowed against the float64 reference on the same inputs."""

    outputs: float
    gradients: float
    # of gradients through the delta memory
    through_delta: float

    def of(self, output: str, call: Call) -> float:
        """Return the largest error allowed of an output or gradient of a call, such as "out" or "dq"."""
        if output in OUTPUTS:
            return self.outputs
        return self.through_delta if call.gated and call.update == "delta" else self.gradients


GATES = {
    "float32": Gate(2e-6, 1e-5, 1e-5),
    "float16": Gate(6e-4, 8e-4, 8e-4),
    "bfloat16": Gate(4e-3, 6e-3, 1e-2),
}
# The backend that others are compared with, and how many times its error they may have. Counted only from a quarter of
# the gate on, and from the RMS of one rounding to the dtype on (eps / sqrt 12): products of half precision start from
# rounded operands, and below either the ratio of two errors is luck.
BASELINE = "torch"
TIMES, GRADIENT_TIMES, RATIO_FROM = 1.5, 2.0, 0.25


def relative_error(value: Tensor, expected: Tensor, size: float | None = None) -> float:
    """Return the RMS error of `value` relative to `size`, computed in float64.

    Args:
        value: a tensor of the shape of `expected`.
        expected: what it should be.
        size: default: the norm of `expected`. Where it is 0, or next to it, the error is absolute.

    Raises:
        ValueError: the shapes differ.
    """
    value, expected = value.detach().double(), expected.detach().double()
    if value.shape != expected.shape:
        raise ValueError(f"value must be of shape {list(expected.shape)}, got {list(value.shape)}")
    distance = float((value - expected).norm())
    size = float(expected.norm()) if size is None else size
    return distance / size if size > 1e-12 else distance


def judge(output: str, error: float, dtype: str, call: Call, baseline: float | None) -> list[str]:
    """List what is wrong with the error of an output; `baseline` is that of the backend to compare with, if any."""
    gate = GATES[dtype].of(output, call)
    problems = ["above the gate"] if error > gate else []
    times = TIMES if output in OUTPUTS else GRADIENT_TIMES
    least = max(RATIO_FROM * gate, torch.finfo(DTYPES[dtype]).eps / math.sqrt(12))
    if baseline is not None and error > max(least, times * baseline):
        problems.append(f"{error / baseline:.1f} times the error of {BASELINE}, at most {times:g} allowed")
    return problems
