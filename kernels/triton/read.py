"""Reading the memory on its own, and the gradients of that."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import recall
from .attention_backward import recall_adjoint
from .launch import block, launch, new_tokens, tile_of, view
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
    rest,
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
        head_of(q, row, head), q[3], first, time, douts, memory + at * K * V,
        None if rest is None else rest + at * K * V, normalizer + at * K, 1.0,
        head_of(dq, row, head), dq[3], ELU, BLOCK_M, K, V, BLOCK_V, CHUNK,
    )
    # fmt: on
    i = first + tl.arange(0, BLOCK_M)
    tl.store(along + (tl.cast(row, tl.int64) * heads + head) * time + i, found, mask=i < time)


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


def read_grads(
    q: Tensor, memory: Tensor, rest: Tensor | None, normalizer: Tensor, dout: Tensor, elu: bool
) -> tuple[Tensor, Tensor]:
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
        rest=rest,
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
