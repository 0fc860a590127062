"""Whole segments on a CPU, with gradients: local attention and the memory as one operation.

It is what `attention.py` does by three operations, and the same numbers. But where the memory reads and writes by q and
k themselves, autograd would allocate a gradient for each use and add them up; here the memory adds its share of dk and
dv to what local attention left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import without_autocast
from .memory import (
    add_fold_gradients,
    fold_segments,
    no_second_derivative,
    nothing_saved,
    read_and_blend,
    read_and_blend_backward,
)

# what PyTorch's own attention calls on a CPU, with its log-sum-exp [F, H, L], and the backward
_local_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_local_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@torch.library.custom_op("segattn::attend_segments", mutates_args=())
@without_autocast
def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    scale: float,
    delta: bool,
    keep_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attend causally in segments q [F, H, L, K], k [F, G, L, K], v [F, G, L, K] of N sequences, and read and write.

    memory_q, memory_k: None where they are q and k. gate, memory, normalizer, keep_gate: as in `memory.py`.
    Returns out [F, H, L, K], M and z after the last segment, and for the backward A_dot, its log-sum-exp, M and z
    before every segment, and A.
    """
    local, lse = _local_attention(q, k, v, 0.0, True, scale=scale)
    written = k if memory_k is None else memory_k
    m_before, z_before, m, z, erased = fold_segments(written, v, memory, normalizer, None, None, delta)
    out = read_and_blend(local, q if memory_q is None else memory_q, m_before, z_before, gate, keep_gate)
    return out, m, z, local, lse, m_before, z_before, erased


@attend_segments.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    scale: float,
    delta: bool,
    keep_gate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    local, lse = _local_attention(q, k, v, 0.0, True, scale=scale)
    m_before, z_before, m, z, erased = fold_segments(k, v, memory, normalizer, None, None, delta)
    return torch.empty_like(local), m, z, local, lse, m_before, z_before, erased


@torch.library.custom_op("segattn::attend_segments_backward", mutates_args=())
@without_autocast
def attend_segments_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor,
    scale: float,
    delta: bool,
    keep_gate: bool,
    local: Tensor,
    lse: Tensor,
    m_before: Tensor,
    z_before: Tensor,
    erased: Tensor,
    dout: Tensor,
    dm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of q, k, v, memory_q, memory_k, gate, memory and normalizer: the adjoint.

    Those of memory_q and memory_k are empty where these are q and k.
    """
    reading, written = q if memory_q is None else memory_q, k if memory_k is None else memory_k
    dlocal, dreading, dm_before, dz_before, dgate = read_and_blend_backward(
        local, reading, m_before, z_before, gate, keep_gate, dout
    )
    dq, dk, dv = _local_attention_backward(dlocal, q, k, v, local, lse, 0.0, True, scale=scale)
    dwritten = dk if memory_k is None else torch.empty_like(written)
    saved = written, v, m_before, z_before, erased, None, None, delta
    state = add_fold_gradients(dwritten, dv, *saved, dm_before, dz_before, dm, dz, fresh=(memory_k is not None, False))
    if memory_q is None:
        dq.add_(dreading)
        dreading = q.new_empty(0)
    return dq, dk, dv, dreading, q.new_empty(0) if memory_k is None else dwritten, dgate, *state


@attend_segments_backward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor,
    scale: float,
    delta: bool,
    keep_gate: bool,
    local: Tensor,
    lse: Tensor,
    m_before: Tensor,
    z_before: Tensor,
    erased: Tensor,
    dout: Tensor,
    dm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dq, dk, dv = _local_attention_backward(dout, q, k, v, local, lse, 0.0, True, scale=scale)
    own = (q.new_empty(0) if x is None else torch.empty_like(x) for x in (memory_q, memory_k))
    return dq, dk, dv, *own, torch.empty_like(gate), dm.new_empty(dm.shape), dz.new_empty(dz.shape)


def _setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, memory_q, memory_k, gate, _, _, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, memory_q, memory_k, gate, *output[3:])
    ctx.mark_non_differentiable(*output[3:])


def _backward(ctx, dout, dm, dz, *_):  # type: ignore[no-untyped-def]
    tensors = ctx.saved_tensors
    dq, dk, dv, dmemory_q, dmemory_k, *rest = attend_segments_backward(
        *tensors[:6], *ctx.options, *tensors[6:], dout, dm, dz
    )
    own = (None if x is None else dx for x, dx in zip(tensors[3:5], (dmemory_q, dmemory_k), strict=True))
    return dq, dk, dv, *own, *rest, None, None, None


attend_segments.register_autograd(_backward, setup_context=_setup)
attend_segments_backward.register_autograd(no_second_derivative, setup_context=nothing_saved)
