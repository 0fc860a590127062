"""Transformer-XL (arXiv 1901.02860): segments that also see the keys and values of the tokens before them."""

from __future__ import annotations

import torch
from torch import Tensor

from ....kernels.attention import segment_attention
from ....kernels.validation import check_integer
from .kept import Kept, before_segments, numbers_before
from .replacing import Attention, Tokens


class TransformerXL(Attention):
    """Causal softmax over [cached | own segment]; all of the cache is seen by each of the segment's tokens.

    The cache is of keys, turned by their own positions, and values, both detached (the paper detaches the hidden states
    that they are made of, one step before). A row's segments are read at once: the cache of each is what the layer
    makes of the tokens before it, as it would be segment by segment with the same weights.

    Args:
        segment_len: L.
        cached: tokens in the cache, M; 0 makes it local attention.
    """

    def __init__(self, segment_len: int, cached: int) -> None:
        super().__init__()
        self.segment_len = check_integer("segment_len", segment_len, 1)
        self.cached = check_integer("cached", cached, 0)

    def attend(self, tokens: Tokens, state: Kept | None) -> Tensor:
        """Return the attention [B, H, T, V], T a multiple of L.

        Raises:
            ValueError: it is not.
        """
        q, k, v = tokens[:3]
        batch, _, time, _ = q.shape
        if time % self.segment_len:
            raise ValueError(f"rows must be of whole segments of {self.segment_len} tokens, got {time}")
        if not self.cached:
            return segment_attention(q, k, v, segment_len=self.segment_len, scale=tokens.scale).out
        kept = state or Kept.nothing(k, v)
        keys, values = (
            torch.cat([before_segments(held, new, self.cached, self.segment_len), self._in_segments(new)], 3)
            for held, new in zip(kept, (k, v), strict=True)
        )
        # every segment is a sequence of its own, that begins where its cache does
        first = self.cached - numbers_before(kept.keys.shape[2], time, self.cached, self.segment_len)
        spans = torch.stack([first, torch.full_like(first, self.cached + self.segment_len)], 1)
        out, _ = segment_attention(
            *(x.transpose(1, 2).flatten(0, 1) for x in (self._in_segments(q), keys, values)),
            segment_len=self.cached + self.segment_len,
            spans=spans.repeat(batch, 1).to(q.device),
            scale=tokens.scale,
        )
        return out.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3)

    def keep(self, tokens: Tokens, state: Kept | None) -> Kept:
        """Return the last M keys and values."""
        return (state or Kept.nothing(tokens.k, tokens.v)).after(tokens.k, tokens.v, self.cached)

    def _in_segments(self, x: Tensor) -> Tensor:
        """Return [B, H, T, ·] as [B, H, S, L, ·]."""
        return x.unflatten(2, (-1, self.segment_len))
