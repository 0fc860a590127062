"""The adjoint of the memory's write. A token's gradients need those of the state after its segment.

With dM of that state and C = dM Mᵀ, the curvature C + Cᵀ is what the erased part A M sends back to the keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from .launch import block, launch, new_tokens, tile_of, view
from .tiles import (
    dot_float32,
    feature_map,
    feature_map_grad,
    head_of,
    load_rows,
    load_vector,
    memory_weight,
    reciprocal,
    rounded,
    row_operand,
    segment_at,
    store_rows,
)
from .write import exact_dot, scan, sum_normalizers


@triton.jit(do_not_specialize=["time", "segment_len", "segments"])
def curvature_kernel(
    memory,
    rest,
    dmemory,
    curvature,
    slots,
    time,
    segment_len,
    segments,
    groups,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of dM Mᵀ + M dMᵀ per complete segment, M before it over z's peak, in two parts, dM after it."""
    across = tl.cdiv(K, COLUMNS)
    tiles = tl.cdiv(K, ROWS) * across
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    slot = tl.program_id(0) // tiles // groups
    _, begin, end = segment_at(slot, slots, segments, segment_len, time)
    if end - begin < segment_len:
        return
    at = tl.cast(slot, tl.int64) * groups + group
    m = memory + at * K * V
    dm = dmemory + at * K * V
    i, j = tile // across * ROWS, tile % across * COLUMNS
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c in tl.range(0, V, CHUNK, num_stages=1):
        m_rows = load_rows(m, V, i, K, c, ROWS, CHUNK, V).to(tl.float32)
        m_columns = load_rows(m, V, j, K, c, COLUMNS, CHUNK, V).to(tl.float32)
        if rest is not None:
            m_rows += load_rows(rest + at * K * V, V, i, K, c, ROWS, CHUNK, V).to(tl.float32)
            m_columns += load_rows(rest + at * K * V, V, j, K, c, COLUMNS, CHUNK, V).to(tl.float32)
        dm_rows = load_rows(dm, V, i, K, c, ROWS, CHUNK, V)
        dm_columns = load_rows(dm, V, j, K, c, COLUMNS, CHUNK, V)
        acc = exact_dot(dm_rows, tl.trans(m_columns), acc, PRECISION)
        acc = exact_dot(m_rows, tl.trans(dm_columns), acc, PRECISION)
    store_rows(curvature + at * K * K, K, i, K, j, acc, ROWS, COLUMNS, K)


@triton.jit
def bend(u, factor, curvature, c, K: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr):
    """factor · u (C + Cᵀ), its columns from c on."""
    rows = load_rows(curvature + c * K, K, 0, K - c, 0, CHUNK, BLOCK_K, K, K % CHUNK != 0)
    return dot_float32(u, tl.trans(rows), tl.zeros([u.shape[0], CHUNK], tl.float32)) * factor


@triton.jit
def erasure(
    k,
    stride,
    first,
    stop,
    normalizer,
    curvature,
    ELU: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """u = σ(k) / σ(k) z in k's dtype, the factor it takes, 1 / σ(k) z, and σ(k) C uᵀ of every row."""
    inverse = reciprocal(memory_weight(k, stride, first, stop, normalizer, ELU, ROWS, K, CHUNK))
    u = feature_map(load_rows(k, stride, first, stop, 0, ROWS, BLOCK_K, K), ELU) * inverse[:, None]
    u = tl.where((tl.arange(0, BLOCK_K) < K)[None, :], u, 0.0)
    u, factor = row_operand(u, k.dtype.element_ty)
    erased = tl.zeros([ROWS], tl.float32)
    for c in tl.range(0, K, CHUNK, num_stages=1):
        features = feature_map(load_rows(k, stride, first, stop, c, ROWS, CHUNK, K), ELU)
        erased += tl.sum(bend(u, factor, curvature, c, K, BLOCK_K, CHUNK) * features, 1)
    return u, factor, inverse, erased * 0.5


@triton.jit
def write_adjoint(
    k,
    k_stride,
    values,
    beta,
    gamma,
    first,
    stop,
    normalizer,
    dmemory,
    dnormalizer,
    curvature,
    dk,
    dk_stride,
    ELU: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """What the state after a segment sends back to its tokens: dk is stored; dv, and the gradient of beta.

    curvature None: the linear rule. Nothing as wide as a token is held but dv and u.
    """
    rows = first + tl.arange(0, ROWS)
    erased = tl.zeros([ROWS], tl.float32)
    if curvature is not None:
        u, factor, inverse, erased = erasure(
            k, k_stride, first, stop, normalizer, curvature, ELU, ROWS, K, BLOCK_K, CHUNK
        )
    dv = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for c in tl.range(0, K, CHUNK, num_stages=1):
        tokens = load_rows(k, k_stride, first, stop, c, ROWS, CHUNK, K)
        received = load_rows(dmemory + c * V, V, 0, K - c, 0, CHUNK, BLOCK_V, V, K % CHUNK != 0)
        dv = dot_float32(rounded(feature_map(tokens, ELU), tokens.dtype), received, dv)
        dfeatures = dot_float32(values, tl.trans(received), tl.zeros([ROWS, CHUNK], tl.float32))
        if curvature is not None:
            z = load_vector(normalizer, c, CHUNK, K)[None, :]
            dfeatures += (erased * inverse)[:, None] * z - bend(u, factor, curvature, c, K, BLOCK_K, CHUNK)
        if beta is not None:
            dfeatures *= tl.load(beta + rows, mask=rows < stop, other=0.0)[:, None]
        dz = load_vector(dnormalizer, c, CHUNK, K)[None, :]
        if gamma is not None:
            dz = dz * tl.load(gamma + rows, mask=rows < stop, other=0.0)[:, None]
        store_rows(dk, dk_stride, first, stop, c, (dfeatures + dz) * feature_map_grad(tokens, ELU), ROWS, CHUNK, K)
    dbeta = erased
    if beta is not None:
        dbeta = tl.sum(dv * values.to(tl.float32), 1) - erased
        dv *= tl.load(beta + rows, mask=rows < stop, other=0.0)[:, None]
    return dv, dbeta


@triton.jit(do_not_specialize=["time", "segment_len", "segments"])
def weight_sums_kernel(
    k,
    beta,
    normalizer,
    inverse_peak,
    curvature,
    sums,
    slots,
    time,
    segment_len,
    segments,
    groups,
    ELU: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Onto sums, the gradient of z that the delta rule's weights 1 / σ(k) z send back over one complete segment."""
    slot, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row, begin, end = segment_at(slot, slots, segments, segment_len, time)
    if end - begin < segment_len:
        return
    at = tl.cast(slot, tl.int64) * groups + group
    keys = head_of(k, row, group)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(begin, end, BLOCK_N):
        # fmt: off
        _, _, inverse, erased = erasure(
            keys, k[3], start, end, normalizer + at * K, curvature + at * K * K, ELU, BLOCK_N, K, BLOCK_K, CHUNK
        )
        # fmt: on
        dweight = erased * inverse
        i = start + tl.arange(0, BLOCK_N)
        if beta is not None:
            at_rows = (tl.cast(row, tl.int64) * groups + group) * time
            dweight *= tl.load(beta + at_rows + i, mask=i < end, other=0.0)
        features = feature_map(load_rows(keys, k[3], start, end, 0, BLOCK_N, BLOCK_K, K), ELU)
        total += tl.sum(tl.where(i < end, dweight, 0.0)[:, None] * features, 0)
    c = tl.arange(0, BLOCK_K)
    target = sums + at * K + c
    tl.store(target, tl.load(target, mask=c < K, other=0.0) + total * tl.load(inverse_peak + at), mask=c < K)


@triton.jit(do_not_specialize=["time", "segment_len", "segments", "tiles"])
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
    slots,
    time,
    segment_len,
    segments,
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
    """dk, dv and dbeta of one tile of one head's tokens: zeros where they were not written."""
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    slot = tl.program_id(0) // tiles // groups
    row, begin, end = segment_at(slot, slots, segments, segment_len, time)
    first = begin + tile * BLOCK_N
    if first >= end:
        return
    dkeys, dvalues = head_of(dk, row, group), head_of(dv, row, group)
    if end - begin < segment_len:
        store_rows(dkeys, dk[3], first, end, 0, tl.zeros([BLOCK_N, BLOCK_K], tl.float32), BLOCK_N, BLOCK_K, K)
        store_rows(dvalues, dv[3], first, end, 0, tl.zeros([BLOCK_N, BLOCK_V], tl.float32), BLOCK_N, BLOCK_V, V)
        return
    at = tl.cast(slot, tl.int64) * groups + group
    at_rows = (tl.cast(row, tl.int64) * groups + group) * time
    values = load_rows(head_of(v, row, group), v[3], first, end, 0, BLOCK_N, BLOCK_V, V)
    # fmt: off
    dwritten, dstrength = write_adjoint(
        head_of(k, row, group), k[3], values, None if beta is None else beta + at_rows,
        None if gamma is None else gamma + at_rows, first, end, normalizer + at * K, dmemory + at * K * V,
        dnormalizer + at * K, None if curvature is None else curvature + at * K * K, dkeys, dk[3],
        ELU, BLOCK_N, K, V, BLOCK_K, BLOCK_V, CHUNK,
    )
    # fmt: on
    store_rows(dvalues, dv[3], first, end, 0, dwritten, BLOCK_N, BLOCK_V, V)
    if dbeta is not None:
        i = first + tl.arange(0, BLOCK_N)
        tl.store(dbeta + at_rows + i, dstrength, mask=i < end)


class StateGrads(NamedTuple):
    """Gradients of the state: after every slot, as its tokens take them, and of the one to begin with."""

    after: Tensor  # float32 [F, G, K, V]
    z_after: Tensor  # float32 [F, G, K]
    curvature: Tensor | None  # float32 [F, G, K, K] C + Cᵀ; None by the linear rule
    memory: Tensor  # float32 [N, G, K, V]
    normalizer: Tensor  # float32 [N, G, K]


def state_grads(
    k: Tensor,
    before: Tensor,
    rest: Tensor | None,
    z_before: Tensor,
    inverse_peak: Tensor,
    erased: Tensor | None,
    dmemory: Tensor,
    dnormalizer: Tensor,
    read: Tensor,
    read_sums: Tensor,
    layout: Layout,
    segment_len: int,
    *,
    beta: Tensor | None = None,
    elu: bool = True,
) -> StateGrads:
    """From the last state's gradients and what every slot's reads send back, read [F, G, K, V], read_sums [F, G, K].

    read_sums is overwritten.
    """
    _, groups, time, key_width = k.shape
    value_width = read.shape[3]
    after, _, dm = scan(dmemory, read, erased, None, torch.float32, layout, time, segment_len, False)
    curvature = None
    if erased is not None:
        tile = tile_of(curvature_kernel, before, key_width, key_width)
        curvature = torch.empty_like(erased)
        places = {
            "slots": layout.slots,
            "time": time,
            "segment_len": segment_len,
            "segments": layout.per_row,
            "groups": groups,
        }
        launch(
            curvature_kernel,
            layout.total * groups * triton.cdiv(key_width, tile.ROWS) * triton.cdiv(key_width, tile.COLUMNS),
            tile,
            k,
            memory=before,
            rest=rest,
            dmemory=after,
            curvature=curvature,
            **places,
            K=key_width,
            V=value_width,
        )
        tile = tile_of(weight_sums_kernel, k, key_width, value_width)
        launch(
            weight_sums_kernel,
            layout.total * groups,
            tile,
            k,
            k=view(k),
            beta=beta,
            normalizer=z_before,
            inverse_peak=inverse_peak,
            curvature=curvature,
            sums=read_sums,
            **places,
            ELU=elu,
            K=key_width,
            BLOCK_K=block(key_width),
        )
    z_after, _, dz = sum_normalizers(dnormalizer, read_sums, layout, time, segment_len, True)
    return StateGrads(after, z_after, curvature, dm, dz)


def write_grads(
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    gamma: Tensor | None,
    z_before: Tensor,
    grads: StateGrads,
    layout: Layout,
    segment_len: int,
    *,
    elu: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dk, dv and dbeta of every token; z_before [F, G, K] over its peak."""
    _, groups, time, key_width = k.shape
    value_width = v.shape[3]
    tile = tile_of(write_grad_kernel, k, key_width, value_width)
    padded = layout.slots is not None
    tiles = triton.cdiv(min(segment_len, time), tile.BLOCK_N)
    dk = new_tokens(k, groups, time, key_width, padded)
    dv = new_tokens(v, groups, time, value_width, padded)
    dbeta = None if beta is None else torch.empty_like(beta)
    launch(
        write_grad_kernel,
        layout.total * groups * tiles,
        tile,
        k,
        k=view(k),
        v=view(v),
        beta=beta,
        gamma=gamma,
        normalizer=z_before,
        dmemory=grads.after,
        dnormalizer=grads.z_after,
        curvature=grads.curvature,
        dk=view(dk),
        dv=view(dv),
        dbeta=dbeta,
        slots=layout.slots,
        time=time,
        segment_len=segment_len,
        segments=layout.per_row,
        tiles=tiles,
        groups=groups,
        ELU=elu,
        K=key_width,
        V=value_width,
        BLOCK_K=block(key_width),
        BLOCK_V=block(value_width),
    )
    return dk, dv, dbeta
