"""Where the rows of a batch stand in their segments; rows are of unequal length where shorter ones are padded."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """What has been read of each row.

    A row's *tail* is what follows its last folded segment. Tails end together, in the last column.

    columns: tokens and padding read so far.
    lengths: tokens of each row.
    folded: how many of these are in the memory, whole segments.
    open: whether every row goes on; right padding ends them.
    """

    columns: int
    lengths: tuple[int, ...]
    folded: tuple[int, ...]
    open: bool = True

    @classmethod
    def fresh(cls, batch: int) -> Rows:
        """Rows of which nothing has been read."""
        return cls(0, (0,) * batch, (0,) * batch)

    @property
    def tails(self) -> tuple[int, ...]:
        """Tokens of each row that are not folded."""
        return tuple(length - folded for length, folded in zip(self.lengths, self.folded, strict=True))

    def read(self, real: Real | None, time: int, segment_len: int, *, keep_last: bool = False) -> Rows:
        """The rows after `time` more columns, of which `real` are tokens, with every completed segment folded.

        keep_last: leave the last completed segment unfolded, so that tokens can be taken back.
        """
        counts = (time,) * len(self.lengths) if real is None else real.counts
        lengths = tuple(length + count for length, count in zip(self.lengths, counts, strict=True))
        whole = (length // segment_len * segment_len - keep_last * segment_len for length in lengths)
        folded = tuple(max(before, after) for before, after in zip(self.folded, whole, strict=True))
        ends = real is not None and any(end < time and n for end, n in zip(real.ends, lengths, strict=True))
        return Rows(self.columns + time, lengths, folded, self.open and not ends)

    def without(self, removed: int) -> Rows:
        """The rows before their last `removed` columns."""
        return self._replace(columns=self.columns - removed, lengths=tuple(length - removed for length in self.lengths))

    def select(self, indices: Tensor) -> Rows:
        """These rows, in this order."""
        if len(set(zip(self.lengths, self.folded, strict=True))) == 1:
            return self._replace(lengths=self.lengths[:1] * len(indices), folded=self.folded[:1] * len(indices))
        order = indices.tolist()
        return self._replace(lengths=tuple(self.lengths[i] for i in order), folded=tuple(self.folded[i] for i in order))

    def spans(self, real: Real | None, time: int, device: torch.device) -> Tensor | None:
        """int32 [B, 2], the real columns of each row among the widest tail and `time` new ones; None: all of them."""
        tails = self.tails
        width = max(tails, default=0)
        if real is None:
            if min(tails, default=0) == width:
                return None
            real = Real((0,) * len(tails), (time,) * len(tails))
        bounds = []
        for tail, length, first, end in zip(tails, self.lengths, real.firsts, real.ends, strict=True):
            if tail == 0 and end == first:
                # a span holds a token: a padded one, whose output is not looked at, and which fills no segment
                bounds.append((width + time - 1, width + time))
            else:
                bounds.append((width - tail if length else width + first, width + end))
        return torch.tensor(bounds, dtype=torch.int32, device=device)

    def positions(self, real: Real | None, time: int, segment_len: int, device: torch.device) -> Tensor:
        """int64 [1 or B, T]: where each new column stands in its segment; padding stands at 0."""
        firsts = (0,) * len(self.lengths) if real is None else real.firsts
        starts = [tail - first for tail, first in zip(self.tails, firsts, strict=True)]
        if len(set(starts)) == 1:
            starts = starts[:1]
        steps = torch.arange(time, device=device)
        return (torch.tensor(starts, device=device)[:, None] + steps).clamp(min=0) % segment_len


class Real(NamedTuple):
    """The tokens among a call's columns: one run in each row."""

    firsts: tuple[int, ...]
    counts: tuple[int, ...]

    @property
    def ends(self) -> tuple[int, ...]:
        """One past the last token."""
        return tuple(first + count for first, count in zip(self.firsts, self.counts, strict=True))

    @classmethod
    def of(cls, mask: Tensor) -> Real | None:
        """Of a mask [B, T]; None where every column is a token.

        Raises:
            ValueError: a row's tokens are not one run.
        """
        mask = mask.bool()
        if bool(mask.all()):
            return None
        time = mask.shape[1]
        first = mask.int().argmax(1)
        last = time - mask.flip(1).int().argmax(1)
        count = mask.sum(1)
        firsts, lasts, counts = torch.stack([first, last, count]).tolist()
        for row, (begin, end, tokens) in enumerate(zip(firsts, lasts, counts, strict=True)):
            if tokens and end - begin != tokens:
                raise ValueError(
                    f"attention_mask must hold one run of ones in each row, with padding only around it: row {row} has "
                    f"{tokens} ones between {begin} and {end}"
                )
        return cls(tuple(first if n else 0 for first, n in zip(firsts, counts, strict=True)), tuple(counts))
