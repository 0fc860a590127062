"""Count what loads, stores and copies move: sectors of global memory, passes over the banks of shared memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .races import Array

SECTOR = 32
BANKS = 32  # of four bytes


class Traffic(NamedTuple):
    """Hold what one instruction moved: accesses of warps, and the bytes of their lanes.

    moved: of global memory, 32-byte sectors; of shared memory, passes over the banks. least: the fewest there may be.
    """

    space: str
    accesses: int
    bytes: int
    moved: int
    least: int

    def __add__(self, other: Traffic) -> Traffic:  # type: ignore[override]
        return Traffic(self.space, *(a + b for a, b in zip(self[1:], other[1:], strict=True)))


def global_traffic(warps: Array, at: Array, width: int) -> Traffic:
    """Return the traffic of lanes of `warps` that access `width` aligned bytes each."""
    sectors = np.unique(warps << 48 | at // SECTOR)
    each = np.unique(warps << 48 | at)  # several lanes may read the same
    of_warps, counts = np.unique(each >> 48, return_counts=True)
    return Traffic("global", of_warps.size, at.size * width, sectors.size, int((-(-counts * width // SECTOR)).sum()))


def shared_traffic(warps: Array, lanes: Array, at: Array, width: int) -> Traffic:
    """Return the traffic of lanes of `warps`: a pass has a word of each bank, for as many lanes as 128 bytes serve."""
    parts = warps * 4 + lanes * max(width, 4) // 128
    words = at[:, None] // 4 + np.arange(max(width // 4, 1))
    distinct = np.unique(parts[:, None] << 40 | words)
    banks, counts = np.unique((distinct >> 40) * BANKS + distinct % BANKS, return_counts=True)
    first = np.flatnonzero(np.diff(banks // BANKS, prepend=-1))
    return Traffic(
        "shared", np.unique(warps).size, at.size * width, int(np.maximum.reduceat(counts, first).sum()), first.size
    )
