"""Text that a recurrent decoder writes: its memory is written when a segment is full, and the next one begins."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels import validation as check
from .segments import bounds, cut
from .state import RecurrentState

if TYPE_CHECKING:
    from ..recurrent_memory import RecurrentMemory

Choose = Callable[[Tensor], Tensor]


@torch.no_grad()
def generate(
    memory: RecurrentMemory,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    state: RecurrentState | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Go on with texts of any length, in the memory of one segment.

    The first token is the likeliest by the logits that `memory(input_ids)` ends with, and every later one by those that
    it has at its place when it reads all that was written: a text is cut into segments as there, its last one stays
    open, and where it fills, memory is written and the next begins.

    Args:
        memory: a decoder with its memory.
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
    if memory.settings.kind != "decoder":
        raise TypeError("generate is for decoders, got a RecurrentMemory of kind 'encoder'")
    check.check_integer("max_new_tokens", max_new_tokens, 1)
    choose = _sampler(temperature, top_k, top_p, generator) if do_sample else _likeliest
    rows = bounds(attention_mask, *input_ids.shape[:2])
    closed, opened = _read_closed(memory, input_ids, rows, state)
    new = input_ids.new_full((len(rows), max_new_tokens), pad_token_id)
    # rows whose open segments are as long go together
    for length in sorted(set(map(len, opened))):
        at = [row for row, own in enumerate(opened) if len(own) == length]
        index = torch.tensor(at, device=input_ids.device)
        segment = _OpenSegment(memory, closed[index], torch.stack([opened[row] for row in at]))
        new[index] = _write(segment, new[index], choose, eos_token_id)
    if eos_token_id is None:
        return new
    ended = (new == eos_token_id).int().cumsum(1) > 0
    return new[:, : int((~ended).sum(1).max().clamp(max=max_new_tokens - 1)) + 1]


def _read_closed(
    memory: RecurrentMemory, input_ids: Tensor, rows: list[tuple[int, int]], state: RecurrentState | None
) -> tuple[Tensor, list[Tensor]]:
    """The memory [B, m, d] before each row's last segment, and that segment's tokens."""
    settings = memory.settings
    last = [cut([row], settings.segment_len, settings.alignment)[-1] for row in rows]
    begin = [segment.begin[0] for segment in last]
    opened = [ids[segment.begin[0] : segment.end[0]] for ids, segment in zip(input_ids, last, strict=True)]
    closed = memory.initial_state(len(rows)).memory if state is None else state.memory
    closed = closed.clone()
    longer = [row for row, first in enumerate(begin) if first > rows[row][0]]
    if longer:
        index = torch.tensor(longer, device=input_ids.device)
        at = torch.arange(input_ids.shape[1], device=input_ids.device)
        first = torch.tensor([rows[row][0] for row in longer], device=input_ids.device)[:, None]
        end = torch.tensor([begin[row] for row in longer], device=input_ids.device)[:, None]
        own = None if state is None else RecurrentState(closed[index])
        mask = (at >= first) & (at < end)
        closed[index] = memory(input_ids[index], mask, state=own, output_logits=False).state.memory.to(closed.dtype)
    return closed, opened


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


def _write(segment: _OpenSegment, new: Tensor, choose: Choose, eos: int | None) -> Tensor:
    """Fill `new` [B, n]; what stands there already goes behind a row's end."""
    new, open_rows = new.clone(), new.new_ones(new.shape[0], dtype=torch.bool)
    for at in range(new.shape[1]):
        if at:
            segment.append(new[:, at - 1])
        token = torch.where(open_rows, choose(segment.next_logits()), new[:, at])
        new[:, at] = token
        if eos is not None:
            open_rows &= token != eos
            if not open_rows.any():
                break
    return new


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _sampler(temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None) -> Choose:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))

    def choose(logits: Tensor) -> Tensor:
        # they look at logits alone
        chances = warpers(None, logits.float()).softmax(-1)  # type: ignore[arg-type]
        return torch.multinomial(chances, 1, generator=generator)[:, 0]

    return choose
