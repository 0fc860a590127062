"""Local attention inside segments; its epilogue reads the memory and blends, while the queries are at hand."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from ..state import Options
from .launch import block, launch, new_tokens, tile_of, view
from .tiles import (
    capped,
    dot,
    feature_map,
    head_of,
    keys_seen,
    load_rows,
    memory_weight,
    reciprocal,
    rounded,
    row_operand,
    score_factor,
    segment_at,
    store_rows,
    visible,
)


@triton.jit
def softmax_loop(
    acc,
    peak,
    total,
    q,
    i,
    k,
    k_stride,
    v,
    v_stride,
    first,
    last,
    begin,
    end,
    num_read,
    num_write,
    factor,
    softcap,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Keys [first, last) into the online softmax, in powers of two: Σ p v, the peak of the scores, Σ p."""
    for start in range(first, last, BLOCK_N):
        keys = load_rows(k, k_stride, start, end, 0, BLOCK_N, BLOCK_K, K, MASKED)
        scores = capped(dot(q, tl.trans(keys), None) * factor, softcap)
        if MASKED:
            j = start + tl.arange(0, BLOCK_N)
            seen = visible(i[:, None], j[None, :], begin, end, num_read, num_write, CAUSAL, BLOCK_MASK)
            scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        p = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        values = load_rows(v, v_stride, start, end, 0, BLOCK_N, BLOCK_V, V, MASKED)
        acc = dot(rounded(p, values.dtype), values, acc * shrink[:, None])
        peak = new_peak
    return acc, peak, total


@triton.jit
def recall(
    acc,
    share,
    x,
    stride,
    first,
    stop,
    memory,
    ELU: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """acc + share · σ(x) M, rows scaled before they are rounded."""
    for c in tl.range(0, K, CHUNK, num_stages=1):
        features = feature_map(load_rows(x, stride, first, stop, c, ROWS, CHUNK, K), ELU) * share[:, None]
        features = tl.where((c + tl.arange(0, CHUNK) < K)[None, :], features, 0.0)
        recalled = load_rows(memory + c * V, V, 0, K - c, 0, CHUNK, BLOCK_V, V, K % CHUNK != 0)
        features, factor = row_operand(features, recalled.dtype)
        acc += dot(features, recalled, None) * factor
    return acc


@triton.jit(
    do_not_specialize=[
        "time",
        "query_time",
        "segment_len",
        "segments",
        "first_segment",
        "tiles",
        "num_read",
        "num_write",
        "scale",
        "softcap",
    ]
)
def attend_kernel(
    q,
    k,
    v,
    memory_q,
    out,
    local,
    statistic,
    gate,
    memory,
    normalizer,
    slots,
    time,
    query_time,
    segment_len,
    segments,
    first_segment,
    tiles,
    num_read,
    num_write,
    scale,
    softcap,
    heads,
    groups,
    ALWAYS: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One tile of one head's queries in one segment.

    statistic [B, H, Tq]: log2 Σ exp(score) − log2(1 − w), w being the memory's weight: what the backward needs.
    local, statistic: None unless a backward follows.
    """
    program = tl.program_id(0)
    # the longest rows of a segment first
    tile = tiles - 1 - program % tiles
    head = program // tiles % heads
    slot = program // tiles // heads
    if slots is None:
        asked = segments - first_segment
        slot = slot // asked * segments + first_segment + slot % asked
    group = head // (heads // groups)
    row, begin, end = segment_at(slot, slots, segments, segment_len, time)
    offset = time - query_time
    first = tl.maximum(begin, offset) + tile * BLOCK_M
    if first >= end:
        return
    i = first + tl.arange(0, BLOCK_M)
    queries = load_rows(head_of(q, row, head), q[3], first - offset, end - offset, 0, BLOCK_M, BLOCK_K, K)
    keys, values = head_of(k, row, group), head_of(v, row, group)
    full, last = keys_seen(first, begin, end, num_read, num_write, BLOCK_M, BLOCK_N, CAUSAL, BLOCK_MASK)

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    factor = score_factor(scale, softcap)
    # fmt: off
    acc, peak, total = softmax_loop(
        acc, peak, total, queries, i, keys, k[3], values, v[3], begin, full, begin, end, num_read, num_write,
        factor, softcap, False, CAUSAL, BLOCK_MASK, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
    )
    acc, peak, total = softmax_loop(
        acc, peak, total, queries, i, keys, k[3], values, v[3], full, last, begin, end, num_read, num_write,
        factor, softcap, True, CAUSAL, BLOCK_MASK, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
    )
    # fmt: on
    row_statistic = peak + tl.log2(total)
    acc = acc / total[:, None]
    if memory is not None:
        if local is not None:
            store_rows(head_of(local, row, head), local[3], first - offset, end - offset, 0, acc, BLOCK_M, BLOCK_V, V)
        g = tl.sigmoid(tl.load(gate + head))
        at = tl.cast(slot, tl.int64) * groups + group
        asking = head_of(memory_q, row, head)
        # fmt: off
        inverse = reciprocal(memory_weight(
            asking, memory_q[3], first - offset, end - offset, normalizer + at * K, True, BLOCK_M, K, CHUNK,
        ))
        kept = tl.where((inverse != 0) | ALWAYS, 1 - g, 1.0)
        acc = recall(
            acc * kept[:, None], g * inverse, asking, memory_q[3], first - offset,
            end - offset, memory + at * K * V, True, BLOCK_M, K, V, BLOCK_V, CHUNK,
        )
        # fmt: on
        row_statistic -= tl.log2(kept)
    if statistic is not None:
        at_rows = (tl.cast(row, tl.int64) * heads + head) * query_time - offset + i
        tl.store(statistic + at_rows, row_statistic, mask=i < end)
    store_rows(head_of(out, row, head), out[3], first - offset, end - offset, 0, acc, BLOCK_M, BLOCK_V, V)


def query_programs(layout: Layout, query_time: int, time: int, segment_len: int, rows: int) -> tuple[int, int, int]:
    """Programs per head over all slots that hold queries, tiles of `rows` queries per slot, and the first such slot."""
    tiles = triton.cdiv(min(segment_len, query_time), rows)
    if layout.slots is not None:
        return layout.total * tiles, tiles, 0
    first = (time - query_time) // segment_len
    return layout.total // layout.per_row * (layout.per_row - first) * tiles, tiles, first


def call_arguments(q: Tensor, k: Tensor, v: Tensor, layout: Layout, options: Options) -> dict[str, Any]:
    """What every kernel over the scores is told of a call."""
    return {
        "q": view(q),
        "k": view(k),
        "v": view(v),
        "slots": layout.slots,
        "time": k.shape[2],
        "query_time": q.shape[2],
        "segment_len": options.segment_len,
        "segments": layout.per_row,
        "num_read": options.num_read,
        "num_write": options.num_write,
        "scale": options.scale,
        "softcap": options.softcap,
        "heads": q.shape[1],
        "groups": k.shape[1],
        "CAUSAL": options.causal,
        "BLOCK_MASK": options.num_read + options.num_write > 0,
        "K": q.shape[3],
        "V": v.shape[3],
        "BLOCK_K": block(q.shape[3]),
        "BLOCK_V": block(v.shape[3]),
    }


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    gate: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    layout: Layout,
    options: Options,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The output [B, H, Tq, V]; if `keep`, A_dot (None without a memory) and the row statistic for the backward.

    memory [F, G, K, V] over z's peak, normalizer [F, G, K] likewise: as before each slot.
    """
    batch, heads, query_time, key_width = q.shape
    time, value_width = v.shape[2:]
    tile = tile_of(attend_kernel, q, key_width, value_width)
    padded = layout.slots is not None
    out = new_tokens(q, heads, query_time, value_width, padded)
    local = new_tokens(q, heads, query_time, value_width, padded) if keep and memory is not None else None
    statistic = q.new_empty((batch, heads, query_time), dtype=torch.float32) if keep else None
    programs, tiles, first = query_programs(layout, query_time, time, options.segment_len, tile.BLOCK_M)
    launch(
        attend_kernel,
        programs * heads,
        tile,
        q,
        memory_q=view(memory_q),
        out=view(out),
        local=view(local),
        statistic=statistic,
        gate=gate,
        memory=memory,
        normalizer=normalizer,
        first_segment=first,
        tiles=tiles,
        ALWAYS=options.empty_memory == "gated",
        **call_arguments(q, k, v, layout, options),
    )
    return out, local, statistic
