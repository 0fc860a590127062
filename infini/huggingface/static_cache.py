"""The cache of a converted model in buffers of fixed addresses, for compiled decoding and CUDA graphs."""

from __future__ import annotations

from typing import Any

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
from .settings import GATE, Settings, attentions_of, conversion_of, trunk_of
from .traits import Traits


class StaticInfiniLayer(ConvertedLayer):
    """The cache of one converted layer, in buffers of fixed addresses.

    keys, memory_keys, values: [B, G, L, K], [B, G, L, K] and [B, G, L, V] of the unfinished segment of each row, whose
        first `lengths % L` places count.
    memory, normalizer: [B, G, K, V] and [B, G, K] of the completed segments, in float32 or wider.
    next_memory, next_normalizer: the memory with the tokens of the unfinished segment written too. The write of a token
        needs only the memory before its segment, so it need not wait for the segment's end.
    """

    is_compileable = True
    is_croppable = False

    def __init__(
        self, batch: int, traits: Traits, lengths: Tensor, columns: Tensor, like: Tensor, settings: Settings
    ) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.lengths, self.columns, self.settings = lengths, columns, settings
        groups, width, value_width = traits.groups, traits.key_width, traits.value_width
        tail = (batch, groups, settings.segment_len)
        self.keys, self.memory_keys = (like.new_zeros(*tail, width) for _ in range(2))
        self.values = like.new_zeros(*tail, value_width)
        dtype = state_dtype(like)
        self.memory, self.next_memory = (
            like.new_zeros(batch, groups, width, value_width, dtype=dtype) for _ in range(2)
        )
        self.normalizer, self.next_normalizer = (like.new_zeros(batch, groups, width, dtype=dtype) for _ in range(2))
        self.counters = torch.zeros(batch * groups, dtype=torch.int32, device=like.device)
        self.is_initialized = True

    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the buffers of the unfinished segment, in the order of a `LayerState`."""
        return self.keys, self.memory_keys, self.values

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all buffers that hold rows."""
        return (*self.tail(), self.memory, self.normalizer, self.next_memory, self.next_normalizer)

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
        gate: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_q: Tensor,
        memory_k: Tensor,
        scale: float | None,
        softcap: float | None,
        sink_logits: Tensor | None,
    ) -> Tensor:
        """Return the attention [B, H, 1, V] of one new token in each row, without a branch."""
        rows = torch.arange(q.shape[0], device=q.device)
        place = self.lengths.to(q.device) % self.settings.segment_len
        for buffer, new in zip(self.tail(), (k, memory_k, v), strict=True):
            # autocast may have narrowed them
            buffer[rows, :, place] = new[:, :, 0].to(buffer.dtype)
        out = segment_decode(
            q,
            self.keys,
            self.values,
            place + 1,
            gate=gate.detach(),
            memory_q=memory_q,
            state=MemoryState(self.memory, self.normalizer),
            empty_memory=self.settings.empty_memory,
            scale=scale,
            softcap=softcap,
            sink_logits=None if sink_logits is None else sink_logits.detach(),
            counters=self.counters,
            backend=self.settings.backend,
        )
        self._write(memory_k, v)
        ends = place + 1 == self.settings.segment_len
        self.memory.copy_(torch.where(ends[:, None, None, None], self.next_memory, self.memory))
        self.normalizer.copy_(torch.where(ends[:, None, None], self.next_normalizer, self.normalizer))
        return out

    def load(self, rows: Rows) -> LayerState:
        """Return the state that a piece of more than one token goes on from: tails that end together."""
        width, tails = max(rows.tails), torch.tensor(rows.tails, device=self.memory.device)
        places = (torch.arange(width, device=tails.device) - width + tails[:, None]).clamp(min=0)
        memory = MemoryState(self.memory.clone(), self.normalizer.clone())
        keys, memory_keys, values = (_at(x, places) for x in self.tail())
        return LayerState(memory, keys, memory_keys, values)

    def store(self, rows: Rows, state: LayerState) -> None:
        """Write the state that such a piece has left into the buffers."""
        width, tails = state.keys.shape[2], torch.tensor(rows.tails, device=self.memory.device)
        steps = torch.arange(width, device=tails.device)
        places = (steps + width - tails[:, None]).clamp(max=width - 1)
        for buffer, x in zip(self.tail(), state.tail, strict=True):
            buffer[:, :, :width] = _at(x, places)
        for buffer, x in zip((self.memory, self.normalizer), state.memory or (), strict=True):
            buffer.copy_(x)
        self.next_memory.copy_(self.memory)
        self.next_normalizer.copy_(self.normalizer)
        counts = (steps < tails[:, None])[:, None, :, None]
        # σ(-1e4) is 0: places that do not count write nothing
        self._write(self.memory_keys[:, :, :width].masked_fill(~counts, -1e4), self.values[:, :, :width] * counts)

    def _write(self, memory_k: Tensor, v: Tensor) -> None:
        """Write tokens of the unfinished segment into the next memory (arXiv 2404.07143, equations 8 and 9)."""
        k, v, backend = memory_k.to(self.memory.dtype), v.to(self.memory.dtype), self.settings.backend
        if self.settings.update == "delta":
            v = v - memory_read(k, MemoryState(self.memory, self.normalizer), backend=backend)
        following = MemoryState(self.next_memory, self.next_normalizer)
        following = memory_write(k, v, following, update="linear", backend=backend)
        self.next_memory.copy_(following.memory)
        self.next_normalizer.copy_(following.normalizer)


class StaticInfiniCache(Cache):
    """An `InfiniCache` of fixed size and addresses: decoding compiles to one graph, and replays as a CUDA graph.

    Pass it to `generate`, which compiles with it on a GPU, or to `forward`, as `past_key_values`. A step of one token
    per row has no branch, reads the lengths on the device, and takes every column for a token. Pieces of more than one
    token, such as the prompt, run as with an `InfiniCache`. Each layer holds keys, keys before rotary embedding and
    values [B, G, L, ·] in the model's dtype, and two memories [B, G, K, V] with normalizers [B, G, K] in float32.

    Args:
        model: a converted model, with every layer converted; without lookback, sinks and memory maps, and with a memory
            in every layer.
        batch_size: number of rows of every call, B.

    Raises:
        TypeError: `batch_size` is not an integer.
        ValueError: the model is not converted, not in every layer, not as above, or without weights, as when accelerate
            offloads it; or `batch_size` is below 1.
    """

    def __init__(self, model: nn.Module, batch_size: int = 1) -> None:
        batch_size = check_integer("batch_size", batch_size, 1)
        conversion, trunk = conversion_of(model), trunk_of(model)
        if conversion.native:
            raise ValueError(
                f"model must have every layer converted for a static cache, got {list(conversion.native)} that are "
                "not: use InfiniCache"
            )
        self.settings = settings = conversion.settings
        for name in ("lookback", "sinks", "memory_maps"):
            if value := getattr(settings, name):
                raise ValueError(
                    f"model must be converted without {name} for a static cache, got {value}: use InfiniCache"
                )
        if settings.memory_layers != settings.layers:
            raise ValueError(
                "model must have a memory in every layer for a static cache, got memory_layers="
                f"{list(settings.memory_layers)}: use InfiniCache"
            )
        check_weights(trunk.parameters())
        device = next(trunk.parameters()).device
        # buffers made in inference mode could not be written outside of it
        with torch.inference_mode(False):
            self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
            self.columns = torch.zeros((), dtype=torch.int64, device=device)
            # the embedding's dtype, since quantized weights are integers
            dtype = trunk.get_input_embeddings().weight.dtype
            # of no weight, since tensors made like one that FSDP2 has sharded would be sharded too
            likes = [torch.empty(0, dtype=dtype, device=_device(attention)) for attention in attentions_of(trunk)]
            layers: list[Any] = [
                StaticInfiniLayer(batch_size, traits, self.lengths, self.columns, like, self.settings)
                for traits, like in zip(conversion.traits.values(), likes, strict=True)
            ]
        super().__init__(layers=layers)
        self.layers: list[Any] = layers
        for x in (self.lengths, self.columns, *(x for layer in layers for x in (*layer.tensors(), layer.counters))):
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
        length = self.settings.segment_len
        return Rows(int(self.columns), lengths, tuple(n // length * length for n in lengths))

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
