"""Truncated backpropagation through segments: which of them gradients reach."""

from __future__ import annotations

import torch
from torch import Tensor

from ..segments import Segment


def reached(segment: Segment, bptt: int | None) -> bool:
    """Return whether gradients from some row's last segment reach this one."""
    return bptt is None or min(segment.left) <= bptt


def truncate(memory: Tensor, segment: Segment, bptt: int | None) -> Tensor:
    """Cut the graph of `memory` [B, m, d] where a row's number of segments left is a multiple of `bptt`.

    Args:
        segment: the one that reads the memory.
        bptt: segments through which gradients reach back; None: through all.
    """
    if bptt is None:
        return memory
    cut = [row for row, left in zip(segment.rows, segment.left, strict=True) if left % bptt == 0]
    if len(cut) == memory.shape[0]:
        return memory.detach()
    rows = torch.tensor(cut, dtype=torch.long, device=memory.device)
    return memory.index_copy(0, rows, memory[rows].detach()) if cut else memory
