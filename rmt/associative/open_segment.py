"""The last segment of a text that goes on, in an `AssociativeMemory`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels.state import MemoryState
from ..generation import Opened
from ..segments import bounds

if TYPE_CHECKING:
    from .memory import AssociativeMemory, AssociativeState


def open_segments(
    memory: AssociativeMemory, input_ids: Tensor, attention_mask: Tensor | None, state: AssociativeState | None
) -> Opened:
    """Read texts [B, P] up to their last segments."""
    embeds = memory.check_inputs(input_ids, None)
    rows = bounds(attention_mask, *input_ids.shape[:2])
    closed = _read_closed(memory, embeds, rows, memory.started(state, embeds))
    size = memory.settings.segment_len
    opened = [ids[_last(*row, size) : row[1]] for ids, row in zip(input_ids, rows, strict=True)]
    return Opened(opened, lambda index, tokens: _OpenSegment(memory, closed.select(index), tokens))


def _last(begin: int, end: int, segment_len: int) -> int:
    """Where a row's last segment begins, which stays open even if it is whole."""
    return begin + (end - begin - 1) // segment_len * segment_len


def _read_closed(
    memory: AssociativeMemory, embeds: Tensor, rows: list[tuple[int, int]], state: AssociativeState
) -> AssociativeState:
    """The state before each row's last segment."""
    ends = [_last(*row, memory.settings.segment_len) for row in rows]
    longer = [row for row, end in enumerate(ends) if end > rows[row][0]]
    if not longer:
        return state
    index = torch.tensor(longer, device=embeds.device)
    at = torch.arange(embeds.shape[1], device=embeds.device)
    begin, end = torch.tensor([(rows[row][0], ends[row]) for row in longer], device=embeds.device).T[..., None]
    mask = (at >= begin) & (at < end)
    after = memory(
        inputs_embeds=embeds[index], attention_mask=mask, state=state.select(index), output_logits=False
    ).state
    return type(state)(
        tuple(
            MemoryState(*(old.index_copy(0, index, new) for old, new in zip(*pair, strict=True)))
            for pair in zip(state.memories, after.memories, strict=True)
        )
    )


class _OpenSegment:
    """A segment that grows, of rows that are as long.

    No token sees the memory tokens, which are run when it is full.
    """

    def __init__(self, module: AssociativeMemory, state: AssociativeState, tokens: Tensor) -> None:
        self.module, self.state, self.tokens = module, state, tokens
        self.cache = module.new_cache()

    def next_logits(self) -> Tensor:
        """[B, vocabulary], after the last token."""
        hidden = self._read(self._unread(), write=False)
        return self.module.logits(hidden[:, -1])

    def append(self, token: Tensor) -> None:
        """Take the next token [B]; a full segment writes its memory first, and another begins with it."""
        if self.tokens.shape[1] < self.module.settings.segment_len:
            self.tokens = torch.cat((self.tokens, token[:, None]), 1)
            return
        unread = self._unread()
        memory = self.module.memory_tokens.to(unread.dtype).expand(unread.shape[0], -1, -1)
        self._read(torch.cat((unread, memory), 1), write=True)
        self.tokens, self.cache = token[:, None], self.module.new_cache()

    def _unread(self) -> Tensor:
        """Embeddings of the tokens that are not in the cache: all of them where the model keeps none."""
        return self.module.embed(self.tokens[:, self.cache.get_seq_length() :])

    def _read(self, rows: Tensor, *, write: bool) -> Tensor:
        hidden, self.state = self.module.read(
            rows.unsqueeze(0), self.state, write=write, past_key_values=self.cache, use_cache=True
        )
        return hidden[0]
