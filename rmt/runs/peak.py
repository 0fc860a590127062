"""How much memory a computation holds at most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@contextmanager
def peak_bytes(device: torch.device) -> Iterator[list[int]]:
    """A list that gets one number when the block is left, or none where it cannot be told.

    On a GPU the most bytes of tensors there were, the model's included; on a CPU under Linux the process's peak
    resident size.
    """
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield found
        found.append(torch.cuda.max_memory_allocated(device))
        return
    try:
        _RESET.write_text("5")
    except OSError:
        yield found
        return
    yield found
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    found.append(int(lines["VmHWM"].split()[0]) * 1024)
