"""Checks of what both memories receive: sizes when they are made, tokens and states when they are called."""

from __future__ import annotations

from torch import Tensor

from ..kernels import validation as check


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


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, width: int) -> Tensor:
    """Return the token ids [B, T] or the embeddings [B, T, d], whichever the caller passed.

    Raises:
        TypeError, ValueError: both or neither are passed; another dtype, shape or width; no row or no token.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("input_ids or inputs_embeds must be given, and not both")
    if inputs_embeds is not None:
        name, x, shape = "inputs_embeds", inputs_embeds, f"[B, T, d = {width}]"
        check.check_floating(name, x)
        fits = x.ndim == 3 and x.shape[2] == width
    else:
        name, x, shape = "input_ids", check.check_ids("input_ids", input_ids), "[B, T]"
        fits = x.ndim == 2
    if not fits:
        raise ValueError(f"{name} must have shape {shape}, got {list(x.shape)}")
    if not x.shape[0] or not x.shape[1]:
        raise ValueError(f"{name} must have a row and a token in it, got shape {list(x.shape)}")
    return x
