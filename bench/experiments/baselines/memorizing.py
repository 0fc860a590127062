"""Memorizing Transformers (arXiv 2203.08913): a layer that looks up the nearest of many stored keys."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....infini.gate import Gate
from ....kernels.validation import check_integer
from .kept import Kept, before_segments, numbers_before
from .replacing import Tokens
from .transformer_xl import TransformerXL

SCALE = 10.0


class MemorizingState(NamedTuple):
    """The cache of Transformer-XL, and the store: keys of length 1, before rotary embedding, and values."""

    cache: Kept
    stored: Kept


class Memorizing(TransformerXL):
    """Local attention with a Transformer-XL cache, blended with softmax over the nearest stored keys (section 3.2).

    Each query and head retrieves the `neighbours` keys of the largest dot product, exactly, among all that are stored
    of earlier segments, those in the cache too. Both are brought to length 1 before they are turned by their positions,
    as the paper normalises them, so that keys stay comparable over steps and distances; a learnt scale per head, at
    first 10, sharpens the softmax. sigmoid(gate), per head, weighs what is retrieved, and nothing is blended in where
    nothing is stored. Gradients reach the queries, the scale and the gate, and no stored key or value.

    Args:
        segment_len, cached: as of Transformer-XL.
        heads: H.
        stored: tokens in the store; the oldest are dropped.
        neighbours: keys that a query retrieves.
    """

    def __init__(self, segment_len: int, cached: int, heads: int, stored: int, neighbours: int) -> None:
        super().__init__(segment_len, cached)
        self.stored = check_integer("stored", stored, 1)
        self.neighbours = check_integer("neighbours", neighbours, 1)
        self.gate = Gate(heads)
        self.log_scale = nn.Parameter(torch.full((heads,), math.log(SCALE)))

    def attend(self, tokens: Tokens, state: Any) -> Tensor:
        """Return the attention [B, H, T, V], T a multiple of L."""
        local = super().attend(tokens, None if state is None else state.cache)
        stored = Kept.nothing(tokens.k, tokens.v) if state is None else state.stored
        keys, values = (
            before_segments(held, new, self.stored, self.segment_len)
            for held, new in zip(stored, (F.normalize(tokens.plain_k, dim=-1), tokens.v), strict=True)
        )
        held = numbers_before(stored.keys.shape[2], local.shape[2], self.stored, self.segment_len).to(local.device)
        queries = self._in_segments(F.normalize(tokens.plain_q, dim=-1))
        recalled = self.retrieve(queries, keys, values, held).flatten(2, 3)
        some = (held > 0).repeat_interleave(self.segment_len)[:, None]
        share = self.gate().sigmoid().to(local.dtype)[:, None, None] * some
        return local + share * (recalled - local)

    def retrieve(self, queries: Tensor, keys: Tensor, values: Tensor, held: Tensor) -> Tensor:
        """Return [B, H, S, L, V]: softmax over the nearest of the last `held` [S] of keys [B, H, S, M, K]."""
        places = keys.shape[3]
        scores = queries @ keys.mT * self.log_scale.exp()[:, None, None, None]
        empty = torch.arange(places, device=held.device) < places - held[:, None]
        scores = scores.masked_fill(empty[:, None], torch.finfo(scores.dtype).min)
        nearest, indices = scores.topk(min(self.neighbours, places), dim=-1, sorted=False)
        # a product with all values costs less than to gather each query's own
        return torch.zeros_like(scores).scatter(-1, indices, nearest.softmax(-1)) @ values

    def keep(self, tokens: Tokens, state: Any) -> Any:
        """Return the last keys and values of the cache, and of the store."""
        cache = super().keep(tokens, None if state is None else state.cache)
        stored = Kept.nothing(tokens.k, tokens.v) if state is None else state.stored
        return MemorizingState(cache, stored.after(F.normalize(tokens.plain_k, dim=-1), tokens.v, self.stored))
