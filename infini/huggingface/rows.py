"""Where the rows of a batch stand in their segments; shorter rows are padded, so lengths differ."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.text import token_runs


class Rows(NamedTuple):
    """Say how far each row of a batch has been read.

    The *tail* of a row is what is not in the memory: its unfinished segment, with a lookback the one before it too.
    What has been written to the memory is *folded*. All tails end in the last column.

    columns: columns read, tokens and padding.
    lengths: tokens read, by row.
    folded: tokens in the memory, by row; whole segments.
    open: whether every row can go on; padding on the right ends a row.
    """

    columns: int
    lengths: tuple[int, ...]
    folded: tuple[int, ...]
    open: bool = True

    @classmethod
    def fresh(cls, batch: int) -> Rows:
        """Return `batch` rows of which nothing has been read."""
        return cls(0, (0,) * batch, (0,) * batch)

    @property
    def tails(self) -> tuple[int, ...]:
        """The number of tokens in each row's tail."""
        return tuple(length - folded for length, folded in zip(self.lengths, self.folded, strict=True))

    def removable(self, lookback: int) -> int:
        """Return how many tokens can be taken back of every row, where each sees `lookback` tokens before its segment.

        What comes after them then still has these in the tail, or the row's beginning.
        """
        rows = zip(self.tails, self.folded, strict=True)
        return min(tail - (lookback if folded else 0) for tail, folded in rows)

    def after(self, tokens: TokenColumns | None, time: int, segment_len: int, *, keep: int = 0) -> Rows:
        """Return the rows after `time` more columns, with completed segments folded.

        Args:
            tokens: those of the columns that hold tokens; None: all of them.
            time: number of new columns.
            segment_len: tokens per segment, L.
            keep: number of completed segments to leave unfolded, those last completed.
        """
        counts = (time,) * len(self.lengths) if tokens is None else tokens.counts
        lengths = tuple(length + count for length, count in zip(self.lengths, counts, strict=True))
        whole = ((length // segment_len - keep) * segment_len for length in lengths)
        folded = tuple(max(before, after) for before, after in zip(self.folded, whole, strict=True))
        ends = tokens is not None and any(end < time and n for end, n in zip(tokens.ends, lengths, strict=True))
        return Rows(self.columns + time, lengths, folded, self.open and not ends)

    def without(self, removed: int) -> Rows:
        """Return the rows before their last `removed` columns."""
        return self._replace(columns=self.columns - removed, lengths=tuple(length - removed for length in self.lengths))

    def select(self, indices: Tensor) -> Rows:
        """Return the rows of these indices, in this order."""
        # rows that all stand alike need no copy of the indices from the device
        if len(set(zip(self.lengths, self.folded, strict=True))) == 1:
            return self._replace(lengths=self.lengths[:1] * len(indices), folded=self.folded[:1] * len(indices))
        order = indices.tolist()
        return self._replace(lengths=tuple(self.lengths[i] for i in order), folded=tuple(self.folded[i] for i in order))

    def spans(self, tokens: TokenColumns | None, time: int, device: torch.device) -> Tensor | None:
        """Return the bounds of each row's tokens in the widest tail and `time` new columns, int32 [B, 2].

        None where every column is a token.
        """
        tails = self.tails
        width = max(tails, default=0)
        if tokens is None:
            if min(tails, default=0) == width:
                return None
            tokens = TokenColumns((0,) * len(tails), (time,) * len(tails))
        bounds = []
        for tail, length, first, end in zip(tails, self.lengths, tokens.firsts, tokens.ends, strict=True):
            if tail == 0 and end == first:
                # a span holds a token: one of padding, whose output is not used, and which completes no segment
                bounds.append((width + time - 1, width + time))
            else:
                bounds.append((width - tail if length else width + first, width + end))
        return torch.tensor(bounds, dtype=torch.int32, device=device)

    def positions(
        self, tokens: TokenColumns | None, time: int, device: torch.device, *, in_text: bool = False
    ) -> Tensor:
        """Return the position of each new column, int64 [1 or B, T], counted from the row's tail; that of padding is 0.

        Args:
            tokens, time: as in `after`.
            device: where the positions are to be.
            in_text: count from the row's first token instead.
        """
        firsts = (0,) * len(self.lengths) if tokens is None else tokens.firsts
        counted = self.lengths if in_text else self.tails
        starts = [read - first for read, first in zip(counted, firsts, strict=True)]
        if len(set(starts)) == 1:
            starts = starts[:1]
        steps = torch.arange(time, device=device)
        return (torch.tensor(starts, device=device)[:, None] + steps).clamp(min=0)


class TokenColumns(NamedTuple):
    """The columns of a batch that hold tokens rather than padding: one run in each row.

    firsts: column of the first token, by row; 0 in a row without tokens.
    counts: number of tokens, by row.
    """

    firsts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """The column behind the last token, by row."""
        return tuple(first + count for first, count in zip(self.firsts, self.counts, strict=True))

    @classmethod
    def of(cls, mask: Tensor) -> TokenColumns | None:
        """Return the columns that an attention mask [B, T] marks, or None where it marks all of them.

        Raises:
            ValueError: the mask has other values than ones and zeros, or the tokens of a row are not one run.
        """
        if bool((mask == 1).all()):
            return None
        runs = token_runs(mask, without_tokens=True)
        return cls(tuple(begin for begin, _ in runs), tuple(end - begin for begin, end in runs))
