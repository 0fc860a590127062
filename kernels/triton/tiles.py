"""The tile vocabulary of every kernel: where a segment lies, loading, features, visibility, products.

Arithmetic is in float32; a tile takes its tensor's dtype again only as the operand of a product.
A tensor of tokens [B, heads, T, width] is passed as the tuple (pointer, batch stride, head stride, time stride).
"""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)
# a normalizer below this has lost its digits to underflow: TINY over float32's epsilon
LEAST_PEAK = tl.constexpr(9.860761315262648e-32)


@triton.jit
def segment_at(slot, slots, segments, segment_len, time):
    """Row, first position and one past the last; from slots [F, 3], or `segments` slots in each row of `time`."""
    if slots is None:
        row = slot // segments
        begin = slot % segments * segment_len
        end = tl.minimum(begin + segment_len, time)
    else:
        row = tl.load(slots + slot * 3).to(tl.int32)
        begin = tl.load(slots + slot * 3 + 1).to(tl.int32)
        end = tl.load(slots + slot * 3 + 2).to(tl.int32)
    return row, begin, end


@triton.jit
def head_of(x, row, head):
    """Where the tokens of one head begin."""
    return x[0] + tl.cast(row, tl.int64) * x[1] + tl.cast(head, tl.int64) * x[2]


@triton.jit
def pointers(x, stride, first, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """To x[first : first + ROWS, column : column + COLUMNS]. Only the first row's offset needs 64 bits."""
    r = tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    return x + tl.cast(first, tl.int64) * stride + (r[:, None] * stride + c[None, :])


@triton.jit
def load_rows(
    x,
    stride,
    first,
    stop,
    column,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr = True,
):
    """x[first : first + ROWS, column : column + COLUMNS]; 0 from row `stop` (if MASKED) and from column WIDTH on.

    column: a multiple of COLUMNS.
    """
    at = pointers(x, stride, first, column, ROWS, COLUMNS)
    inside_rows = (first + tl.arange(0, ROWS) < stop)[:, None]
    inside_columns = (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    if MASKED:
        if WIDTH % COLUMNS:
            return tl.load(at, mask=inside_rows & inside_columns, other=0.0)
        return tl.load(at, mask=inside_rows, other=0.0)
    if WIDTH % COLUMNS:
        return tl.load(at, mask=inside_columns, other=0.0)
    return tl.load(at)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x to the nearest of `dtype`."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            # the interpreter would cut the last bits off
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(x, stride, first, stop, column, values, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """The inverse of `load_rows`, in x's dtype."""
    at = pointers(x, stride, first, column, ROWS, COLUMNS)
    inside_rows = (first + tl.arange(0, ROWS) < stop)[:, None]
    inside_columns = (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    tl.store(at, rounded(values, x.dtype.element_ty), mask=inside_rows & inside_columns)


@triton.jit
def load_vector(x, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """x[column : column + COLUMNS], 0 from WIDTH on."""
    c = column + tl.arange(0, COLUMNS)
    return tl.load(x + c, mask=c < WIDTH, other=0.0)


@triton.jit
def feature_map(x, ELU: tl.constexpr):
    """σ(x) = ELU(x) + 1 in float32, as exp(x) below zero; x itself where it is mapped already (ELU False)."""
    x = x.to(tl.float32)
    if ELU:
        return tl.where(x > 0, x + 1, tl.exp(tl.minimum(x, 0.0)))
    return x


@triton.jit
def feature_map_grad(x, ELU: tl.constexpr):
    """σ'(x) in float32."""
    x = x.to(tl.float32)
    if ELU:
        return tl.exp(tl.minimum(x, 0.0))
    return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def capped(scores, softcap):
    """softcap · tanh(scores) in powers of two, of scores over softcap; scores as they are where it is None."""
    if softcap is not None:
        shrunk = tl.exp2(tl.abs(scores) * (-2 * LOG2_E))
        size = (1.0 - shrunk) / (1.0 + shrunk)
        scores = tl.where(scores < 0, -size, size) * (softcap * LOG2_E)
    return scores


@triton.jit
def capped_grad(dscores, scores, softcap):
    """dscores · (1 − tanh²), of the scores that `capped` returned."""
    if softcap is not None:
        share = scores * (1.0 / (softcap * LOG2_E))
        dscores = dscores * (1.0 - share * share)
    return dscores


@triton.jit
def score_factor(scale, softcap):
    """What products of queries and keys are multiplied by, before `capped`."""
    factor = scale * LOG2_E
    if softcap is not None:
        factor = scale / softcap
    return factor


@triton.jit
def reciprocal(weight):
    """1 / weight; 0 where there is none."""
    found = tl.abs(weight) >= TINY
    return tl.where(found, 1.0 / tl.where(found, weight, 1.0), 0.0)


@triton.jit
def memory_weight(
    x,
    stride,
    first,
    stop,
    normalizer,
    ELU: tl.constexpr,
    ROWS: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """σ(x) z of every row, z over its peak."""
    weight = tl.zeros([ROWS], tl.float32)
    for c in tl.range(0, K, CHUNK, num_stages=1):
        features = feature_map(load_rows(x, stride, first, stop, c, ROWS, CHUNK, K), ELU)
        weight += tl.sum(features * load_vector(normalizer, c, CHUNK, K)[None, :], 1)
    return weight


@triton.jit
def dot(a, b, acc):
    """a b + acc in float32, the products of float32 tiles in full precision."""
    if INTERPRETED:
        # the interpreter would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def operand(x, dtype: tl.constexpr):
    """float32 x as `dtype`, and the factor that restores it: x / max |x| for float16, which loses what is small."""
    if dtype == tl.float16:
        factor = tl.max(tl.max(tl.abs(x), 1), 0)
        x = x * reciprocal(factor)
    else:
        factor = 1.0
    return rounded(x, dtype), factor


@triton.jit
def row_operand(x, dtype: tl.constexpr):
    """As `operand`, each row by itself: factors [rows, 1]."""
    if dtype == tl.float16:
        factor = tl.max(tl.abs(x), 1)[:, None]
        x = x * reciprocal(factor)
    else:
        factor = 1.0
    return rounded(x, dtype), factor


@triton.jit
def dot_float32(a, b, acc):
    """a b + acc for float32 b, rounded to a's dtype."""
    b, scale = operand(b, a.dtype)
    return acc + dot(a, b, None) * scale


@triton.jit
def visible(i, j, begin, end, num_read, num_write, CAUSAL: tl.constexpr, BLOCK_MASK: tl.constexpr):
    """May the query at i see the key at j? BLOCK_MASK lets all see the first num_read, the last num_write see all."""
    inside = j < end
    if CAUSAL:
        seen = j <= i
        if BLOCK_MASK:
            seen = seen | (j < begin + num_read) | (i >= end - num_write)
        return inside & seen
    return inside & (i >= begin)


@triton.jit
def keys_seen(
    first,
    begin,
    end,
    num_read,
    num_write,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_MASK: tl.constexpr,
):
    """For queries from `first` on: whole blocks of keys up to `full` are seen by all, none from `last` on by any."""
    full = end
    last = end
    if CAUSAL:
        full = first + 1
        last = tl.minimum(first + ROWS, end)
        if BLOCK_MASK:
            last = tl.maximum(last, tl.minimum(begin + num_read, end))
            last = tl.where(first + ROWS > end - num_write, end, last)
    return begin + (full - begin) // BLOCK * BLOCK, last
