"""The most memory that a computation holds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """Yield a list that, after the block, holds the most bytes that were in use, or nothing where they are unknown.

    On a GPU these are the bytes of tensors, the model's included; on a CPU under Linux the process's peak resident
    size.
    """
    peak: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device))
        return
    try:
        _RESET.write_text("5")
    except OSError:
        yield peak
        return
    yield peak
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    peak.append(int(lines["VmHWM"].split()[0]) * 1024)
