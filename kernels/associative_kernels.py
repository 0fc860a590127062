"""The memory on its own: reading it, and the gradients of reading and of writing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import recall
from .attention_backward import recall_adjoint
from .launch import block, launch, new_tokens, tile_of, view
from .memory_backward import StateGrads, write_adjoint
from .tiles import head_of, load_rows, memory_weight, reciprocal, store_rows


@triton.jit(do_not_specialize=["time", "tiles"])
def read_kernel(
    q,
    memory,
    normalizer,
    out,
    time,
    tiles,
    heads,
    groups,
    ELU: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """A_mem of one tile of one head's rows."""
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    row = tl.program_id(0) // tiles // heads
    first = tile * BLOCK_M
    at = tl.cast(row, tl.int64) * groups + head // (heads // groups)
    x = head_of(q, row, head)
    inverse = reciprocal(memory_weight(x, q[3], first, time, normalizer + at * K, ELU, BLOCK_M, K, CHUNK))
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    acc = recall(acc, inverse, x, q[3], first, time, memory + at * K * V, ELU, BLOCK_M, K, V, BLOCK_V, CHUNK)
    store_rows(head_of(out, row, head), out[3], first, time, 0, acc, BLOCK_M, BLOCK_V, V)


@triton.jit(do_not_specialize=["time", "tiles"])
def read_grad_kernel(
    q,
    memory,
    normalizer,
    dout,
    dq,
    along,
    time,
    tiles,
    heads,
    groups,
    ELU: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dq of one tile of one head's rows; do · A_mem is left in along [B, H, T] for the memory's gradient."""
    tile = tl.program_id(0) % tiles
    head = tl.program_id(0) // tiles % heads
    row = tl.program_id(0) // tiles // heads
    first = tile * BLOCK_M
    at = tl.cast(row, tl.int64) * groups + head // (heads // groups)
    douts = load_rows(head_of(dout, row, head), dout[3], first, time, 0, BLOCK_M, BLOCK_V, V)
    # fmt: off
    found, _ = recall_adjoint(
        head_of(q, row, head), q[3], first, time, douts, memory + at * K * V, normalizer + at * K, 1.0,
        head_of(dq, row, head), dq[3], ELU, BLOCK_M, K, V, BLOCK_V, CHUNK,
    )
    # fmt: on
    i = first + tl.arange(0, BLOCK_M)
    tl.store(along + (tl.cast(row, tl.int64) * heads + head) * time + i, found, mask=i < time)


@triton.jit(do_not_specialize=["time", "tiles"])
def write_grad_kernel(
    k,
    v,
    beta,
    gamma,
    normalizer,
    dmemory,
    dnormalizer,
    curvature,
    dk,
    dv,
    dbeta,
    time,
    tiles,
    groups,
    ELU: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """dk, dv and dbeta of one tile of one head's tokens."""
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    row = tl.program_id(0) // tiles // groups
    first = tile * BLOCK_N
    at = tl.cast(row, tl.int64) * groups + group
    values = load_rows(head_of(v, row, group), v[3], first, time, 0, BLOCK_N, BLOCK_V, V)
    # fmt: off
    dvalues, dstrength = write_adjoint(
        head_of(k, row, group), k[3], values, None if beta is None else beta + at * time,
        None if gamma is None else gamma + at * time, first, time, normalizer + at * K, dmemory + at * K * V,
        dnormalizer + at * K, None if curvature is None else curvature + at * K * K, head_of(dk, row, group), dk[3],
        ELU, BLOCK_N, K, V, BLOCK_K, BLOCK_V, CHUNK,
    )
    # fmt: on
    store_rows(head_of(dv, row, group), dv[3], first, time, 0, dvalues, BLOCK_N, BLOCK_V, V)
    if dbeta is not None:
        i = first + tl.arange(0, BLOCK_N)
        tl.store(dbeta + at * time + i, dstrength, mask=i < time)


def read(q: Tensor, memory: Tensor, normalizer: Tensor, elu: bool) -> Tensor:
    """A_mem [B, H, T, V]; memory [B, G, K, V] in q's dtype and normalizer [B, G, K], both over z's peak."""
    batch, heads, time, key_width = q.shape
    groups, value_width = memory.shape[1], memory.shape[3]
    tile = tile_of(read_kernel, q, key_width, value_width)
    tiles = triton.cdiv(time, tile.BLOCK_M)
    out = new_tokens(q, heads, time, value_width)
    launch(
        read_kernel,
        batch * heads * tiles,
        tile,
        q,
        q=view(q),
        memory=memory,
        normalizer=normalizer,
        out=view(out),
        time=time,
        tiles=tiles,
        heads=heads,
        groups=groups,
        ELU=elu,
        K=key_width,
        V=value_width,
        BLOCK_V=block(value_width),
    )
    return out


def read_grads(q: Tensor, memory: Tensor, normalizer: Tensor, dout: Tensor, elu: bool) -> tuple[Tensor, Tensor]:
    """dq, and do · A_mem float32 [B, H, T]."""
    batch, heads, time, key_width = q.shape
    groups, value_width = memory.shape[1], memory.shape[3]
    tile = tile_of(read_grad_kernel, q, key_width, value_width)
    tiles = triton.cdiv(time, tile.BLOCK_M)
    dq = new_tokens(q, heads, time, key_width)
    along = q.new_empty((batch, heads, time), dtype=torch.float32)
    launch(
        read_grad_kernel,
        batch * heads * tiles,
        tile,
        q,
        q=view(q),
        memory=memory,
        normalizer=normalizer,
        dout=view(dout),
        dq=view(dq),
        along=along,
        time=time,
        tiles=tiles,
        heads=heads,
        groups=groups,
        ELU=elu,
        K=key_width,
        V=value_width,
        BLOCK_V=block(value_width),
    )
    return dq, along


def write_grads(
    k: Tensor, v: Tensor, beta: Tensor | None, gamma: Tensor | None, normalizer: Tensor, grads: StateGrads, elu: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv and dbeta; normalizer [B, G, K] before the write, over its peak."""
    batch, groups, time, key_width = k.shape
    value_width = v.shape[3]
    tile = tile_of(write_grad_kernel, k, key_width, value_width)
    tiles = triton.cdiv(time, tile.BLOCK_N)
    dk, dv = new_tokens(k, groups, time, key_width), new_tokens(v, groups, time, value_width)
    dbeta = None if beta is None else torch.empty_like(beta)
    launch(
        write_grad_kernel,
        batch * groups * tiles,
        tile,
        k,
        k=view(k),
        v=view(v),
        beta=beta,
        gamma=gamma,
        normalizer=normalizer,
        dmemory=grads.after,
        dnormalizer=grads.z_after,
        curvature=grads.curvature,
        dk=view(dk),
        dv=view(dv),
        dbeta=dbeta,
        time=time,
        tiles=tiles,
        groups=groups,
        ELU=elu,
        K=key_width,
        V=value_width,
        BLOCK_K=block(key_width),
        BLOCK_V=block(value_width),
    )
    return dk, dv, dbeta
