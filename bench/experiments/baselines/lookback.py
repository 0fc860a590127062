"""Segments that also see the whole segment before: Transformer-XL's window, with gradients through it."""

from __future__ import annotations

from torch import Tensor

from ....kernels.attention import segment_attention
from ....kernels.validation import check_integer
from .kept import Kept
from .replacing import Attention, Tokens


class Lookback(Attention):
    """`segment_attention` with a lookback and without a memory: no key or value of a row is detached.

    Args:
        segment_len: L.
    """

    def __init__(self, segment_len: int) -> None:
        super().__init__()
        self.segment_len = check_integer("segment_len", segment_len, 2)

    def attend(self, tokens: Tokens, state: Kept | None) -> Tensor:
        """Return the attention [B, H, T, V] of whole segments behind those of the state."""
        k, v = tokens.k, tokens.v
        if state is not None:
            k, v = state.joined(k, v)
        return segment_attention(tokens.q, k, v, segment_len=self.segment_len, lookback=1, scale=tokens.scale).out

    def keep(self, tokens: Tokens, state: Kept | None) -> Kept:
        """Return the last segment's keys and values."""
        return (state or Kept.nothing(tokens.k, tokens.v)).after(tokens.k, tokens.v, self.segment_len)
