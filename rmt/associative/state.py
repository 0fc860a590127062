"""The state and the result of a call of `AssociativeMemory`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...kernels.state import MemoryState
from ..trainer import read_by_fields


class AssociativeState(NamedTuple):
    """Hold what an `AssociativeMemory` keeps of the segments it has read: constant in size, a value, differentiable.

    memories: one for each layer with a memory, in order: memory [B, 1, K, d] and normalizer [B, 1, K] with
        K = 2 · nu · d_mem, float32 (float64 for a float64 model).
    """

    memories: tuple[MemoryState, ...]

    def detach(self) -> AssociativeState:
        """Return the same numbers, cut from the graph."""
        return AssociativeState(tuple(memory.detach() for memory in self.memories))

    def select(self, rows: Tensor) -> AssociativeState:
        """Return the state of some rows of the batch, int [b], in this order."""
        return AssociativeState(tuple(MemoryState(*(x[rows] for x in memory)) for memory in self.memories))

    def replace(self, rows: Tensor, other: AssociativeState) -> AssociativeState:
        """Return this state with some rows, int [b], taken from `other`, a state of b rows."""
        pairs = zip(self.memories, other.memories, strict=True)
        return AssociativeState(
            tuple(MemoryState(*(x.index_copy(0, rows, y) for x, y in zip(*pair, strict=True))) for pair in pairs)
        )


@read_by_fields
class AssociativeOutput(NamedTuple):
    """Hold what a call of `AssociativeMemory` returns.

    loss: mean cross-entropy over the labels that count, 0 where none does; None without labels.
    logits: [B, T, vocabulary], meaningless at padding; None unless they were wanted.
    state: after every segment.
    """

    loss: Tensor | None
    logits: Tensor | None
    state: AssociativeState
