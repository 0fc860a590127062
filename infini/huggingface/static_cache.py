"""The cache of a converted model in buffers of fixed addresses, for compiled decoding and CUDA graphs."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...kernels.decoding import segment_decode
from ...kernels.memory import memory_read, memory_write
from ...kernels.state import MemoryState
from ...kernels.validation import check_integer, state_dtype
from .cache_layer import ConvertedLayer, LayerState, new_columns
from .convertible import check_weights
from .rows import Rows
from .settings import GATE, MAP_K, Conversion, Settings, attentions_of, conversion_of, trunk_of
from .traits import Traits
from .window import Embeddings, embeddings_at


class StaticInfiniLayer(ConvertedLayer):
    """The cache of one converted layer, in buffers of fixed addresses.

    keys, memory_keys, values: [B, G, W, K], [B, G, W, K] and [B, G, W, V] of each row's tail, which begins with the
        segment looked back at; W is the window, (1 + lookback) · L tokens.
    sinks: the first tokens' keys before rotary embedding and values, [B, G, n, ·]; none: no tensors.
    memories: [B, G, K, V] with [B, G, K], in float32 or wider; none, where the layer has no memory: first the one that
        is read; with a lookback, the same with the segment looked back at; and last, with the tokens of the unfinished
        segment too. The write of a token needs only the memory before its segment, the last but one, so it need not
        wait for the segment's end.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, cache: StaticInfiniCache, attention: nn.Module, traits: Traits, like: Tensor) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.lengths, self.columns, self.settings = cache.lengths, cache.columns, cache.settings
        self.rotary, self.places = traits.rotary, cache.places
        # what is written passes through the layer's map
        self.map_k: Any = getattr(attention, MAP_K, None)
        settings, batch, groups = self.settings, len(self.lengths), traits.groups
        width, value_width = traits.key_width, traits.value_width
        tail, sinks = (batch, groups, settings.window), (batch, groups, settings.sinks)
        self.keys, self.memory_keys = (like.new_zeros(*tail, width) for _ in range(2))
        self.values = like.new_zeros(*tail, value_width)
        self.sinks: tuple[Tensor, ...] = ()
        if settings.sinks:
            self.sinks = like.new_zeros(*sinks, width), like.new_zeros(*sinks, value_width)
        count = 2 + settings.lookback if hasattr(attention, GATE) else 0
        state: dict[str, Any] = {"device": like.device, "dtype": state_dtype(like)}
        self.memories = [MemoryState.zeros(batch, groups, width, value_width, **state) for _ in range(count)]
        self.counters = torch.zeros(batch * groups, dtype=torch.int32, device=like.device)
        self.is_initialized = True

    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the buffers of the tail, in the order of a `LayerState`."""
        return self.keys, self.memory_keys, self.values

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all buffers that hold rows."""
        return (*self.tail(), *self.sinks, *(x for memory in self.memories for x in memory))

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Return the columns of a mask over the new tokens alone, so that a compiled step's mask keeps its shape."""
        return new_columns(query_length), 0

    def get_seq_length(self, *args: Any) -> Any:
        """Return the number of columns read, an int64 tensor []."""
        return self.columns

    def reset(self) -> None:
        """Forget everything."""
        for x in (*self.tensors(), self.lengths, self.columns):
            x.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these B indices, in this order."""
        for x in self.tensors():
            x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse to take tokens back, since their writes to the memory cannot be undone.

        Raises:
            ValueError: always.
        """
        raise ValueError("a StaticInfiniCache must not be cropped, as by assisted decoding: use an InfiniCache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refuse to change the number of rows, which is fixed.

        Raises:
            ValueError: always.
        """
        raise ValueError("a StaticInfiniCache must keep its batch_size: make one of as many rows as there will be")

    def step(
        self,
        gate: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_q: Tensor,
        memory_k: Tensor,
        scale: float | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Return the attention [B, H, 1, V] of one new token in each row, without a branch.

        Args:
            memory_q: after the layer's map, where it has one.
            memory_k: before it.
        """
        lengths, rows = self.lengths.to(q.device), torch.arange(q.shape[0], device=q.device)
        place = tail_of(lengths, self.settings)
        for buffer, new in zip(self.tail(), (k, memory_k, v), strict=True):
            # autocast may have narrowed them
            buffer[rows, :, place] = new[:, :, 0].to(buffer.dtype)
        self._keep_sinks(lengths, memory_k, v)
        out = segment_decode(
            q,
            self.keys,
            self.values,
            place + 1,
            gate=None if gate is None else gate.detach(),
            memory_q=memory_q,
            state=self.memories[0] if self.memories else None,
            empty_memory=self.settings.empty_memory,
            scale=scale,
            softcap=softcap,
            **self._seen_sinks(lengths),
            sink_logits=None if sink_logits is None else sink_logits.detach(),
            counters=self.counters,
            backend=self.settings.backend,
        )
        if self.memories:
            before, last = self.memories[-2:]
            self._write(before, last, memory_k, v)
        self._end_segments(lengths + 1)
        return out

    def load(self, rows: Rows) -> LayerState:
        """Return the state that a piece of more than one token goes on from: tails that end together."""
        width, tails = max(rows.tails), torch.tensor(rows.tails, device=self.keys.device)
        places = (torch.arange(width, device=tails.device) - width + tails[:, None]).clamp(min=0)
        memory = MemoryState(*(x.clone() for x in self.memories[0])) if self.memories else None
        keys, memory_keys, values = (_at(x, places) for x in self.tail())
        sinks = (self.sinks[0].clone(), self.sinks[1].clone()) if self.sinks and any(rows.folded) else None
        return LayerState(memory, keys, memory_keys, values, sinks)

    def store(self, rows: Rows, state: LayerState) -> None:
        """Write the state that such a piece has left into the buffers."""
        width, tails = state.keys.shape[2], torch.tensor(rows.tails, device=self.keys.device)
        steps = torch.arange(width, device=tails.device)
        places = (steps + width - tails[:, None]).clamp(max=max(width - 1, 0))
        for buffer, x in zip(self.tail(), state.tail, strict=True):
            buffer[:, :, :width] = _at(x, places)
        begun = torch.tensor(rows.folded, device=tails.device)[:, None, None, None] > 0
        for number, (buffer, x) in enumerate(zip(self.sinks, (self.memory_keys, self.values), strict=False)):
            # those of rows that are not begun stand in their tails
            first = x[:, :, : self.settings.sinks]
            buffer.copy_(first if state.sinks is None else torch.where(begun, state.sinks[number], first))
        if not self.memories:
            return
        for memory in self.memories:
            for buffer, x in zip(memory, state.memory or (), strict=False):
                buffer.copy_(x)
        keys, values = self.memory_keys[:, :, :width], self.values[:, :, :width]
        # with a lookback, a tail may begin with a whole segment
        whole = (tails // self.settings.segment_len * self.settings.segment_len)[:, None]
        if self.settings.lookback:
            oldest, looked_back, last = self.memories
            self._write(oldest, looked_back, keys, values, steps < whole)
            for buffer, x in zip(last, looked_back, strict=True):
                buffer.copy_(x)
        before, last = self.memories[-2:]
        self._write(before, last, keys, values, (steps >= whole) & (steps < tails[:, None]))

    def _keep_sinks(self, lengths: Tensor, memory_k: Tensor, v: Tensor) -> None:
        """Write the token behind the first `lengths` of each row, where it is among the first n."""
        rows, place = torch.arange(len(lengths), device=lengths.device), lengths.clamp(max=self.settings.sinks - 1)
        for buffer, new in zip(self.sinks, (memory_k, v), strict=False):
            is_sink = (lengths < self.settings.sinks)[:, None, None]
            buffer[rows, :, place] = torch.where(is_sink, new[:, :, 0].to(buffer.dtype), buffer[rows, :, place])

    def _seen_sinks(self, lengths: Tensor) -> dict[str, Any]:
        """Return the arguments of `segment_decode` that say which sinks are seen, just before the window."""
        if not self.sinks:
            return {}
        keys, values = self.sinks
        seen = lengths >= self.settings.window
        return {"sink_k": self._rotated(keys, self.places.sinks), "sink_v": values, "sink_seen": seen}

    def _end_segments(self, lengths: Tensor) -> None:
        """Go on to the next segment in rows of `lengths` tokens that have completed one: shift memories and tails."""
        length = self.settings.segment_len
        ends = (lengths % length == 0)[:, None, None]
        for memory, following in itertools.pairwise(self.memories):
            memory.memory.copy_(torch.where(ends[..., None], following.memory, memory.memory))
            memory.normalizer.copy_(torch.where(ends, following.normalizer, memory.normalizer))
        if self.settings.lookback:
            # a row's first segment stays where it is, and is looked back at from there
            ends = ends[..., None] & (lengths > length)[:, None, None, None]
            moved = self._rotated(self.memory_keys[:, :, length:], self.places.tail)
            for buffer, second in zip(self.tail(), (moved, *(x[:, :, length:] for x in self.tail()[1:])), strict=True):
                buffer[:, :, :length] = torch.where(ends, second, buffer[:, :, :length])

    def _rotated(self, keys: Tensor, at: Embeddings) -> Tensor:
        """Return keys before rotary embedding, [B, G, T, K], at places whose embeddings are passed."""
        if self.rotary is None or self.rotary.call is None:
            return keys
        return self.rotary.redo(keys, at[self.rotary.call])

    def _write(
        self, before: MemoryState, into: MemoryState, memory_k: Tensor, v: Tensor, counts: Tensor | None = None
    ) -> None:
        """Write tokens of one segment into a memory (arXiv 2404.07143, equations 8 and 9).

        Args:
            before: the memory before the segment.
            into: the memory to add to, in place.
            memory_k, v: [B, G, T, ·] of the tokens, before the layer's map.
            counts: bool [B, T], which of them to write; None: all.
        """
        k = memory_k if self.map_k is None else self.map_k(memory_k).detach()
        k, v, backend = k.to(into.memory.dtype), v.to(into.memory.dtype), self.settings.backend
        if counts is not None:
            # σ(-1e4) is 0: places that do not count write nothing
            counts = counts[:, None, :, None]
            k, v = k.masked_fill(~counts, -1e4), v * counts
        if self.settings.update == "delta":
            v = v - memory_read(k, before, backend=backend)
        following = memory_write(k, v, into, update="linear", backend=backend)
        into.memory.copy_(following.memory)
        into.normalizer.copy_(following.normalizer)


class Places(NamedTuple):
    """The rotary embeddings of the places of sinks, just before the window, and of a segment that is looked back at."""

    sinks: Embeddings
    tail: Embeddings

    @classmethod
    def of(cls, trunk: Any, conversion: Conversion, device: torch.device) -> Places:
        """Return those of a converted model."""
        settings = conversion.settings
        sinks = torch.arange(-settings.sinks, 0, device=device)
        tail = torch.arange(settings.segment_len if settings.lookback else 0, device=device)
        embeddings = (embeddings_at(trunk, conversion, x[None]) if len(x) else {} for x in (sinks, tail))
        return cls(*embeddings)

    def tensors(self) -> list[Tensor]:
        """Return the tensors of all embeddings."""
        made = [x for at in self for x in at.values()]
        return [x for each in made for x in ([each] if isinstance(each, Tensor) else each)]


def tail_of(lengths: Tensor, settings: Settings) -> Tensor:
    """Return the number of tokens in the tails of rows of `lengths` tokens, int64 [B]: where the next one stands."""
    place = lengths % settings.segment_len
    return place + settings.segment_len * (lengths >= settings.segment_len) if settings.lookback else place


class StaticInfiniCache(Cache):
    """An `InfiniCache` of fixed size and addresses: decoding compiles to one graph, and replays as a CUDA graph.

    Pass it to `generate`, which compiles with it on a GPU, or to `forward`, as `past_key_values`. A step of one token
    per row has no branch, reads the lengths on the device, and takes every column for a token. Pieces of more than one
    token, such as the prompt, run as with an `InfiniCache`. Each layer holds keys, keys before rotary embedding and
    values [B, G, L, ·], with a lookback 2 L, and those of the sinks in the model's dtype, and two memories [B, G, K, V]
    with normalizers [B, G, K] in float32, with a lookback three. With a lookback each step also rotates L keys, those
    that the next segment would look back at, since it cannot branch where a segment ends.

    Args:
        model: a converted model, with every layer converted.
        batch_size: number of rows of every call, B.

    Raises:
        TypeError: `batch_size` is not an integer.
        ValueError: the model is not converted, not in every layer, or without weights, as when accelerate offloads it;
            or `batch_size` is below 1.
    """

    def __init__(self, model: nn.Module, batch_size: int = 1) -> None:
        batch_size = check_integer("batch_size", batch_size, 1)
        conversion, trunk = conversion_of(model), trunk_of(model)
        if conversion.native:
            raise ValueError(
                f"model must have every layer converted for a static cache, got {list(conversion.native)} that are "
                "not: use InfiniCache"
            )
        self.settings = conversion.settings
        check_weights(trunk.parameters())
        device = next(trunk.parameters()).device
        # buffers made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.columns = torch.zeros((), dtype=torch.int64, device=device)
            # the embedding's dtype, since quantized weights are integers
            dtype = trunk.get_input_embeddings().weight.dtype
            attentions = attentions_of(trunk)
            # of no weight, since tensors made like one that FSDP2 has sharded would be sharded too
            likes = [torch.empty(0, dtype=dtype, device=_device(attention)) for attention in attentions]
            with torch.no_grad():
                self.places = Places.of(trunk, conversion, device)
            layers: list[Any] = [
                StaticInfiniLayer(self, attention, traits, like)
                for attention, traits, like in zip(attentions, conversion.traits.values(), likes, strict=True)
            ]
        super().__init__(layers=layers)
        self.layers: list[Any] = layers
        buffers = [x for layer in layers for x in (*layer.tensors(), layer.counters)]
        for x in (self.lengths, self.columns, *self.places.tensors(), *buffers):
            torch._dynamo.mark_static_address(x)

    recording = False
    # a piece that ends with padding is refused before it is read
    is_open = True

    @property
    def batch(self) -> int:
        """Number of rows, B."""
        return len(self.lengths)

    @property
    def rows(self) -> Rows:
        """Return how far each row has been read; reading it waits for the device."""
        lengths = tuple(self.lengths.tolist())
        length, lookback = self.settings.segment_len, self.settings.lookback
        return Rows(int(self.columns), lengths, tuple(max(0, n // length - lookback) * length for n in lengths))

    @property
    def states(self) -> dict[int, LayerState | None]:
        """The state of each layer, by its index; reading it waits for the device."""
        rows = self.rows
        return {index: layer.load(rows) for index, layer in enumerate(self.layers)}

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors())

    def is_empty(self) -> bool:
        """Return whether nothing has been read; this waits for the device."""
        return int(self.columns) == 0

    def commit(self, rows: Rows, states: dict[int, LayerState]) -> None:
        """Take over the state that a forward pass of more than one token has left in every layer.

        Raises:
            RuntimeError: the state has a gradient, which buffers cannot keep.
        """
        if any(x.requires_grad for state in states.values() for x in state.tensors()):
            raise RuntimeError(
                "past_key_values must be an InfiniCache for gradients, got a StaticInfiniCache, which has none: call "
                "the model under torch.no_grad(), or use InfiniCache"
            )
        self.lengths.copy_(torch.tensor(rows.lengths, device="cpu"))
        self.columns.fill_(rows.columns)
        for index, state in states.items():
            self.layers[index].store(rows, state)

    def positions(self) -> Tensor:
        """Return the positions of one new token in each row, int64 [B, 1], counted from its tail's first token."""
        return tail_of(self.lengths, self.settings)[:, None]

    def advance(self) -> None:
        """Count one more token in each row, on the device."""
        self.lengths.add_(1)
        self.columns.add_(1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows of these B indices, in this order."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        self.lengths.copy_(self.lengths.index_select(0, beam_idx.to(self.lengths.device)))


def _device(attention: nn.Module) -> torch.device:
    return next(parameter for name, parameter in attention.named_parameters() if GATE not in name).device


def _at(x: Tensor, places: Tensor) -> Tensor:
    """Return x [B, G, T, K] at the places [B, P] of each row, [B, G, P, K]."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
