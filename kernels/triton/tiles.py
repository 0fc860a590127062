"""The tile vocabulary of every kernel: where a segment lies, loading, features, visibility, products.

Arithmetic is in float32; a tile takes its tensor's dtype again only as the operand of a product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)
# a normalizer below this has lost its digits to underflow: TINY over float32's epsilon
LEAST_PEAK = tl.constexpr(9.860761315262648e-32)
# arguments that vary from call to call: no variant of a kernel is compiled for their values
LENGTHS = ("time", "query_time", "segment_len", "segments", "tiles", "steps", "splits", "split_len")


class Tokens(NamedTuple):
    """A tensor [B, heads, T, width] whose last dimension is contiguous, as an argument of a kernel."""

    pointer: Any
    row_stride: Any
    head_stride: Any
    time_stride: Any
    heads: Any
    width: Any  # tl.constexpr


# in place of None: kernels ask for the pointer, since Triton 3.6 cannot compare tuples within a tuple with None
NO_TOKENS = Tokens(None, None, None, None, None, None)


class Memory(NamedTuple):
    """A memory [B, G, K, V] and its normalizer [B, G, K], as an argument of a kernel."""

    memory: Any
    normalizer: Any


class Rows(NamedTuple):
    """A matrix with contiguous rows, of which only those before `stop` are loaded and stored."""

    pointer: Any
    stride: Any
    stop: Any


class Segment(NamedTuple):
    """A segment: its batch row, its first position, one past its last, and those two of its sequence."""

    row: Any
    begin: Any
    end: Any
    first: Any
    stop: Any


class SinkTokens(NamedTuple):
    """The keys and values that the segments of slots see beside their window, as an argument of a kernel."""

    k: Any  # Tokens [F, G, n, K]
    v: Any  # Tokens [F, G, n, V]
    seen: Any  # bool [F] whether a slot's segment sees them
    count: Any  # tl.constexpr, n


class MemoryTokens(NamedTuple):
    """The memory tokens of RMT at the ends of a sequence; None where a call has none, so that no kernel masks them."""

    read: Any
    write: Any


@triton.constexpr_function
def block(width):
    """Return the power of two that holds a width, at least what a tensor core takes."""
    return max(16, triton.next_power_of_2(width))


@triton.constexpr_function
def sink_block(count, rows):
    """Return how many sinks a tile holds, where one of tokens holds `rows`."""
    return min(block(count), rows)


@triton.constexpr_function
def ragged(width, columns):
    """Return whether tiles of `columns` columns reach beyond a width."""
    return width % columns != 0


@triton.jit
def query_slot(nth, slots, segments, first):
    """Return the nth of the slots that may hold queries: of every row, those from segment number `first` on."""
    if slots is None:
        nth = nth // (segments - first) * segments + first + nth % (segments - first)
    return nth


@triton.jit
def segment_at(slot, slots, segments, segment_len, time):
    """Return the segment of a slot: from slots [F, 5], or among the `segments` of each row of `time` tokens."""
    if slots is None:
        row = slot // segments
        begin = slot % segments * segment_len
        end = tl.minimum(begin + segment_len, time)
        first = 0
        stop = time
    else:
        row = tl.load(slots + slot * 5).to(tl.int32)
        begin = tl.load(slots + slot * 5 + 1).to(tl.int32)
        end = tl.load(slots + slot * 5 + 2).to(tl.int32)
        first = tl.load(slots + slot * 5 + 3).to(tl.int32)
        stop = tl.load(slots + slot * 5 + 4).to(tl.int32)
    return Segment(row, begin, end, first, stop)


@triton.jit
def spanning(segment, begin, end):
    """Return other positions of a segment's sequence in the place of its own."""
    return Segment(segment.row, begin, end, segment.first, segment.stop)


@triton.jit
def keys_of(segment, segment_len, LOOKBACK: tl.constexpr):
    """Return where the keys lie that a segment's queries see: with LOOKBACK, in the segment before it too."""
    begin = segment.begin
    if LOOKBACK:
        begin = tl.maximum(begin - segment_len, segment.first)
    return spanning(segment, begin, segment.end)


@triton.jit
def queries_of(segment, segment_len, LOOKBACK: tl.constexpr):
    """Return where the queries lie that see a segment's keys: with LOOKBACK, in the segment after it too."""
    end = segment.end
    if LOOKBACK:
        end = tl.minimum(end + segment_len, segment.stop)
    return spanning(segment, segment.begin, end)


@triton.jit
def readers_of(segment, segment_len, LOOKBACK: tl.constexpr):
    """Return where the queries lie that read the memory before a segment: with LOOKBACK, in the segment after it.

    The memory before a sequence's first segment is read there too.
    """
    queries = queries_of(segment, segment_len, LOOKBACK)
    begin = segment.begin
    if LOOKBACK:
        begin = tl.where(begin > segment.first, segment.end, begin)
    return spanning(segment, begin, queries.end)


@triton.jit
def read_slot(slot, segment, LOOKBACK: tl.constexpr):
    """Return the slot before which the memory is as a segment's queries read it: with LOOKBACK, the one before."""
    if LOOKBACK:
        slot -= tl.where(segment.begin > segment.first, 1, 0)
    return slot


@triton.jit
def unwritten(segment, segment_len, LOOKBACK: tl.constexpr):
    """Return whether a segment is not written into the memory: it is incomplete, or with LOOKBACK the last complete."""
    left_out = segment.end - segment.begin < segment_len
    if LOOKBACK:
        left_out = left_out | (segment.stop - segment.end < segment_len)
    return left_out


@triton.jit
def part_of(begin, end, part, parts, BLOCK: tl.constexpr):
    """Return where one of `parts` parts of [begin, end) lies: whole blocks, but for the last."""
    length = tl.cdiv(tl.cdiv(end - begin, parts), BLOCK) * BLOCK
    begin += part * length
    return begin, tl.minimum(begin + length, end)


@triton.jit
def head_of(x, row, head, stop):
    """Return the tokens of one head, up to position `stop`."""
    pointer = x.pointer + tl.cast(row, tl.int64) * x.row_stride + tl.cast(head, tl.int64) * x.head_stride
    return Rows(pointer, x.time_stride, stop)


@triton.jit
def sinks_of(sinks, slot, group):
    """Return the keys and values of a slot's sinks of one head: up to as many as its segment sees."""
    stop = tl.where(tl.load(sinks.seen + slot), sinks.count, 0)
    return head_of(sinks.k, slot, group, stop), head_of(sinks.v, slot, group, stop)


@triton.jit
def from_sinks(i, window, sinks, slope):
    """Return queries' positions as sinks count them, which stand directly before the window; i itself without slope."""
    if slope is not None:
        i = i - window.begin + sinks.count
    return i


@triton.jit
def pointers(x, first, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return pointers to a tile of `Rows`. Only the offset of its first row needs 64 bits."""
    r = tl.arange(0, ROWS)
    c = column + tl.arange(0, COLUMNS)
    return x.pointer + tl.cast(first, tl.int64) * x.stride + (r[:, None] * x.stride + c[None, :])


@triton.jit
def load_rows(
    x, first, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr = True
):  # fmt: skip
    """Load x[first : first + ROWS, column : column + COLUMNS]; 0 from x.stop (if MASKED) and from column WIDTH on.

    column: a multiple of COLUMNS.
    """
    at = pointers(x, first, column, ROWS, COLUMNS)
    inside_rows = (first + tl.arange(0, ROWS) < x.stop)[:, None]
    inside_columns = (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    if MASKED:
        if ragged(WIDTH, COLUMNS):
            return tl.load(at, mask=inside_rows & inside_columns, other=0.0)
        return tl.load(at, mask=inside_rows, other=0.0)
    if ragged(WIDTH, COLUMNS):
        return tl.load(at, mask=inside_columns, other=0.0)
    return tl.load(at)


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round float32 x to the nearest of `dtype`."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            # the interpreter would cut the last bits off
            bits = x.to(tl.int32, bitcast=True)
            x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def store_rows(x, first, column, values, WIDTH: tl.constexpr):
    """Store a tile where `load_rows` loads it from, in the dtype of x."""
    ROWS: tl.constexpr = values.shape[0]
    COLUMNS: tl.constexpr = values.shape[1]
    at = pointers(x, first, column, ROWS, COLUMNS)
    inside_rows = (first + tl.arange(0, ROWS) < x.stop)[:, None]
    inside_columns = (column + tl.arange(0, COLUMNS) < WIDTH)[None, :]
    tl.store(at, rounded(values, x.pointer.dtype.element_ty), mask=inside_rows & inside_columns)


@triton.jit
def load_chunk(matrix, c, CHUNK: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """Load rows [c, c + CHUNK) of a dense matrix [K, V]; 0 from row K and from column V on."""
    return load_rows(Rows(matrix + c * V, V, K - c), 0, 0, CHUNK, block(V), V, ragged(K, CHUNK))


@triton.jit
def load_vector(x, column, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """Load x[column : column + COLUMNS]; 0 from WIDTH on."""
    c = column + tl.arange(0, COLUMNS)
    return tl.load(x + c, mask=c < WIDTH, other=0.0)


@triton.jit
def feature_map(x, ELU: tl.constexpr):
    """Return σ(x) = ELU(x) + 1 in float32, as exp(x) below zero; x itself where it is mapped already (ELU False)."""
    x = x.to(tl.float32)
    if ELU:
        # tl.exp would keep results below float32's normal numbers, by three instructions more
        return tl.where(x > 0, x + 1, tl.exp2(tl.minimum(x, 0.0) * LOG2_E))
    return x


@triton.jit
def feature_map_grad(features, ELU: tl.constexpr):
    """Return σ'(x) for features = σ(x): σ itself up to 1, where x is not positive, and 1 beyond."""
    if ELU:
        return tl.minimum(features, 1.0)
    return tl.full(features.shape, 1.0, tl.float32)


@triton.jit
def capped(x, softcap):
    """Return softcap · tanh(x) for powers of two, x being scores over softcap; x itself where softcap is None."""
    if softcap is not None:
        shrunk = tl.exp2(tl.abs(x) * (-2 * LOG2_E))
        size = (1.0 - shrunk) / (1.0 + shrunk)
        x = tl.where(x < 0, -size, size) * (softcap * LOG2_E)
    return x


@triton.jit
def capped_grad(dx, x, softcap):
    """Return dx · (1 − tanh²) for the x that `capped` returned."""
    if softcap is not None:
        share = x * (1.0 / (softcap * LOG2_E))
        dx = dx * (1.0 - share * share)
    return dx


@triton.jit
def score_factor(scale, softcap):
    """Return what turns products of queries and keys into scores, before `capped`."""
    factor = scale * LOG2_E
    if softcap is not None:
        factor = scale / softcap
    return factor


@triton.jit
def reciprocal(weight):
    """Return 1 / weight; 0 where the weight is 0 or has underflowed."""
    normal = tl.abs(weight) >= TINY
    return tl.where(normal, 1.0 / tl.where(normal, weight, 1.0), 0.0)


@triton.jit
def peak_reciprocal(z, axis: tl.constexpr):
    """Return 1 / max |z|; 0 where z is 0 or has lost its digits to underflow."""
    peak = tl.max(tl.abs(z), axis)
    return tl.where(peak >= LEAST_PEAK, 1.0 / tl.where(peak >= LEAST_PEAK, peak, 1.0), 0.0)


@triton.jit
def largest(features, column, WIDTH: tl.constexpr):
    """Return max |σ| of every row of features, whose first is that of `column`, before column WIDTH."""
    COLUMNS: tl.constexpr = features.shape[1]
    sizes = tl.abs(features)
    if ragged(WIDTH, COLUMNS):
        sizes = tl.where((column + tl.arange(0, COLUMNS) < WIDTH)[None, :], sizes, 0.0)
    return tl.max(sizes, 1)


@triton.jit
def sum_of_squares(z):
    """Return Σ z², the same in every lane."""
    # LLVM would fuse one lane's square with the sum's first addition, but not with the maximum
    return tl.sum(tl.maximum(z * z, 0.0), 0)


@triton.jit
def inverse_weight(weight, most, inverse_peak):
    """Return 1 / σ z, z over its peak, for features of at most `most`; 0 where σ z is too small: see `least_weight`."""
    least = tl.maximum(most * (LEAST_PEAK * tl.maximum(inverse_peak, 1.0)), TINY)
    held = tl.abs(weight) >= least
    return tl.where(held, 1.0 / tl.where(held, weight, 1.0), 0.0)


@triton.jit
def whole_rows(x, first, ROWS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr):
    """Load rows of x from `first` on where a chunk is all of their columns; else return None.

    Rows beyond x.stop are the last one again: predicated loads would wait for each other.
    """
    whole = None
    if CHUNK == K:
        r = tl.minimum(tl.arange(0, ROWS), x.stop - 1 - first)
        at = r[:, None] * x.stride + tl.arange(0, K)[None, :]
        whole = tl.load(x.pointer + tl.cast(first, tl.int64) * x.stride + at)
    return whole


@triton.jit
def chunk_features(
    x, first, whole, c, ELU: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Return columns [c, c + CHUNK) of σ(x), of `whole` where that holds them all."""
    return feature_map(load_rows(x, first, c, ROWS, CHUNK, K) if whole is None else whole, ELU)


@triton.jit
def memory_inverse(
    x, first, whole, normalizer, ELU: tl.constexpr, ROWS: tl.constexpr, K: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Return 1 / σ(x) z of every row, z over its peak; 0 where the memory holds nothing for it.

    whole: as `whole_rows` returns them, or None.
    """
    weight = tl.zeros([ROWS], tl.float32)
    most = tl.zeros([ROWS], tl.float32)
    for c in tl.range(0, K, CHUNK, num_stages=1):
        features = chunk_features(x, first, whole, c, ELU, ROWS, K, CHUNK)
        weight += tl.sum(features * load_vector(normalizer.z, c, CHUNK, K)[None, :], 1)
        most = tl.maximum(most, largest(features, c, K))
    return inverse_weight(weight, most, tl.load(normalizer.inverse_peak))


@triton.jit
def dot(a, b, acc):
    """Return a b + acc in float32; products of float32 tiles are in full precision."""
    if INTERPRETED:
        # the interpreter would multiply the bits of bfloat16
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def scores(a, b, factor, softcap):
    """Return the scores a bᵀ · factor of two tiles of rows, capped, for powers of two."""
    return capped(dot(a, tl.trans(b), None) * factor, softcap)


@triton.jit
def of_head(values, head):
    """Return a head's value, for powers of two."""
    return tl.load(values + head) * LOG2_E


@triton.jit
def of_heads(values, head, inside):
    """Return the values of the heads [rows] that are `inside`, for powers of two."""
    return tl.load(values + head, mask=inside, other=0.0) * LOG2_E


@triton.jit
def biased(x, i, j, slope):
    """Return scores x less slope · |i − j|, for queries at i and keys at j; x itself where slope is None."""
    if slope is not None:
        x -= slope * tl.abs(i.to(tl.float32) - j.to(tl.float32))
    return x


@triton.jit
def no_keys(ROWS: tl.constexpr, COLUMNS: tl.constexpr, sink_logit=None):
    """Return Σ p v, the scores' peak and Σ p where no key has been seen, but perhaps a sink logit."""
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if sink_logit is not None:
        peak = total + sink_logit
        total += 1.0
    return acc, peak, total


@triton.jit
def operand(x, dtype: tl.constexpr):
    """Return float32 x in `dtype` and the factor to restore it: x / max |x| for float16, which loses small values."""
    if dtype == tl.float16:
        factor = tl.max(tl.max(tl.abs(x), 1), 0)
        x = x * reciprocal(factor)
    else:
        factor = 1.0
    return rounded(x, dtype), factor


@triton.jit
def row_operand(x, dtype: tl.constexpr):
    """Do as `operand`, row by row: factors [rows, 1]."""
    if dtype == tl.float16:
        factor = tl.max(tl.abs(x), 1)[:, None]
        x = x * reciprocal(factor)
    else:
        factor = 1.0
    return rounded(x, dtype), factor


@triton.jit
def chunk_operand(matrix, whole, c, dtype: tl.constexpr, CHUNK: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """Return rows [c, c + CHUNK) of a float32 matrix [K, V] as an `operand`: `whole`, where that holds them all."""
    if whole is not None:
        return whole
    return operand(load_chunk(matrix, c, CHUNK, K, V), dtype)


@triton.jit
def visible(i, j, segment, memory_tokens, CAUSAL: tl.constexpr):
    """Return whether the query at i sees the key at j: all see the memory read, the memory to write sees all."""
    inside = j < segment.end
    if CAUSAL:
        seen = j <= i
        if memory_tokens is not None:
            seen = seen | (j < segment.begin + memory_tokens.read) | (i >= segment.end - memory_tokens.write)
        return inside & seen
    return inside & (i >= segment.begin)


@triton.jit
def keys_seen(first, segment, memory_tokens, ROWS: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr):
    """Return, for queries from `first` on, where the blocks of keys that all see end, and where those that any does."""
    begin, end = segment.begin, segment.end
    full = end
    last = end
    if CAUSAL:
        full = first + 1
        last = tl.minimum(first + ROWS, end)
        if memory_tokens is not None:
            last = tl.maximum(last, tl.minimum(begin + memory_tokens.read, end))
            last = tl.where(first + ROWS > end - memory_tokens.write, end, last)
    return begin + (full - begin) // BLOCK * BLOCK, last
