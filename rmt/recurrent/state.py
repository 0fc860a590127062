"""The state and the result of a call of `RecurrentMemory`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..trainer import read_by_fields


class RecurrentState(NamedTuple):
    """Hold what one call of a `RecurrentMemory` hands on to the next.

    memory: [B, m, d], written by the last segment of each row.
    """

    memory: Tensor

    def detach(self) -> RecurrentState:
        """Return the same numbers, cut from the graph."""
        return RecurrentState(self.memory.detach())

    def select(self, rows: Tensor) -> RecurrentState:
        """Return the state of some rows of the batch, int [b], in this order."""
        return RecurrentState(self.memory[rows])

    def replace(self, rows: Tensor, other: RecurrentState) -> RecurrentState:
        """Return this state with some rows, int [b], taken from `other`, a state of b rows."""
        return RecurrentState(self.memory.index_copy(0, rows, other.memory.to(self.memory.dtype)))


@read_by_fields
class RecurrentOutput(NamedTuple):
    """Hold what a call of `RecurrentMemory` returns.

    loss: mean cross-entropy over the labels that count, 0 where none does; None without labels.
    logits: [B, T, C] of every token, or [B, C] of each row's last segment; None unless they were wanted.
    state: after every segment.
    """

    loss: Tensor | None
    logits: Tensor | None
    state: RecurrentState
