"""Text that an associative memory writes: a segment's memory is written when it is full, and the next one begins."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...kernels import validation as check
from ...kernels.state import MemoryState
from ..recurrent.generation import _likeliest, _sampler, _write
from ..recurrent.segments import bounds

if TYPE_CHECKING:
    from ..associative_memory import AssociativeMemory, AssociativeState


@torch.no_grad()
def generate(
    memory: AssociativeMemory,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    state: AssociativeState | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Go on with texts of any length, in the memory of one segment, a token at a time by the model's own cache.

    The first token is the likeliest by the logits that `memory(input_ids)` ends with, and every later one by those that
    it has at its place when it reads all that was written.

    Args:
        memory: a decoder with its memories.
        input_ids: [B, P].
        attention_mask: [B, P], 0 where padding stands before or after a row's tokens.
        max_new_tokens: per row.
        state: what an earlier call returned, to go on from.
        do_sample: draw from the distribution; default the likeliest.
        temperature, top_k, top_p: how it is changed before, as in transformers.
        eos_token_id: ends a row.
        pad_token_id: what follows it there.
        generator: of random numbers.

    Returns:
        The new tokens, [B, max_new_tokens] or as many as the longest row took.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    check.check_integer("max_new_tokens", max_new_tokens, 1)
    choose = _sampler(temperature, top_k, top_p, generator) if do_sample else _likeliest
    embeds = memory.embed(input_ids)
    rows = bounds(attention_mask, *input_ids.shape[:2])
    closed = _read_closed(memory, embeds, rows, memory.started(state, embeds))
    size = memory.settings.segment_len
    opened = [ids[_last(*row, size) : row[1]] for ids, row in zip(input_ids, rows, strict=True)]
    new = input_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    # rows whose open segments are as long go together
    for length in sorted(set(map(len, opened))):
        at = [row for row, own in enumerate(opened) if len(own) == length]
        index = torch.tensor(at, device=input_ids.device)
        segment = _OpenSegment(memory, closed.select(index), torch.stack([opened[row] for row in at]))
        new[index] = _write(segment, new[index], choose, eos_token_id)  # type: ignore[arg-type]
    if eos_token_id is None:
        return new
    ended = (new == eos_token_id).int().cumsum(1) > 0
    return new[:, : int((~ended).sum(1).max().clamp(max=max_new_tokens - 1)) + 1]


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
