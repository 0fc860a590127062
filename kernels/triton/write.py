"""The memory's write, every segment at once: key sums, each segment's products A and B, and the scan over segments.

With u = σ(k) / σ(k) z, a segment's write is M ← M + B − A M, where B = σ(k)ᵀ v and A = uᵀ σ(k) (0 for the linear rule).
The adjoints are the same kernels: the read's adjoint is a product like B, and as A is symmetric, the scan's is the scan
run backwards.

z is divided by its peak, which cancels, so that small features do not vanish in their products.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Layout
from .launch import block, launch, tile_of, view
from .tiles import (
    INTERPRETED,
    LEAST_PEAK,
    dot,
    feature_map,
    head_of,
    load_rows,
    load_vector,
    operand,
    reciprocal,
    rounded,
    segment_at,
    store_rows,
)


@triton.jit(do_not_specialize=["time", "segment_len", "segments"])
def key_sums_kernel(
    k,
    normalizer,
    sums,
    gamma,
    slots,
    time,
    segment_len,
    segments,
    groups,
    ELU: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Σ γ σ(k) over one complete segment of one head. γ = 1, or clip(1 − z σ / ‖σ‖², 0, 1), left in gamma [B, G, T]."""
    slot, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    row, begin, end = segment_at(slot, slots, segments, segment_len, time)
    if end - begin < segment_len:
        return
    keys = head_of(k, row, group)
    at = tl.cast(slot, tl.int64) * groups + group
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(begin, end, BLOCK_N):
        inside = start + tl.arange(0, BLOCK_N) < end
        features = feature_map(load_rows(keys, k[3], start, end, 0, BLOCK_N, BLOCK_K, K), ELU)
        features = tl.where(inside[:, None] & (tl.arange(0, BLOCK_K) < K)[None, :], features, 0.0)
        if gamma is not None:
            z = load_vector(normalizer + at * K, 0, BLOCK_K, K)
            known = tl.sum(features * z[None, :], 1) * reciprocal(tl.sum(features * features, 1))
            counted = tl.where(tl.sum(features * features, 1) > 0, tl.clamp(1 - known, 0.0, 1.0), 0.0)
            tl.store(gamma + at * time + start + tl.arange(0, BLOCK_N), counted, mask=inside)
            features *= counted[:, None]
        total += tl.sum(features, 0)
    c = tl.arange(0, BLOCK_K)
    tl.store(sums + at * K + c, total, mask=c < K)


@triton.jit
def sequence_at(n, runs, segments, segment_len, time):
    """First slot, number of complete segments, and whether a shorter one follows, of sequence n."""
    if runs is None:
        first = tl.cast(n, tl.int64) * segments
        tokens = time
    else:
        first = tl.load(runs + n * 2)
        tokens = tl.load(runs + n * 2 + 1).to(tl.int32)
    return first, tokens // segment_len, tokens % segment_len > 0


@triton.jit(do_not_specialize=["time", "segment_len", "segments"])
def normalizer_kernel(
    initial,
    added,
    before,
    inverse_peak,
    after,
    runs,
    time,
    segment_len,
    segments,
    groups,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sums over the segments of one sequence's head: z before every segment, over its peak, and z after the last.

    REVERSE: gradients of z after every segment, unscaled (inverse_peak is None), and of the one to begin with.
    """
    n, group = tl.program_id(0) // groups, tl.program_id(0) % groups
    first, whole, tail = sequence_at(n, runs, segments, segment_len, time)
    c = tl.arange(0, BLOCK_K)[None, :]
    column = c < K
    at_sequence = (tl.cast(n, tl.int64) * groups + group) * K
    carry = tl.load(initial + at_sequence + c, mask=column, other=0.0)
    if REVERSE:
        if tail:
            carry += tl.load(added + ((first + whole) * groups + group) * K + c, mask=column, other=0.0)
    for start in range(0, whole + 1, BLOCK_N):
        # step p has added what the steps before it did: no difference of sums
        p = start + tl.arange(0, BLOCK_N)[:, None]
        source = whole - p if REVERSE else p - 1
        term = tl.load(
            added + ((first + source) * groups + group) * K + c, mask=(p > 0) & (p <= whole) & column, other=0.0
        )
        z = carry + tl.cumsum(term, 0)
        target = whole - 1 - p if REVERSE else p
        slot = first + target
        if REVERSE:
            tl.store(before + (slot * groups + group) * K + c, z, mask=(p < whole) & column)
        else:
            held = p < whole + tl.where(tail, 1, 0)
            peak = tl.max(tl.abs(z), 1)
            inverse = tl.where(peak >= LEAST_PEAK, 1.0 / tl.where(peak >= LEAST_PEAK, peak, 1.0), 0.0)[:, None]
            tl.store(before + (slot * groups + group) * K + c, z * inverse, mask=held & column)
            tl.store(inverse_peak + slot * groups + group, inverse, mask=held)
        tl.store(after + at_sequence + c + p * 0, z, mask=(p == whole) & column)
        carry += tl.sum(term, 0)[None, :]


@triton.jit(do_not_specialize=["time", "query_time", "segment_len", "segments"])
def product_kernel(
    x,
    y,
    normalizer,
    inverse_peak,
    gate,
    beta,
    along,
    product,
    sums,
    slots,
    time,
    query_time,
    segment_len,
    segments,
    heads,
    groups,
    ELU: tl.constexpr,
    WHOLE: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of Σ weight · features(x)ᵀ y over the tokens of one segment, and over a group's heads.

    | product       | x        | y         | features                         | weight |
    | ---           | ---      | ---       | ---                              | ---    |
    | B             | memory_k | v         | σ(x)                             | beta   |
    | A             | memory_k | None: σ(x)| σ(x) / σ(x) z, given normalizer  | beta   |
    | read, adjoint | memory_q | do        | σ(x) / σ(x) z, given normalizer  | gate   |

    x stands at the last query_time positions, with `heads` heads; WHOLE: incomplete segments are left out.
    sums: Σ features, or −Σ along · weight · features, the adjoint of z; None: not wanted.
    """
    tiles = tl.cdiv(W, COLUMNS)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    slot = tl.program_id(0) // tiles // groups
    row, begin, end = segment_at(slot, slots, segments, segment_len, time)
    if WHOLE:
        if end - begin < segment_len:
            return
    offset = time - query_time
    at = tl.cast(slot, tl.int64) * groups + group
    members = heads // groups
    acc = tl.zeros([BLOCK_K, COLUMNS], tl.float32)
    total = tl.zeros([BLOCK_K], tl.float32)
    column = tile * COLUMNS
    if normalizer is not None:
        z = load_vector(normalizer + at * K, 0, BLOCK_K, K)
    for member in range(0, members):
        head = group * members + member
        tokens = head_of(x, row, head)
        weight = 1.0
        if gate is not None:
            weight = tl.sigmoid(tl.load(gate + head))
        at_rows = (tl.cast(row, tl.int64) * heads + head) * query_time - offset
        for start in range(tl.maximum(begin, offset), end, BLOCK_N):
            i = start + tl.arange(0, BLOCK_N)
            mapped = load_rows(tokens, x[3], start - offset, end - offset, 0, BLOCK_N, BLOCK_K, K)
            features = tl.where((i < end)[:, None], feature_map(mapped, ELU), 0.0)
            features = tl.where((tl.arange(0, BLOCK_K) < K)[None, :], features, 0.0)
            if normalizer is not None:
                features *= reciprocal(tl.sum(features * z[None, :], 1))[:, None]
            weights = tl.full([BLOCK_N], 1.0, tl.float32) * weight
            if beta is not None:
                weights *= tl.load(beta + at_rows + i, mask=i < end, other=0.0)
            if sums is not None:
                if along is None:
                    total += tl.sum(features, 0)
                else:
                    total -= tl.sum(
                        features * (weights * tl.load(along + at_rows + i, mask=i < end, other=0.0))[:, None], 0
                    )
            if y is None:
                other = load_rows(tokens, x[3], start - offset, end - offset, column, BLOCK_N, COLUMNS, W)
                other = rounded(feature_map(other, ELU), x[0].dtype.element_ty)
            else:
                other = load_rows(
                    head_of(y, row, head), y[3], start - offset, end - offset, column, BLOCK_N, COLUMNS, W
                )
            some, factor = operand(features * weights[:, None], other.dtype)
            acc += dot(tl.trans(some), other, None) * factor
    if normalizer is not None:
        scale = tl.load(inverse_peak + at)
        acc *= scale
        total *= scale
    store_rows(product + at * K * W, W, 0, K, column, acc, BLOCK_K, COLUMNS, W)
    if sums is not None:
        if tile == 0:
            c = tl.arange(0, BLOCK_K)
            tl.store(sums + at * K + c, total, mask=c < K)


@triton.jit
def exact_dot(a, b, acc, PRECISION: tl.constexpr):
    """float32 a b + acc to float32's precision, on tensor cores where PRECISION says how."""
    if INTERPRETED:
        return tl.dot(a, b, acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def advance(x, added, erased, inside, K: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr):
    """x + B − A x, for x as a tuple of tiles of ROWS rows; added: pointers to the tile's columns."""
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
def leave(
    before,
    rest,
    at,
    column,
    x,
    scale,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """x · scale into before[at], rounded, and what that took from it into rest[at]."""
    for i in tl.static_range(0, K, ROWS):
        exact = x[i // ROWS] * scale
        store_rows(before + at * K * V, V, i, K, column, exact, ROWS, COLUMNS, V)
        if rest is not None:
            lost = exact - rounded(exact, rest.dtype.element_ty).to(tl.float32)
            store_rows(rest + at * K * V, V, i, K, column, lost, ROWS, COLUMNS, V)


@triton.jit(do_not_specialize=["time", "segment_len", "segments"])
def scan_kernel(
    initial,
    added,
    erased,
    before,
    rest,
    inverse_peak,
    after,
    runs,
    time,
    segment_len,
    segments,
    groups,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """X ← X + B − A X over the segments of one sequence's head, some columns of X = M.

    Leaves M / peak before every segment in `before`, what rounding took from it in `rest` (None: not wanted), and M
    after the last. REVERSE: X is M's gradient, which is left as it is after every segment (inverse_peak is None).
    """
    tiles = tl.cdiv(V, COLUMNS)
    tile = tl.program_id(0) % tiles
    group = tl.program_id(0) // tiles % groups
    n = tl.program_id(0) // tiles // groups
    first, whole, tail = sequence_at(n, runs, segments, segment_len, time)
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
        leave(before, rest, at, tile * COLUMNS, x, scale, K, V, ROWS, COLUMNS)
        x = advance(
            x,
            added + at * K * V + column,
            None if erased is None else erased + at * K * K,
            inside,
            K,
            V,
            ROWS,
            PRECISION,
        )
    if not REVERSE:
        if tail:
            at = (first + whole) * groups + group
            scale = tl.load(inverse_peak + at)
            leave(before, rest, at, tile * COLUMNS, x, scale, K, V, ROWS, COLUMNS)
    for i in tl.static_range(0, K, ROWS):
        tl.store(after + at_sequence + (i + r) * V + column, x[i // ROWS], mask=(i + r < K) & inside)


class Written(NamedTuple):
    """The memory before every slot, as readers take it, and after the last of every sequence."""

    before: Tensor  # [F, G, K, V] M over z's peak, in the tokens' dtype
    rest: Tensor | None  # [F, G, K, V] what that rounding lost, for the backward; None for float32
    z_before: Tensor  # float32 [F, G, K] z over its peak
    inverse_peak: Tensor  # float32 [F, G] 0 where the memory is empty
    erased: Tensor | None  # float32 [F, G, K, K] A; None by the linear rule
    gamma: Tensor | None  # float32 [B, G, T]
    memory: Tensor  # float32 [N, G, K, V]
    normalizer: Tensor  # float32 [N, G, K]


def sum_keys(
    k: Tensor, normalizer: Tensor | None, layout: Layout, segment_len: int, elu: bool
) -> tuple[Tensor, Tensor | None]:
    """Σ γ σ(k) per slot [F, G, K], and γ [B, G, T] if a normalizer [F, G, K] is given to correct by."""
    batch, groups, time, width = k.shape
    tile = tile_of(key_sums_kernel, k, width, width)
    sums = k.new_empty((layout.total, groups, width), dtype=torch.float32)
    gamma = None if normalizer is None else sums.new_empty((batch, groups, time))
    launch(
        key_sums_kernel,
        layout.total * groups,
        tile,
        k,
        k=view(k),
        normalizer=normalizer,
        sums=sums,
        gamma=gamma,
        slots=layout.slots,
        time=time,
        segment_len=segment_len,
        segments=layout.per_row,
        groups=groups,
        ELU=elu,
        K=width,
        BLOCK_K=block(width),
    )
    return sums, gamma


def sum_normalizers(
    initial: Tensor, added: Tensor, layout: Layout, time: int, segment_len: int, reverse: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Over every slot's `added` [F, G, K]: z / peak before it, 1 / peak [F, G], and z after the last [N, G, K].

    reverse: gradients of z after every slot, None, and the gradient of the z to begin with.
    """
    groups, width = initial.shape[1:]
    tile = tile_of(normalizer_kernel, initial, width, width)
    before = torch.empty_like(added)
    inverse_peak = None if reverse else added.new_empty((layout.total, groups))
    after = torch.empty_like(initial, memory_format=torch.contiguous_format)
    launch(
        normalizer_kernel,
        layout.sequences * groups,
        tile,
        initial,
        initial=initial,
        added=added,
        before=before,
        inverse_peak=inverse_peak,
        after=after,
        runs=layout.runs,
        time=time,
        segment_len=segment_len,
        segments=layout.per_row,
        groups=groups,
        REVERSE=reverse,
        K=width,
        BLOCK_K=block(width),
    )
    return before, inverse_peak, after


def products(
    x: Tensor,
    y: Tensor | None,
    normalizer: Tensor | None,
    inverse_peak: Tensor | None,
    gate: Tensor | None,
    beta: Tensor | None,
    along: Tensor | None,
    groups: int,
    time: int,
    layout: Layout,
    segment_len: int,
    *,
    elu: bool,
    whole: bool,
    summed: bool,
) -> tuple[Tensor, Tensor]:
    """`product_kernel`'s table: one product per slot [F, G, K, W], and sums [F, G, K] if `summed` (else empty)."""
    heads, query_time, key_width = x.shape[1:]
    width = key_width if y is None else y.shape[3]
    tile = tile_of(product_kernel, x, key_width, width)
    product = x.new_empty((layout.total, groups, key_width, width), dtype=torch.float32)
    sums = product.new_empty((layout.total, groups, key_width) if summed else 0)
    launch(
        product_kernel,
        layout.total * groups * triton.cdiv(width, tile.COLUMNS),
        tile,
        x,
        x=view(x),
        y=view(y),
        normalizer=normalizer,
        inverse_peak=inverse_peak,
        gate=gate,
        beta=beta,
        along=along,
        product=product,
        sums=sums if summed else None,
        slots=layout.slots,
        time=time,
        query_time=query_time,
        segment_len=segment_len,
        segments=layout.per_row,
        heads=heads,
        groups=groups,
        ELU=elu,
        WHOLE=whole,
        K=key_width,
        W=width,
        BLOCK_K=block(key_width),
    )
    return product, sums


def scan(
    initial: Tensor,
    added: Tensor,
    erased: Tensor | None,
    inverse_peak: Tensor | None,
    dtype: torch.dtype,
    layout: Layout,
    time: int,
    segment_len: int,
    keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """M / peak before every slot in `dtype`, the rest that it rounds off if `keep`, and M after the last [N, G, K, V].

    inverse_peak None: the scan run backwards, the gradients after every slot and of the memory to begin with.
    """
    _, groups, key_width, value_width = initial.shape
    tile = tile_of(scan_kernel, initial, key_width, value_width)
    before = added.new_empty(added.shape, dtype=dtype)
    rest = torch.empty_like(before) if keep and dtype != torch.float32 else None
    after = torch.empty_like(initial, memory_format=torch.contiguous_format)
    launch(
        scan_kernel,
        layout.sequences * groups * triton.cdiv(value_width, tile.COLUMNS),
        tile,
        initial,
        initial=initial,
        added=added,
        erased=erased,
        before=before,
        rest=rest,
        inverse_peak=inverse_peak,
        after=after,
        runs=layout.runs,
        time=time,
        segment_len=segment_len,
        segments=layout.per_row,
        groups=groups,
        REVERSE=inverse_peak is None,
        K=key_width,
        V=value_width,
    )
    return before, rest, after


def write(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    layout: Layout,
    segment_len: int,
    delta: bool,
    *,
    keep: bool = True,
    beta: Tensor | None = None,
    corrected: bool = False,
    elu: bool = True,
) -> Written:
    """Every complete segment of k and v into a contiguous memory [N, G, K, V], normalizer [N, G, K].

    corrected: one segment per row only, as γ looks at the normalizer before it.
    """
    groups, time = k.shape[1:3]
    shared = (groups, time, layout, segment_len)
    added, sums = products(
        k, v, None, None, None, beta, None, *shared, elu=elu, whole=True, summed=not delta and not corrected
    )
    gamma = None
    if delta or corrected:
        sums, gamma = sum_keys(k, normalizer if corrected else None, layout, segment_len, elu)
    z_before, inverse_peak, z = sum_normalizers(normalizer, sums, layout, time, segment_len, False)
    erased = None
    if delta:
        erased, _ = products(
            k, None, z_before, inverse_peak, None, beta, None, *shared, elu=elu, whole=True, summed=False
        )
    assert inverse_peak is not None
    before, rest, m = scan(memory, added, erased, inverse_peak, k.dtype, layout, time, segment_len, keep)
    return Written(before, rest, z_before, inverse_peak, erased, gamma, m, z)
