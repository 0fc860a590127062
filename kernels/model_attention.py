"""Local attention as transformers calls it, for a model whose attention is chosen by name: `attn_implementation`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .attention import segment_attention
from .attention_arguments import with_effect
from .validation import check_integer

# of packed texts, whose offsets are those of the queries
HARMLESS = frozenset({"cu_seq_lens_k", "max_length_k", "max_length_q"})


def model_attention(
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
    is_causal: bool | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attend inside segments of a plain model's text, without a memory.

    A segment is `module.config.segment_len` tokens, or the whole text where the configuration has no such entry: then
    a model computes what it computes with its own attention. Gradients reach query, key and value.

    Args:
        module: the layer's attention; its `config` may have `segment_len`.
        query: [B, H, Tq, K], the last Tq of the Tk positions.
        key, value: [B, G, Tk, K] and [B, G, Tk, V].
        attention_mask: of padding before or after a row's tokens: [B, Tk], 0 where it stands, or bool [B or 1, 1, Tq,
            Tk], True where a query sees a key; None: there is none.
        scaling, softcap: of the scores, as in `segment_attention`.
        dropout: must be 0.
        sliding_window: of the layer; at least a segment.
        is_causal: default `module.is_causal`, or True where it has none.
        position_ids: [B or 1, Tq], by which packed texts and caches with room for more tokens are told, and refused.
        cu_seq_lens_q: int32 [N + 1], offsets of packed texts, B = 1.
        s_aux: [H], learnt sink logits, as `sink_logits` in `segment_attention`.
        kwargs: those that change nothing in attention, or are None.

    Returns:
        The output [B, Tq, H, V], and None in the place of attention weights.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    _check_others(module, kwargs)
    if dropout:
        raise ValueError(f"attention dropout must be 0 in training, got {dropout}: set it to 0 in the configuration")
    time = key.shape[2]
    size = getattr(getattr(module, "config", None), "segment_len", None)
    segment_len = max(1, time) if size is None else check_integer("config.segment_len", size, 1)
    if sliding_window is not None and sliding_window < min(segment_len, time):
        raise ValueError(
            f"sliding_window must be at least a segment, {min(segment_len, time)} tokens, got {sliding_window}: set "
            f"config.segment_len to at most {sliding_window}, or leave the model its own attention"
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    spans = None
    if attention_mask is not None:
        spans = _spans(attention_mask, query, time, causal)
    elif cu_seq_lens_q is None:
        _check_positions(position_ids, query.shape[2], time)
    out, _ = segment_attention(
        query,
        key,
        value,
        segment_len=segment_len,
        cu_seqlens=cu_seq_lens_q,
        spans=spans,
        causal=causal,
        scale=scaling,
        softcap=softcap,
        sink_logits=s_aux,
    )
    return out.transpose(1, 2), None


def _check_others(module: nn.Module, arguments: Mapping[str, Any]) -> None:
    """Check that a model hands on nothing else that would change its attention, such as a bias of the scores.

    Raises:
        ValueError: it does.
    """
    if others := with_effect(arguments, HARMLESS):
        raise ValueError(
            f"attn_implementation must be another for a model whose {type(module).__name__} passes "
            f"{', '.join(others)} to its attention, which this one does not take"
        )


def _spans(mask: Tensor, query: Tensor, time: int, causal: bool) -> Tensor:
    """Return the first token of each row and one past its last, int32 [B, 2].

    Raises:
        ValueError: a mask of another shape, or of more than padding.
    """
    batch, queries = query.shape[0], query.shape[2]
    if mask.shape == (batch, time):
        real = mask.bool()
    elif mask.dtype == torch.bool and mask.shape in ((batch, 1, queries, time), (1, 1, queries, time)):
        # the last query sees every token of its row
        real = mask[:, 0, -1].expand(batch, -1)
    else:
        raise ValueError(
            f"attention_mask must be None, [B, Tk] = {[batch, time]} or bool [B, 1, Tq, Tk] = "
            f"{[batch, 1, queries, time]}, got {mask.dtype} {list(mask.shape)}"
        )
    begin, end = real.int().argmax(1), time - real.flip(1).int().argmax(1)
    if not torch.compiler.is_compiling() and not _is_padding(mask, real, begin[:, None], end[:, None], causal):
        raise ValueError(
            "attention_mask must hide padding before and after a row's tokens, and what comes later, alone: pass "
            "cu_seq_lens_q with packed texts, and a DynamicCache in place of a static one"
        )
    return torch.stack((begin, end), 1).int()


def _is_padding(mask: Tensor, real: Tensor, begin: Tensor, end: Tensor, causal: bool) -> bool:
    """Return whether a mask hides what is outside [begin, end) of each row, and what a causal query does not see."""
    j = torch.arange(real.shape[1], device=mask.device)
    inside = (j >= begin) & (j < end)
    if mask.ndim == 2:
        return torch.equal(real, inside)
    i = j[real.shape[1] - mask.shape[2] :]
    seen, query = mask[:, 0], inside[:, i, None]
    expected = inside[:, None] & (j <= i[:, None] if causal else True)
    # rows of padding see no padding, or everything where a kernel takes no empty rows
    stray = seen & ~inside[:, None] & ~seen.all(2, keepdim=True)
    return torch.equal(seen & query, expected & query) and not stray.any()


def _check_positions(position_ids: Tensor | None, queries: int, time: int) -> None:
    """Check that unpadded keys are one text's, and all of them, where a call's positions say so.

    One new token is not looked at, since that would wait for the device at every step; the prompt before it was.

    Raises:
        ValueError: texts are packed, or the cache has room for more tokens.
    """
    if position_ids is None or position_ids.ndim != 2 or queries == 1 or torch.compiler.is_compiling():
        return
    last = int(position_ids[:, -1].max())
    if last + 1 != time:
        raise ValueError(
            f"position_ids must end with {time - 1}, the last key's, got {last}: pass cu_seq_lens_q with packed texts, "
            "and a DynamicCache in place of a static one"
        )
