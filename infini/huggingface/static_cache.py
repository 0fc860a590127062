"""A cache of fixed addresses, for decoding that is compiled or replayed as a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin

from ...kernels.decoding import segment_decode
from ...kernels.memory import memory_read, memory_write
from ...kernels.state import MemoryState
from ...kernels.validation import check_integer
from .cache import LayerState
from .rows import Rows
from .settings import GATE, Settings, attentions_of, conversion_of, trunk_of


class StaticInfiniLayer(CacheLayerMixin):
    """One layer's buffers.

    keys, memory_keys, values: [B, G, L, ·], the unfinished segment of each row, of which `lengths % L` places count.
    memory, normalizer: completed segments.
    next_memory, next_normalizer: the same, and what the unfinished segment has written so far. A token's write needs
    only the memory before its segment, so it need not wait for the segment's end.
    """

    is_sliding = False
    is_compileable = True
    is_croppable = False

    def __init__(
        self, batch: int, groups: int, width: int, lengths: Tensor, columns: Tensor, like: Tensor, settings: Settings
    ) -> None:
        super().__init__()
        self.keys: Tensor
        self.values: Tensor
        self.lengths, self.columns, self.settings = lengths, columns, settings
        tail = (batch, groups, settings.segment_len, width)
        self.keys, self.memory_keys, self.values = (like.new_zeros(tail) for _ in range(3))
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.memory, self.next_memory = (like.new_zeros(batch, groups, width, width, dtype=dtype) for _ in range(2))
        self.normalizer, self.next_normalizer = (like.new_zeros(batch, groups, width, dtype=dtype) for _ in range(2))
        self.counters = torch.zeros(batch * groups, dtype=torch.int32, device=like.device)
        self.is_initialized = True

    def tail(self) -> tuple[Tensor, Tensor, Tensor]:
        """In the order of a `LayerState`."""
        return self.keys, self.memory_keys, self.values

    def tensors(self) -> tuple[Tensor, ...]:
        """Those that hold rows."""
        return (*self.tail(), self.memory, self.normalizer, self.next_memory, self.next_normalizer)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor | None = None) -> None:
        """Everything is made ahead."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are: attention itself puts them in their places."""
        return key_states, value_states

    def get_mask_sizes(self, query_length: int | Tensor) -> tuple[int, int]:
        """Of the new columns only, so that a compiled step's mask keeps its shape."""
        return query_length.shape[0] if isinstance(query_length, Tensor) else query_length, 0

    def get_seq_length(self, *args: Any) -> Any:
        """Columns read, a tensor."""
        return self.columns

    def get_max_length(self) -> int:
        """-1: there is none."""
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        """Forget everything."""
        for x in (*self.tensors(), self.lengths, self.columns):
            x.zero_()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; as many as there are."""
        for x in self.tensors():
            x.copy_(x.index_select(0, beam_idx.to(x.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Refused: what a token has written is not taken back.

        Raises:
            ValueError: always.
        """
        raise ValueError("a StaticInfiniCache must not be cropped, as by assisted decoding: use an InfiniCache")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Refused: its rows are as many as they are.

        Raises:
            ValueError: always.
        """
        raise ValueError("a StaticInfiniCache must keep its batch_size: make one of as many rows as there will be")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; as many as there are."""
        self.reorder_cache(indices)

    def offload(self) -> None:
        """Moved by nobody: its addresses are fixed."""

    def prefetch(self) -> None:
        """Never away."""

    def step(
        self,
        module: nn.Module,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_q: Tensor,
        memory_k: Tensor,
        scale: float | None,
        softcap: float | None,
    ) -> Tensor:
        """Attention of one new token in each row, without a branch: [B, H, 1, V]."""
        rows = torch.arange(q.shape[0], device=q.device)
        place = self.lengths.to(q.device) % self.settings.segment_len
        for held, new in zip(self.tail(), (k, memory_k, v), strict=True):
            held[rows, :, place] = new[:, :, 0]
        out = segment_decode(
            q,
            self.keys,
            self.values,
            place + 1,
            gate=getattr(module, GATE)().detach(),
            memory_q=memory_q,
            state=MemoryState(self.memory, self.normalizer),
            empty_memory=self.settings.empty_memory,
            scale=scale,
            softcap=softcap,
            counters=self.counters,
            backend=self.settings.backend,
        )
        self._write(memory_k, v)
        ends = place + 1 == self.settings.segment_len
        self.memory.copy_(torch.where(ends[:, None, None, None], self.next_memory, self.memory))
        self.normalizer.copy_(torch.where(ends[:, None, None], self.next_normalizer, self.normalizer))
        return out

    def read(self, rows: Rows) -> LayerState:
        """The state that pieces of more than one token go on from: tails that end together."""
        width, tails = max(rows.tails), torch.tensor(rows.tails, device=self.memory.device)
        places = (torch.arange(width, device=tails.device) - width + tails[:, None]).clamp(min=0)
        memory = MemoryState(self.memory.clone(), self.normalizer.clone())
        return LayerState(memory, *(_at(x, places) for x in self.tail()))

    def store(self, rows: Rows, state: LayerState) -> None:
        """What such a piece has left."""
        width, tails = state.keys.shape[2], torch.tensor(rows.tails, device=self.memory.device)
        steps = torch.arange(width, device=tails.device)
        places = (steps + width - tails[:, None]).clamp(max=width - 1)
        for held, x in zip(self.tail(), state[1:], strict=True):
            held[:, :, :width] = _at(x, places)
        for held, x in zip((self.memory, self.normalizer), state.memory, strict=True):
            held.copy_(x)
        self.next_memory.copy_(self.memory)
        self.next_normalizer.copy_(self.normalizer)
        counts = (steps < tails[:, None])[:, None, :, None]
        # σ(-1e4) is 0: places that do not count write nothing
        self._write(self.memory_keys[:, :, :width].masked_fill(~counts, -1e4), self.values[:, :, :width] * counts)

    def _write(self, memory_k: Tensor, v: Tensor) -> None:
        """Tokens of the unfinished segment into what the memory will be (arXiv 2404.07143, equations 8 and 9)."""
        k, v, backend = memory_k.to(self.memory.dtype), v.to(self.memory.dtype), self.settings.backend
        if self.settings.update == "delta":
            v = v - memory_read(k, MemoryState(self.memory, self.normalizer), backend=backend)
        following = MemoryState(self.next_memory, self.next_normalizer)
        following = memory_write(k, v, following, update="linear", backend=backend)
        self.next_memory.copy_(following.memory)
        self.next_normalizer.copy_(following.normalizer)


class StaticInfiniCache(Cache):
    """An `InfiniCache` of fixed size and addresses: decoding with it compiles whole, and replays in a CUDA graph.

    `generate` compiles with it on a GPU. Steps of one token have no branch, read the lengths on the device, and take
    every column for a token. Pieces of more than one token, such as the prompt, run as with an `InfiniCache`.

    Args:
        model: a converted model, every layer of it.
        batch_size: B, of every call.

    Raises:
        ValueError: the model is not converted, or has layers that are not.
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
        config = trunk.config
        groups = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        # of every row: the first piece's device and dtype are the layers' own
        device = next(trunk.parameters()).device
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.columns = torch.zeros((), dtype=torch.int64, device=device)
        # quantized weights are no floats
        likes = [trunk.get_input_embeddings().weight[:0].to(_device(m)) for m in attentions_of(trunk)]
        layers: list[Any] = [
            StaticInfiniLayer(batch_size, groups, width, self.lengths, self.columns, like.detach(), self.settings)
            for like in likes
        ]
        super().__init__(layers=layers)
        self.layers: list[Any] = layers
        for x in (self.lengths, self.columns, *(x for layer in layers for x in (*layer.tensors(), layer.counters))):
            torch._dynamo.mark_static_address(x)

    recording = False
    # a piece that ends with padding is refused
    is_open = True

    @property
    def batch(self) -> int:
        """Rows, as it was made for."""
        return len(self.lengths)

    @property
    def rows(self) -> Rows:
        """How far each row has been read; waits for the device."""
        lengths = tuple(self.lengths.tolist())
        length = self.settings.segment_len
        return Rows(int(self.columns), lengths, tuple(n // length * length for n in lengths))

    @property
    def states(self) -> dict[int, LayerState | None]:
        """By layer."""
        rows = self.rows
        return {index: layer.read(rows) for index, layer in enumerate(self.layers)}

    @property
    def num_bytes(self) -> int:
        """What the tensors take."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors())

    def is_empty(self) -> bool:
        """Whether nothing has been read; waits for the device."""
        return int(self.columns) == 0

    def commit(self, rows: Rows, states: dict[int, LayerState]) -> None:
        """What a pass of more than one token has left."""
        if not rows.open:
            raise ValueError("attention_mask must end with ones for a static cache, got padding on the right")
        self.lengths.copy_(torch.tensor(rows.lengths))
        self.columns.fill_(rows.columns)
        for index, state in states.items():
            self.layers[index].store(rows, state)

    def advance(self) -> None:
        """One more token in each row, on the device."""
        self.lengths.add_(1)
        self.columns.add_(1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these rows, in this order; as many as there are."""
        for layer in self.layers:
            layer.reorder_cache(beam_idx)
        self.lengths.copy_(self.lengths.index_select(0, beam_idx.to(self.lengths.device)))


def _device(attention: nn.Module) -> torch.device:
    return next(parameter for name, parameter in attention.named_parameters() if GATE not in name).device


def _at(x: Tensor, places: Tensor) -> Tensor:
    """x [B, G, T, K] at places [B, P] → [B, G, P, K]."""
    return x.gather(2, places[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
