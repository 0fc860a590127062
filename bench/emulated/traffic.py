"""Count what code moves while it is executed: sectors of global memory, passes over the banks of shared memory."""

from __future__ import annotations

import numpy as np

from .races import Array, Lanes

WARP = 32
SECTOR = 32  # bytes that global memory moves at least
BANKS, WORD = 32, 4  # of shared memory, and the bytes that each gives in one pass


class Traffic:
    """What each instruction of a kernel moved; arrays have an element for each, but for `read` and `written`.

    Attributes:
        loaded, stored: bytes of global memory, lane by lane.
        sectors: of global memory, each counted once for a warp's instruction.
        passes: over shared memory, of which a warp takes several where its lanes need different words of a bank.
        least: the passes of the same lanes without such conflicts.
        products: operations of matrix instructions.
        read, written: for every two bytes of global memory, whether they were.
    """

    def __init__(self, instructions: int, lanes: int, memory: int) -> None:
        self.loaded, self.stored, self.sectors, self.passes, self.least, self.products = np.zeros(
            (6, instructions), np.int64
        )
        self.read, self.written = np.zeros((2, memory // 2), np.bool_)
        self._lane = np.arange(lanes)

    def move(self, instruction: int, at: Array, width: int, lanes: Lanes, *, stores: bool) -> None:
        """Count that lanes load or store `width` bytes of global memory at each place."""
        (self.stored if stores else self.loaded)[instruction] += at.size * width
        self.sectors[instruction] += np.unique(self._lane[lanes] // WARP << 40 | at // SECTOR).size
        granules = max(width // 2, 1)
        (self.written if stores else self.read).reshape(-1, granules)[at // (2 * granules)] = True

    def touch(self, instruction: int, at: Array, width: int, lanes: Lanes) -> None:
        """Count that lanes touch `width` bytes of shared memory at each place; of 16 bytes, eight lanes in a pass."""
        together = min(BANKS * WORD // width, WARP)
        group = self._lane[lanes] // together
        words = at[:, None] // WORD + np.arange(max(width // WORD, 1))
        needed = np.unique(group[:, None] << 40 | words)
        banks, counts = np.unique(needed >> 40 << 8 | needed % BANKS, return_counts=True)
        groups, group_of = np.unique(banks >> 8, return_inverse=True)
        most = np.zeros(groups.size, np.int64)
        np.maximum.at(most, group_of, counts)
        self.passes[instruction] += most.sum()
        self.least[instruction] += groups.size
