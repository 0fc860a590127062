"""Checks of what both memories receive: sizes when they are made, tokens and states when they are called."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import validation as check
from ..kernels.text import check_text


def check_sizes(num_memory_tokens: int, segment_len: int, bptt: int | None) -> None:
    """Check the sizes of a memory.

    Raises:
        TypeError, ValueError: a size that is no integer of at least 1, or a segment shorter than its memory.
    """
    check.check_integer("num_memory_tokens", num_memory_tokens, 1)
    check.check_integer("segment_len", segment_len, 1)
    if segment_len < num_memory_tokens:
        raise ValueError(
            f"segment_len must be at least num_memory_tokens = {num_memory_tokens}, got {segment_len}: a segment "
            "shorter than its memory compresses nothing"
        )
    if bptt is not None:
        check.check_integer("bptt", bptt, 1)


def check_inputs(input_ids: object, inputs_embeds: object, like: Tensor) -> Tensor:
    """Return the token ids [B, T], or the embeddings [B, T, d] in the memory's dtype or a wider one.

    Args:
        input_ids, inputs_embeds: what the caller passed.
        like: rows of the memory [m, d].

    Raises:
        TypeError, ValueError: both or neither are passed; another dtype, shape or width; no row or no token.
    """
    x = check_text(input_ids, inputs_embeds, like.shape[1], like.dtype)
    return x.to(torch.promote_types(x.dtype, like.dtype)) if x.is_floating_point() else x
