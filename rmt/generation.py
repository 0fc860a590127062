"""Text that a decoder with a memory writes: its memory is written when a segment is full, and the next one begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels import validation as check

Choose = Callable[[Tensor], Tensor]


class OpenSegment(Protocol):
    """A segment that grows, of rows that are as long."""

    def next_logits(self) -> Tensor:
        """[B, vocabulary], after the last token."""

    def append(self, token: Tensor) -> None:
        """Take the next token [B]; a full segment writes the memory first, and another begins with it."""


class Opened(NamedTuple):
    """Texts read up to their last segments.

    tokens: of each row's last segment, which stays open even if it is full.
    segment: of some rows, their indices and tokens [b, n].
    """

    tokens: list[Tensor]
    segment: Callable[[Tensor, Tensor], OpenSegment]


class Writer(Protocol):
    """`RecurrentMemory` and `AssociativeMemory`."""

    def open_segments(self, input_ids: Tensor, attention_mask: Tensor | None, state: Any) -> Opened:
        """Read texts [B, P] up to their last segments."""


@torch.no_grad()
def generate(
    memory: Writer,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    state: Any = None,
    do_sample: bool = False,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Go on with texts of any length, in the memory of one segment.

    The first token is the likeliest by the logits that `memory(input_ids)` ends with, and every later one by those that
    it has at its place when it reads all that was written: a text is cut into segments as there, its last one stays
    open, and where it fills, memory is written and the next begins. (With alignment="right" the prompt is cut as it is
    alone, and what follows from the left.)

    Args:
        memory: a decoder with its memory: `RecurrentMemory` or `AssociativeMemory`, whose method this is.
        input_ids: [B, P].
        attention_mask: [B, P], 0 where padding stands before or after a row's tokens.
        max_new_tokens: per row.
        state: what an earlier call returned, to go on from, at a segment's border.
        do_sample: draw from the distribution; default the likeliest.
        temperature, top_k, top_p: how it is changed before, as in transformers.
        eos_token_id: ends a row; or several that do.
        pad_token_id: what follows it there.
        generator: of random numbers.

    Returns:
        The new tokens, [B, max_new_tokens] or as many as the longest row took.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    check.check_integer("max_new_tokens", max_new_tokens, 1)
    if not do_sample and any(option is not None for option in (temperature, top_k, top_p)):
        raise ValueError("temperature, top_k and top_p must come with do_sample=True, got one of them without")
    ends = None if eos_token_id is None else torch.as_tensor(eos_token_id, device=input_ids.device)
    choose = _sampler(temperature, top_k, top_p, generator) if do_sample else _likeliest
    opened = memory.open_segments(input_ids, attention_mask, state)
    lengths = [len(tokens) for tokens in opened.tokens]
    new = input_ids.new_full((len(lengths), max_new_tokens), pad_token_id)
    # rows whose open segments are as long go together
    for length in sorted(set(lengths)):
        rows = [row for row, own in enumerate(lengths) if own == length]
        index = torch.tensor(rows, device=input_ids.device)
        segment = opened.segment(index, torch.stack([opened.tokens[row] for row in rows]))
        new[index] = _write(segment, new[index], choose, ends)
    if ends is None:
        return new
    ended = torch.isin(new, ends).int().cumsum(1) > 0
    return new[:, : int((~ended).sum(1).max().clamp(max=max_new_tokens - 1)) + 1]


def _write(segment: OpenSegment, new: Tensor, choose: Choose, ends: Tensor | None) -> Tensor:
    """Fill `new` [B, n]; what stands there already goes behind a row's end."""
    new, open_rows = new.clone(), new.new_ones(new.shape[0], dtype=torch.bool)
    for at in range(new.shape[1]):
        if at:
            segment.append(new[:, at - 1])
        token = torch.where(open_rows, choose(segment.next_logits()), new[:, at])
        new[:, at] = token
        if ends is not None:
            open_rows &= ~torch.isin(token, ends)
            if not open_rows.any():
                break
    return new


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


def _sampler(
    temperature: float | None, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Choose:
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if temperature is not None:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))

    def choose(logits: Tensor) -> Tensor:
        # they look at logits alone
        chances = warpers(None, logits.float()).softmax(-1)  # type: ignore[arg-type]
        return torch.multinomial(chances, 1, generator=generator)[:, 0]

    return choose
