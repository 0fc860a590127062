"""`backend="triton"`: the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import MemoryState, Options, SegmentOutput
from .launch import dense_rows
from .ops import Attend, distinct

# queries of a group that one tile of the decoding kernel holds
DECODED_ROWS = 64


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    bounds: Tensor | None,
    options: Options,
) -> SegmentOutput:
    """bounds [N, 2]: the rows' spans, or N sequences packed into one row; None for whole rows."""
    asking = None if memory_q is q or gate is None else dense_rows(memory_q)
    written = None if memory_k is k or gate is None else dense_rows(memory_k)
    q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
    gate = None if gate is None else gate.contiguous()
    memory, normalizer = (None, None) if state is None else (x.contiguous() for x in state)
    tensors = (q, k, v, asking, written, gate, memory, normalizer, bounds)
    differentiated = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if not differentiated and bounds is None and _is_tail(q, k, options):
        how = (options.causal, options.empty_memory == "gated", options.scale, options.softcap)
        out = torch.ops.segattn.decode(q, k, v, asking, gate, memory, normalizer, None, None, *how)
        return SegmentOutput(out, state)
    settings = (
        options.segment_len,
        options.update == "delta",
        options.causal,
        options.num_read,
        options.num_write,
        options.empty_memory == "gated",
        options.scale,
        options.softcap,
    )
    if differentiated:
        out, m, z = Attend.apply(*distinct(*tensors), *settings)
    else:
        out, m, z, *_ = torch.ops.segattn.attend(*tensors, *settings, False)
    return SegmentOutput(out, None if state is None else MemoryState(m, z))


def _is_tail(q: Tensor, k: Tensor, options: Options) -> bool:
    """A few queries of one unfinished segment: what the decoding kernel is for."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    masked = options.causal and options.num_read + options.num_write > 0
    return 0 < rows <= DECODED_ROWS and k.shape[2] < options.segment_len and q.shape[2] < k.shape[2] and not masked


def segment_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    lengths: Tensor | None,
    counters: Tensor | None,
    options: Options,
) -> Tensor:
    """lengths [B]: tokens in each row of k and v, the last of them q's."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    if rows > DECODED_ROWS:
        raise ValueError(
            f"q must have at most {DECODED_ROWS} rows per key/value head, H / G · Tq, for the kernels, got {rows}: "
            f"use segment_attention, or pass backend='torch'"
        )
    asking = None if memory_q is q or gate is None else dense_rows(memory_q)
    memory, normalizer = (None, None) if state is None else (x.contiguous() for x in state)
    gate, lengths = (None if x is None else x.contiguous() for x in (gate, lengths))
    return torch.ops.segattn.decode(
        *(dense_rows(q), dense_rows(k), dense_rows(v), asking, gate, memory, normalizer, lengths, counters),
        options.causal,
        options.empty_memory == "gated",
        options.scale,
        options.softcap,
    )
