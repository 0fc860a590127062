"""The orders in which the cells (layer, segment) are run; all compute the same.

A cell needs the layer below in its own segment, and its own layer's memory of the segment before. Recurrence that
stays inside a layer leaves more than one order, and lets a diagonal of cells run at once (arXiv 2506.05229).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

# cells that run at once
Wave = list[tuple[int, int]]


def vertical(depth: int, segments: int) -> Iterator[Wave]:
    """Run segment by segment."""
    return ([(layer, segment)] for segment in range(segments) for layer in range(depth))


def horizontal(depth: int, segments: int) -> Iterator[Wave]:
    """Run layer by layer."""
    return ([(layer, segment)] for layer in range(depth) for segment in range(segments))


def diagonal(depth: int, segments: int) -> Iterator[Wave]:
    """Run all cells with the same layer + segment at once."""
    for at in range(depth + segments - 1):
        yield [(layer, at - layer) for layer in range(max(0, at - segments + 1), min(depth, at + 1))]


SCHEDULES: dict[str, Callable[[int, int], Iterator[Wave]]] = {
    "vertical": vertical,
    "horizontal": horizontal,
    "diagonal": diagonal,
}
