"""How associative memories are laid into a model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from numbers import Real
from typing import ClassVar

from ...kernels import validation as check
from ..inputs import check_sizes
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
    epsilon: float = 0.0
    # a text's last segment is the short one
    alignment: ClassVar[str] = "left"

    def __post_init__(self) -> None:
        check_sizes(self.num_memory_tokens, self.segment_len, self.bptt)
        check.check_integer("d_mem", self.d_mem, 1)
        check.check_integer("nu", self.nu, 1)
        check.check_bool("normalize", self.normalize)
        check.check_choice("schedule", self.schedule, tuple(SCHEDULES))
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, Real) or not 0 <= self.epsilon < math.inf:
            raise ValueError(f"epsilon must be a number of at least 0, got {self.epsilon!r}")

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
