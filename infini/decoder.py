"""A small decoder with `InfiniAttention`: what the demo trains, and an example of the module in a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import InfiniAttention, InfiniState
from .gate import Gate


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a `Decoder`; `attention` holds further arguments of `InfiniAttention`."""

    vocabulary: int
    segment_len: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    update: str = "delta"
    attention: dict[str, Any] | None = None


class Block(nn.Module):
    """Attention and a gated feed-forward layer, each behind its own norm."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = InfiniAttention(
            config.width, config.heads, segment_len=config.segment_len, update=config.update, **(config.attention or {})
        )
        self.feed_forward_norm = nn.RMSNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width, bias=False)
        self.down = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: Tensor, state: InfiniState | None) -> tuple[Tensor, InfiniState | None]:
        attended, state = self.attention(self.attention_norm(x), state)
        x = x + attended
        return x + self.down(F.silu(self.up(self.feed_forward_norm(x)))), state


class Decoder(nn.Module):
    """Tokens in, logits out, one InfiniState per layer carried by the caller."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(
        self, tokens: Tensor, states: list[InfiniState] | None = None, last: int = 0
    ) -> tuple[Tensor, list[InfiniState]]:
        """tokens [B, T] → logits [B, T, vocabulary], or of the `last` positions alone, and the states to go on from."""
        x = self.embedding(tokens)
        after = []
        for i, block in enumerate(self.blocks):
            x, state = block(x, None if states is None else states[i])
            after.append(state)
        return self.head(self.norm(x[:, -last:])), after

    def gates(self) -> Tensor:
        """sigmoid(β), [layers, heads]: each head's share of memory."""
        return torch.stack([gate().detach().sigmoid() for gate in self.modules() if isinstance(gate, Gate)])
