"""The adjoint of the memory's write. A token's gradients need those of the state after its segment.

With dM of that state and C = dM Mᵀ, the curvature C + Cᵀ is what the erased part A M sends back to the keys.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from .launch import launch, new_tokens, processors, segment_arguments, tile_of, view
from .tiles import (
    LENGTHS,
    Rows,
    block,
    chunk_operand,
    dot,
    feature_map,
    feature_map_grad,
    head_of,
    inverse_weight,
    largest,
    load_chunk,
    load_rows,
    load_vector,
    memory_inverse,
    operand,
    part_of,
    reciprocal,
    rounded,
    row_operand,
    segment_at,
    store_rows,
    sum_of_squares,
    unwritten,
)
from .write import (
    Normalizer,
    SegmentMemory,
    add_parts,
    exact_dot,
    normalizer_at,
    scan,
    splits_of,
    sum_normalizer_grads,
)

# tiles of tokens that one program of `write_grad_kernel` takes at most
MOST_STEPS = 8


@triton.jit(do_not_specialize=LENGTHS)
def curvature_kernel(
    memory, dmemory, curvature, slots, time, segment_len, segments, groups, LOOKBACK: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Store one tile of dM Mᵀ + M dMᵀ per written segment, M before it over z's peak, in two parts, dM after it."""
    across = tl.cdiv(K, COLUMNS)
    tiles = tl.cdiv(K, ROWS) * across
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    slot = tl.program_id(0) // tiles // groups
    segment = segment_at(slot, slots, segments, segment_len, time)
    if unwritten(segment, segment_len, LOOKBACK):
        return
    at = tl.cast(slot, tl.int64) * groups + group
    m = Rows(memory.matrix + at * K * V, V, K)
    dm = Rows(dmemory + at * K * V, V, K)
    i, j = tile // across * ROWS, tile % across * COLUMNS
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for c in tl.range(0, V, CHUNK, num_stages=1):
        m_rows = load_rows(m, i, c, ROWS, CHUNK, V).to(tl.float32)
        m_columns = load_rows(m, j, c, COLUMNS, CHUNK, V).to(tl.float32)
        if memory.residual is not None:
            residual = Rows(memory.residual + at * K * V, V, K)
            m_rows += load_rows(residual, i, c, ROWS, CHUNK, V).to(tl.float32)
            m_columns += load_rows(residual, j, c, COLUMNS, CHUNK, V).to(tl.float32)
        dm_rows = load_rows(dm, i, c, ROWS, CHUNK, V)
        dm_columns = load_rows(dm, j, c, COLUMNS, CHUNK, V)
        acc = exact_dot(dm_rows, tl.trans(m_columns), acc, PRECISION)
        acc = exact_dot(m_rows, tl.trans(dm_columns), acc, PRECISION)
    store_rows(Rows(curvature + at * K * K, K, K), i, j, acc, K)


class StateAfter(NamedTuple):
    """Say where the gradients of one segment's state lie: of M and z after it, C + Cᵀ, and z before it."""

    dmemory: Any
    dnormalizer: Any
    curvature: Any  # None by the linear rule
    normalizer: Any


class Held(NamedTuple):
    """Hold dM and C + Cᵀ as operands, with their factors, for all tiles of a program; None where chunks are loaded."""

    dmemory: Any
    curvature: Any


@triton.jit
def write_adjoint(
    keys, values, beta, gamma, dweight, first, state, held, dkeys,
    ELU: tl.constexpr, K: tl.constexpr, V: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store what the state after a segment sends back to its keys; return dv, and the gradient of beta.

    beta, gamma, dweight: pointers to those of the first row, or None. Nothing as wide as a token is held but dv and u.
    """
    ROWS: tl.constexpr = values.shape[0]
    BLOCK_K: tl.constexpr = block(K)
    dtype: tl.constexpr = values.dtype
    rows = tl.arange(0, ROWS)
    inside = first + rows < keys.stop
    if dweight is not None:
        inverse = memory_inverse(keys, first, None, state.normalizer, ELU, ROWS, K, CHUNK)
        u = feature_map(load_rows(keys, first, 0, ROWS, BLOCK_K, K), ELU) * inverse[:, None]
        u = tl.where((tl.arange(0, BLOCK_K) < K)[None, :], u, 0.0)
        # negative, so that products add up
        erasing, factor = row_operand(-u, dtype)
        to_weight = tl.load(dweight + rows, mask=inside, other=0.0)
    dv = tl.zeros([ROWS, values.shape[1]], tl.float32)
    for c in tl.range(0, K, CHUNK, num_stages=1):
        features = feature_map(load_rows(keys, first, c, ROWS, CHUNK, K), ELU)
        dm, scale = chunk_operand(state.dmemory, held.dmemory, c, dtype, CHUNK, K, V)
        dfeatures = dot(values, tl.trans(dm), None) * scale
        if dweight is not None:
            bent, size = chunk_operand(state.curvature, held.curvature, c, dtype, CHUNK, K, K)
            dfeatures += dot(erasing, tl.trans(bent), None) * (factor * size)
            dfeatures += to_weight[:, None] * load_vector(state.normalizer.z, c, CHUNK, K)[None, :]
        dv += dot(rounded(features, dtype), dm, None) * scale
        if beta is not None:
            dfeatures *= tl.load(beta + rows, mask=inside, other=0.0)[:, None]
        dz = load_vector(state.dnormalizer, c, CHUNK, K)[None, :]
        if gamma is not None:
            dz = dz * tl.load(gamma + rows, mask=inside, other=0.0)[:, None]
        store_rows(dkeys, first, c, (dfeatures + dz) * feature_map_grad(features, ELU), K)
    dbeta = tl.zeros([ROWS], tl.float32)
    if beta is not None:
        dbeta = tl.sum(dv * values.to(tl.float32), 1)
        if dweight is not None:
            dbeta -= to_weight * reciprocal(inverse)
        dv *= tl.load(beta + rows, mask=inside, other=0.0)[:, None]
    return dv, dbeta


class Bending(NamedTuple):
    """Hold rows of C + Cᵀ as an operand, its factor, and their parts along z."""

    rows: Any
    factor: Any
    level: Any  # of every row: its product with z / z z
    common: Any  # Σ level z / z z


@triton.jit
def bending(curvature, normalizer, c, dtype: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Return rows [c, c + CHUNK) of C + Cᵀ, ready to be multiplied."""
    z = load_vector(normalizer.z, 0, block(K), K)
    share = reciprocal(sum_of_squares(z))
    rows = load_chunk(curvature, c, CHUNK, K, K)
    level = tl.sum(rows * z[None, :], 1) * share
    common = tl.sum(level * load_vector(normalizer.z, c, CHUNK, K), 0) * share
    bent, factor = operand(rows, dtype)
    return Bending(bent, factor, level, common)


@triton.jit
def weight_grads(
    k, first, features, z, share, inverse_peak, normalizer, curvature, held,
    ELU: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Return u C uᵀ of every row, u = σ(k) / σ(k) z, without the digits that a rounded u C would lose.

    features: σ(k) of the rows from `first` on, 0 beyond K. share: 1 / z z. held: the `Bending` of all rows.

    As u z = 1, u is z / z z, the same for all rows, and a rest. Keys that are alike differ in the rest alone, so that
    what is rounded, its product with C, is small; the other parts are in float32.
    """
    ROWS: tl.constexpr = features.shape[0]
    dtype: tl.constexpr = k.pointer.dtype.element_ty
    inverse = inverse_weight(tl.sum(features * z[None, :], 1), largest(features, 0, K), inverse_peak)
    present = inverse != 0
    rest = tl.where(present[:, None], features * inverse[:, None] - (z * share)[None, :], 0.0)
    rounded_rest, factor = row_operand(rest, dtype)
    if held is not None:
        bent = dot(rounded_rest, tl.trans(held.rows), None) * (0.5 * factor * held.factor)
        result = tl.sum(rest * (bent + held.level[None, :]), 1)
        common = held.common
    else:
        result = tl.zeros([ROWS], tl.float32)
        common = 0.0
        for c in tl.range(0, K, CHUNK, num_stages=1):
            part = bending(curvature, normalizer, c, dtype, K, CHUNK)
            common += part.common
            bent = dot(rounded_rest, tl.trans(part.rows), None) * (0.5 * factor * part.factor)
            u = feature_map(load_rows(k, first, c, ROWS, CHUNK, K), ELU) * inverse[:, None]
            along = (load_vector(normalizer.z, c, CHUNK, K) * share)[None, :]
            result += tl.sum((u - along) * (bent + part.level[None, :]), 1)
    return tl.where(present, result + 0.5 * common, 0.0)


@triton.jit(do_not_specialize=LENGTHS)
def weight_sums_kernel(
    k, beta, normalizer, curvature, dweights, sums, parts, slots, time, segment_len, segments, splits,
    LOOKBACK: tl.constexpr, ELU: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store u C uᵀ of one part of one written segment's tokens, and Σ u C uᵀ σ(k), to which the first part adds sums.

    They are the gradients of the delta rule's weights 1 / σ(k) z, over these, and their share of z's.
    """
    K: tl.constexpr = k.width
    BLOCK_K: tl.constexpr = block(K)
    part = tl.program_id(0) % splits
    slot, group = tl.program_id(0) // splits // k.heads, tl.program_id(0) // splits % k.heads
    segment = segment_at(slot, slots, segments, segment_len, time)
    at = tl.cast(slot, tl.int64) * k.heads + group
    c = tl.arange(0, BLOCK_K)
    total = tl.load(sums + at * K + c, mask=(c < K) & (part == 0), other=0.0)
    target = parts + (at * splits + part) * K + c
    if unwritten(segment, segment_len, LOOKBACK):
        tl.store(target, total, mask=c < K)
        return
    begin, end = part_of(segment.begin, segment.end, part, splits, BLOCK_N)
    keys = head_of(k, segment.row, group, end)
    at_rows = (tl.cast(segment.row, tl.int64) * k.heads + group) * time
    before, c_of_segment = normalizer_at(normalizer, at, K), curvature + at * K * K
    held = None
    if CHUNK == BLOCK_K:
        held = bending(c_of_segment, before, 0, k.pointer.dtype.element_ty, K, CHUNK)
    # summed over its rows at the end: warps would wait for each other at every tile
    totals = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    z = load_vector(before.z, 0, BLOCK_K, K)
    share = reciprocal(sum_of_squares(z))
    inverse_peak = tl.load(before.inverse_peak)
    for start in range(begin, end, BLOCK_N):
        i = start + tl.arange(0, BLOCK_N)
        features = feature_map(load_rows(keys, start, 0, BLOCK_N, BLOCK_K, K), ELU)
        features = tl.where((c < K)[None, :], features, 0.0)
        dweight = weight_grads(
            keys, start, features, z, share, inverse_peak, before, c_of_segment, held, ELU, K, CHUNK
        )  # fmt: skip
        written = tl.where(i < end, dweight, 0.0)
        if beta is not None:
            written *= tl.load(beta + at_rows + i, mask=i < end, other=0.0)
        totals += written[:, None] * features
        # last, as no load is kept over a store
        tl.store(dweights + at_rows + i, dweight, mask=i < end)
    tl.store(target, total + tl.sum(totals, 0) * inverse_peak, mask=c < K)


@triton.jit(do_not_specialize=LENGTHS)
def write_grad_kernel(
    k, v, beta, gamma, normalizer, grads, dk, dv, dbeta, slots, time, segment_len, segments, tiles, steps,
    LOOKBACK: tl.constexpr, ELU: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Store dk, dv and dbeta of `steps` tiles of one head's tokens: zeros where they were not written."""
    K: tl.constexpr = k.width
    V: tl.constexpr = v.width
    BLOCK_K: tl.constexpr = block(K)
    BLOCK_V: tl.constexpr = block(V)
    dtype: tl.constexpr = k.pointer.dtype.element_ty
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % k.heads
    slot = tl.program_id(0) // tiles // k.heads
    segment = segment_at(slot, slots, segments, segment_len, time)
    first, end = segment.begin + tile * steps * BLOCK_N, segment.end
    if first >= end:
        return
    last = tl.minimum(first + steps * BLOCK_N, end)
    dkeys, dvalues = head_of(dk, segment.row, group, end), head_of(dv, segment.row, group, end)
    if unwritten(segment, segment_len, LOOKBACK):
        for start in range(first, last, BLOCK_N):
            store_rows(dkeys, start, 0, tl.zeros([BLOCK_N, BLOCK_K], tl.float32), K)
            store_rows(dvalues, start, 0, tl.zeros([BLOCK_N, BLOCK_V], tl.float32), V)
        return
    at = tl.cast(slot, tl.int64) * k.heads + group
    at_rows = (tl.cast(segment.row, tl.int64) * k.heads + group) * time
    keys, values = head_of(k, segment.row, group, end), head_of(v, segment.row, group, end)
    state = StateAfter(
        grads.after + at * K * V,
        grads.z_after + at * K,
        None if grads.curvature is None else grads.curvature + at * K * K,
        normalizer_at(normalizer, at, K),
    )
    held = Held(None, None)
    if CHUNK == BLOCK_K:
        held = Held(operand(load_chunk(state.dmemory, 0, CHUNK, K, V), dtype), None)
        if grads.curvature is not None:
            held = Held(held.dmemory, operand(load_chunk(state.curvature, 0, CHUNK, K, K), dtype))
    rows = tl.arange(0, BLOCK_N)
    for start in range(first, last, BLOCK_N):
        dvalue, dstrength = write_adjoint(
            keys, load_rows(values, start, 0, BLOCK_N, BLOCK_V, V), None if beta is None else beta + at_rows + start,
            None if gamma is None else gamma + at_rows + start,
            None if grads.weights is None else grads.weights + at_rows + start, start, state, held, dkeys,
            ELU, K, V, CHUNK,
        )  # fmt: skip
        store_rows(dvalues, start, 0, dvalue, V)
        if dbeta is not None:
            tl.store(dbeta + at_rows + start + rows, dstrength, mask=start + rows < end)


class SlotGrads(NamedTuple):
    """Gradients of the state after every slot, as its tokens take them."""

    after: Tensor  # float32 [F, G, K, V]
    z_after: Tensor  # float32 [F, G, K]
    curvature: Tensor | None  # float32 [F, G, K, K] C + Cᵀ; None by the linear rule
    weights: Tensor | None  # float32 [B, G, T] u C uᵀ of written tokens; None by the linear rule


def state_grads(
    k: Tensor, before: SegmentMemory, erased: Tensor | None, dmemory: Tensor, dnormalizer: Tensor, read: Tensor,
    read_sums: Tensor, layout: Layout, *, beta: Tensor | None = None, elu: bool = True,
) -> tuple[SlotGrads, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of the state after every slot, and of the initial memory and normalizer.

    They come from those of the final state, and from what the reads of every slot send back: read [F, G, K, V], and
    read_sums [F, G, K].
    """
    groups, _, key_width = k.shape[1:]
    after, _, dm = scan(dmemory, read, erased, None, torch.float32, layout, save=False)
    where = {**segment_arguments(layout), "LOOKBACK": layout.lookback}
    curvature = weights = None
    if erased is not None:
        curvature, weights = torch.empty_like(erased), erased.new_empty(k.shape[:3])
        tile = tile_of(curvature_kernel, before.matrix, key_width, key_width)
        tiles = triton.cdiv(key_width, tile.ROWS) * triton.cdiv(key_width, tile.COLUMNS)
        launch(
            curvature_kernel, layout.total * groups * tiles, tile, k,
            memory=before, dmemory=after, curvature=curvature, **where, groups=groups, K=key_width, V=read.shape[3],
        )  # fmt: skip
        tile = tile_of(weight_sums_kernel, k, key_width, read.shape[3])
        splits = splits_of(layout.total * groups, layout, tile, k)
        parts = read_sums.new_empty((layout.total, groups, splits, 1, key_width))
        launch(
            weight_sums_kernel, layout.total * groups * splits, tile, k,
            k=view(k), beta=beta, normalizer=before.normalizer, curvature=curvature, dweights=weights, sums=read_sums,
            parts=parts, **where, splits=splits, ELU=elu,
        )  # fmt: skip
        read_sums = add_parts(parts).squeeze(2)
    z_after, dz = sum_normalizer_grads(dnormalizer, read_sums, layout)
    return SlotGrads(after, z_after, curvature, weights), dm, dz


def write_grads(
    k: Tensor, v: Tensor, normalizer: Normalizer, grads: SlotGrads, layout: Layout, *,
    beta: Tensor | None = None, gamma: Tensor | None = None, elu: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Return dk, dv and dbeta of every token."""
    groups, time, key_width = k.shape[1:]
    padded = layout.slots is not None
    tile = tile_of(write_grad_kernel, k, key_width, v.shape[3])
    tiles = triton.cdiv(min(layout.segment_len, time), tile.BLOCK_N)
    # what a program holds of the state serves several tiles, where there are programs enough
    steps = max(1, min(MOST_STEPS, layout.total * groups * tiles // (4 * processors(k.device))))
    tiles = triton.cdiv(tiles, steps)
    dk = new_tokens(k, groups, time, key_width, padded)
    dv = new_tokens(v, groups, time, v.shape[3], padded)
    dbeta = None if beta is None else torch.empty_like(beta)
    launch(
        write_grad_kernel, layout.total * groups * tiles, tile, k,
        k=view(k), v=view(v), beta=beta, gamma=gamma, normalizer=normalizer, grads=grads, dk=view(dk), dv=view(dv),
        dbeta=dbeta, **segment_arguments(layout), tiles=tiles, steps=steps, LOOKBACK=layout.lookback, ELU=elu,
    )  # fmt: skip
    return dk, dv, dbeta
