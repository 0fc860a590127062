"""The backward of `attention`: first the queries' gradients, which leave row sums; then those of the keys and values.

Every score is computed again from q, k and the saved log-sum-exp. With w the memory's weight in a row, p' = (1 − w) p
comes straight from that, so the loops know nothing of the memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from ..state import HeadBiases, Options, Sinks
from .attention import NO_READING, Reading, SavedRows, call_arguments, query_programs
from .launch import launch, new_tokens, tile_of, view, view_sinks
from .tiles import (
    LENGTHS,
    NO_TOKENS,
    biased,
    block,
    capped_grad,
    dot,
    feature_map,
    feature_map_grad,
    from_sinks,
    head_of,
    inverse_weight,
    keys_of,
    keys_seen,
    largest,
    load_chunk,
    load_rows,
    load_vector,
    of_head,
    queries_of,
    query_slot,
    read_slot,
    rounded,
    score_factor,
    scores,
    segment_at,
    sink_block,
    sinks_of,
    spanning,
    store_rows,
    visible,
)
from .write import normalizer_at


@triton.jit
def query_loop(
    acc, queries, douts, lse2, row_delta, i, keys, values, first, last, segment, memory_tokens, factor, softcap,
    slope, MASKED: tl.constexpr, CAUSAL: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Return acc + Σ over keys [first, last) of p' (do vᵀ − D) k."""
    BLOCK_K: tl.constexpr = queries.shape[1]
    BLOCK_V: tl.constexpr = douts.shape[1]
    for start in range(first, last, BLOCK_N):
        key = load_rows(keys, start, 0, BLOCK_N, BLOCK_K, K, MASKED)
        j = start + tl.arange(0, BLOCK_N)
        x = scores(queries, key, factor, softcap)
        p = tl.exp2(biased(x, i[:, None], j[None, :], slope) - lse2[:, None])
        if MASKED:
            p = tl.where(visible(i[:, None], j[None, :], segment, memory_tokens, CAUSAL), p, 0.0)
        value = load_rows(values, start, 0, BLOCK_N, BLOCK_V, V, MASKED)
        dx = capped_grad(p * (dot(douts, tl.trans(value), None) - row_delta[:, None]), x, softcap)
        acc = dot(rounded(dx, key.dtype), key, acc)
    return acc


@triton.jit
def dfeatures_of(dout, matrix, residual, c, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr):
    """Return columns of do Mᵀ from c on, for M = matrix + residual."""
    acc = dot(dout, tl.trans(load_chunk(matrix, c, CHUNK, K, V)), None)
    if residual is not None:
        acc = dot(dout, tl.trans(load_chunk(residual, c, CHUNK, K, V)), acc)
    return acc


@triton.jit
def recall_adjoint(
    x, first, dout, memory, at_memory, share, dx, ELU: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """Store share · dx for A_mem = σ(x) M / σ(x) z; return do · A_mem and 1 / σ(x) z of every row.

    do Mᵀ is of all of M's digits, as most of it may cancel against do · A_mem z. Where a chunk does not hold all of its
    columns, it is computed twice, some columns at a time.
    """
    ROWS: tl.constexpr = dout.shape[0]
    matrix = memory.matrix + at_memory * K * V
    residual = None if memory.residual is None else memory.residual + at_memory * K * V
    normalizer = normalizer_at(memory.normalizer, at_memory, K)
    if CHUNK >= K:
        tokens = load_rows(x, first, 0, ROWS, CHUNK, K)
        dfeatures = dfeatures_of(dout, matrix, residual, 0, K, V, CHUNK)
        # behind the products: features take twice the registers of tokens
        features = feature_map(tokens, ELU)
        z = load_vector(normalizer.z, 0, CHUNK, K)[None, :]
        weight = tl.sum(features * z, 1)
        inverse = inverse_weight(weight, largest(features, 0, K), tl.load(normalizer.inverse_peak))
        memory_delta = tl.sum(features * dfeatures, 1) * inverse
        dfeatures -= memory_delta[:, None] * z
        dfeatures *= (share * inverse)[:, None] * feature_map_grad(features, ELU)
        store_rows(dx, first, 0, dfeatures, K)
    else:
        weight = tl.zeros([ROWS], tl.float32)
        most = tl.zeros([ROWS], tl.float32)
        memory_delta = tl.zeros([ROWS], tl.float32)
        for c in tl.range(0, K, CHUNK, num_stages=1):
            features = feature_map(load_rows(x, first, c, ROWS, CHUNK, K), ELU)
            weight += tl.sum(features * load_vector(normalizer.z, c, CHUNK, K)[None, :], 1)
            most = tl.maximum(most, largest(features, c, K))
            memory_delta += tl.sum(features * dfeatures_of(dout, matrix, residual, c, K, V, CHUNK), 1)
        inverse = inverse_weight(weight, most, tl.load(normalizer.inverse_peak))
        memory_delta *= inverse
        for c in tl.range(0, K, CHUNK, num_stages=1):
            tokens = load_rows(x, first, c, ROWS, CHUNK, K)
            dfeatures = dfeatures_of(dout, matrix, residual, c, K, V, CHUNK)
            dfeatures -= memory_delta[:, None] * load_vector(normalizer.z, c, CHUNK, K)[None, :]
            dfeatures *= (share * inverse)[:, None] * feature_map_grad(feature_map(tokens, ELU), ELU)
            store_rows(dx, first, c, dfeatures, K)
    return memory_delta, inverse


class RowDeltas(NamedTuple):
    """The products of every query's output gradient with what it is blended from."""

    local: Tensor  # float32 [B, H, Tq] do · A_dot, the row term D of the softmax's backward
    memory: Tensor | None  # float32 [B, H, Tq] do · A_mem


class QueryGrads(NamedTuple):
    """The gradients of what stands at the queries, and row sums that later kernels take."""

    q: Any
    memory_q: Any  # None where the memory reads by q
    gate: Tensor | None  # [H]; [slots, H, tiles] as a kernel leaves it
    sink_logits: Tensor | None  # as the gate's
    deltas: RowDeltas


@triton.jit
def row_sum(x):
    """Return the sum of a vector [rows] as [1]."""
    # a row of a matrix: where one product feeds it, Triton 3.7 cannot lay out the sum of a vector on sm_100
    return tl.sum(x[None, :], 1)


@triton.jit(do_not_specialize=LENGTHS)
def query_grad_kernel(
    q, k, v, sinks, biases, reading, saved, dout, grads,
    slots, time, query_time, segment_len, segments, tiles, memory_tokens, scale, softcap,
    LOOKBACK: tl.constexpr, KEEP_GATE: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store in `grads` the gradients of one tile of one head's queries, and its row sums.

    grads.memory_q None: grads.q sums the memory's part too.
    """
    K: tl.constexpr = q.width
    V: tl.constexpr = v.width
    BLOCK_K: tl.constexpr = block(K)
    BLOCK_V: tl.constexpr = block(V)
    program = tl.program_id(0)
    tile = tiles - 1 - program % tiles
    head = program // tiles % q.heads
    group = head // (q.heads // k.heads)
    offset = time - query_time
    slot = query_slot(program // tiles // q.heads, slots, segments, offset // segment_len)
    segment = segment_at(slot, slots, segments, segment_len, time)
    first = tl.maximum(segment.begin, offset) + tile * BLOCK_M
    if first >= segment.end:
        if reading.gate is not None:
            tl.store(grads.gate + program, 0.0)
        if grads.sink_logits is not None:
            tl.store(grads.sink_logits + program, 0.0)
        return
    i = first + tl.arange(0, BLOCK_M)
    inside = i < segment.end
    at, stop = first - offset, segment.end - offset
    at_rows = (tl.cast(segment.row, tl.int64) * q.heads + head) * query_time - offset + i
    douts = load_rows(head_of(dout, segment.row, head, stop), at, 0, BLOCK_M, BLOCK_V, V)
    local = load_rows(head_of(saved.local, segment.row, head, stop), at, 0, BLOCK_M, BLOCK_V, V)
    row_delta = tl.sum(douts.to(tl.float32) * local.to(tl.float32), 1)
    tl.store(grads.deltas.local + at_rows, row_delta, mask=inside)

    if reading.gate is not None:
        g = tl.sigmoid(tl.load(reading.gate + head))
        x = head_of(reading.q, segment.row, head, stop)
        dx = head_of(grads.q if grads.memory_q.pointer is None else grads.memory_q, segment.row, head, stop)
        at_memory = tl.cast(read_slot(slot, segment, LOOKBACK), tl.int64) * k.heads + group
        memory_delta, inverse = recall_adjoint(x, at, douts, reading.memory, at_memory, g, dx, True, K, V, CHUNK)
        tl.store(grads.deltas.memory + at_rows, memory_delta, mask=inside)
        gated = ((inverse != 0) | KEEP_GATE) & inside
        to_gate = row_sum(tl.where(gated, memory_delta - row_delta, 0.0))
        tl.store(grads.gate + program + tl.arange(0, 1), g * (1 - g) * to_gate)
    queries = load_rows(head_of(q, segment.row, head, stop), at, 0, BLOCK_M, BLOCK_K, K)
    lse2 = tl.load(saved.lse2 + at_rows, mask=inside, other=float("inf"))
    slope = None if biases.slopes is None else of_head(biases.slopes, head)
    if grads.sink_logits is not None:
        p = tl.exp2(of_head(biases.sink_logits, head) - lse2)
        tl.store(grads.sink_logits + program + tl.arange(0, 1), -row_sum(p * row_delta))
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    factor = score_factor(scale, softcap)
    window = keys_of(segment, segment_len, LOOKBACK)
    if sinks is not None:
        keys, values = sinks_of(sinks, slot, group)
        acc = query_loop(
            acc, queries, douts, lse2, row_delta, from_sinks(i, window, sinks, slope), keys, values, 0, keys.stop,
            spanning(segment, 0, keys.stop), None, factor, softcap, slope, True, False, K, V,
            sink_block(sinks.count, BLOCK_N),
        )  # fmt: skip
    keys = head_of(k, segment.row, group, segment.end)
    values = head_of(v, segment.row, group, segment.end)
    full, last = keys_seen(first, window, memory_tokens, BLOCK_M, BLOCK_N, CAUSAL)
    acc = query_loop(
        acc, queries, douts, lse2, row_delta, i, keys, values, window.begin, full, window, memory_tokens,
        factor, softcap, slope, False, CAUSAL, K, V, BLOCK_N,
    )  # fmt: skip
    acc = query_loop(
        acc, queries, douts, lse2, row_delta, i, keys, values, full, last, window, memory_tokens,
        factor, softcap, slope, True, CAUSAL, K, V, BLOCK_N,
    )  # fmt: skip
    acc *= scale
    dqueries = head_of(grads.q, segment.row, head, stop)
    if reading.gate is not None:
        if grads.memory_q.pointer is None:
            # other threads of this program have stored the memory's part
            tl.debug_barrier()
            acc += load_rows(dqueries, at, 0, BLOCK_M, BLOCK_K, K).to(tl.float32)
    store_rows(dqueries, at, 0, acc, K)


def query_grads(
    q: Tensor, k: Tensor, v: Tensor, sinks: Sinks | None, biases: HeadBiases, reading: Reading | None, saved: SavedRows,
    dout: Tensor, layout: Layout, options: Options,
) -> QueryGrads:  # fmt: skip
    """Return the gradients of what stands at the queries; of the memory's alone where they are not q itself."""
    heads, query_time, key_width = q.shape[1:]
    padded = layout.slots is not None
    tile = tile_of(query_grad_kernel, q, key_width, v.shape[3])
    slots, tiles = query_programs(q, layout, tile.BLOCK_M)
    dq = new_tokens(q, heads, query_time, key_width, padded)
    own = reading is not None and reading.q is not q
    dmemory_q = new_tokens(q, heads, query_time, key_width, padded) if own else None
    deltas = RowDeltas(torch.empty_like(saved.lse2), None if reading is None else torch.empty_like(saved.lse2))
    sums = (reading, biases.sink_logits)
    dgate, dlogits = (None if x is None else saved.lse2.new_empty((slots, heads, tiles)) for x in sums)
    launch(
        query_grad_kernel, slots * heads * tiles, tile, q,
        **call_arguments(q, k, v, biases, layout, options), sinks=view_sinks(sinks), saved=saved.view(),
        reading=NO_READING if reading is None else reading.view(), dout=view(dout), tiles=tiles,
        grads=QueryGrads(view(dq), view(dmemory_q) if own else NO_TOKENS, dgate, dlogits, deltas),
        KEEP_GATE=options.empty_memory == "gated",
    )  # fmt: skip
    dgate, dlogits = (None if x is None else x.sum((0, 2)) for x in (dgate, dlogits))
    return QueryGrads(dq, dmemory_q, dgate, dlogits, deltas)


class Walk(NamedTuple):
    """The tiles of queries that a loop visits: `tiles` of them from `first` on, those from number `turn` on later."""

    first: Any
    tiles: Any
    turn: Any
    skipped: Any  # by this many queries


@triton.jit
def key_loop(
    grads, keys, values, j, q, dout, lse2, row_delta, group, members, walk, offset, query_time, segment, memory_tokens,
    factor, softcap, slopes, MASKED: tl.constexpr, CAUSAL: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Return dk + Σ p' (do vᵀ − D) q and dv + Σ p' do, over the queries of the group's heads.

    Scores are transposed from the start: nothing that a product left in registers is transposed for the next.
    """
    dk, dv = grads
    BLOCK_K: tl.constexpr = keys.shape[1]
    BLOCK_V: tl.constexpr = values.shape[1]
    head = group * members
    step = 0
    for _ in range(0, members * walk.tiles):
        start = walk.first + step * BLOCK_M
        if MASKED:
            start += tl.where(step >= walk.turn, walk.skipped, 0)
        at = start - offset
        i = start + tl.arange(0, BLOCK_M)
        at_rows = (tl.cast(segment.row, tl.int64) * q.heads + head) * query_time + at
        rows = tl.arange(0, BLOCK_M)
        stop = segment.end - offset
        query = load_rows(head_of(q, segment.row, head, stop), at, 0, BLOCK_M, BLOCK_K, K, MASKED)
        x = scores(keys, query, factor, softcap)
        slope = None if slopes is None else of_head(slopes, head)
        biased_x = biased(x, i[None, :], j[:, None], slope)
        if MASKED:
            inside = i < segment.end
            p = tl.exp2(biased_x - tl.load(lse2 + at_rows + rows, mask=inside, other=float("inf"))[None, :])
            p = tl.where(visible(i[None, :], j[:, None], segment, memory_tokens, CAUSAL), p, 0.0)
        else:
            p = tl.exp2(biased_x - tl.load(lse2 + at_rows + rows)[None, :])
        do = load_rows(head_of(dout, segment.row, head, stop), at, 0, BLOCK_M, BLOCK_V, V, MASKED)
        if MASKED:
            delta = tl.load(row_delta + at_rows + rows, mask=inside, other=0.0)
        else:
            delta = tl.load(row_delta + at_rows + rows)
        # before dv, so that it runs under the softmax; and from −D, which needs no registers then
        dp = dot(values, tl.trans(do), tl.broadcast_to(-delta[None, :], p.shape))
        dv = dot(rounded(p, do.dtype), do, dv)
        dk = dot(rounded(capped_grad(p, x, softcap) * dp, query.dtype), query, dk)
        step += 1
        head += tl.where(step == walk.tiles, 1, 0)
        step = tl.where(step == walk.tiles, 0, step)
    return dk, dv


@triton.jit(do_not_specialize=LENGTHS)
def key_grad_kernel(
    q, k, v, biases, lse2, dout, row_delta, dk, dv,
    slots, time, query_time, segment_len, segments, tiles, memory_tokens, scale, softcap,
    LOOKBACK: tl.constexpr, ADD_DK: tl.constexpr, ADD_DV: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of one tile of one key/value head, over its group's queries; ADD_DK, ADD_DV: add them."""
    K: tl.constexpr = k.width
    V: tl.constexpr = v.width
    BLOCK_K: tl.constexpr = block(K)
    BLOCK_V: tl.constexpr = block(V)
    program = tl.program_id(0)
    tile = program % tiles
    group = program // tiles % k.heads
    segment = segment_at(program // tiles // k.heads, slots, segments, segment_len, time)
    begin, end = segment.begin, segment.end
    offset = time - query_time
    first = begin + tile * BLOCK_N
    if first >= end:
        return
    j = first + tl.arange(0, BLOCK_N)
    keys = load_rows(head_of(k, segment.row, group, end), first, 0, BLOCK_N, BLOCK_K, K)
    values = load_rows(head_of(v, segment.row, group, end), first, 0, BLOCK_N, BLOCK_V, V)
    dkeys = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dvalues = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    # queries [first_seen, full) see some of these keys, later ones all; masks take registers: those tiles are smaller
    MASKED_M: tl.constexpr = BLOCK_M // 2 if BLOCK_M > 16 else BLOCK_M
    queries = queries_of(segment, segment_len, LOOKBACK)
    first_seen = tl.maximum(begin, offset)
    some = 0
    if CAUSAL:
        least = first
        if memory_tokens is not None:
            least = tl.where(first < begin + memory_tokens.read, begin, tl.minimum(first, end - memory_tokens.write))
        first_seen = tl.maximum(first_seen, least)
        some = tl.maximum(tl.minimum(first + BLOCK_N - 1, queries.end) - first_seen, 0)
    diagonal = tl.cdiv(some, MASKED_M)
    full = first_seen + diagonal * MASKED_M
    whole = tl.maximum(queries.end - full, 0) // BLOCK_M
    left = tl.cdiv(tl.maximum(queries.end - full - whole * BLOCK_M, 0), MASKED_M)
    factor = score_factor(scale, softcap)
    members = q.heads // k.heads
    dkeys, dvalues = key_loop(
        (dkeys, dvalues), keys, values, j, q, dout, lse2, row_delta, group, members,
        Walk(first_seen, diagonal + left, diagonal, whole * BLOCK_M), offset, query_time, queries, memory_tokens,
        factor, softcap, biases.slopes, True, CAUSAL, K, V, MASKED_M,
    )  # fmt: skip
    dkeys, dvalues = key_loop(
        (dkeys, dvalues), keys, values, j, q, dout, lse2, row_delta, group, members,
        Walk(full, whole, 0, 0), offset, query_time, queries, memory_tokens,
        factor, softcap, biases.slopes, False, CAUSAL, K, V, BLOCK_M,
    )  # fmt: skip
    dkeys *= scale
    to_k, to_v = head_of(dk, segment.row, group, end), head_of(dv, segment.row, group, end)
    if ADD_DK:
        dkeys += load_rows(to_k, first, 0, BLOCK_N, BLOCK_K, K).to(tl.float32)
    if ADD_DV:
        dvalues += load_rows(to_v, first, 0, BLOCK_N, BLOCK_V, V).to(tl.float32)
    store_rows(to_k, first, 0, dkeys, K)
    store_rows(to_v, first, 0, dvalues, V)


def key_grads(
    q: Tensor, k: Tensor, v: Tensor, biases: HeadBiases, lse2: Tensor, dout: Tensor, row_delta: Tensor,
    dk: Tensor | None, dv: Tensor | None, layout: Layout, options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dk and dv, added to the dk and dv that are passed, if they are."""
    groups, time, key_width = k.shape[1:]
    padded = layout.slots is not None
    tile = tile_of(key_grad_kernel, q, key_width, v.shape[3])
    if options.softcap is not None and tile.num_stages > 3:
        # the tile that copies so far ahead fills the registers, and caps take some
        tile = replace(tile, BLOCK_M=tile.BLOCK_M // 2)
    tiles = triton.cdiv(min(layout.segment_len, time), tile.BLOCK_N)
    add_dk, add_dv = dk is not None, dv is not None
    dk = new_tokens(k, groups, time, key_width, padded) if dk is None else dk
    dv = new_tokens(v, groups, time, v.shape[3], padded) if dv is None else dv
    launch(
        key_grad_kernel, layout.total * groups * tiles, tile, q,
        **call_arguments(q, k, v, biases, layout, options), lse2=lse2, dout=view(dout), row_delta=row_delta,
        dk=view(dk), dv=view(dv), tiles=tiles, ADD_DK=add_dk, ADD_DV=add_dv,
    )  # fmt: skip
    return dk, dv
