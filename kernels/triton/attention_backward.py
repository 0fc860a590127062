"""The backward of `attention`: first the queries' gradients, which leave row sums; then those of the keys and values.

Every score is computed again from q, k and the saved statistic. With w the memory's weight in a row, p' = (1 − w) p
comes straight from that statistic, so the loops know nothing of the memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from ..state import Options
from .attention import call_arguments, query_programs
from .launch import launch, new_tokens, tile_of, view
from .tiles import (
    capped,
    capped_grad,
    dot,
    feature_map,
    feature_map_grad,
    head_of,
    keys_seen,
    load_rows,
    load_vector,
    reciprocal,
    rounded,
    score_factor,
    segment_at,
    store_rows,
    visible,
)


@triton.jit
def query_loop(
    acc,
    q,
    dout,
    row_statistic,
    row_sum,
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
    """acc + Σ over keys [first, last) of p' (do vᵀ − D) k."""
    for start in range(first, last, BLOCK_N):
        keys = load_rows(k, k_stride, start, end, 0, BLOCK_N, BLOCK_K, K, MASKED)
        scores = capped(dot(q, tl.trans(keys), None) * factor, softcap)
        p = tl.exp2(scores - row_statistic[:, None])
        if MASKED:
            j = start + tl.arange(0, BLOCK_N)
            seen = visible(i[:, None], j[None, :], begin, end, num_read, num_write, CAUSAL, BLOCK_MASK)
            p = tl.where(seen, p, 0.0)
        values = load_rows(v, v_stride, start, end, 0, BLOCK_N, BLOCK_V, V, MASKED)
        dscores = capped_grad(p * (dot(dout, tl.trans(values), None) - row_sum[:, None]), scores, softcap)
        acc = dot(rounded(dscores, keys.dtype), keys, acc)
    return acc


@triton.jit
def sent_back(dout, memory, rest, c, K: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, CHUNK: tl.constexpr):
    """Columns of do Mᵀ from c on, for M = memory + rest."""
    columns = load_rows(memory + c * V, V, 0, K - c, 0, CHUNK, BLOCK_V, V, K % CHUNK != 0)
    acc = dot(dout, tl.trans(columns), None)
    if rest is not None:
        columns = load_rows(rest + c * V, V, 0, K - c, 0, CHUNK, BLOCK_V, V, K % CHUNK != 0)
        acc = dot(dout, tl.trans(columns), acc)
    return acc


@triton.jit
def recall_adjoint(
    x,
    stride,
    first,
    stop,
    dout,
    memory,
    rest,
    normalizer,
    share,
    dx,
    dx_stride,
    ELU: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Of A_mem = σ(x) M / σ(x) z, M and z over z's peak: do · A_mem of every row and 1 / σ(x) z; share · dx is stored.

    do Mᵀ is computed twice, some columns at a time, rather than held; and with all of M's digits, as most of it may
    cancel against do · A_mem z.
    """
    weight = tl.zeros([ROWS], tl.float32)
    along = tl.zeros([ROWS], tl.float32)
    for c in tl.range(0, K, CHUNK, num_stages=1):
        features = feature_map(load_rows(x, stride, first, stop, c, ROWS, CHUNK, K), ELU)
        weight += tl.sum(features * load_vector(normalizer, c, CHUNK, K)[None, :], 1)
        along += tl.sum(features * sent_back(dout, memory, rest, c, K, V, BLOCK_V, CHUNK), 1)
    inverse = reciprocal(weight)
    along *= inverse
    for c in tl.range(0, K, CHUNK, num_stages=1):
        tokens = load_rows(x, stride, first, stop, c, ROWS, CHUNK, K)
        back = sent_back(dout, memory, rest, c, K, V, BLOCK_V, CHUNK)
        back -= along[:, None] * load_vector(normalizer, c, CHUNK, K)[None, :]
        back *= (share * inverse)[:, None] * feature_map_grad(tokens, ELU)
        store_rows(dx, dx_stride, first, stop, c, back, ROWS, CHUNK, K)
    return along, inverse


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
def query_grad_kernel(
    q,
    k,
    v,
    memory_q,
    local,
    statistic,
    gate,
    memory,
    rest,
    normalizer,
    dout,
    dq,
    dmemory_q,
    row_sum,
    along_memory,
    dgate,
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
    SHARED: tl.constexpr,
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
    """One tile of one head's queries: dq, and the memory's part in dmemory_q; SHARED: that is dq too, which sums both.

    local: A_dot, which is the output where there is no memory.
    Leaves row_sum = do · A_dot and along_memory = do · A_mem [B, H, Tq], and β's gradient per tile [slots · H · tiles].
    """
    program = tl.program_id(0)
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
        if memory is not None:
            tl.store(dgate + program, 0.0)
        return
    i = first + tl.arange(0, BLOCK_M)
    at, stop = first - offset, end - offset
    at_rows = (tl.cast(row, tl.int64) * heads + head) * query_time - offset + i
    doutputs = head_of(dout, row, head)
    douts = load_rows(doutputs, dout[3], at, stop, 0, BLOCK_M, BLOCK_V, V)
    locals_ = load_rows(head_of(local, row, head), local[3], at, stop, 0, BLOCK_M, BLOCK_V, V)
    along_local = tl.sum(douts.to(tl.float32) * locals_.to(tl.float32), 1)
    tl.store(row_sum + at_rows, along_local, mask=i < end)

    if memory is not None:
        g = tl.sigmoid(tl.load(gate + head))
        at_group = tl.cast(slot, tl.int64) * groups + group
        # fmt: off
        along, inverse = recall_adjoint(
            head_of(memory_q, row, head), memory_q[3], at, stop, douts, memory + at_group * K * V,
            None if rest is None else rest + at_group * K * V, normalizer + at_group * K, g,
            head_of(dmemory_q, row, head), dmemory_q[3], True, BLOCK_M, K, V, BLOCK_V, CHUNK,
        )
        # fmt: on
        tl.store(along_memory + at_rows, along, mask=i < end)
        counted = ((inverse != 0) | ALWAYS) & (i < end)
        tl.store(dgate + program, g * (1 - g) * tl.sum(tl.where(counted, along - along_local, 0.0), 0))
    queries = load_rows(head_of(q, row, head), q[3], at, stop, 0, BLOCK_M, BLOCK_K, K)
    row_statistic = tl.load(statistic + at_rows, mask=i < end, other=float("inf"))
    keys, values = head_of(k, row, group), head_of(v, row, group)
    full, last = keys_seen(first, begin, end, num_read, num_write, BLOCK_M, BLOCK_N, CAUSAL, BLOCK_MASK)
    acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    factor = score_factor(scale, softcap)
    # fmt: off
    acc = query_loop(
        acc, queries, douts, row_statistic, along_local, i, keys, k[3], values, v[3], begin, full, begin, end,
        num_read, num_write, factor, softcap, False, CAUSAL, BLOCK_MASK, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
    )
    acc = query_loop(
        acc, queries, douts, row_statistic, along_local, i, keys, k[3], values, v[3], full, last, begin, end,
        num_read, num_write, factor, softcap, True, CAUSAL, BLOCK_MASK, K, V, BLOCK_N, BLOCK_K, BLOCK_V,
    )
    # fmt: on
    acc *= scale
    if memory is not None:
        if SHARED:
            # other threads of this program have stored the memory's part
            tl.debug_barrier()
            acc += load_rows(head_of(dq, row, head), dq[3], at, stop, 0, BLOCK_M, BLOCK_K, K).to(tl.float32)
    store_rows(head_of(dq, row, head), dq[3], at, stop, 0, acc, BLOCK_M, BLOCK_K, K)


def query_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    local: Tensor,
    statistic: Tensor,
    gate: Tensor | None,
    memory: Tensor | None,
    rest: Tensor | None,
    normalizer: Tensor | None,
    dout: Tensor,
    layout: Layout,
    options: Options,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None, Tensor | None]:
    """dq, dmemory_q (None where memory_q is: it reads by q), do · A_dot, do · A_mem and the gate's gradient."""
    heads, query_time, key_width = q.shape[1:]
    time, value_width = v.shape[2:]
    tile = tile_of(query_grad_kernel, q, key_width, value_width)
    padded = layout.slots is not None
    programs, tiles, first = query_programs(layout, query_time, time, options.segment_len, tile.BLOCK_M)
    dq = new_tokens(q, heads, query_time, key_width, padded)
    shared = memory_q is None
    dmemory_q = dq if shared else new_tokens(q, heads, query_time, key_width, padded)
    row_sum = torch.empty_like(statistic)
    along_memory = None if memory is None else torch.empty_like(statistic)
    dgate = None if memory is None else statistic.new_empty((programs // max(tiles, 1), heads, tiles))
    launch(
        query_grad_kernel,
        programs * heads,
        tile,
        q,
        memory_q=view(q if shared else memory_q),
        local=view(local),
        statistic=statistic,
        gate=gate,
        memory=memory,
        rest=rest,
        normalizer=normalizer,
        dout=view(dout),
        dq=view(dq),
        dmemory_q=view(dmemory_q),
        row_sum=row_sum,
        along_memory=along_memory,
        dgate=dgate,
        first_segment=first,
        tiles=tiles,
        ALWAYS=options.empty_memory == "gated",
        SHARED=shared,
        **call_arguments(q, k, v, layout, options),
    )
    return dq, None if shared else dmemory_q, row_sum, along_memory, None if dgate is None else dgate.sum((0, 2))


@triton.jit
def key_loop(
    dk,
    dv,
    keys,
    values,
    j,
    q,
    dout,
    statistic,
    row_sum,
    row,
    first_head,
    members,
    heads,
    query_time,
    first,
    steps,
    diagonal,
    skipped,
    offset,
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
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dv + Σ p' do and dk + Σ p' (do vᵀ − D) q over the group's heads, `steps` tiles of queries each from `first` on.

    MASKED: the tiles on the diagonal and, `skipped` queries later, what is left at the end.
    Scores are transposed from the start: nothing that a product left in registers is transposed for the next.
    """
    head = first_head
    step = 0
    for _ in range(0, members * steps):
        start = first + step * BLOCK_M
        if MASKED:
            start += tl.where(step >= diagonal, skipped, 0)
        at = start - offset
        i = start + tl.arange(0, BLOCK_M)
        at_rows = (tl.cast(row, tl.int64) * heads + head) * query_time + at
        rows = tl.arange(0, BLOCK_M)
        queries = load_rows(head_of(q, row, head), q[3], at, end - offset, 0, BLOCK_M, BLOCK_K, K, MASKED)
        scores = capped(dot(keys, tl.trans(queries), None) * factor, softcap)
        if MASKED:
            p = tl.exp2(scores - tl.load(statistic + at_rows + rows, mask=i < end, other=float("inf"))[None, :])
            seen = visible(i[None, :], j[:, None], begin, end, num_read, num_write, CAUSAL, BLOCK_MASK)
            p = tl.where(seen, p, 0.0)
        else:
            p = tl.exp2(scores - tl.load(statistic + at_rows + rows)[None, :])
        douts = load_rows(head_of(dout, row, head), dout[3], at, end - offset, 0, BLOCK_M, BLOCK_V, V, MASKED)
        dv = dot(rounded(p, douts.dtype), douts, dv)
        dp = dot(values, tl.trans(douts), None)
        if MASKED:
            sums = tl.load(row_sum + at_rows + rows, mask=i < end, other=0.0)
        else:
            sums = tl.load(row_sum + at_rows + rows)
        dscores = capped_grad(p * (dp - sums[None, :]), scores, softcap)
        dk = dot(rounded(dscores, queries.dtype), queries, dk)
        step += 1
        head += tl.where(step == steps, 1, 0)
        step = tl.where(step == steps, 0, step)
    return dk, dv


@triton.jit(
    do_not_specialize=[
        "time",
        "query_time",
        "segment_len",
        "segments",
        "tiles",
        "num_read",
        "num_write",
        "scale",
        "softcap",
    ]
)
def key_grad_kernel(
    q,
    k,
    v,
    statistic,
    dout,
    row_sum,
    dk,
    dv,
    slots,
    time,
    query_time,
    segment_len,
    segments,
    tiles,
    num_read,
    num_write,
    scale,
    softcap,
    heads,
    groups,
    ADD_DK: tl.constexpr,
    ADD_DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of one key/value head: dk and dv over its group's queries. ADD_DK, ADD_DV: onto what is there."""
    program = tl.program_id(0)
    tile = program % tiles
    group = program // tiles % groups
    slot = program // tiles // groups
    row, begin, end = segment_at(slot, slots, segments, segment_len, time)
    offset = time - query_time
    first = begin + tile * BLOCK_N
    if first >= end:
        return
    j = first + tl.arange(0, BLOCK_N)
    keys = load_rows(head_of(k, row, group), k[3], first, end, 0, BLOCK_N, BLOCK_K, K)
    values = load_rows(head_of(v, row, group), v[3], first, end, 0, BLOCK_N, BLOCK_V, V)
    dk_rows = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    dv_rows = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    # queries [first_seen, full) see some of these keys, later ones all; masks take registers: those tiles are smaller
    MASKED_M: tl.constexpr = BLOCK_M // 2 if BLOCK_M > 16 else BLOCK_M
    first_seen = tl.maximum(begin, offset)
    some = 0
    if CAUSAL:
        least = first
        if BLOCK_MASK:
            least = tl.where(first < begin + num_read, begin, tl.minimum(first, end - num_write))
        first_seen = tl.maximum(first_seen, least)
        some = tl.maximum(tl.minimum(first + BLOCK_N - 1, end) - first_seen, 0)
    diagonal = tl.cdiv(some, MASKED_M)
    full = first_seen + diagonal * MASKED_M
    whole = tl.maximum(end - full, 0) // BLOCK_M
    rest = tl.cdiv(tl.maximum(end - full - whole * BLOCK_M, 0), MASKED_M)
    members = heads // groups
    factor = score_factor(scale, softcap)
    # fmt: off
    dk_rows, dv_rows = key_loop(
        dk_rows, dv_rows, keys, values, j, q, dout, statistic, row_sum, row, group * members, members, heads,
        query_time, first_seen, diagonal + rest, diagonal, whole * BLOCK_M, offset, begin, end,
        num_read, num_write, factor, softcap, True, CAUSAL, BLOCK_MASK, K, V, MASKED_M, BLOCK_K, BLOCK_V,
    )
    dk_rows, dv_rows = key_loop(
        dk_rows, dv_rows, keys, values, j, q, dout, statistic, row_sum, row, group * members, members, heads,
        query_time, full, whole, 0, 0, offset, begin, end, num_read, num_write, factor, softcap,
        False, CAUSAL, BLOCK_MASK, K, V, BLOCK_M, BLOCK_K, BLOCK_V,
    )
    # fmt: on
    dk_rows *= scale
    if ADD_DK:
        dk_rows += load_rows(head_of(dk, row, group), dk[3], first, end, 0, BLOCK_N, BLOCK_K, K).to(tl.float32)
    if ADD_DV:
        dv_rows += load_rows(head_of(dv, row, group), dv[3], first, end, 0, BLOCK_N, BLOCK_V, V).to(tl.float32)
    store_rows(head_of(dk, row, group), dk[3], first, end, 0, dk_rows, BLOCK_N, BLOCK_K, K)
    store_rows(head_of(dv, row, group), dv[3], first, end, 0, dv_rows, BLOCK_N, BLOCK_V, V)


def key_grads(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    statistic: Tensor,
    dout: Tensor,
    row_sum: Tensor,
    dk: Tensor | None,
    dv: Tensor | None,
    layout: Layout,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """dk and dv, added to what is given of them."""
    key_width = q.shape[3]
    groups, time, value_width = v.shape[1:]
    tile = tile_of(key_grad_kernel, q, key_width, value_width)
    padded = layout.slots is not None
    tiles = triton.cdiv(min(options.segment_len, time), tile.BLOCK_N)
    add_dk, add_dv = dk is not None, dv is not None
    dk = new_tokens(k, groups, time, key_width, padded) if dk is None else dk
    dv = new_tokens(v, groups, time, value_width, padded) if dv is None else dv
    launch(
        key_grad_kernel,
        layout.total * groups * tiles,
        tile,
        q,
        statistic=statistic,
        dout=view(dout),
        row_sum=row_sum,
        dk=view(dk),
        dv=view(dv),
        tiles=tiles,
        ADD_DK=add_dk,
        ADD_DV=add_dv,
        **call_arguments(q, k, v, layout, options),
    )
    return dk, dv
