"""The memory's write, every segment at once: each one's products A and B and sum of keys, and the scan over segments.

With u = σ(k) / σ(k) z, a segment's write is M ← M + B − A M, where B = σ(k)ᵀ v and A = uᵀ σ(k) (0 for the linear rule).
The adjoints are the same kernels: the read's adjoint is a product like B, and as A is symmetric, the scan's is the scan
run backwards.

z is divided by its peak, which cancels, so that small features do not vanish in their products.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from .configs import Tile
from .launch import launch, processors, segment_arguments, tile_of, view
from .tiles import (
    INTERPRETED,
    LENGTHS,
    Rows,
    block,
    dot,
    feature_map,
    head_of,
    inverse_weight,
    largest,
    load_rows,
    load_vector,
    operand,
    part_of,
    peak_reciprocal,
    readers_of,
    reciprocal,
    rounded,
    segment_at,
    store_rows,
    sum_of_squares,
    unwritten,
)

# parts of a segment's tokens that programs of their own sum over, at most
MOST_SPLITS = 8


class Normalizer(NamedTuple):
    """z before every slot, over its peak."""

    z: Tensor  # float32 [F, G, K] z / peak
    inverse_peak: Tensor  # float32 [F, G] 1 / peak, 0 where the memory is empty


@triton.jit
def normalizer_at(normalizer, at, K: tl.constexpr):
    """Return where the normalizer of one slot's head lies."""
    return Normalizer(normalizer.z + at * K, normalizer.inverse_peak + at)


class SegmentMemory(NamedTuple):
    """The memory before every slot, over the peak of z: what kernels read it from."""

    matrix: Tensor  # [F, G, K, V] M / peak, in the tokens' dtype
    residual: Tensor | None  # [F, G, K, V] what that rounding lost, for a backward; None for float32
    normalizer: Normalizer


@triton.jit(do_not_specialize=LENGTHS)
def key_sums_kernel(
    k, normalizer, sums, gamma, slots, time, segment_len, segments,
    ELU: tl.constexpr, LOOKBACK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Store Σ γ σ(k) over one complete segment of one head, and γ = clip(1 − z σ / ‖σ‖², 0, 1) in gamma."""
    K: tl.constexpr = k.width
    BLOCK_K: tl.constexpr = block(K)
    slot, group = tl.program_id(0) // k.heads, tl.program_id(0) % k.heads
    segment = segment_at(slot, slots, segments, segment_len, time)
    if unwritten(segment, segment_len, LOOKBACK):
        return
    begin, end = segment.begin, segment.end
    keys = head_of(k, segment.row, group, end)
    at = tl.cast(slot, tl.int64) * k.heads + group
    c = tl.arange(0, BLOCK_K)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(begin, end, BLOCK_N):
        inside = start + tl.arange(0, BLOCK_N) < end
        features = feature_map(load_rows(keys, start, 0, BLOCK_N, BLOCK_K, K), ELU)
        features = tl.where(inside[:, None] & (c < K)[None, :], features, 0.0)
        z = load_vector(normalizer + at * K, 0, BLOCK_K, K)
        square = tl.sum(features * features, 1)
        known = tl.sum(features * z[None, :], 1) * reciprocal(square)
        new = tl.where(square > 0, tl.clamp(1 - known, 0.0, 1.0), 0.0)
        tl.store(gamma + at * time + start + tl.arange(0, BLOCK_N), new, mask=inside)
        total += tl.sum(features * new[:, None], 0)
    tl.store(sums + at * K + c, total, mask=c < K)


@triton.jit
def sequence_at(n, runs, segments, segment_len, time, LOOKBACK: tl.constexpr):
    """Return the first slot of sequence n, how many of its segments are written, and whether others follow.

    With LOOKBACK the last complete segment is not: of what follows, its slot alone has a memory before it that is read.
    """
    if runs is None:
        first = tl.cast(n, tl.int64) * segments
        tokens = time
    else:
        first = tl.load(runs + n * 2)
        tokens = tl.load(runs + n * 2 + 1).to(tl.int32)
    if LOOKBACK:
        return first, tl.maximum(tokens // segment_len - 1, 0), tokens > 0
    return first, tokens // segment_len, tokens % segment_len > 0


@triton.jit(do_not_specialize=LENGTHS)
def normalizer_kernel(
    initial, added, before, inverse_peak, after, runs, time, segment_len, segments, groups,
    LOOKBACK: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sum over the segments of one sequence's head: z before every segment, over its peak, and z after the last.

    REVERSE: gradients of z after every segment, unscaled (inverse_peak is None), and of the initial z.
    """
    n, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    first, whole, tail = sequence_at(n, runs, segments, segment_len, time, LOOKBACK)
    c = tl.arange(0, block(K))[None, :]
    column = c < K
    at_sequence = (tl.cast(n, tl.int64) * groups + group) * K
    carry = tl.load(initial + at_sequence + c, mask=column, other=0.0)
    if REVERSE:
        if tail:
            carry += tl.load(added + ((first + whole) * groups + group) * K + c, mask=column, other=0.0)
    for start in range(0, whole + 1, BLOCK_N):
        # step p has added what the steps before it did: no difference of sums
        p = start + tl.arange(0, BLOCK_N)[:, None]
        source = first + (whole - p if REVERSE else p - 1)
        term = tl.load(added + (source * groups + group) * K + c, mask=(p > 0) & (p <= whole) & column, other=0.0)
        z = carry + tl.cumsum(term, 0)
        slot = first + (whole - 1 - p if REVERSE else p)
        if REVERSE:
            tl.store(before + (slot * groups + group) * K + c, z, mask=(p < whole) & column)
        else:
            held = p < whole + tl.where(tail, 1, 0)
            inverse = peak_reciprocal(z, 1)[:, None]
            tl.store(before + (slot * groups + group) * K + c, z * inverse, mask=held & column)
            tl.store(inverse_peak + slot * groups + group, inverse, mask=held)
        tl.store(after + at_sequence + c + p * 0, z, mask=(p == whole) & column)
        carry += tl.sum(term, 0)[None, :]


@triton.jit(do_not_specialize=LENGTHS)
def product_kernel(
    x, y, normalizer, gate, beta, memory_delta, product, sums, slots, time, query_time, segment_len, segments, groups,
    splits, LOOKBACK: tl.constexpr, ELU: tl.constexpr, READ: tl.constexpr, BLOCK_N: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store some columns of Σ weight · features(x)ᵀ y over tokens of one segment, and over a group's heads.

    | product       | x        | y          | features                         | weight |
    | ---           | ---      | ---        | ---                              | ---    |
    | B             | memory_k | v          | σ(x)                             | beta   |
    | A             | memory_k | None: σ(x) | σ(x) / σ(x) z, with a normalizer | beta   |
    | read, adjoint | memory_q | do         | σ(x) / σ(x) z, with a normalizer | gate   |

    READ: the tokens are those that read the memory before the segment, not those that are written into it. x stands at
    the last query_time positions.
    sums: Σ features, or −Σ memory_delta · weight · features, the adjoint of z; None: not wanted.
    splits: of each segment's tokens into parts, of which every sum is stored by itself.
    """
    K: tl.constexpr = x.width
    W: tl.constexpr = x.width if y is None else y.width
    BLOCK_K: tl.constexpr = block(K)
    tiles = tl.cdiv(W, COLUMNS)
    program = tl.program_id(0) // splits
    tile = program % tiles
    group = program // tiles % groups
    slot = program // tiles // groups
    segment = segment_at(slot, slots, segments, segment_len, time)
    offset = time - query_time
    part = tl.program_id(0) % splits
    at = tl.cast(slot, tl.int64) * groups + group
    stored = Rows(product + (at * splits + part) * K * W, W, K)
    acc = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    column = tile * COLUMNS
    c = tl.arange(0, BLOCK_K)
    summing = (c < K) & (tile == 0)
    if READ:
        segment = readers_of(segment, segment_len, LOOKBACK)
    elif unwritten(segment, segment_len, LOOKBACK):
        # nobody reads these, but parts are added up everywhere
        store_rows(stored, 0, column, acc, W)
        if sums is not None:
            tl.store(sums + (at * splits + part) * K + c, tl.zeros([BLOCK_K], tl.float32), mask=summing)
        return
    begin, end = part_of(tl.maximum(segment.begin, offset), segment.end, part, splits, BLOCK_N)
    members = x.heads // groups
    # summed over their rows at the end: warps would wait for each other at every tile
    totals = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    if normalizer is not None:
        z = load_vector(normalizer.z + at * K, 0, BLOCK_K, K)
        inverse_peak = tl.load(normalizer.inverse_peak + at)
    # in half precision A = Σ weight · σ z · uᵀ u, u = σ(x) / σ(x) z, and u is split along z: as u z = 1, it is z / z z
    # and a rest, which alone is rounded
    SPLIT: tl.constexpr = (y is None) and (x.pointer.dtype.element_ty != tl.float32)
    if SPLIT:
        share = reciprocal(sum_of_squares(z))
        along = z * share
        along_columns = load_vector(normalizer.z + at * K, column, COLUMNS, K) * share
        commons = tl.zeros([BLOCK_N], tl.float32)
        totals_columns = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    for member in range(0, members):
        head = group * members + member
        tokens = head_of(x, segment.row, head, end - offset)
        weight = 1.0
        if gate is not None:
            weight = tl.sigmoid(tl.load(gate + head))
        at_rows = (tl.cast(segment.row, tl.int64) * x.heads + head) * query_time - offset
        for start in range(begin, end, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            mapped = load_rows(tokens, start - offset, 0, BLOCK_N, BLOCK_K, K)
            features = tl.where((i < end)[:, None], feature_map(mapped, ELU), 0.0)
            features = tl.where((tl.arange(0, BLOCK_K) < K)[None, :], features, 0.0)
            if normalizer is not None:
                most = largest(features, 0, BLOCK_K)
                known = tl.sum(features * z[None, :], 1)
                inverse = inverse_weight(known, most, inverse_peak)
                features *= inverse[:, None]
            weights = tl.full([BLOCK_N], 1.0, tl.float32) * weight
            if beta is not None:
                weights *= tl.load(beta + at_rows + i, mask=i < end, other=0.0)
            if sums is not None:
                if memory_delta is None:
                    totals += features
                else:
                    delta = tl.load(memory_delta + at_rows + i, mask=i < end, other=0.0)
                    totals -= features * (weights * delta)[:, None]
            scale = 1.0
            if SPLIT:
                weights = tl.where(inverse != 0, weights * known, 0.0)
                features -= along[None, :]
                commons += weights
                totals += features * weights[:, None]
                if COLUMNS == BLOCK_K:
                    other = features
                else:
                    other = feature_map(load_rows(tokens, start - offset, column, BLOCK_N, COLUMNS, W), ELU)
                    other = other * inverse[:, None] - along_columns[None, :]
                    totals_columns += other * weights[:, None]
                other, scale = operand(other, x.pointer.dtype.element_ty)
            elif y is None:
                other = feature_map(load_rows(tokens, start - offset, column, BLOCK_N, COLUMNS, W), ELU)
            else:
                y_head = head_of(y, segment.row, head, end - offset)
                other = load_rows(y_head, start - offset, column, BLOCK_N, COLUMNS, W)
            scaled, factor = operand(features * weights[:, None], other.dtype)
            acc += dot(tl.trans(scaled), other, None) * (factor * scale)
    total = tl.sum(totals, 0)
    if SPLIT:
        if COLUMNS == BLOCK_K:
            totals_columns = totals
        common = tl.sum(commons, 0) * along_columns + tl.sum(totals_columns, 0)
        acc += along[:, None] * common[None, :] + total[:, None] * along_columns[None, :]
    if normalizer is not None:
        acc *= inverse_peak
        total *= inverse_peak
    store_rows(stored, 0, column, acc, W)
    if sums is not None:
        tl.store(sums + (at * splits + part) * K + c, total, mask=summing)


@triton.jit(do_not_specialize=LENGTHS)
def add_parts_kernel(parts, whole, splits, K: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    """Add up the parts of one slot's head, some rows of a product [K, W], in their order."""
    tiles = tl.cdiv(K, ROWS)
    first = tl.program_id(0) % tiles * ROWS
    at = tl.cast(tl.program_id(0) // tiles, tl.int64)
    acc = tl.zeros([ROWS, block(W)], tl.float32)
    for part in range(0, splits):
        acc += load_rows(Rows(parts + (at * splits + part) * K * W, W, K), first, 0, ROWS, block(W), W)
    store_rows(Rows(whole + at * K * W, W, K), first, 0, acc, W)


@triton.jit
def exact_dot(a, b, acc, PRECISION: tl.constexpr):
    """Return float32 a b + acc to float32's precision, on tensor cores where PRECISION says how."""
    if INTERPRETED:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def advance(x, added, erased, inside, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """Return x + B − A x, for x as a tuple of tiles of ROWS rows; added: pointers to the tile's columns."""
    r = tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, ROWS)[None, :]
    y = ()
    for i in tl.static_range(0, K, ROWS):
        acc = x[i // ROWS] + tl.load(added + (i + r) * V, mask=(i + r < K) & inside, other=0.0)
        if erased is not None:
            for j in tl.static_range(0, K, ROWS):
                a = tl.load(erased + (i + r) * K + j + c, mask=(i + r < K) & (j + c < K), other=0.0)
                acc = exact_dot(-a, x[j // ROWS], acc, PRECISION)
        y = y + (acc,)  # type: ignore[assignment]
    return y


@triton.jit
def leave(matrix, residual, at, column, x, scale, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr):
    """Store x · scale, rounded, in matrix[at], and what the rounding lost in residual[at]."""
    for i in tl.static_range(0, K, ROWS):
        exact = x[i // ROWS] * scale
        store_rows(Rows(matrix + at * K * V, V, K), i, column, exact, V)
        if residual is not None:
            lost = exact - rounded(exact, residual.dtype.element_ty).to(tl.float32)
            store_rows(Rows(residual + at * K * V, V, K), i, column, lost, V)


@triton.jit(do_not_specialize=LENGTHS)
def scan_kernel(
    initial, added, erased, before, residual, inverse_peak, after, runs, time, segment_len, segments, groups,
    LOOKBACK: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Run X ← X + B − A X over the segments of one sequence's head, some columns of X = M.

    Leaves M / peak before every segment in `before`, what rounding took from it in `residual` (None: not wanted), and M
    after the last. REVERSE: X is M's gradient, which is left as it is after every segment (inverse_peak is None).
    """
    tiles = tl.cdiv(V, COLUMNS)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    n = tl.program_id(0) // tiles // groups
    first, whole, tail = sequence_at(n, runs, segments, segment_len, time, LOOKBACK)
    r = tl.arange(0, ROWS)[:, None]
    column = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = column < V
    at_sequence = (tl.cast(n, tl.int64) * groups + group) * K * V
    x = ()
    for i in tl.static_range(0, K, ROWS):
        start = tl.load(initial + at_sequence + (i + r) * V + column, mask=(i + r < K) & inside, other=0.0)
        if REVERSE:
            at = ((first + whole) * groups + group) * K * V
            start += tl.load(added + at + (i + r) * V + column, mask=(i + r < tl.where(tail, K, 0)) & inside, other=0.0)
        x = x + (start,)  # type: ignore[assignment]
    for step in range(0, whole):
        slot = first + (whole - 1 - step if REVERSE else step)
        at = slot * groups + group
        scale = 1.0
        if inverse_peak is not None:
            scale = tl.load(inverse_peak + at)
        leave(before, residual, at, tile * COLUMNS, x, scale, K, V, ROWS)
        erased_at = None if erased is None else erased + at * K * K
        x = advance(x, added + at * K * V + column, erased_at, inside, K, V, ROWS, PRECISION)
    if not REVERSE:
        if tail:
            at = (first + whole) * groups + group
            leave(before, residual, at, tile * COLUMNS, x, tl.load(inverse_peak + at), K, V, ROWS)
    for i in tl.static_range(0, K, ROWS):
        tl.store(after + at_sequence + (i + r) * V + column, x[i // ROWS], mask=(i + r < K) & inside)


class Written(NamedTuple):
    """Hold what a write returns."""

    before: SegmentMemory
    erased: Tensor | None  # float32 [F, G, K, K] A; None by the linear rule
    gamma: Tensor | None  # float32 [B, G, T]
    memory: Tensor  # float32 [N, G, K, V]
    normalizer: Tensor  # float32 [N, G, K]


def sum_keys(k: Tensor, normalizer: Tensor, layout: Layout, elu: bool) -> tuple[Tensor, Tensor]:
    """Return Σ γ σ(k) per slot [F, G, K], and γ [B, G, T], the correction by the normalizer [F, G, K] before it."""
    batch, groups, time, width = k.shape
    tile = tile_of(key_sums_kernel, k, width, width)
    sums = k.new_empty((layout.total, groups, width), dtype=torch.float32)
    gamma = sums.new_empty((batch, groups, time))
    launch(
        key_sums_kernel, layout.total * groups, tile, k,
        k=view(k), normalizer=normalizer, sums=sums, gamma=gamma, **segment_arguments(layout), ELU=elu,
        LOOKBACK=layout.lookback,
    )  # fmt: skip
    return sums, gamma


def _sequence_arguments(layout: Layout) -> dict[str, Any]:
    """Return the arguments by which a kernel finds the slots of a sequence."""
    return {
        "runs": layout.runs,
        "time": layout.time,
        "segment_len": layout.segment_len,
        "segments": layout.per_row,
        "LOOKBACK": layout.lookback,
    }


def sum_normalizers(initial: Tensor, added: Tensor, layout: Layout) -> tuple[Normalizer, Tensor]:
    """Return, by every slot's `added` [F, G, K], the normalizer before it, and z after the last [N, G, K]."""
    before, after = torch.empty_like(added), initial.new_empty(initial.shape)
    inverse_peak = added.new_empty(added.shape[:2])
    _launch_sums(initial, added, before, inverse_peak, after, layout)
    return Normalizer(before, inverse_peak), after


def sum_normalizer_grads(final: Tensor, added: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the gradients of z after every slot [F, G, K], and of the initial z [N, G, K]: the sums run backwards."""
    after_slots, initial = torch.empty_like(added), final.new_empty(final.shape)
    _launch_sums(final, added, after_slots, None, initial, layout)
    return after_slots, initial


def _launch_sums(
    initial: Tensor, added: Tensor, before: Tensor, inverse_peak: Tensor | None, after: Tensor, layout: Layout
) -> None:
    groups, width = initial.shape[1:]
    tile = tile_of(normalizer_kernel, initial, width, width)
    launch(
        normalizer_kernel, layout.sequences * groups, tile, initial,
        initial=initial, added=added, before=before, inverse_peak=inverse_peak, after=after, groups=groups,
        **_sequence_arguments(layout), REVERSE=inverse_peak is None, K=width,
    )  # fmt: skip


def products(
    x: Tensor, y: Tensor | None, groups: int, layout: Layout, *, normalizer: Normalizer | None = None,
    gate: Tensor | None = None, beta: Tensor | None = None, memory_delta: Tensor | None = None,
    elu: bool = True, read: bool = False, summed: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the products of `product_kernel`'s table per slot [F, G, K, W], and sums [F, G, K] (empty: not summed)."""
    query_time, key_width = x.shape[2:]
    width = key_width if y is None else y.shape[3]
    tile = tile_of(product_kernel, x, key_width, width)
    programs = layout.total * groups * triton.cdiv(width, tile.COLUMNS)
    splits = splits_of(programs, layout, tile, x)
    product = x.new_empty((layout.total, groups, splits, key_width, width), dtype=torch.float32)
    sums = product.new_empty((layout.total, groups, splits, 1, key_width) if summed else 0)
    launch(
        product_kernel, programs * splits, tile, x,
        x=view(x), y=view(y), normalizer=normalizer, gate=gate, beta=beta, memory_delta=memory_delta, product=product,
        sums=sums if summed else None, **segment_arguments(layout), query_time=query_time, groups=groups,
        splits=splits, LOOKBACK=layout.lookback, ELU=elu, READ=read,
    )  # fmt: skip
    return add_parts(product), add_parts(sums).squeeze(2) if summed else sums


def splits_of(programs: int, layout: Layout, tile: Tile, like: Tensor) -> int:
    """Return into how many parts each segment's tokens are split, so that few programs do not leave a GPU idle."""
    tiles = triton.cdiv(min(layout.segment_len, layout.time), tile.BLOCK_N)
    return max(1, min(MOST_SPLITS, tiles, processors(like.device) // max(programs, 1)))


def add_parts(parts: Tensor) -> Tensor:
    """Return the sums of contiguous parts [F, G, splits, K, W] over splits, always in the same order."""
    slots, groups, splits, rows, width = parts.shape
    if splits == 1:
        return parts.squeeze(2)
    whole = parts.new_empty((slots, groups, rows, width))
    tile = tile_of(add_parts_kernel, parts, rows, width)
    launch(
        add_parts_kernel, slots * groups * triton.cdiv(rows, tile.ROWS), tile, parts,
        parts=parts, whole=whole, splits=splits, K=rows, W=width,
    )  # fmt: skip
    return whole


def scan(
    initial: Tensor, added: Tensor, erased: Tensor | None, inverse_peak: Tensor | None, dtype: torch.dtype,
    layout: Layout, save: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Return M / peak before every slot in `dtype`, what that rounds off if `save`, and M after the last [N, G, K, V].

    inverse_peak None: the scan run backwards, the gradients after every slot and of the initial memory.
    """
    _, groups, key_width, value_width = initial.shape
    tile = tile_of(scan_kernel, initial, key_width, value_width)
    before = added.new_empty(added.shape, dtype=dtype)
    residual = torch.empty_like(before) if save and dtype != torch.float32 else None
    after = initial.new_empty(initial.shape)
    launch(
        scan_kernel, layout.sequences * groups * triton.cdiv(value_width, tile.COLUMNS), tile, initial,
        initial=initial, added=added, erased=erased, before=before, residual=residual, inverse_peak=inverse_peak,
        after=after, **_sequence_arguments(layout), groups=groups, REVERSE=inverse_peak is None, K=key_width,
        V=value_width,
    )  # fmt: skip
    return before, residual, after


def write(
    k: Tensor, v: Tensor, memory: Tensor, normalizer: Tensor, layout: Layout, update: str, *,
    beta: Tensor | None = None, corrected: bool = False, elu: bool = True, save: bool = True,
) -> Written:  # fmt: skip
    """Write every complete segment of k and v into a contiguous memory [N, G, K, V] and normalizer [N, G, K].

    corrected: for one segment per row only, as γ looks at the normalizer before it.
    """
    groups = k.shape[1]
    delta = update == "delta"
    added, sums = products(k, v, groups, layout, beta=beta, elu=elu, summed=not corrected)
    gamma = None
    if corrected:
        sums, gamma = sum_keys(k, normalizer, layout, elu)
    z_before, z = sum_normalizers(normalizer, sums, layout)
    erased = None
    if delta:
        erased, _ = products(k, None, groups, layout, normalizer=z_before, beta=beta, elu=elu)
    matrix, residual, m = scan(memory, added, erased, z_before.inverse_peak, k.dtype, layout, save)
    return Written(SegmentMemory(matrix, residual, z_before), erased, gamma, m, z)
