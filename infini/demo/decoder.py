"""A small decoder with `InfiniAttention`: the model that the demo trains, and an example of the module in use."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import InfiniAttention, InfiniState


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`.

    neighbours: tokens before each token that its embedding takes in by weights of their own (a short convolution), so
        that the order within a phrase is known before the first layer.
    attention: further arguments of `InfiniAttention`.
    """

    vocabulary: int
    segment_len: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    neighbours: int = 0
    update: str = "delta"
    attention: dict[str, Any] | None = None


class DecoderState(NamedTuple):
    """Hold what a `Decoder` keeps of the tokens it has read: a state per layer, and the last tokens [B, neighbours]."""

    layers: list[InfiniState]
    tokens: Tensor


class Block(nn.Module):
    """Attention and a feed-forward layer, each behind a norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = InfiniAttention(
            config.width, config.heads, segment_len=config.segment_len, update=config.update, **(config.attention or {})
        )
        self.feed_forward_norm = nn.RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, state: InfiniState | None, last: int = 0) -> tuple[Tensor, InfiniState]:
        attended, state = self.attention(self.attention_norm(x), state)
        x = (x + attended)[:, -last:]
        return x + self.down(F.silu(self.up(self.feed_forward_norm(x)))), state


class Decoder(nn.Module):
    """A language model whose caller carries its state from one piece of a text to the next."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        # small beside what the layers add, so that they count from the first step
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.neighbours = nn.Parameter(0.5 * torch.randn(config.neighbours, config.width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, tokens: Tensor, state: DecoderState | None = None, last: int = 0) -> tuple[Tensor, DecoderState]:
        """Return the logits of the `last` positions, 0 for all, and the state to go on from.

        Args:
            tokens: [B, T], int64.
            state: of the tokens before; None at a text's beginning.

        Returns:
            logits [B, last or T, vocabulary], and the state after the tokens.
        """
        count = self.config.neighbours
        before = tokens.new_zeros(tokens.shape[0], count) if state is None else state.tokens
        tokens = torch.cat([before, tokens], dim=1)
        embedded = self.embedding(tokens)
        x = embedded[:, count:]
        for distance, weight in enumerate(self.neighbours, start=1):
            x = x + weight * embedded[:, count - distance : -distance]
        layers = []
        for i, block in enumerate(self.blocks):
            # the feed-forward layer of the last block is wanted at these positions alone
            wanted = last if i == len(self.blocks) - 1 else 0
            x, after = block(x, None if state is None else state.layers[i], wanted)
            layers.append(after)
        return self.head(self.norm(x)), DecoderState(layers, tokens[:, tokens.shape[1] - count :])

    def gates(self) -> Tensor:
        """Return sigmoid(β) [layers, heads], the memory's share of each head."""
        blocks = cast(Iterable[Block], self.blocks)
        return torch.stack([block.attention.gate().detach().sigmoid() for block in blocks])
