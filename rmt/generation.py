"""Text generation by a decoder with a memory: a full segment is written into the memory, and the next one begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import validation as check
from .growing_segment import Extension, GrowingSegment
from .segments import bounds, last_begin

Choose = Callable[[Tensor], Tensor]


class TextGeneration:
    """The method `generate` of a decoder with a memory.

    The class that inherits it says how segments are read: `_start_text`, `_read_segments` and `_extend_segment`.
    """

    settings: Any

    def _start_text(self, input_ids: Tensor, state: Any) -> Any:
        """Check prompts [B, P] and `state`, and return the state that the prompts begin with."""
        raise NotImplementedError

    def _read_segments(self, input_ids: Tensor, rows: list[tuple[int, int]], state: Any) -> Any:
        """Read whole segments, from the begin to the end column of each row, and return the state after them."""
        raise NotImplementedError

    def _extend_segment(self, tokens: Tensor, state: Any, cache: Any, write: bool) -> Extension:
        """Read more tokens of a segment, and write it into the memory where `write` says that it ends.

        Args:
            tokens: [B, n], those that the cache does not hold.
            state: the memory before the segment.
            cache: as returned for the tokens before; None: these are the segment's first.
        """
        raise NotImplementedError

    @torch.no_grad()
    def generate(
        self,
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
        **others: Any,
    ) -> Tensor:
        """Continue texts of any length, in the memory of one segment.

        The first new token follows the logits with which a call on `input_ids` ends, each later one those that a call
        on the text written so far has at its place: texts are cut into segments as in a call, the last segment stays
        open, and where it is full it is written into the memory and the next one begins. (With alignment="right" the
        prompt is cut as by itself, and what follows from the left.)

        Args:
            input_ids: int [B, P].
            attention_mask: [B, P], 0 where padding stands before or after a row's tokens.
            max_new_tokens: per row.
            state: what an earlier call returned, to continue from a segment's border.
            do_sample: draw tokens at random; default: take the likeliest.
            temperature, top_k, top_p: change the distribution before drawing, as in transformers.
            eos_token_id: the token, or one of several, that ends a row.
            pad_token_id: fills a row after its end.
            generator: of the random numbers.
            others: none; those of transformers' `generate`, such as `num_beams`, are refused.

        Returns:
            The new tokens, [B, max_new_tokens], or [B, n] where every row ends after n tokens at the latest.

        Raises:
            TypeError, ValueError: naming the argument, what it must be, and what it was.
        """
        check_no_others(others)
        check.check_integer("max_new_tokens", max_new_tokens, 1)
        choose = token_chooser(do_sample, temperature, top_k, top_p, generator)
        state = self._start_text(input_ids, state)
        rows = bounds(attention_mask, *input_ids.shape[:2])
        begins = [last_begin(*row, self.settings.segment_len, self.settings.alignment) for row in rows]
        state = self._read_up_to(input_ids, rows, begins, state)
        lengths = [end - begin for begin, (_, end) in zip(begins, rows, strict=True)]
        ends = None if eos_token_id is None else torch.as_tensor(eos_token_id, device=input_ids.device)
        new = input_ids.new_full((len(rows), max_new_tokens), pad_token_id)
        # rows with equally many tokens in the last segment are continued together
        for length in sorted(set(lengths)):
            together = [row for row, own in enumerate(lengths) if own == length]
            index = torch.tensor(together, device=input_ids.device)
            tokens = torch.stack([input_ids[row, begins[row] : rows[row][1]] for row in together])
            segment = GrowingSegment(self._extend_segment, self.settings.segment_len, state.select(index), tokens)
            new[index] = _fill(segment, new[index], choose, ends)
        if ends is None:
            return new
        ended = torch.isin(new, ends).int().cumsum(1) > 0
        return new[:, : int((~ended).sum(1).max().clamp(max=max_new_tokens - 1)) + 1]

    def _read_up_to(self, input_ids: Tensor, rows: list[tuple[int, int]], begins: list[int], state: Any) -> Any:
        """Return the state in front of each row's last segment, which begins at the column in `begins`."""
        longer = [row for row, begin in enumerate(begins) if begin > rows[row][0]]
        if not longer:
            return state
        index = torch.tensor(longer, device=input_ids.device)
        spans = [(rows[row][0], begins[row]) for row in longer]
        return state.replace(index, self._read_segments(input_ids[index], spans, state.select(index)))


def check_no_others(others: Mapping[str, object]) -> None:
    """Check that `generate` is called with no other arguments than its own.

    Raises:
        TypeError: naming them, and those that it takes.
    """
    if others:
        known = [
            name for name in inspect.signature(TextGeneration.generate).parameters if name not in ("self", "others")
        ]
        raise TypeError(f"generate takes no {', '.join(others)}: its arguments are {', '.join(known)}")


def _fill(segment: GrowingSegment, new: Tensor, choose: Choose, ends: Tensor | None) -> Tensor:
    """Return `new` [B, n] filled with generated tokens; behind a row's end it stays as it is."""
    new, running = new.clone(), new.new_ones(new.shape[0], dtype=torch.bool)
    for at in range(new.shape[1]):
        if at:
            segment.append(new[:, at - 1])
        token = torch.where(running, choose(segment.next_logits()), new[:, at])
        new[:, at] = token
        if ends is not None:
            running &= ~torch.isin(token, ends)
            if not running.any():
                break
    return new


def token_chooser(
    do_sample: bool,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Choose:
    """Return a function from logits [B, vocabulary] to tokens [B]: the likeliest, or drawn at random.

    Raises:
        ValueError: the distribution is to be changed, and nothing is drawn from it.
    """
    if not do_sample:
        if any(option is not None for option in (temperature, top_k, top_p)):
            raise ValueError("temperature, top_k and top_p must come with do_sample=True, got one of them without")
        return lambda logits: logits.argmax(-1)
    from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    warpers = LogitsProcessorList()
    if temperature is not None:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k is not None:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))

    def draw(logits: Tensor) -> Tensor:
        # these warpers read logits alone
        chances = warpers(None, logits.float()).softmax(-1)  # type: ignore[arg-type]
        return torch.multinomial(chances, 1, generator=generator)[:, 0]

    return draw
