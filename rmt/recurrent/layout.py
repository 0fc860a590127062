"""The rows of a segment as the model gets them, and which of them see which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """Rows [before | tokens | after], as many of each as the sequence has; padding comes after them.

    before, after: rows around the tokens.
    memory: where the memory that goes on to the next segment is read off: counted from the first row, or, where
        negative, from one past the last.
    num_memory: its rows.
    """

    before: int
    after: int
    memory: int
    num_memory: int

    def join(self, before: Tensor, tokens: Tensor, after: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, ·, d] each → [B, T, d], the rows of `after` directly behind each sequence's last token."""
        x = torch.cat((before, tokens, after), 1)
        if lengths is None or not self.after:
            return x
        return torch.take_along_dim(x, self._order(lengths, tokens.shape[1])[..., None], 1)

    def _order(self, lengths: Tensor, time: int) -> Tensor:
        """Of the rows of [before | tokens | padding | after], those that come to stand in [... | after | padding]."""
        at = torch.arange(self.before + time + self.after, device=lengths.device)
        end = self.before + lengths[:, None]
        moved = torch.where(at < end + self.after, at + time - lengths[:, None], at - self.after)
        return torch.where(at < end, at, moved)

    def memory_of(self, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """[B, T, d] → [B, m, d]."""
        first = self.memory
        if first >= 0:
            return hidden[:, first : first + self.num_memory]
        if lengths is None:
            first += hidden.shape[1]
            return hidden[:, first : first + self.num_memory]
        ends = self.before + lengths + self.after
        rows = (ends + first)[:, None] + torch.arange(self.num_memory, device=lengths.device)
        return torch.take_along_dim(hidden, rows[..., None], 1)

    def tokens_of(self, rows: Tensor) -> Tensor:
        """[B, T, ·] → [B, tokens, ·]; past a sequence's end stands something else."""
        return rows[:, self.before : rows.shape[1] - self.after]

    def real(self, time: int, lengths: Tensor) -> Tensor:
        """[B, T], True where a row is not padding."""
        at = torch.arange(self.before + time + self.after, device=lengths.device)
        return at < (self.before + lengths + self.after)[:, None]


def decoder_layout(num_memory_tokens: int) -> Layout:
    """[read | tokens | write], the memory read off at the end (arXiv 2207.06881, section 3)."""
    return Layout(num_memory_tokens, num_memory_tokens, -num_memory_tokens, num_memory_tokens)


def encoder_layout(num_memory_tokens: int, special: bool) -> Layout:
    """[first | memory | separator | tokens | separator] (arXiv 2304.11062), or [memory | tokens]."""
    if special:
        return Layout(num_memory_tokens + 2, 1, 1, num_memory_tokens)
    return Layout(num_memory_tokens, 0, 0, num_memory_tokens)


def block_mask(
    time: int,
    num_read: int,
    num_write: int,
    lengths: Tensor | None = None,
    *,
    queries: int | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Which row sees which: j ≤ i, or j is read memory, or i is write memory (arXiv 2207.06881, figure 6d).

    Args:
        time: T, rows of a segment, padding included.
        num_read, num_write: rows of memory at its two ends; both 0: plain causal.
        lengths: [B], rows of each sequence; default T.
        queries: only the last so many rows' part; default all.

    Returns:
        bool [1 or B, 1, queries, T]. Padding is seen by itself alone, so that no row sees nothing.
    """
    device = device if lengths is None else lengths.device
    j = torch.arange(time, device=device)
    i = j[time - queries :, None] if queries is not None else j[:, None]
    end = time if lengths is None else lengths[:, None, None, None]
    visible = (j <= i) | (j < num_read) | (i >= end - num_write)
    return ((visible & (j < end)) | (j == i)).expand(-1 if lengths is not None else 1, 1, -1, -1)
