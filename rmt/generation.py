"""Text generation by a decoder with a memory: a full segment is written into the memory, and the next one begins."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import validation as check
from .backbone import huggingface_of
from .growing_segment import Extension, GrowingSegment
from .open_segments import Group, OpenSegments
from .random_numbers import drawn_from
from .segments import bounds, last_begin

# options that transformers takes as they are
COUNTS = ("max_new_tokens", "max_length", "num_beams", "num_return_sequences")


class TextGeneration:
    """The method `generate` of a decoder with a memory.

    The class that inherits it says how segments are read: `_start_text`, `_read_segments` and `_extend_segment`.
    """

    settings: Any
    model: nn.Module

    def get_input_embeddings(self) -> nn.Module:
        """Return the module that embeds tokens, with weight [tokens, d]; Trainer sets the noise of NEFTune on it."""
        raise NotImplementedError

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
        state: Any = None,
        generator: torch.Generator | None = None,
        **options: Any,
    ) -> Any:
        """Continue texts of any length by transformers' `generate`, in the memory of one segment.

        The first new token follows the logits with which a call on `input_ids` ends, each later one those that a call
        on the text written so far has at its place: texts are cut into segments as in a call, the last segment stays
        open, and where it is full it is written into the memory and the next one begins. (With alignment="right" the
        prompt is cut as by itself, and what follows from the left.)

        Args:
            input_ids: int [B, P].
            attention_mask: [B, P], 0 where padding stands before or after a row's tokens.
            state: what an earlier call returned, to continue from a segment's border.
            generator: of the random numbers; default PyTorch's own, as `torch.manual_seed` sets it.
            options: what transformers' `generate` takes beside them: `max_new_tokens`, `max_length`, `do_sample`,
                `temperature`, `top_k`, `top_p`, `num_beams`, `num_return_sequences`, `repetition_penalty`,
                `eos_token_id`, `pad_token_id`, `logits_processor`, `stopping_criteria`, `streamer`,
                `generation_config`, `return_dict_in_generate`, `output_scores` and the rest. Defaults are those of the
                model's `generation_config`. Refused are those of its cache, of assisted decoding, and of attention
                weights and hidden states.

        Returns:
            The new tokens, int [B · num_return_sequences, n], where n is the length of the longest row. With
            `return_dict_in_generate`, transformers' output, whose `sequences` they are, without a cache.

        Raises:
            ImportError: there is no transformers.
            TypeError, ValueError: naming the argument, what it must be, and what it was.
        """
        for name in COUNTS:
            if options.get(name) is not None:
                check.check_integer(name, options[name], 1)
        state = self._start_text(input_ids, state)
        rows = bounds(attention_mask, *input_ids.shape[:2])
        opened = OpenSegments(partial(self._open, input_ids, rows, state), len(rows))
        with drawn_from(generator, input_ids.device):
            writer = _writer(huggingface_of(self.model), self._vocabulary(), input_ids.device)
            return writer.write(*padded_left(input_ids, rows), opened, options)

    def _vocabulary(self) -> int:
        embedding: Any = self.get_input_embeddings()
        return len(embedding.weight)

    def _open(self, input_ids: Tensor, rows: list[tuple[int, int]], state: Any) -> list[Group]:
        """Read each row up to its last segment, and return the rows' last segments."""
        size = self.settings.segment_len
        begins = [last_begin(*row, size, self.settings.alignment) for row in rows]
        state = self._read_up_to(input_ids, rows, begins, state)
        lengths = [end - begin for begin, (_, end) in zip(begins, rows, strict=True)]
        groups = []
        for length in sorted(set(lengths)):
            together = [row for row, own in enumerate(lengths) if own == length]
            index = torch.tensor(together, device=input_ids.device)
            tokens = torch.stack([input_ids[row, begins[row] : rows[row][1]] for row in together])
            groups.append(Group(index, GrowingSegment(self._extend_segment, size, state.select(index), tokens)))
        return groups

    def _read_up_to(self, input_ids: Tensor, rows: list[tuple[int, int]], begins: list[int], state: Any) -> Any:
        """Return the state in front of each row's last segment, which begins at the column in `begins`."""
        longer = [row for row, begin in enumerate(begins) if begin > rows[row][0]]
        if not longer:
            return state
        index = torch.tensor(longer, device=input_ids.device)
        spans = [(rows[row][0], begins[row]) for row in longer]
        return state.replace(index, self._read_segments(input_ids[index], spans, state.select(index)))


def padded_left(input_ids: Tensor, rows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return texts [B, P] with each row's padding in front of its tokens, and their mask, int [B, P].

    Args:
        rows: columns at which each row's tokens begin and end.
    """
    begin, end = torch.tensor(rows, device=input_ids.device)[..., None].unbind(1)
    at = torch.arange(input_ids.shape[1], device=input_ids.device)
    moved = torch.take_along_dim(input_ids, (at + end) % input_ids.shape[1], 1)
    return moved, (at >= input_ids.shape[1] - (end - begin)).long()


def _writer(model: Any, vocabulary: int, device: torch.device) -> Any:
    """Return a `Writer`, which needs transformers."""
    try:
        from .writer import Writer
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError("generate needs transformers: pip install 'segattn[hf]'", name=error.name) from error
    return Writer(model, vocabulary, device)
