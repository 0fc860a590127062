"""The cache of a converted model for transformers: its size does not grow with the text."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from .cache_layer import ConvertedLayer, LayerState, new_columns
from .rows import Rows
from .settings import Settings, conversion_of, trunk_of


class InfiniLayer(ConvertedLayer):
    """The cache of one converted layer. Its state is replaced after a forward pass, never during one."""

    is_compileable = False
    is_croppable = True

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.record_past = False
        self.reset()

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the columns of a mask over everything read: only layers that were not converted use it."""
        return self.rows.columns + new_columns(query_length), 0

    def get_seq_length(self, *args: Any) -> int:
        """Return the number of columns read, tokens and padding."""
        return self.rows.columns

    def reset(self) -> None:
        """Forget everything."""
        self.state: LayerState | None = None
        self.rows = Rows.fresh(0)
        self.room: list[Tensor] = []

    def joined(self, state: LayerState, new: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
        """Return the tail's keys, memory keys and values, each followed by the new ones [B, G, T, ·].

        Without gradients, a single token is written into spare room behind the tail, which is not copied. With them,
        attention may save what is returned for its backward pass, and the room could not be written again.
        """
        if torch.is_grad_enabled() or new[0].shape[2] > 1 or torch.compiler.is_compiling():
            return super().joined(state, new)
        old = state.tail
        batch, _, length, _ = old[0].shape
        dtypes = [torch.promote_types(tail.dtype, token.dtype) for tail, token in zip(old, new, strict=True)]
        fits = self.room and self.room[0].shape[0] == batch and self.room[0].shape[2] > length
        if not fits or dtypes != [room.dtype for room in self.room]:
            places = max(length + 1, min(self.settings.window, 2 * length + 64))
            # a tensor made in inference mode could not be written outside of it
            with torch.inference_mode(False):
                self.room = [
                    torch.empty(batch, x.shape[1], places, x.shape[3], dtype=dtype, device=x.device)
                    for x, dtype in zip(new, dtypes, strict=True)
                ]
        for room, tail, token in zip(self.room, old, new, strict=True):
            if tail.data_ptr() != room.data_ptr():
                room[:, :, :length] = tail
            room[:, :, length : length + 1] = token
        return tuple(room[:, :, : length + 1] for room in self.room)

    def activate_past_recording(self) -> None:
        """Leave the last completed segment unfolded, so that `crop` can take back tokens across its boundary."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens of every row.

        Args:
            tokens_to_remove: minus their number; or, as transformers before version 5 has it, the positive number of
                columns to keep.

        Raises:
            ValueError: some of the tokens have been folded into the memory.
        """
        columns = self.rows.columns
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(0, columns - tokens_to_remove)
        if self.state is None or removed == 0:
            return
        most = self.rows.removable(self.settings.lookback * self.settings.segment_len)
        if removed > most:
            raise ValueError(
                f"crop must take back at most the {most} tokens that no memory or lookback depends on yet, got "
                f"{removed}: call activate_past_recording() before they are read, which keeps a segment more; assisted "
                "decoding may have as many candidates (num_assistant_tokens, prompt_lookup_num_tokens)"
            )
        self.rows = self.rows.without(removed)
        # all tails end in the last column
        self.state = self.state.cut(slice(self.state.keys.shape[2] - removed))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these indices, in this order."""
        if self.state is not None:
            self.rows = self.rows.select(beam_idx)
            kept = self.state.map(lambda x: x.index_select(0, beam_idx.to(x.device)))
            # the row with the longest tail may be gone
            self.state = kept.cut(slice(kept.keys.shape[2] - max(self.rows.tails), None))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row, the copies next to each other."""
        batch = len(self.rows.lengths)
        self.reorder_cache(torch.arange(batch, device="cpu").repeat_interleave(repeats))


class InfiniCache(Cache):
    """The cache of a converted model: for each converted layer its memory and its unfinished segment.

    Pass it to `generate` or `forward` as `past_key_values`; both make one where none is passed and caching is on. A
    converted layer keeps at most one segment of keys and values (with a lookback two), its sinks, and the memory,
    MemoryState([B, G, K, V], [B, G, K]) in float32, however long the text. Layers that were not converted cache keys
    and values as before.

    Args:
        model: a converted model, or a model that wraps one.

    Raises:
        ValueError: the model is not converted.
    """

    def __init__(self, model: nn.Module) -> None:
        conversion = conversion_of(model)
        self.settings = conversion.settings
        native: list[Any] = list(DynamicCache(config=trunk_of(model).config).layers) if conversion.native else []
        layers = [
            InfiniLayer(self.settings)
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
        """Return how far each row has been read."""
        return self._first.rows

    @property
    def states(self) -> dict[int, LayerState | None]:
        """The state of each converted layer, by its index; None where nothing has been read."""
        return {layer: self.layers[layer].state for layer in self.settings.layers}

    @property
    def recording(self) -> bool:
        """Return whether the last completed segment stays unfolded, for `crop`."""
        return self._first.record_past

    @property
    def _first(self) -> InfiniLayer:
        return self.layers[self.settings.layers[0]]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors in the cache."""
        tensors = [x for state in self.states.values() if state is not None for x in state.tensors()]
        tensors += [x for layer in self.layers for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in tensors)

    @property
    def max_bytes(self) -> int:
        """Bytes of the tensors with the longest tail, L tokens, with a lookback 2 L, and with the sinks."""
        states = [state for state in self.states.values() if state is not None]
        missing = [(x, self.settings.window - x.shape[2]) for state in states for x in state.tail]
        sinks = [(x, self.settings.sinks) for s in states if s.sinks is None for x in (s.memory_keys, s.values)]
        free = (x.element_size() * n * x.shape[0] * x.shape[1] * x.shape[3] for x, n in missing + sinks)
        return self.num_bytes + sum(free)

    def commit(self, rows: Rows, states: dict[int, LayerState]) -> None:
        """Take over the state that a forward pass has left in every converted layer."""
        for layer in self.settings.layers:
            self.layers[layer].rows, self.layers[layer].state = rows, states[layer]

    def copy(self) -> InfiniCache:
        """Return an independent cache of the same contents; it shares the tensors, which are never changed in place."""
        # single tokens are written into spare room, which must not be shared
        for layer in self.layers:
            if isinstance(layer, InfiniLayer):
                layer.room = []
        other = copy.copy(self)
        other.layers = [copy.copy(layer) for layer in self.layers]
        return other

    def detach(self) -> InfiniCache:
        """Return a copy cut from the graph, where truncated back-propagation ends."""
        other = self.copy()
        for layer in other.layers:
            if isinstance(layer, InfiniLayer):
                layer.state = None if layer.state is None else layer.state.map(torch.Tensor.detach)
            elif layer.keys is not None:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
        return other

    @property
    def batch(self) -> int | None:
        """Number of rows, B; None before the first forward pass, which sets it."""
        return None if self.is_empty() else len(self.rows.lengths)

    @property
    def is_open(self) -> bool:
        """Return whether the rows can go on: none has ended with padding."""
        return self.rows.open

    def is_empty(self) -> bool:
        """Return whether nothing has been read."""
        return self.rows.columns == 0
