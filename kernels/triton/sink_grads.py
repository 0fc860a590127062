"""The gradients of the sinks: what the queries of each segment send back to the keys and values beside its window."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from ..state import Options, Sinks
from .attention_backward import Walk, key_loop
from .launch import launch, segment_arguments, tile_of, view, view_sinks
from .tiles import (
    LENGTHS,
    block,
    head_of,
    keys_of,
    load_rows,
    score_factor,
    segment_at,
    sink_block,
    sinks_of,
    store_rows,
)


@triton.jit(do_not_specialize=LENGTHS)
def sink_grad_kernel(
    q, sinks, slopes, lse2, dout, row_delta, dk, dv,
    slots, time, query_time, segment_len, segments, scale, softcap,
    LOOKBACK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store dk and dv of one tile of one slot's sinks of one key/value head, over its group's queries."""
    K: tl.constexpr = dk.width
    V: tl.constexpr = dv.width
    ROWS: tl.constexpr = sink_block(sinks.count, BLOCK_N)
    program = tl.program_id(0)
    tiles = tl.cdiv(sinks.count, ROWS)
    first = program % tiles * ROWS
    group = program // tiles % dk.heads
    slot = program // tiles // dk.heads
    segment = segment_at(slot, slots, segments, segment_len, time)
    offset = time - query_time
    keys, values = sinks_of(sinks, slot, group)
    # every query sees them, as if they stood where its segment begins; distances are those from before its window
    j = segment.begin + tl.zeros([ROWS], tl.int32)
    if slopes is not None:
        j = keys_of(segment, segment_len, LOOKBACK).begin - sinks.count + first + tl.arange(0, ROWS)
    first_query = tl.maximum(segment.begin, offset)
    steps = tl.where(keys.stop > 0, tl.cdiv(tl.maximum(segment.end - first_query, 0), BLOCK_M), 0)
    dkeys, dvalues = key_loop(
        (tl.zeros([ROWS, block(K)], tl.float32), tl.zeros([ROWS, block(V)], tl.float32)),
        load_rows(keys, first, 0, ROWS, block(K), K), load_rows(values, first, 0, ROWS, block(V), V), j,
        q, dout, lse2, row_delta, group, q.heads // dk.heads, Walk(first_query, steps, steps, 0), offset, query_time,
        segment, None, score_factor(scale, softcap), softcap, slopes, True, False, K, V, BLOCK_M,
    )  # fmt: skip
    store_rows(head_of(dk, slot, group, sinks.count), first, 0, dkeys * scale, K)
    store_rows(head_of(dv, slot, group, sinks.count), first, 0, dvalues, V)


def sink_grads(
    q: Tensor, sinks: Sinks, slopes: Tensor | None, lse2: Tensor, dout: Tensor, row_delta: Tensor, layout: Layout,
    options: Options,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return dk [F, G, n, K] and dv [F, G, n, V] of the sinks, 0 where a slot does not see them."""
    slots, groups, count, key_width = sinks.k.shape
    dk, dv = (x.new_empty(x.shape) for x in sinks[:2])
    tile = tile_of(sink_grad_kernel, q, key_width, sinks.v.shape[3])
    tiles = triton.cdiv(count, sink_block(count, tile.BLOCK_N))
    launch(
        sink_grad_kernel, slots * groups * tiles, tile, q,
        q=view(q), sinks=view_sinks(sinks), slopes=slopes, lse2=lse2, dout=view(dout), row_delta=row_delta,
        dk=view(dk), dv=view(dv), **segment_arguments(layout), query_time=q.shape[2], scale=options.scale,
        softcap=options.softcap, LOOKBACK=layout.lookback,
    )  # fmt: skip
    return dk, dv
