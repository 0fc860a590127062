"""How associative memories are laid into a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

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
    # a text's last segment is the short one
    alignment: ClassVar[str] = "left"

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


def layers_with_memory(layers: Iterable[int] | None, depth: int) -> tuple[int, ...]:
    """Return the indices of the layers with a memory, in order, none negative.

    Args:
        layers: indices, negative ones from the end; None: all.
        depth: layers of the model.

    Raises:
        TypeError, ValueError: an index that is no layer's, or no index.
    """
    if layers is None:
        return tuple(range(depth))
    indices = [check.check_integer("layers", layer, -depth) for layer in layers]
    if wrong := [layer for layer in indices if layer >= depth]:
        raise ValueError(f"layers must be below the model's {depth}, got {wrong[0]}")
    if not indices:
        raise ValueError("layers must name at least one layer, got none")
    return tuple(sorted({layer % depth for layer in indices}))
