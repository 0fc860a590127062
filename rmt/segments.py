"""Sequences of different lengths, cut into segments: each row has as many as it needs, and none that is empty."""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.text import token_runs

# labels that do not count, as in PyTorch and transformers
IGNORED = -100


class Segment(NamedTuple):
    """One segment of every row that has one here.

    number: segments before it.
    rows: those of the batch that have it.
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
        """The number of tokens of its longest row."""
        return max(end - begin for begin, end in zip(self.begin, self.end, strict=True))

    def lengths(self, device: torch.device) -> Tensor | None:
        """Return the number of tokens of each row [b]; None where all have as many."""
        sizes = [end - begin for begin, end in zip(self.begin, self.end, strict=True)]
        return None if len(set(sizes)) == 1 else torch.tensor(sizes, device=device)

    def columns(self, device: torch.device) -> Tensor:
        """Return the columns of each row's tokens [b, longest]; past a row's end its last column again."""
        begin = torch.tensor(self.begin, device=device)[:, None]
        end = torch.tensor(self.end, device=device)[:, None]
        return torch.minimum(begin + torch.arange(self.longest, device=device), end - 1)

    def whole(self, batch: int) -> bool:
        """Return whether all rows of the batch have it, at the same columns."""
        return len(self.rows) == batch and len(set(self.begin)) == len(set(self.end)) == 1

    def of(self, x: Tensor) -> Tensor:
        """Take the segment out of a batch: [B, T, ...] → [b, longest, ...]."""
        if self.whole(x.shape[0]):
            return x[:, self.begin[0] : self.end[0]]
        rows = torch.tensor(self.rows, device=x.device)[:, None]
        return x[rows, self.columns(x.device)]

    def rows_of(self, x: Tensor) -> Tensor:
        """Take the segment's rows out of a batch: [B, ...] → [b, ...]."""
        return x if len(self.rows) == x.shape[0] else x[torch.tensor(self.rows, device=x.device)]


def bounds(attention_mask: Tensor | None, batch: int, time: int) -> list[tuple[int, int]]:
    """Return the columns at which each row's tokens begin and end.

    Args:
        attention_mask: [B, T], 0 at padding; None: there is none.

    Raises:
        TypeError, ValueError: a mask that is no tensor, of another shape, with a row without tokens, or with padding
            between tokens.
    """
    if attention_mask is None:
        return [(0, time)] * batch
    if not isinstance(attention_mask, Tensor):
        raise TypeError(f"attention_mask must be a tensor, got {type(attention_mask).__name__}")
    if attention_mask.shape != (batch, time):
        raise ValueError(f"attention_mask must have shape [B, T] = {[batch, time]}, got {list(attention_mask.shape)}")
    return token_runs(attention_mask)


def cut(rows: list[tuple[int, int]], segment_len: int, alignment: str = "left") -> list[Segment]:
    """Cut every row, from its first token on, into segments of `segment_len` tokens.

    Args:
        rows: columns at which each row's tokens begin and end.
        alignment: "left": a row's last segment is the short one; "right": its first.
    """
    pieces = [_pieces(begin, end, segment_len, alignment) for begin, end in rows]
    segments = []
    for index in range(max(map(len, pieces))):
        live = [(row, *own[index], len(own) - index) for row, own in enumerate(pieces) if index < len(own)]
        segments.append(Segment(index, *(tuple(column) for column in zip(*live, strict=True))))
    return segments


def _pieces(begin: int, end: int, size: int, alignment: str) -> list[tuple[int, int]]:
    """Cut the columns of a row into segments."""
    first = begin + size if alignment == "left" else end - (end - begin - 1) // size * size
    cuts = [begin, *range(first, end, size), end]
    return list(pairwise(cuts))


def last_begin(begin: int, end: int, segment_len: int, alignment: str) -> int:
    """Return the column at which the last segment begins of a row that begins and ends at these columns."""
    return (
        begin + (end - begin - 1) // segment_len * segment_len if alignment == "left" else max(begin, end - segment_len)
    )


def next_tokens(labels: Tensor, rows: list[tuple[int, int]]) -> Tensor:
    """Return the label that each column's logits are to predict: the row's next one, also over a segment's border.

    Args:
        labels: [B, T], one for each token.
        rows: columns at which each row's tokens begin and end.

    Returns:
        [B, T], IGNORED where there is nothing to predict.
    """
    device = labels.device
    begin, end = torch.tensor(rows, device=device)[..., None].unbind(1)
    at = torch.arange(labels.shape[1], device=device)
    following = torch.cat((labels[:, 1:], labels.new_full((labels.shape[0], 1), IGNORED)), 1)
    return following.masked_fill((at < begin) | (at + 1 >= end), IGNORED)
