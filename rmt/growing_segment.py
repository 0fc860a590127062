"""The last segment of a text, while tokens are appended to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Extension(NamedTuple):
    """Hold what reading a few more tokens of a segment returns.

    logits: [B, vocabulary] after the last token; None once the segment is written.
    state: the memory, changed only where the segment is written.
    cache: keys and values of the segment so far; None where the model keeps none.
    """

    logits: Tensor | None
    state: Any
    cache: Any


# tokens [B, n] that the cache does not hold, state, cache, and whether the segment ends and is written
Extend = Callable[[Tensor, Any, Any, bool], Extension]


class GrowingSegment:
    """The last segment of B texts that have equally many tokens in it.

    Tokens never see the rows that write the memory, so these are run once, when the segment is full.

    Args:
        extend: reads more tokens of the segment.
        segment_len: L.
        state: the memory before the segment.
        tokens: [B, n], 1 ≤ n ≤ L.
    """

    def __init__(self, extend: Extend, segment_len: int, state: Any, tokens: Tensor) -> None:
        self.extend, self.segment_len = extend, segment_len
        self.state, self.tokens = state, tokens
        self.cache: Any = None
        self.cached = 0

    def next_logits(self) -> Tensor:
        """Return the logits [B, vocabulary] that follow the last token."""
        logits, _, self.cache = self.extend(self._uncached(), self.state, self.cache, False)
        self.cached = 0 if self.cache is None else self.tokens.shape[1]
        if logits is None:
            raise RuntimeError("extend must return logits unless the segment is written")
        return logits

    def append(self, token: Tensor) -> None:
        """Append a token [B]; where the segment is full, write it into the memory and begin the next one."""
        if self.tokens.shape[1] < self.segment_len:
            self.tokens = torch.cat((self.tokens, token[:, None]), 1)
            return
        self.state = self.extend(self._uncached(), self.state, self.cache, True).state
        self.tokens, self.cache, self.cached = token[:, None], None, 0

    def select(self, texts: Tensor) -> None:
        """Go on with some of the texts, int [b], in this order; one may be there several times."""
        self.state, self.tokens = self.state.select(texts), self.tokens[texts]
        if self.cache is not None:
            self.cache.reorder_cache(texts)

    def _uncached(self) -> Tensor:
        return self.tokens[:, self.cached :]
