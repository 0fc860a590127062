"""Segment attention with the block mask of memory tokens, as an attention function of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ...kernels.attention import segment_attention
from ...kernels.attention_arguments import with_effect

IMPLEMENTATION = "segattn_block"
# inside a segment with a mask of its own
HARMLESS = frozenset({"is_causal", "position_ids"})


class Block(NamedTuple):
    """Hold what a call passes to attention in place of a mask.

    num_read, num_write: rows of memory at the two ends.
    spans: bounds of each sequence, int32 [B, 2]; None: all rows.
    """

    num_read: int
    num_write: int
    spans: Tensor | None


def block_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    segattn_block: Block | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend within one segment: query [B, H, Tq, K], key and value [B, G, T, ·] → [B, Tq, H, V].

    s_aux: [H], learnt sink logits, as `sink_logits` in `segment_attention`.

    Raises:
        ValueError: a call that does not come from a `RecurrentMemory`, dropout, a window shorter than the segment, or
            another argument that would change the output, such as a bias of the scores.
    """
    if segattn_block is None:
        raise ValueError(
            "the model runs on attention='segattn' of a RecurrentMemory, must be called through it, and must hand "
            "arguments on to its attention; set_attn_implementation('sdpa') gives it its own attention back"
        )
    if others := with_effect(kwargs, HARMLESS):
        raise ValueError(
            f"attention must be None for a model whose {type(module).__name__} passes {', '.join(others)} to "
            "its attention, which attention='segattn' does not take"
        )
    if dropout:
        raise ValueError(f"attention dropout must be 0 in training, got {dropout}: set it to 0 in the configuration")
    if sliding_window is not None and sliding_window < key.shape[2]:
        raise ValueError(
            f"attention must reach over a segment of {key.shape[2]} rows, got a sliding window of {sliding_window}: "
            "pass attention=None"
        )
    out, _ = segment_attention(
        query,
        key,
        value,
        segment_len=key.shape[2],
        num_read=segattn_block.num_read,
        num_write=segattn_block.num_write,
        spans=segattn_block.spans,
        scale=scaling,
        softcap=softcap,
        sink_logits=s_aux,
    )
    return out.transpose(1, 2), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Return no mask, since a call passes a `Block` instead."""


@contextmanager
def used(model: Any) -> Iterator[None]:
    """Make a Hugging Face model run on segment attention, and on what it ran on before where the block fails.

    Raises:
        ValueError: its layers do not let attention be chosen.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, block_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, no_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(IMPLEMENTATION)
    try:
        if model.config._attn_implementation != IMPLEMENTATION:
            raise ValueError(
                f"attention='segattn' needs a model whose attention can be chosen, got {type(model).__name__}: pass "
                "attention=None"
            )
        yield
    except BaseException:
        model.set_attn_implementation(before)
        raise
