"""The last segments of a batch's texts, in the place of the cache that transformers' `generate` hands to a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .growing_segment import GrowingSegment


class Group(NamedTuple):
    """Texts that have equally many tokens in their last segment, and therefore grow in step.

    rows: of the batch, int [b].
    """

    rows: Tensor
    segment: GrowingSegment


class OpenSegments:
    """The last segments of B texts that grow by a token each at a time.

    Args:
        read: reads the texts up to their last segments, and returns these; each row of the batch is in one group. It is
            called by the first `next_logits`, after transformers has checked its arguments.
        batch: B.
    """

    # what transformers asks a cache
    is_compileable = False
    is_croppable = False

    def __init__(self, read: Callable[[], list[Group]], batch: int) -> None:
        self.read, self.batch = read, batch
        self.groups: list[Group] = []
        self.columns = 0

    def next_logits(self, text: Tensor) -> Tensor:
        """Return the logits [N, vocabulary] that follow each row of a text.

        Args:
            text: [N, T]. In the first call the prompts, N = B, or N = n · B with n copies of each prompt side by side;
                in each later call the text of the call before with one column more.
        """
        if not self.groups:
            self.groups = self.read()
            self._repeat(text.shape[0] // self.batch)
        else:
            for group in self.groups:
                group.segment.append(text[group.rows, self.columns])
        self.columns = text.shape[1]
        if len(self.groups) == 1:
            return self.groups[0].segment.next_logits()
        rows = torch.cat([group.rows for group in self.groups])
        return torch.cat([group.segment.next_logits() for group in self.groups])[rows.argsort()]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put text `beam_idx[row]` in each row's place, as a beam search does among the texts of one prompt."""
        place = torch.empty_like(beam_idx)
        for rows, segment in self.groups:
            place[rows] = torch.arange(len(rows), dtype=place.dtype, device=place.device)
            segment.select(place[beam_idx[rows]])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0, by which transformers hands over whole texts."""
        return 0

    def _repeat(self, times: int) -> None:
        """Put `times` copies of each text side by side."""
        if times == 1:
            return
        copies = torch.arange(times, device=self.groups[0].rows.device)
        for at, (rows, segment) in enumerate(self.groups):
            segment.select(torch.arange(len(rows), device=rows.device).repeat_interleave(times))
            self.groups[at] = Group((rows[:, None] * times + copies).flatten(), segment)
        self.batch *= times
