"""What a converted model keeps of the tokens it has read, as transformers wants it: bytes constant in their number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from ...kernels.state import MemoryState
from .rows import Rows
from .settings import conversion_of, trunk_of


class LayerState(NamedTuple):
    """Of one layer: completed segments, and the keys and values of the unfinished one.

    keys, values: [B, G, P, K] as attention uses them; P is the longest tail of a row, shorter ones end with it.
    memory_keys: the keys before rotary embedding.
    """

    memory: MemoryState
    keys: Tensor
    memory_keys: Tensor
    values: Tensor

    def map(self, change: Callable[[Tensor], Tensor]) -> LayerState:
        """The state of changed tensors."""
        return LayerState(MemoryState(*map(change, self.memory)), *map(change, self[1:]))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them."""
        return (*self.memory, *self[1:])


class InfiniLayer(CacheLayerMixin):
    """One converted layer's state. It is replaced when a forward pass has ended, never in its midst."""

    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, segment_len: int) -> None:
        super().__init__()
        self.segment_len = segment_len
        self.record_past = False
        self.reset()

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Nothing is made ahead of the first tokens."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: attention itself puts the tail before them."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """As of a layer that keeps everything, since only layers that are not converted use the mask."""
        # before transformers 5, the new columns' positions
        time = query_length.shape[0] if isinstance(query_length, Tensor) else query_length
        return self.rows.columns + time, 0

    def get_seq_length(self, *args: Any) -> int:
        """Columns read, tokens and padding."""
        return self.rows.columns

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    # the name that older transformers ask for
    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        self.state: LayerState | None = None
        self.rows = Rows.fresh(0)
        self.room: list[Tensor] = []

    def joined(self, state: LayerState, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The tail's keys, plain keys and values with new ones behind them; single ones go into room that is left."""
        held = (state.keys, state.memory_keys, state.values)
        grown = torch.is_grad_enabled() and any(x.requires_grad for x in (*held, *new))
        if grown or new[0].shape[2] > 1 or torch.compiler.is_compiling():
            return tuple(torch.cat(pair, dim=2) for pair in zip(held, new, strict=True))
        batch, _, length, _ = held[0].shape
        if not self.room or self.room[0].shape[0] != batch or self.room[0].shape[2] <= length:
            places = max(length + 1, min(self.segment_len, 2 * length + 64))
            self.room = [x.new_empty(batch, x.shape[1], places, x.shape[3]) for x in new]
        for place, before, after in zip(self.room, held, new, strict=True):
            if before.data_ptr() != place.data_ptr():
                place[:, :, :length] = before
            place[:, :, length : length + 1] = after
        return tuple(place[:, :, : length + 1] for place in self.room)

    def activate_past_recording(self) -> None:
        """Keep the last completed segment unfolded, so that `crop` can take tokens back across its edge."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row, given as a negative number (or, as before transformers 5, keep so
        many columns).

        Raises:
            ValueError: they are folded already.
        """
        columns = self.rows.columns
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, columns - tokens_to_remove)
        if self.state is None or removed == 0:
            return
        if removed > min(self.rows.tails):
            raise ValueError(
                f"crop must take back at most the {min(self.rows.tails)} tokens that are not in the memory yet, got "
                f"{removed}: call activate_past_recording() before they are read, which keeps a segment more; assisted "
                "decoding may have as many candidates (num_assistant_tokens, prompt_lookup_num_tokens)"
            )
        self.rows = self.rows.without(removed)
        kept = self.state.keys.shape[2] - removed
        # a row's tail ends with the last column, so only the end is cut
        self.state = LayerState(self.state.memory, *(x[:, :, :kept] for x in self.state[1:]))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.state is not None:
            self.rows = self.rows.select(beam_idx)
            memory, *tail = self.state.map(lambda x: x.index_select(0, beam_idx.to(x.device)))
            # the row with the longest tail may be gone
            unused = self.state.keys.shape[2] - max(self.rows.tails)
            self.state = LayerState(memory, *(x[:, :, unused:] for x in tail))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each row `repeats` times, next to itself."""
        batch = len(self.rows.lengths)
        self.reorder_cache(torch.arange(batch).repeat_interleave(repeats))

    def offload(self) -> None:
        """Moved by nobody: what it holds is small."""

    def prefetch(self) -> None:
        """Never away."""


class InfiniCache(Cache):
    """The cache of a converted model: for each converted layer its memory and the unfinished segment.

    `generate` and `forward` take it as `past_key_values`, and put one in where there is none. It is of constant size:
    at most a segment of keys and values, and the memory. Layers that were not converted keep what they always kept.

    Args:
        model: a converted model.

    Raises:
        ValueError: the model is not converted.
    """

    def __init__(self, model: nn.Module) -> None:
        conversion = conversion_of(model)
        self.settings = conversion.settings
        native: list[Any] = list(DynamicCache(config=trunk_of(model).config).layers) if conversion.native else []
        layers = [
            InfiniLayer(self.settings.segment_len)
            if layer in self.settings.layers
            else native[layer]
            if layer < len(native)
            else DynamicLayer()
            for layer in range(conversion.depth)
        ]
        super().__init__(layers=layers)
        self.layers: list[Any] = layers

    @property
    def rows(self) -> Rows:
        """How far each row has been read."""
        return self.layers[self.settings.layers[0]].rows

    @property
    def states(self) -> dict[int, LayerState | None]:
        """By layer, of the converted ones."""
        return {layer: self.layers[layer].state for layer in self.settings.layers}

    @property
    def recording(self) -> bool:
        """Whether a segment more is kept, for `crop`."""
        return self.layers[self.settings.layers[0]].record_past

    @property
    def num_bytes(self) -> int:
        """What the tensors take."""
        held = [x for state in self.states.values() if state is not None for x in state.tensors()]
        held += [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def max_bytes(self) -> int:
        """What they take when the unfinished segment is as long as it can be."""
        length = self.settings.segment_len
        tails = [x for state in self.states.values() if state is not None for x in state[1:]]
        free = (x.element_size() * (length - x.shape[2]) * x.shape[0] * x.shape[1] * x.shape[3] for x in tails)
        return self.num_bytes + sum(free)

    def commit(self, rows: Rows, states: dict[int, LayerState]) -> None:
        """What a whole forward pass has left."""
        for layer in self.settings.layers:
            self.layers[layer].rows, self.layers[layer].state = rows, states[layer]

    def copy(self) -> InfiniCache:
        """The same values in a cache of its own: what is read into one is not seen by the other. Tensors are shared."""
        # tensors may be shared, but not the room behind them
        for layer in self.layers:
            if isinstance(layer, InfiniLayer):
                layer.room = []
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def detach(self) -> InfiniCache:
        """A copy that is cut from the graph: where truncated back-propagation ends."""
        other = self.copy()
        for layer in other.layers:
            if isinstance(layer, InfiniLayer):
                layer.state = None if layer.state is None else layer.state.map(torch.Tensor.detach)
            elif layer.keys is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return other

    @property
    def batch(self) -> int | None:
        """Rows; None before the first pass, which decides."""
        return None if self.is_empty() else len(self.rows.lengths)

    @property
    def is_open(self) -> bool:
        """Whether its rows go on: none has ended with padding."""
        return self.rows.open

    def is_empty(self) -> bool:
        """Whether nothing has been read."""
        return self.rows.columns == 0
