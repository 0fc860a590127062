"""What a memory is given to read."""

from __future__ import annotations

from torch import Tensor

from ..kernels import validation as check


def check_inputs(input_ids: Tensor | None, inputs_embeds: Tensor | None, width: int) -> Tensor:
    """Token ids [B, T] or embeddings [B, T, d], whichever is given.

    Raises:
        TypeError, ValueError: both or none are given; another dtype, shape or width; no row or no token.
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
