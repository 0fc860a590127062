"""Reading the memory on its own, and the gradients of that."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import recall
from .attention_backward import recall_adjoint
from .launch import launch, new_tokens, tile_of, view
from .tiles import LENGTHS, block, head_of, load_rows, memory_inverse, store_rows, whole_rows
from .write import SegmentMemory, normalizer_at


@triton.jit(do_not_specialize=LENGTHS)
def read_kernel(
    q, memory, out, time, tiles, groups, ELU: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Store A_mem of one tile of one head's rows."""
    K: tl.constexpr = q.width
    V: tl.constexpr = out.width
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % q.heads
    row = tl.program_id(0) // tiles // q.heads
    at = tl.cast(row, tl.int64) * groups + head // (q.heads // groups)
    x = head_of(q, row, head, time)
    rows = whole_rows(x, first, BLOCK_M, K, CHUNK)
    inverse = memory_inverse(x, first, rows, normalizer_at(memory.normalizer, at, K), ELU, BLOCK_M, K, CHUNK)
    acc = tl.zeros([BLOCK_M, block(V)], tl.float32)
    acc = recall(acc, inverse, x, first, rows, memory.matrix + at * K * V, ELU, K, V, CHUNK)
    store_rows(head_of(out, row, head, time), first, 0, acc, V)


@triton.jit(do_not_specialize=LENGTHS)
def read_grad_kernel(
    q, memory, dout, dq, memory_delta, time, tiles, groups,
    ELU: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store dq of one tile of one head's rows, and do · A_mem in memory_delta [B, H, T] for the memory's gradient."""
    K: tl.constexpr = q.width
    V: tl.constexpr = dout.width
    first = tl.program_id(0) % tiles * BLOCK_M
    head = tl.program_id(0) // tiles % q.heads
    row = tl.program_id(0) // tiles // q.heads
    at = tl.cast(row, tl.int64) * groups + head // (q.heads // groups)
    douts = load_rows(head_of(dout, row, head, time), first, 0, BLOCK_M, block(V), V)
    x, dx = head_of(q, row, head, time), head_of(dq, row, head, time)
    delta, _ = recall_adjoint(x, first, douts, memory, at, 1.0, dx, ELU, K, V, CHUNK)
    i = first + tl.arange(0, BLOCK_M)
    tl.store(memory_delta + (tl.cast(row, tl.int64) * q.heads + head) * time + i, delta, mask=i < time)


def read(q: Tensor, memory: SegmentMemory, elu: bool) -> Tensor:
    """Return A_mem [B, H, T, V] from a memory with one slot for each row of q."""
    batch, heads, time, key_width = q.shape
    groups, value_width = memory.matrix.shape[1], memory.matrix.shape[3]
    tile = tile_of(read_kernel, q, key_width, value_width)
    tiles = triton.cdiv(time, tile.BLOCK_M)
    out = new_tokens(q, heads, time, value_width)
    launch(
        read_kernel, batch * heads * tiles, tile, q,
        q=view(q), memory=memory, out=view(out), time=time, tiles=tiles, groups=groups, ELU=elu,
    )  # fmt: skip
    return out


def read_grads(q: Tensor, memory: SegmentMemory, dout: Tensor, elu: bool) -> tuple[Tensor, Tensor]:
    """Return dq, and do · A_mem float32 [B, H, T]."""
    batch, heads, time, key_width = q.shape
    tile = tile_of(read_grad_kernel, q, key_width, dout.shape[3])
    tiles = triton.cdiv(time, tile.BLOCK_M)
    dq = new_tokens(q, heads, time, key_width)
    memory_delta = q.new_empty((batch, heads, time), dtype=torch.float32)
    launch(
        read_grad_kernel, batch * heads * tiles, tile, q,
        q=view(q), memory=memory, dout=view(dout), dq=view(dq), memory_delta=memory_delta, time=time,
        tiles=tiles, groups=memory.matrix.shape[1], ELU=elu,
    )  # fmt: skip
    return dq, memory_delta
