"""Local attention inside segments; its epilogue reads the memory and blends, while the queries are at hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from ..state import HeadBiases, Options, Sinks
from .launch import launch, new_tokens, segment_arguments, tile_of, view, view_sinks
from .tiles import (
    LENGTHS,
    MemoryTokens,
    biased,
    block,
    chunk_features,
    dot,
    from_sinks,
    head_of,
    keys_of,
    keys_seen,
    load_chunk,
    load_rows,
    memory_inverse,
    no_keys,
    of_head,
    query_slot,
    read_slot,
    rounded,
    row_operand,
    score_factor,
    scores,
    segment_at,
    sink_block,
    sinks_of,
    spanning,
    store_rows,
    visible,
    whole_rows,
)
from .write import SegmentMemory, normalizer_at


class Reading(NamedTuple):
    """Hold what a call reads from a memory."""

    q: Any  # memory_q [B, H, Tq, K]
    gate: Tensor  # float32 [H]
    memory: SegmentMemory

    def view(self) -> Reading:
        """Return these as an argument of a kernel."""
        return self._replace(q=view(self.q))


class SavedRows(NamedTuple):
    """Hold what the queries' backward needs of the forward."""

    local: Any  # A_dot [B, H, Tq, V]; None where there is no memory, as the output is A_dot then
    lse2: Any  # float32 [B, H, Tq] log2 Σ exp(score) − log2(1 − w), w being the weight of the memory

    def view(self) -> SavedRows:
        """Return these as an argument of a kernel."""
        return SavedRows(view(self.local), self.lse2)


# in place of None: kernels ask for a member, since Triton 3.6 cannot compare these tuples with None
NO_READING = Reading(None, None, None)  # type: ignore[arg-type]
NOT_SAVED = SavedRows(None, None)


@triton.jit
def softmax_loop(
    state, queries, i, keys, values, first, last, segment, memory_tokens, factor, softcap, slope,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Fold keys [first, last) into the online softmax in powers of two: Σ p v, the peak of the scores, Σ p."""
    acc, peak, total = state
    BLOCK_K: tl.constexpr = queries.shape[1]
    BLOCK_V: tl.constexpr = acc.shape[1]
    for start in range(first, last, BLOCK_N):
        key = load_rows(keys, start, 0, BLOCK_N, BLOCK_K, K, MASKED)
        j = start + tl.arange(0, BLOCK_N)
        if (softcap is None) and (slope is None):
            # scaled with the subtraction of the peak, in one instruction
            x, unit = dot(queries, tl.trans(key), None), factor
        else:
            x, unit = biased(scores(queries, key, factor, softcap), i[:, None], j[None, :], slope), 1.0
        if MASKED:
            x = tl.where(visible(i[:, None], j[None, :], segment, memory_tokens, CAUSAL), x, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(x, 1) * unit)
        p = tl.exp2(x * unit - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 1)
        value = load_rows(values, start, 0, BLOCK_N, BLOCK_V, V, MASKED)
        acc = dot(rounded(p, value.dtype), value, acc * shrink[:, None])
        peak = new_peak
    return acc, peak, total


@triton.jit
def recall(
    acc, share, x, first, whole, matrix, ELU: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Return acc + share · σ(x) M for the rows of x from `first` on, scaled before they are rounded.

    whole: as `whole_rows` returns them.
    """
    ROWS: tl.constexpr = acc.shape[0]
    for c in tl.range(0, K, CHUNK, num_stages=1):
        features = chunk_features(x, first, whole, c, ELU, ROWS, K, CHUNK) * share[:, None]
        features = tl.where((c + tl.arange(0, CHUNK) < K)[None, :], features, 0.0)
        recalled = load_chunk(matrix, c, CHUNK, K, V)
        features, factor = row_operand(features, recalled.dtype)
        acc += dot(features, recalled, None) * factor
    return acc


@triton.jit(do_not_specialize=LENGTHS)
def attend_kernel(
    q, k, v, sinks, biases, reading, out, saved,
    slots, time, query_time, segment_len, segments, tiles, memory_tokens, scale, softcap,
    LOOKBACK: tl.constexpr, KEEP_GATE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Attend by one tile of the queries of one head in one segment.

    reading: None without a memory. saved: None unless a backward follows. KEEP_GATE: local attention is weighed by
    1 − g where the memory is empty too.
    """
    K: tl.constexpr = q.width
    V: tl.constexpr = v.width
    BLOCK_V: tl.constexpr = block(V)
    program = tl.program_id(0)
    # the longest rows of a segment first
    tile = tiles - 1 - program % tiles
    head = program // tiles % q.heads
    group = head // (q.heads // k.heads)
    offset = time - query_time
    slot = query_slot(program // tiles // q.heads, slots, segments, offset // segment_len)
    segment = segment_at(slot, slots, segments, segment_len, time)
    first = tl.maximum(segment.begin, offset) + tile * BLOCK_M
    if first >= segment.end:
        return
    at, stop = first - offset, segment.end - offset
    i = first + tl.arange(0, BLOCK_M)
    queries = load_rows(head_of(q, segment.row, head, stop), at, 0, BLOCK_M, block(K), K)
    keys = head_of(k, segment.row, group, segment.end)
    values = head_of(v, segment.row, group, segment.end)
    window = keys_of(segment, segment_len, LOOKBACK)
    full, last = keys_seen(first, window, memory_tokens, BLOCK_M, BLOCK_N, CAUSAL)

    slope = None if biases.slopes is None else of_head(biases.slopes, head)
    sink_logit = None if biases.sink_logits is None else of_head(biases.sink_logits, head)
    acc, peak, total = no_keys(BLOCK_M, BLOCK_V, sink_logit)
    factor = score_factor(scale, softcap)
    acc, peak, total = softmax_loop(
        (acc, peak, total), queries, i, keys, values, window.begin, full, window, memory_tokens, factor, softcap,
        slope, False, CAUSAL, K, V, BLOCK_N,
    )  # fmt: skip
    acc, peak, total = softmax_loop(
        (acc, peak, total), queries, i, keys, values, full, last, window, memory_tokens, factor, softcap,
        slope, True, CAUSAL, K, V, BLOCK_N,
    )  # fmt: skip
    if sinks is not None:
        # behind the window, so that no row's peak is still −inf where none are seen
        keys, values = sinks_of(sinks, slot, group)
        acc, peak, total = softmax_loop(
            (acc, peak, total), queries, from_sinks(i, window, sinks, slope), keys, values, 0, keys.stop,
            spanning(segment, 0, keys.stop), None, factor, softcap, slope, True, False, K, V,
            sink_block(sinks.count, BLOCK_N),
        )  # fmt: skip
    lse2 = peak + tl.log2(total)
    acc *= (1.0 / total)[:, None]
    if reading.gate is not None:
        x = head_of(reading.q, segment.row, head, stop)
        rows = whole_rows(x, at, BLOCK_M, K, CHUNK)
        if saved.lse2 is not None:
            store_rows(head_of(saved.local, segment.row, head, stop), at, 0, acc, V)
        g = tl.sigmoid(tl.load(reading.gate + head))
        at_memory = tl.cast(read_slot(slot, segment, LOOKBACK), tl.int64) * k.heads + group
        normalizer = normalizer_at(reading.memory.normalizer, at_memory, K)
        inverse = memory_inverse(x, at, rows, normalizer, True, BLOCK_M, K, CHUNK)
        local_share = tl.where((inverse != 0) | KEEP_GATE, 1 - g, 1.0)
        matrix = reading.memory.matrix + at_memory * K * V
        acc = recall(acc * local_share[:, None], g * inverse, x, at, rows, matrix, True, K, V, CHUNK)
        lse2 -= tl.log2(local_share)
    if saved.lse2 is not None:
        at_rows = (tl.cast(segment.row, tl.int64) * q.heads + head) * query_time - offset + i
        tl.store(saved.lse2 + at_rows, lse2, mask=i < segment.end)
    store_rows(head_of(out, segment.row, head, stop), at, 0, acc, V)


def query_programs(q: Tensor, layout: Layout, rows: int) -> tuple[int, int]:
    """Return how many slots may hold queries, and how many tiles of `rows` queries each of their heads has."""
    tiles = triton.cdiv(min(layout.segment_len, q.shape[2]), rows)
    if layout.slots is not None:
        return layout.total, tiles
    return layout.sequences * (layout.per_row - (layout.time - q.shape[2]) // layout.segment_len), tiles


def call_arguments(
    q: Tensor, k: Tensor, v: Tensor, biases: HeadBiases, layout: Layout, options: Options
) -> dict[str, Any]:
    """Return the arguments that every kernel over the scores takes."""
    masked = options.num_read + options.num_write > 0
    return {
        "q": view(q),
        "k": view(k),
        "v": view(v),
        "biases": biases,
        **segment_arguments(layout),
        "query_time": q.shape[2],
        "memory_tokens": MemoryTokens(options.num_read, options.num_write) if masked else None,
        "scale": options.scale,
        "softcap": options.softcap,
        "LOOKBACK": layout.lookback,
        "CAUSAL": options.causal,
    }


def attend(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, biases: HeadBiases, reading: Reading | None, layout: Layout,
    options: Options, save: bool,
) -> tuple[Tensor, SavedRows | None]:  # fmt: skip
    """Return the output [B, H, Tq, V] and, if `save`, what a backward needs; without a memory, local attention."""
    heads, query_time = q.shape[1:3]
    value_width = v.shape[3]
    padded = layout.slots is not None
    out = new_tokens(q, heads, query_time, value_width, padded)
    saved = None
    if save:
        local = None if reading is None else new_tokens(q, heads, query_time, value_width, padded)
        saved = SavedRows(local, q.new_empty(q.shape[:3], dtype=torch.float32))
    tile = tile_of(attend_kernel, q, q.shape[3], value_width)
    slots, tiles = query_programs(q, layout, tile.BLOCK_M)
    launch(
        attend_kernel, slots * heads * tiles, tile, q,
        **call_arguments(q, k, v, biases, layout, options), sinks=view_sinks(sinks), out=view(out),
        reading=NO_READING if reading is None else reading.view(), saved=NOT_SAVED if saved is None else saved.view(),
        tiles=tiles, KEEP_GATE=options.empty_memory == "gated",
    )  # fmt: skip
    return out, saved
