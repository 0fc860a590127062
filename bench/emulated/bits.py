"""The bits of outputs, few enough for a file: what a device computes, held against what the executor does."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.check.gates import DTYPES, relative_error
from ...kernels.triton.configs import TARGETS, family
from .cases import CASES
from .launches import EMULATED, emulating

# of a device's record
DTYPE = "bfloat16"
# elements of an output that are kept, evenly spread
SAMPLE = 256
# of the gate: how far a device may be from the executor, which rounds 2^x and sums in a tensor core otherwise
SHARE = 0.25


def record(call: str, target: str, device: torch.device | str) -> dict[str, Any]:
    """Run a call by the kernels on a device, and return its outputs' bits as plain values."""
    case = CASES[call]
    made = {name: x.detach().to(device).requires_grad_(x.requires_grad) for name, x in case.draw(DTYPES[DTYPE]).items()}
    values = case.evaluate(made, "triton")
    return {
        "call": call,
        "dtype": DTYPE,
        "target": target,
        "outputs": {name: _kept(x) for name, x in values.items()},
    }


def _kept(x: Tensor) -> dict[str, Any]:
    """Return a hash of a tensor's bits, and those of some of its elements."""
    words = _words(x)
    return {
        "sha256": hashlib.sha256(words.tobytes()).hexdigest(),
        "sample": base64.b64encode(words[_places(words.size)].tobytes()).decode(),
    }


def _words(x: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's elements as unsigned words."""
    flat = x.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy().view(f"<u{x.element_size()}")


def _places(size: int) -> np.ndarray[Any, Any]:
    """Return which elements of `size` are kept."""
    return np.unique(np.linspace(0, size - 1, min(size, SAMPLE)).astype(np.int64))


class Difference(NamedTuple):
    """An output of a device's record, and how far the executor's is from it."""

    call: str
    dtype: str
    target: str
    output: str
    same: float  # share of the sample's elements that are equal to the bit
    error: float  # RMS of the difference, relative to the executor's
    gate: float  # the largest error allowed

    def __str__(self) -> str:
        return (
            f"{self.target:7} {self.dtype:9} {self.call:19} {self.output:11} {self.same:6.1%} to the bit, "
            f"{self.error:.1e} apart, {self.gate:.0e} allowed"
        )


def differences(records: Sequence[Mapping[str, Any]]) -> Iterator[Difference]:
    """Execute the calls of a device's records, and yield how far every output is from the device's.

    Raises:
        ValueError: of a device whose code is not PTX.
    """
    for kept in records:
        if not kept["target"].startswith("sm_"):
            raise ValueError(f"code for {kept['target']} is not executed, only for {', '.join(EMULATED)} and their kin")
        case = CASES[kept["call"]]
        with emulating(TARGETS[family(kept["target"])]):
            values = case.evaluate(case.draw(DTYPES[kept["dtype"]]), "triton")
        for name, x in values.items():
            here = _words(x)
            here = here[_places(here.size)]
            there = np.frombuffer(base64.b64decode(kept["outputs"][name]["sample"]), here.dtype)
            device, executed = (torch.from_numpy(words.copy()).view(x.dtype).double() for words in (there, here))
            yield Difference(
                kept["call"],
                kept["dtype"],
                kept["target"],
                name,
                float((here == there).mean()),
                relative_error(device, executed),
                SHARE * case.gate(name, kept["dtype"]),
            )
