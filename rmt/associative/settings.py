"""How associative memories are laid into a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...kernels import validation as check
from .schedules import SCHEDULES


@dataclass(frozen=True)
class AssociativeSettings:
    """The arguments of `AssociativeMemory`, checked; `layers` are those that have a memory, in order.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """

    num_memory_tokens: int
    segment_len: int
    d_mem: int
    nu: int
    normalize: bool
    layers: tuple[int, ...]
    schedule: str
    bptt: int | None

    def __post_init__(self) -> None:
        for name in ("num_memory_tokens", "segment_len", "d_mem", "nu"):
            check.check_integer(name, getattr(self, name), 1)
        if self.segment_len < self.num_memory_tokens:
            raise ValueError(
                f"segment_len must be at least num_memory_tokens = {self.num_memory_tokens}, got {self.segment_len}: a "
                "segment shorter than its memory compresses nothing"
            )
        check.check_bool("normalize", self.normalize)
        check.check_choice("schedule", self.schedule, tuple(SCHEDULES))
        if self.bptt is not None:
            check.check_integer("bptt", self.bptt, 1)

    @property
    def key_width(self) -> int:
        """Features of a query or key, K."""
        return 2 * self.nu * self.d_mem


def chosen(layers: Iterable[int] | None, depth: int) -> tuple[int, ...]:
    """Indices of the layers with a memory, in order.

    Raises:
        TypeError, ValueError: one is not there, or none is chosen.
    """
    if layers is None:
        return tuple(range(depth))
    given = [check.check_integer("layers", layer, -depth) for layer in layers]
    if wrong := [layer for layer in given if layer >= depth]:
        raise ValueError(f"layers must be below the model's {depth}, got {wrong[0]}")
    if not given:
        raise ValueError("layers must name at least one layer, got none")
    return tuple(sorted({layer % depth for layer in given}))
