"""Decoding: a few queries at the end of an unfinished segment, in one launch.

The tail's keys and values are split over programs, one more reads the memory; the last to finish puts the parts
together, in their order, so that the result does not depend on which one that is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..state import HeadBiases, MemoryState, Options, Sinks
from .launch import launch, new_tokens, processors, tile_of, view, view_sinks
from .tiles import (
    LENGTHS,
    Memory,
    biased,
    block,
    dot,
    feature_map,
    head_of,
    inverse_weight,
    largest,
    load_chunk,
    load_rows,
    load_vector,
    no_keys,
    of_heads,
    peak_reciprocal,
    rounded,
    row_operand,
    score_factor,
    scores,
    sink_block,
    sinks_of,
)


@triton.jit
def gather_rows(x, first_head, row, r, query_time, inside, column, COLUMNS: tl.constexpr):
    """Load rows r of a group's queries, head by head: x[row, first_head + r // Tq, r % Tq, column : + COLUMNS]."""
    c = column + tl.arange(0, COLUMNS)
    at = (first_head + r // query_time).to(tl.int64) * x.head_stride + (r % query_time) * x.time_stride
    start = x.pointer + tl.cast(row, tl.int64) * x.row_stride
    return tl.load(start + at[:, None] + c[None, :], mask=inside[:, None] & (c < x.width)[None, :], other=0.0)


@triton.jit
def part_at(parts, part, BLOCK_M: tl.constexpr, V: tl.constexpr):
    """Return pointers to the rows [BLOCK_M, block(V)] of one part, and which of their columns there are."""
    r = tl.arange(0, BLOCK_M)
    c = tl.arange(0, block(V))
    return parts + (part * BLOCK_M + r[:, None]) * V + c[None, :], (c < V)[None, :]


@triton.jit
def attend_tail(
    state, queries, position, keys, values, first, factor, softcap, slope,
    CAUSAL: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold the keys from `first` on into Σ p v, the scores' peak and Σ p; a row that sees none keeps a sum of 0."""
    acc, peak, total = state
    BLOCK_K: tl.constexpr = queries.shape[1]
    BLOCK_V: tl.constexpr = block(V)
    for start in range(first, keys.stop, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)
        x = scores(queries, load_rows(keys, start, 0, BLOCK_N, BLOCK_K, K), factor, softcap)
        x = biased(x, position[:, None], j[None, :], None if slope is None else slope[:, None])
        seen = (j < keys.stop)[None, :] & (position >= 0)[:, None]
        if CAUSAL:
            seen = seen & (j[None, :] <= position[:, None])
        x = tl.where(seen, x, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(x, 1))
        safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = tl.exp2(x - safe[:, None])
        shrink = tl.exp2(peak - safe)
        total = total * shrink + tl.sum(p, 1)
        value = load_rows(values, start, 0, BLOCK_N, BLOCK_V, V)
        acc = dot(rounded(p, value.dtype), value, acc * shrink[:, None])
        peak = new_peak
    return acc, peak, total


@triton.jit
def read_state(
    memory_q, state, at, first_head, row, r, query_time, inside, V: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Return A_mem of the rows of a group's queries, and 1 / σ(q) z, z over its peak."""
    K: tl.constexpr = memory_q.width
    z = load_vector(state.normalizer + tl.cast(at, tl.int64) * K, 0, block(K), K)
    inverse_peak = peak_reciprocal(z, 0)
    features = feature_map(gather_rows(memory_q, first_head, row, r, query_time, inside, 0, block(K)), True)
    weight = tl.sum(features * (z * inverse_peak)[None, :], 1)
    inverse = inverse_weight(weight, largest(features, 0, K), inverse_peak)
    matrix = state.memory + tl.cast(at, tl.int64) * K * V
    acc = tl.zeros([r.shape[0], block(V)], tl.float32)
    for start in tl.range(0, K, CHUNK, num_stages=1):
        queries = gather_rows(memory_q, first_head, row, r, query_time, inside, start, CHUNK)
        rows = load_chunk(matrix, start, CHUNK, K, V)
        u = tl.where((start + tl.arange(0, CHUNK) < K)[None, :], feature_map(queries, True) * inverse[:, None], 0.0)
        u, factor = row_operand(u, queries.dtype)
        acc += dot(u, rounded(rows * inverse_peak, queries.dtype), None) * factor
    return acc, inverse


@triton.jit(do_not_specialize=LENGTHS)
def decode_kernel(
    q, k, v, sinks, biases, memory_q, out, gate, state, lengths, parts, sums, counters,
    time, query_time, splits, split_len, scale, softcap,
    KEEP_GATE: tl.constexpr, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attend to one split of one key/value head's tail, or read its memory, for all the queries of its group.

    lengths [B]: how many of k's and v's tokens there are, read here so that a captured graph may be replayed as it
    grows; None: all of them. Leaves parts [B · G, splits + 1, BLOCK_M, V] and sums [B · G, splits + 1, 2, BLOCK_M]:
    peak and Σ p of a split, 1 / σ(q) z of the memory. counters [B · G] are 0 before and after.
    """
    K: tl.constexpr = q.width
    V: tl.constexpr = v.width
    BLOCK_V: tl.constexpr = block(V)
    count = splits
    if state is not None:
        count += 1
    part = tl.program_id(0) % count
    at = tl.program_id(0) // count
    row, group = at // k.heads, at % k.heads
    members = q.heads // k.heads
    end = time
    if lengths is not None:
        end = tl.minimum(tl.load(lengths + row), time).to(tl.int32)
    r = tl.arange(0, BLOCK_M)
    inside = r < members * query_time
    position = end - query_time + r % query_time
    head = group * members + r // query_time
    first_part = tl.cast(at, tl.int64) * (splits + 1)
    if part < splits:
        first = part * split_len
        stop = tl.minimum(first + split_len, end)
        if first < stop:
            queries = gather_rows(q, group * members, row, r, query_time, inside, 0, block(K))
            keys, values = head_of(k, row, group, stop), head_of(v, row, group, stop)
            factor = score_factor(scale, softcap)
            slope = None if biases.slopes is None else of_heads(biases.slopes, head, inside)
            nothing = no_keys(BLOCK_M, BLOCK_V)
            acc, peak, total = attend_tail(
                nothing, queries, position, keys, values, first, factor, softcap, slope, CAUSAL, K, V, BLOCK_N
            )
            if sinks is not None:
                keys, values = sinks_of(sinks, row, group)
                first = tl.where(part == 0, 0, keys.stop)
                acc, peak, total = attend_tail(
                    (acc, peak, total), queries, position + sinks.count, keys, values, first, factor, softcap, slope,
                    False, K, V, sink_block(sinks.count, BLOCK_N),
                )  # fmt: skip
            target, columns = part_at(parts, first_part + part, BLOCK_M, V)
            tl.store(target, acc, mask=columns)
            tl.store(sums + (first_part + part) * 2 * BLOCK_M + r, peak)
            tl.store(sums + (first_part + part) * 2 * BLOCK_M + BLOCK_M + r, total)
    elif state is not None:
        acc, inverse = read_state(memory_q, state, at, group * members, row, r, query_time, inside, V, CHUNK)
        target, columns = part_at(parts, first_part + splits, BLOCK_M, V)
        tl.store(target, acc, mask=columns)
        tl.store(sums + (first_part + splits) * 2 * BLOCK_M + r, inverse)

    # every thread's stores come before the count, which the last program's loads come after
    tl.debug_barrier()
    done = tl.atomic_add(counters + at, 1, sem="acq_rel")
    if done == count - 1:
        tl.store(counters + at, 0)
        sink_logit = None if biases.sink_logits is None else of_heads(biases.sink_logits, head, inside)
        acc, peak, total = no_keys(BLOCK_M, BLOCK_V, sink_logit)
        for split in range(0, tl.cdiv(end, split_len)):
            split_peak = tl.load(sums + (first_part + split) * 2 * BLOCK_M + r, cache_modifier=".cg")
            split_total = tl.load(sums + (first_part + split) * 2 * BLOCK_M + BLOCK_M + r, cache_modifier=".cg")
            source, columns = part_at(parts, first_part + split, BLOCK_M, V)
            new_peak = tl.maximum(peak, split_peak)
            safe = tl.where(new_peak == float("-inf"), 0.0, new_peak)
            shrink, added = tl.exp2(peak - safe), tl.exp2(split_peak - safe)
            total = total * shrink + split_total * added
            values = tl.load(source, mask=columns, other=0.0, cache_modifier=".cg")
            acc = acc * shrink[:, None] + values * added[:, None]
            peak = new_peak
        acc *= tl.where(total > 0, 1.0 / tl.where(total > 0, total, 1.0), 0.0)[:, None]
        if state is not None:
            g = tl.sigmoid(tl.load(gate + head, mask=inside, other=0.0))
            inverse = tl.load(sums + (first_part + splits) * 2 * BLOCK_M + r, cache_modifier=".cg")
            acc = acc * tl.where((inverse != 0) | KEEP_GATE, 1 - g, 1.0)[:, None]
            source, columns = part_at(parts, first_part + splits, BLOCK_M, V)
            acc += g[:, None] * tl.load(source, mask=columns, other=0.0, cache_modifier=".cg")
        acc = tl.where((position >= 0)[:, None], acc, 0.0)
        out_rows = head.to(tl.int64) * out.head_stride + (r % query_time) * out.time_stride
        c = tl.arange(0, BLOCK_V)
        target_rows = out.pointer + tl.cast(row, tl.int64) * out.row_stride + out_rows[:, None] + c[None, :]
        tl.store(target_rows, rounded(acc, out.pointer.dtype.element_ty), mask=inside[:, None] & (c < V)[None, :])


def decode(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, biases: HeadBiases, memory_q: Tensor, gate: Tensor | None,
    state: MemoryState | None, lengths: Tensor | None, counters: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """Return out [B, H, Tq, V] of the last Tq of lengths [B] tokens in k and v.

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
    sums = parts.new_empty((batch * groups, splits + 1, 2, rows))
    if counters is None:
        counters = q.new_zeros(batch * groups, dtype=torch.int32)
    launch(
        decode_kernel, batch * groups * (splits + (state is not None)), tile, q,
        q=view(q), k=view(k), v=view(v), sinks=view_sinks(sinks), biases=biases, memory_q=view(memory_q),
        out=view(out), gate=gate, state=None if state is None else Memory(*state), lengths=lengths, parts=parts,
        sums=sums, counters=counters, time=time, query_time=query_time, splits=splits, split_len=split_len,
        scale=options.scale, softcap=options.softcap, CAUSAL=options.causal,
        KEEP_GATE=options.empty_memory == "gated", BLOCK_M=rows,
    )  # fmt: skip
    return out
