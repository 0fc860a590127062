"""Decoding: a few queries at the end of an unfinished segment, in one launch.

The tail's keys and values are split over programs, one more reads the memory; the last to finish puts the parts
together, in their order, so that the result does not depend on which one that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import block, launch, new_tokens, processors, tile_of, view
from .tiles import (
    LEAST_PEAK,
    capped,
    dot,
    feature_map,
    head_of,
    load_rows,
    load_vector,
    reciprocal,
    rounded,
    row_operand,
    score_factor,
)


@triton.jit
def gather_rows(x, first_head, row, r, query_time, inside, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Rows r of a group's queries, head by head: x[row, first_head + r // Tq, r % Tq, column : column + COLUMNS]."""
    c = column + tl.arange(0, COLUMNS)
    at = (first_head + r // query_time).to(tl.int64) * x[2] + (r % query_time) * x[3]
    start = x[0] + tl.cast(row, tl.int64) * x[1]
    return tl.load(start + at[:, None] + c[None, :], mask=inside[:, None] & (c < WIDTH)[None, :], other=0.0)


@triton.jit
def attend_tail(
    queries,
    position,
    keys,
    k_stride,
    values,
    v_stride,
    first,
    stop,
    factor,
    softcap,
    CAUSAL: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Σ p v, the scores' peak and Σ p over keys [first, stop); a row that sees none has a sum of 0."""
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for start in range(first, stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        key = load_rows(keys, k_stride, start, stop, 0, BLOCK_N, BLOCK_K, K)
        scores = capped(dot(queries, tl.trans(key), None) * factor, softcap)
        seen = (j < stop)[None, :] & (position >= 0)[:, None]
        if CAUSAL:
            seen = seen & (j[None, :] <= position[:, None])
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(scores - safe[:, None])
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.sum(p, 1)
        value = load_rows(values, v_stride, start, stop, 0, BLOCK_N, BLOCK_V, V)
        acc = dot(rounded(p, value.dtype), value, acc * shrink[:, None])
        peak = new_peak
    return acc, peak, total


@triton.jit(do_not_specialize=["time", "query_time", "splits", "split_len", "scale", "softcap"])
def decode_kernel(
    q,
    k,
    v,
    memory_q,
    out,
    gate,
    memory,
    normalizer,
    lengths,
    parts,
    sums,
    counters,
    time,
    query_time,
    splits,
    split_len,
    scale,
    softcap,
    heads,
    groups,
    ALWAYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One split of one key/value head's tail, or its memory, for all the queries of its group.

    lengths [B]: how many of k's and v's tokens there are, read here so that a captured graph may be replayed as it
    grows; None: all of them. Leaves parts [B · G, splits + 1, BLOCK_M, V] and sums [B · G, splits + 1, 2, BLOCK_M]:
    peak and Σ p of a split, 1 / σ(q) z of the memory. counters [B · G] are 0 before and after.
    """
    count = splits
    if memory is not None:
        count += 1
    part = tl.program_id(0) % count
    at = tl.program_id(0) // count
    row, group = at // groups, at % groups
    members = heads // groups
    end = time
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + row), time).to(tl.int32)
    r = tl.arange(0, BLOCK_M)
    inside = r < members * query_time
    position = end - query_time + r % query_time
    c = tl.arange(0, BLOCK_V)
    mine = tl.cast(at, tl.int64) * (splits + 1)
    if part < splits:
        first = part * split_len
        stop = tl.minimum(first + split_len, end)
        if first < stop:
            queries = gather_rows(q, group * members, row, r, query_time, inside, 0, BLOCK_K, K)
            # fmt: off
            acc, peak, total = attend_tail(
                queries, position, head_of(k, row, group), k[3], head_of(v, row, group), v[3], first, stop,
                score_factor(scale, softcap), softcap, CAUSAL, K, V, BLOCK_K, BLOCK_V, BLOCK_M, BLOCK_N,
            )
            # fmt: on
            tl.store(parts + ((mine + part) * BLOCK_M + r[:, None]) * V + c[None, :], acc, mask=(c < V)[None, :])
            tl.store(sums + (mine + part) * 2 * BLOCK_M + r, peak)
            tl.store(sums + (mine + part) * 2 * BLOCK_M + BLOCK_M + r, total)
    elif memory is not None:
        z = load_vector(normalizer + tl.cast(at, tl.int64) * K, 0, BLOCK_K, K)
        z_peak = tl.max(tl.abs(z), 0)
        inverse_peak = tl.where(z_peak >= LEAST_PEAK, 1.0 / tl.where(z_peak >= LEAST_PEAK, z_peak, 1.0), 0.0)
        features = feature_map(gather_rows(memory_q, group * members, row, r, query_time, inside, 0, BLOCK_K, K), True)
        inverse = reciprocal(tl.sum(features * (z * inverse_peak)[None, :], 1))
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        for start in tl.range(0, K, CHUNK, num_stages=1):
            some = gather_rows(memory_q, group * members, row, r, query_time, inside, start, CHUNK, K)
            rows = load_rows(memory + (tl.cast(at, tl.int64) * K + start) * V, V, 0, K - start, 0, CHUNK, BLOCK_V, V)
            u = tl.where((start + tl.arange(0, CHUNK) < K)[None, :], feature_map(some, True) * inverse[:, None], 0.0)
            u, factor = row_operand(u, some.dtype)
            acc += dot(u, rounded(rows * inverse_peak, some.dtype), None) * factor
        tl.store(parts + ((mine + splits) * BLOCK_M + r[:, None]) * V + c[None, :], acc, mask=(c < V)[None, :])
        tl.store(sums + (mine + splits) * 2 * BLOCK_M + r, inverse)

    # every thread's stores come before the count, which the last program's loads come after
    tl.debug_barrier()
    done = tl.atomic_add(counters + at, 1, sem="acq_rel")
    if done == count - 1:
        tl.store(counters + at, 0)
        acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        for split in range(0, tl.cdiv(end, split_len)):
            other_peak = tl.load(sums + (mine + split) * 2 * BLOCK_M + r, cache_modifier=".cg")
            other_total = tl.load(sums + (mine + split) * 2 * BLOCK_M + BLOCK_M + r, cache_modifier=".cg")
            other = parts + ((mine + split) * BLOCK_M + r[:, None]) * V + c[None, :]
            new_peak = tl.maximum(peak, other_peak)
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            kept, added = tl.exp2(peak - safe), tl.exp2(other_peak - safe)
            total = total * kept + other_total * added
            values = tl.load(other, mask=(c < V)[None, :], other=0.0, cache_modifier=".cg")
            acc = acc * kept[:, None] + values * added[:, None]
            peak = new_peak
        acc *= tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        if memory is not None:
            head = group * members + r // query_time
            g = tl.sigmoid(tl.load(gate + head, mask=inside, other=0.0))
            inverse = tl.load(sums + (mine + splits) * 2 * BLOCK_M + r, cache_modifier=".cg")
            kept = tl.where((inverse != 0) | ALWAYS, 1 - g, 1.0)
            recalled = parts + ((mine + splits) * BLOCK_M + r[:, None]) * V + c[None, :]
            acc = acc * kept[:, None]
            acc += g[:, None] * tl.load(recalled, mask=(c < V)[None, :], other=0.0, cache_modifier=".cg")
        acc = tl.where((position >= 0)[:, None], acc, 0.0)
        target = (group * members + r // query_time).to(tl.int64) * out[2] + (r % query_time) * out[3]
        target = out[0] + tl.cast(row, tl.int64) * out[1] + target[:, None] + c[None, :]
        tl.store(target, rounded(acc, out[0].dtype.element_ty), mask=inside[:, None] & (c < V)[None, :])


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    gate: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    lengths: Tensor | None,
    counters: Tensor | None,
    causal: bool,
    always: bool,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """out [B, H, Tq, V] of the last Tq of lengths [B] tokens in k and v; memory [B, G, K, V], normalizer [B, G, K].

    counters: int32 [B · G], zeros, which it leaves as zeros; None: made here, by a launch of their own.
    """
    batch, heads, query_time, key_width = q.shape
    groups, time, value_width = v.shape[1:]
    tile = tile_of(decode_kernel, q, key_width, value_width)
    rows = block(heads // groups * query_time)
    # two programs per processor, as far as whole blocks of keys go
    wanted = max(1, 2 * processors(q.device) // (batch * groups))
    split_len = triton.cdiv(triton.cdiv(time, wanted), tile.BLOCK_N) * tile.BLOCK_N
    splits = triton.cdiv(time, split_len)
    out = new_tokens(q, heads, query_time, value_width)
    parts = q.new_empty((batch * groups, splits + 1, rows, value_width), dtype=torch.float32)
    if counters is None:
        counters = q.new_zeros(batch * groups, dtype=torch.int32)
    launch(
        decode_kernel,
        batch * groups * (splits + (memory is not None)),
        tile,
        q,
        q=view(q),
        k=view(k),
        v=view(v),
        memory_q=view(memory_q),
        out=view(out),
        gate=gate,
        memory=memory,
        normalizer=normalizer,
        lengths=lengths,
        parts=parts,
        sums=parts.new_empty((batch * groups, splits + 1, 2, rows)),
        counters=counters,
        time=time,
        query_time=query_time,
        splits=splits,
        split_len=split_len,
        scale=scale,
        softcap=softcap,
        heads=heads,
        groups=groups,
        ALWAYS=always,
        CAUSAL=causal,
        K=key_width,
        V=value_width,
        BLOCK_K=block(key_width),
        BLOCK_V=block(value_width),
        BLOCK_M=rows,
    )
    return out
