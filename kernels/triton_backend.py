"""`backend="triton"`: the fused kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import dense_rows
from .state import MemoryState, Options, SegmentOutput
from .triton_ops import Attend


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
    memory, normalizer = (None, None) if state is None else (x.contiguous() for x in state)
    tensors = (q, k, v, asking, written, gate, memory, normalizer, bounds)
    settings = (
        options.segment_len,
        options.update == "delta",
        options.causal,
        options.num_read,
        options.num_write,
        options.empty_memory == "gated",
        options.scale,
    )
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        out, m, z = Attend.apply(*tensors, *settings)
    else:
        out, m, z, *_ = torch.ops.segattn.attend(*tensors, *settings, False)
    return SegmentOutput(out, None if state is None else MemoryState(m, z))
