"""The values that cross the operation's boundary: the memory's state, the result, a call's options, sinks, biases."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import GetAttrKey, register_pytree_node


class MemoryState:
    """A compressive memory as a value: passed in, returned, never mutated.

    memory: [B, G, K, V], the sum of σ(k)ᵀ v that the update rule has kept.
    normalizer: [B, G, K], the sum of σ(k).

    Both are float32 (float64 when the call's inputs are). With packed sequences, B is their number N.

    It unpacks like a pair, `memory, normalizer = state`, but is not a tuple: wrappers for mixed precision, such as
    FSDP2, rebuild the tuples, dictionaries and dataclasses among a module's arguments and results with every tensor
    cast. They pass an object of any other class as it is, so the memory stays float32.
    """

    __slots__ = ("memory", "normalizer")

    def __init__(self, memory: Tensor, normalizer: Tensor) -> None:
        self.memory = memory
        self.normalizer = normalizer

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.memory, self.normalizer))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return (self.memory, self.normalizer)[index]

    def __repr__(self) -> str:
        return f"MemoryState(memory={self.memory}, normalizer={self.normalizer})"

    @classmethod
    def zeros(
        cls,
        batch: int,
        heads: int,
        key_width: int,
        value_width: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> MemoryState:
        """Return the empty memory of `batch` sequences and `heads` key/value heads."""
        memory = torch.zeros(batch, heads, key_width, value_width, device=device, dtype=dtype)
        return cls(memory, memory.new_zeros(batch, heads, key_width))

    def detach(self) -> MemoryState:
        """Return the same state, cut from the graph: where truncated back-propagation ends."""
        return MemoryState(self.memory.detach(), self.normalizer.detach())


# hooks, transforms and torch.export look for tensors in registered classes
register_pytree_node(
    MemoryState,
    lambda state: (list(state), None),
    lambda tensors, _: MemoryState(*tensors),
    serialized_type_name="segattn.MemoryState",
    flatten_with_keys_fn=lambda state: (
        [(GetAttrKey("memory"), state.memory), (GetAttrKey("normalizer"), state.normalizer)],
        None,
    ),
)


class SegmentOutput(NamedTuple):
    """Hold what `segment_attention` returns.

    out: [B, H, Tq, V] in q's dtype.
    state: the memory after every segment completed inside k and v, less the last `lookback` of them; None when the call
        has no gate.
    """

    out: Tensor
    state: MemoryState | None


class Options(NamedTuple):
    """The arguments of `segment_attention` that are not tensors, checked."""

    segment_len: int
    update: str
    causal: bool
    num_read: int
    num_write: int
    empty_memory: str
    scale: float
    softcap: float | None = None
    lookback: int = 0


class HeadBiases(NamedTuple):
    """Hold what each query head adds to its softmax, [H] each, in the state's dtype, or None."""

    slopes: Tensor | None = None  # a score loses slope · |i − j|
    sink_logits: Tensor | None = None  # one more score of every row, without a value

    @property
    def present(self) -> bool:
        """Return whether there are any."""
        return self.slopes is not None or self.sink_logits is not None


class Sinks(NamedTuple):
    """The sinks of a call as extra keys of every slot that sees them; zeros where a slot does not."""

    k: Tensor  # [F, G, n, K], contiguous as v
    v: Tensor  # [F, G, n, V]
    seen: Tensor  # bool [F]
    unseen: int = 0  # of whole rows: how many first segments of every row do not see them


def over_peak(normalizer: Tensor) -> tuple[Tensor, Tensor]:
    """Return z [..., K] over its peak, and 1 / peak [..., 1]; both 0 where z is 0 or has underflowed."""
    limits = torch.finfo(normalizer.dtype)
    peak = normalizer.abs().amax(-1, keepdim=True)
    inverse = torch.where(peak >= limits.tiny / limits.eps, peak.reciprocal(), 0)
    return normalizer * inverse, inverse


def least_weight(largest: Tensor, inverse_peak: Tensor) -> Tensor:
    """Return the least |σ z| [..., 1], z over its peak, by which features σ find anything in a memory.

    Below it σ z has lost its digits to underflow, or σ / σ z, times which gradients go, could overflow.

    Args:
        largest: [..., 1], the largest |σ| of a row.
    """
    limits = torch.finfo(largest.dtype)
    least = limits.tiny / limits.eps * inverse_peak.clamp(min=1)
    return (largest * least).clamp(min=limits.tiny)


def empty_output(q: Tensor, v: Tensor) -> Tensor:
    """Return out [B, H, Tq, V] of a call without queries: nothing, but still part of the graph."""
    return q[..., :1].expand(-1, -1, -1, v.shape[-1])
