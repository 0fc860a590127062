"""The rows of a segment as a model receives them, and which of them see which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The order [before | tokens | after] of a segment's rows; padding of shorter sequences comes last.

    before, after: rows in front of the tokens and behind them.
    memory: first row of the memory that goes on to the next segment, counted from a sequence's first row, or, where
        negative, from one past its last.
    num_memory: rows of that memory, m.
    """

    before: int
    after: int
    memory: int
    num_memory: int

    def join(self, before: Tensor, tokens: Tensor, after: Tensor, lengths: Tensor | None) -> Tensor:
        """Join rows [B, ·, d] to a segment [B, T, d], `after` directly behind each sequence's last token.

        Args:
            lengths: tokens of each sequence [B]; None: all of them.
        """
        x = torch.cat((before, tokens, after), 1)
        if lengths is None or not self.after:
            return x
        return torch.take_along_dim(x, self._order(lengths, tokens.shape[1])[..., None], 1)

    def _order(self, lengths: Tensor, time: int) -> Tensor:
        """Return the indices [B, T] that bring [before | tokens | padding | after] to [... | after | padding]."""
        at = torch.arange(self.before + time + self.after, device=lengths.device)
        end = self.before + lengths[:, None]
        moved = torch.where(at < end + self.after, at + time - lengths[:, None], at - self.after)
        return torch.where(at < end, at, moved)

    def memory_of(self, hidden: Tensor, lengths: Tensor | None) -> Tensor:
        """Return the memory [B, m, d] among a segment's rows [B, T, d]."""
        first = self.memory
        if first >= 0:
            return hidden[:, first : first + self.num_memory]
        if lengths is None:
            first += hidden.shape[1]
            return hidden[:, first : first + self.num_memory]
        rows = (self.ends(lengths) + first)[:, None] + torch.arange(self.num_memory, device=lengths.device)
        return torch.take_along_dim(hidden, rows[..., None], 1)

    def tokens_of(self, rows: Tensor) -> Tensor:
        """Return the places of the tokens [B, L, ·] among rows [B, T, ·]; past a sequence's end they hold others."""
        return rows[:, self.before : rows.shape[1] - self.after]

    def ends(self, lengths: Tensor) -> Tensor:
        """Return where each sequence's rows end [B], for its number of tokens [B]; padding stands behind."""
        return self.before + lengths + self.after


def decoder_layout(num_memory_tokens: int) -> Layout:
    """Return [read | tokens | write], whose memory is read off at the end (arXiv 2207.06881, section 3)."""
    return Layout(num_memory_tokens, num_memory_tokens, -num_memory_tokens, num_memory_tokens)


def encoder_layout(num_memory_tokens: int, special: bool) -> Layout:
    """Return [first | memory | separator | tokens | separator] (arXiv 2304.11062), or [memory | tokens]."""
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
    """Return which row sees which: j ≤ i, or j is read memory, or i is write memory (arXiv 2207.06881, figure 6d).

    Args:
        time: T, rows of a segment, padding included.
        num_read, num_write: rows of memory at its two ends; both 0: plain causal.
        lengths: rows of each sequence [B]; default T.
        queries: return only this many of the last rows; default all.
        device: of the result where there are no lengths; default the CPU.

    Returns:
        bool [1 or B, 1, queries, T]. Padding is seen by itself alone, so that no row sees nothing.
    """
    device = (device or torch.device("cpu")) if lengths is None else lengths.device
    j = torch.arange(time, device=device)
    i = j[time - queries :, None] if queries is not None else j[:, None]
    end = time if lengths is None else lengths[:, None, None, None]
    visible = (j <= i) | (j < num_read) | (i >= end - num_write)
    return ((visible & (j < end)) | (j == i)).expand(-1 if lengths is not None else 1, 1, -1, -1)
