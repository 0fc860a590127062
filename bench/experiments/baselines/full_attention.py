"""Full attention: every key and value is kept."""

from __future__ import annotations

from torch import Tensor

from ....kernels.attention import segment_attention
from .kept import Kept
from .replacing import Attention, Tokens


class FullAttention(Attention):
    """Causal softmax over the whole sequence: `segment_attention` with one segment as long as that is."""

    def attend(self, tokens: Tokens, state: Kept | None) -> Tensor:
        """Return the attention [B, H, T, V] of any number of tokens."""
        q, k, v = tokens[:3]
        if state is not None:
            k, v = state.joined(k, v)
        return segment_attention(q, k, v, segment_len=k.shape[2], scale=tokens.scale).out

    def keep(self, tokens: Tokens, state: Kept | None) -> Kept:
        """Return the keys and values of all tokens."""
        return (state or Kept.nothing(tokens.k, tokens.v)).after(tokens.k, tokens.v)
