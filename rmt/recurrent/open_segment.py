"""The last segment of a text that goes on, in a `RecurrentMemory`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..generation import Opened
from ..segments import bounds, cut
from .state import RecurrentState

if TYPE_CHECKING:
    from .memory import RecurrentMemory


def open_segments(
    memory: RecurrentMemory, input_ids: Tensor, attention_mask: Tensor | None, state: RecurrentState | None
) -> Opened:
    """Read texts [B, P] up to their last segments."""
    settings = memory.settings
    if settings.kind != "decoder":
        raise TypeError("generate is for decoders, got a RecurrentMemory of kind 'encoder'")
    rows = bounds(attention_mask, *memory.check_inputs(input_ids, None).shape[:2])
    last = [cut([row], settings.segment_len, settings.alignment)[-1] for row in rows]
    begin = [segment.begin[0] for segment in last]
    opened = [ids[segment.begin[0] : segment.end[0]] for ids, segment in zip(input_ids, last, strict=True)]
    closed = memory.check_state(state, len(rows)).memory.clone()
    longer = [row for row, first in enumerate(begin) if first > rows[row][0]]
    if longer:
        index = torch.tensor(longer, device=input_ids.device)
        ids, own = input_ids[index], closed[index]
        for segment in cut([(rows[row][0], begin[row]) for row in longer], settings.segment_len, settings.alignment):
            own, _ = memory.read(ids, segment, own, False)
        closed[index] = own.to(closed.dtype)
    return Opened(opened, lambda index, tokens: _OpenSegment(memory, closed[index], tokens))


class _OpenSegment:
    """A segment [read | tokens] that grows, of rows that are as long; keys and values are cached where the model can.

    The write rows come last and nothing before sees them: they are run when the segment is full.
    """

    def __init__(self, module: RecurrentMemory, memory: Tensor, tokens: Tensor) -> None:
        self.module, self.memory, self.tokens = module, memory, tokens
        self.cache: Any = None

    def next_logits(self) -> Tensor:
        """[B, vocabulary], after the last token."""
        _, logits, self.cache = self.module.newest(self._rows(), False, self.cache)
        return logits

    def append(self, token: Tensor) -> None:
        """Take the next token [B]; a full segment writes the memory first, and another begins with it."""
        if self.tokens.shape[1] < self.module.settings.segment_len:
            self.tokens = torch.cat((self.tokens, token[:, None]), 1)
            return
        before = self.memory if self.cache is not None else torch.cat((self._rows(), self.memory), 1)
        self.memory = self.module.newest(before, True, self.cache)[0]
        self.tokens, self.cache = token[:, None], None

    def _rows(self) -> Tensor:
        if self.cache is not None:
            return self.module.embed(self.tokens[:, -1:])
        return torch.cat((self.memory, self.module.embed(self.tokens)), 1)
