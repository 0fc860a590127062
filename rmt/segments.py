"""Sequences of unlike lengths, cut into segments: each row has as many as it needs, and none that is empty."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100


class Segment(NamedTuple):
    """One segment of every row that has one here.

    number: how many came before it.
    rows: of the batch, which have it.
    begin, end: columns, per row.
    left: segments from this one to the row's last, per row.
    """

    number: int
    rows: tuple[int, ...]
    begin: tuple[int, ...]
    end: tuple[int, ...]
    left: tuple[int, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest of its rows."""
        return max(end - begin for begin, end in zip(self.begin, self.end, strict=True))

    def lengths(self, device: torch.device) -> Tensor | None:
        """Tokens of each row [b], None where they are all as long."""
        sizes = [end - begin for begin, end in zip(self.begin, self.end, strict=True)]
        return None if len(set(sizes)) == 1 else torch.tensor(sizes, device=device)

    def columns(self, device: torch.device) -> Tensor:
        """[b, tokens]; past a row's end its last column again."""
        begin = torch.tensor(self.begin, device=device)[:, None]
        end = torch.tensor(self.end, device=device)[:, None]
        return torch.minimum(begin + torch.arange(self.longest, device=device), end - 1)

    def whole(self, batch: int) -> bool:
        """Whether all rows have it, at the same columns."""
        return len(self.rows) == batch and len(set(self.begin)) == len(set(self.end)) == 1

    def of(self, x: Tensor) -> Tensor:
        """[B, T, ...] → [b, tokens, ...]."""
        if self.whole(x.shape[0]):
            return x[:, self.begin[0] : self.end[0]]
        rows = torch.tensor(self.rows, device=x.device)[:, None]
        return x[rows, self.columns(x.device)]

    def rows_of(self, x: Tensor) -> Tensor:
        """[B, ...] → [b, ...]."""
        return x if len(self.rows) == x.shape[0] else x[torch.tensor(self.rows, device=x.device)]


def bounds(attention_mask: Tensor | None, batch: int, time: int) -> list[tuple[int, int]]:
    """Where each row's tokens begin and end.

    Raises:
        TypeError, ValueError: the mask is no tensor, of another shape, of a row without tokens, or with padding
            between tokens.
    """
    if attention_mask is None:
        return [(0, time)] * batch
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != (batch, time):
        raise ValueError(f"attention_mask must have shape [B, T] = {[batch, time]}, got {list(attention_mask.shape)}")
    real = attention_mask.bool()
    # one copy to the host, for all rows
    count, first, last = torch.stack(
        (real.sum(1), real.long().argmax(1), time - 1 - real.flip(1).long().argmax(1))
    ).tolist()
    for row in range(batch):
        if count[row] == 0:
            raise ValueError(f"attention_mask must have a token in every row, got row {row} without one")
        if last[row] - first[row] + 1 != count[row]:
            raise ValueError(
                f"attention_mask must have a row's tokens side by side, got padding between those of row {row}"
            )
    return [(begin, end + 1) for begin, end in zip(first, last, strict=True)]


def cut(rows: list[tuple[int, int]], segment_len: int, alignment: str = "left") -> list[Segment]:
    """Every row from its first token on in segments of `segment_len`; by "right" its first is the short one.

    Args:
        rows: begin and end of each row's tokens.
    """
    pieces = [_pieces(begin, end, segment_len, alignment) for begin, end in rows]
    segments = []
    for index in range(max(map(len, pieces))):
        live = [(row, *own[index], len(own) - index) for row, own in enumerate(pieces) if index < len(own)]
        segments.append(Segment(index, *(tuple(column) for column in zip(*live, strict=True))))
    return segments


def _pieces(begin: int, end: int, size: int, alignment: str) -> list[tuple[int, int]]:
    first = begin + size if alignment == "left" else end - (end - begin - 1) // size * size
    cuts = [begin, *range(first, end, size), end]
    return list(pairwise(cuts))


def next_tokens(labels: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """[B, T] labels → [B, T], what each column's logits are to predict: the row's next label, also over a border."""
    device = labels.device
    begin, end = torch.tensor(rows, device=device)[..., None].unbind(1)
    at = torch.arange(labels.shape[1], device=device)
    following = torch.cat((labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORED)), 1)
    return following.masked_fill((at < begin) | (at + 1 >= end), IGNORED)
