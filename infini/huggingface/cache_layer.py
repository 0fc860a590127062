"""The state of one converted layer, and what every kind of its cache answers transformers alike."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ...kernels.state import MemoryState


class LayerState(NamedTuple):
    """Hold what a converted layer keeps of the tokens that it has read.

    memory: MemoryState of the completed segments, with a lookback of all but the last; None: the layer has no memory.
    keys, values: [B, G, P, K] of the tokens behind them as attention uses them; P is the longest tail of a row, and
        shorter tails end with it.
    memory_keys: [B, G, P, K], the keys before rotary embedding.
    sinks: keys before rotary embedding and values, [B, G, n, ·], of each row's first n tokens; of rows that have these
        in their tails yet, of no account. None: all rows have them there, or the model has no sinks.
    """

    memory: MemoryState | None
    keys: Tensor
    memory_keys: Tensor
    values: Tensor
    sinks: tuple[Tensor, Tensor] | None = None

    @property
    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """The parts that grow with the tail."""
        return self.keys, self.memory_keys, self.values

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerState:
        """Return the state with `change` applied to each tensor."""
        memory = None if self.memory is None else MemoryState(*map(change, self.memory))
        sinks = None if self.sinks is None else (change(self.sinks[0]), change(self.sinks[1]))
        return LayerState(memory, change(self.keys), change(self.memory_keys), change(self.values), sinks)

    def cut(self, columns: slice) -> LayerState:
        """Return the state with these columns of the tail."""
        keys, memory_keys, values = (x[:, :, columns] for x in self.tail)
        return LayerState(self.memory, keys, memory_keys, values, self.sinks)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors of the state."""
        return (*(self.memory or ()), *self.tail, *(self.sinks or ()))


class ConvertedLayer(CacheLayerMixin):
    """The cache of one converted layer, without what depends on how the state is kept."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Do nothing: the state comes from attention."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values alone: attention joins them to the unfinished segment."""
        return key_states, value_states

    def joined(self, state: LayerState, new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return the tail's keys, memory keys and values, each followed by the new ones [B, G, T, ·]."""
        return tuple(torch.cat(pair, dim=2) for pair in zip(state.tail, new, strict=True))

    def get_max_length(self) -> int:
        """Return -1: the length of a text is not limited."""
        return -1

    # the name in older transformers
    get_max_cache_shape = get_max_length

    @abstractmethod
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these indices, in this order."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices, in this order."""
        self.reorder_cache(indices)

    def offload(self) -> None:
        """Do nothing: a state is small, and some have fixed addresses."""

    def prefetch(self) -> None:
        """Do nothing, as nothing was offloaded."""


def new_columns(query_length: int | Tensor) -> int:
    """Return the number of new columns, of which transformers before version 5 passes the positions."""
    return query_length.shape[0] if isinstance(query_length, Tensor) else query_length
