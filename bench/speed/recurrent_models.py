"""Models that read segments with a memory, the same weights each time they are made, and the plain loop over them.

The peer's layers are not quite Llama's: learnt positions for rotated ones, a null key, residual values, GELU for SiLU.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ...rmt.associative.memory import AssociativeMemory
from ...rmt.recurrent.memory import RecurrentMemory

VOCABULARY = 256
# more than any text that is read; the weights do not depend on them
POSITIONS = 1 << 20
# of weights: the memory then weighs enough for a wrong one to show
SPREAD = 0.08


@dataclass(frozen=True)
class Sizes:
    """B rows of S segments of L tokens, with m memory tokens, and the layers, heads and width of a model."""

    B: int
    S: int
    L: int
    m: int
    layers: int
    heads: int
    width: int

    @classmethod
    def parse(cls, sizes: str) -> Sizes:
        """Return the sizes of "B,S,L,m,layers,heads,width".

        Raises:
            ValueError: anything but seven positive integers, L at least m, and width an even multiple of heads.
        """
        numbers = [int(x) if x.isdecimal() else 0 for x in sizes.split(",")]
        fits = len(numbers) == 7 and min(numbers) > 0 and numbers[2] >= numbers[3]
        if not fits or numbers[6] % (2 * numbers[5]):
            raise ValueError(
                "sizes must be seven positive integers B,S,L,m,layers,heads,width, L at least m, width an even "
                f"multiple of heads, got {sizes!r}"
            )
        return cls(*numbers)

    @property
    def name(self) -> str:
        """Return the sizes in a word."""
        return "-".join(
            f"{name}{x}" for name, x in zip(("B", "S", "L", "m", "N", "H", "d"), astuple(self), strict=True)
        )

    def ids(self, device: torch.device, tokens: int | None = None) -> Tensor:
        """Return random tokens [B, S · L], or as many as `tokens`."""
        shape = self.B, self.S * self.L if tokens is None else tokens
        return torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1), device="cpu").to(device)


SIZES = Sizes(B=1, S=8, L=128, m=16, layers=4, heads=2, width=128)


class Backbone(NamedTuple):
    """The parts of a model that a plain loop needs.

    embed: From a segment's ids [B, n] to [B, n, d].
    layers: From rows [B, T, d] and the mask, bool [1, 1, T, T], to the last layer's rows, normed.
    logits: From [B, n, d] to [B, n, vocabulary].
    parameters: The trained parameters.
    """

    embed: Callable[[Tensor], Tensor]
    layers: Callable[[Tensor, Tensor], Tensor]
    logits: Callable[[Tensor], Tensor]
    parameters: Sequence[Tensor]


def llama(sizes: Sizes, device: torch.device) -> Any:
    """Return a Llama, the same weights each time."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=sizes.width,
        intermediate_size=8 * sizes.width // 3,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=POSITIONS,
        initializer_range=SPREAD,
        use_cache=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config)
    return model.to(device)


def peer_transformer(sizes: Sizes, device: torch.device) -> Any:
    """Return the peer's `RecurrentMemoryTransformer`, the same weights each time."""
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = RecurrentMemoryTransformer(
            sizes.width,
            num_tokens=VOCABULARY,
            depth=sizes.layers,
            num_memory_tokens=sizes.m,
            seq_len=sizes.L,
            dim_head=sizes.width // sizes.heads,
            heads=sizes.heads,
            use_flash_attn=True,
            use_xl_memories=False,
            emb_gradient_frac=1.0,
            add_write_to_next_write_mem=True,
            next_write_mem_stop_grad=False,
            num_residual_streams=1,
        ).to(device)
    # the memory is passed in, and nothing added to it
    for added in (transformer.read_memory_emb, transformer.memory_tokens):
        nn.init.zeros_(added.requires_grad_(False))
    return transformer


class PeerLayers(nn.Module):
    """The peer's layers as a module that takes embeddings."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the last layer's rows [B, T, d], normed."""
        x, values = self.transformer.expand_streams(inputs_embeds), None
        for attention, feed_forward in self.transformer.layers:
            x, _, own = attention(x, mask=attention_mask, value_residual=values)
            values = own if values is None else values
            x = feed_forward(x)
        hidden: Tensor = self.transformer.norm(self.transformer.reduce_streams(x))
        return hidden


class PeerEmbedding(nn.Module):
    """The peer's vectors of a segment's tokens, with their positions."""

    def __init__(self, transformer: Any) -> None:
        super().__init__()
        self.tokens, self.positions = transformer.token_emb, transformer.pos_emb

    @property
    def weight(self) -> Tensor:
        """Return the vectors of the vocabulary."""
        weight: Tensor = self.tokens.weight
        return weight

    def forward(self, ids: Tensor) -> Tensor:
        """Return a segment's vectors [B, n, d]."""
        at: Tensor = self.positions.weight[: ids.shape[1]]
        return at + self.tokens(ids)


def first_memory(sizes: Sizes, device: torch.device) -> Tensor:
    """Return the memory [m, d] before the first segment, the same each time."""
    memory = torch.randn(sizes.m, sizes.width, generator=torch.Generator().manual_seed(2), device="cpu")
    return (SPREAD * memory).to(device).requires_grad_()


def trained(model: nn.Module) -> list[Tensor]:
    """Return the parameters that are trained."""
    return [x for x in model.parameters() if x.requires_grad]


def visible(time: int, memory: int, device: torch.device) -> Tensor:
    """Return bool [1, 1, T, T]: causal; all see the read rows, the write rows see all (arXiv 2207.06881, figure 6d)."""
    mask = torch.ones(time, time, dtype=torch.bool, device=device).tril()
    mask[:, :memory] = True
    mask[time - memory :] = True
    return mask[None, None]


def peer_backbone(transformer: Any) -> Backbone:
    """Return the parts of the peer that a plain loop needs."""
    return Backbone(PeerEmbedding(transformer), PeerLayers(transformer), transformer.to_logits, trained(transformer))


def llama_backbone(model: Any) -> Backbone:
    """Return the parts of a Llama that a plain loop needs."""

    def layers(rows: Tensor, mask: Tensor) -> Tensor:
        hidden: Tensor = model.model(inputs_embeds=rows, attention_mask=mask).last_hidden_state
        return hidden

    return Backbone(model.get_input_embeddings(), layers, model.lm_head, trained(model))


class Loop(ABC):
    """A mechanism in a few lines, as the definition and as what others are measured against.

    parameters: The trained parameters, the memory tokens first.
    """

    parameters: Sequence[Tensor]

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """Return the logits [B, T, vocabulary]."""

    @abstractmethod
    def read(self, ids: Tensor) -> Sequence[Tensor]:
        """Return the memory after the last segment."""

    def loss(self, ids: Tensor) -> Tensor:
        """Return the mean cross-entropy of each next token."""
        return F.cross_entropy(self.logits(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


class PlainLoop(Loop):
    """RMT (arXiv 2207.06881) over the parts of a model."""

    def __init__(self, backbone: Backbone, memory: Tensor, segment_len: int) -> None:
        self.backbone, self.memory, self.segment_len = backbone, memory, segment_len
        self.parameters = [memory, *backbone.parameters]
        self.mask = functools.cache(visible)

    def segments(self, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Return each segment's rows of its tokens [B, n, d], and the memory after it [B, m, d]."""
        memory = self.memory.expand(ids.shape[0], -1, -1)
        m = memory.shape[1]
        for segment in ids.split(self.segment_len, 1):
            rows = torch.cat((memory, self.backbone.embed(segment), memory), 1)
            hidden = self.backbone.layers(rows, self.mask(rows.shape[1], m, ids.device))
            memory = hidden[:, -m:]
            yield hidden[:, m:-m], memory

    def logits(self, ids: Tensor) -> Tensor:
        return torch.cat([self.backbone.logits(rows) for rows, _ in self.segments(ids)], 1)

    def read(self, ids: Tensor) -> Sequence[Tensor]:
        return [memory for _, memory in self.segments(ids)][-1:]


def plain_llama(sizes: Sizes, device: torch.device) -> PlainLoop:
    """Return a plain loop over a Llama."""
    return PlainLoop(llama_backbone(llama(sizes, device)), first_memory(sizes, device), sizes.L)


def plain_peer(sizes: Sizes, device: torch.device) -> PlainLoop:
    """Return a plain loop over the peer's layers."""
    return PlainLoop(peer_backbone(peer_transformer(sizes, device)), first_memory(sizes, device), sizes.L)


def recurrent(sizes: Sizes, device: torch.device, backbone: nn.Module | None = None, **options: Any) -> RecurrentMemory:
    """Return RMT around a backbone, by default a Llama, with `first_memory`."""
    model = llama(sizes, device) if backbone is None else backbone
    module = RecurrentMemory(model, sizes.m, sizes.L, **options).to(device)
    with torch.no_grad():
        module.memory.copy_(first_memory(sizes, device))
    return module


def associative(sizes: Sizes, device: torch.device, schedule: str = "vertical") -> AssociativeMemory:
    """Return ARMT around a Llama whose memories return something, the same weights each time."""
    model = llama(sizes, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = AssociativeMemory(model, sizes.m, sizes.L, d_mem=sizes.width // sizes.heads, schedule=schedule)
        for name, weight in module.memories.named_parameters():
            if name.endswith("value.weight"):
                nn.init.normal_(weight, std=SPREAD)
    return module.to(device)
