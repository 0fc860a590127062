"""`backend="torch"`: all segments at once, by PyTorch's own attention and the memory's closed forms.

CPU, CUDA and MPS run the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..sequences import Slots, gather_tokens, scatter_tokens, slots_of, window
from ..state import HeadBiases, MemoryState, Options, SegmentOutput, Sinks, empty_output
from .memory import blend_into, blend_one_query, fold_segments, read_and_blend


def stores_scores(biases: HeadBiases, options: Options) -> bool:
    """Return whether scores are capped or biased, as no attention of PyTorch does it: they are stored then."""
    return options.softcap is not None or biases.present


def attend_slots_by_scores(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    first: Tensor | None,
    slopes: Tensor | None,
    sink_logits: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Attend as `attend_slots` with scores that are stored, capped and biased."""
    dtype, (query_time, time) = torch.promote_types(q.dtype, torch.float32), (q.shape[2], k.shape[2])
    groups, members = k.shape[1], q.shape[1] // k.shape[1]
    q, k = q.to(dtype).unflatten(1, (groups, members)), k.to(dtype).unsqueeze(2)
    scores = q @ k.mT * (scale if softcap is None else scale / softcap)
    if softcap is not None:
        scores = softcap * scores.tanh()
    if slopes is not None:
        i = torch.arange(query_time, device=q.device) + (time - query_time if first is None else first[:, None])
        distance = (i.unsqueeze(-1) - torch.arange(time, device=q.device)).abs().to(dtype)
        scores = scores - slopes.view(groups, members, 1, 1) * distance[..., None, None, :, :]
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~(mask if mask.ndim == 2 else mask.unsqueeze(2)), float("-inf"))
    if sink_logits is not None:
        sink = sink_logits.view(groups, members, 1, 1).expand(*scores.shape[:4], 1)
        scores = torch.cat([scores, sink], dim=4)
    weights = scores.softmax(-1)[..., :time].to(v.dtype)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    biases: HeadBiases,
    options: Options,
    first: Tensor | None = None,
) -> Tensor:
    """Attend inside slots, q [F, H, Lq, K], k [F, G, Lk, K] and v [F, G, Lk, V], padded where K and V differ.

    first [F]: which of its keys a slot's first query stands at; None: the queries stand at the last ones.
    """
    if stores_scores(biases, options):
        call = (q, k, v, mask, is_causal, first, *biases, options.scale, options.softcap)
        if torch.is_grad_enabled():
            # the scores are computed again for the backward, rather than kept
            return checkpoint(attend_slots_by_scores, *call, use_reentrant=False)
        return attend_slots_by_scores(*call)
    key_width, value_width = q.shape[-1], v.shape[-1]
    if key_width < value_width:
        q, k = (F.pad(x, (0, value_width - key_width)) for x in (q, k))
    elif value_width < key_width:
        v = F.pad(v, (0, key_width - value_width))
    if q.shape[2] == 1 and mask is None and not is_causal:
        # one query sees what all do, so the heads of a group are rows of one: its keys are read once
        rows = q.reshape(*k.shape[:2], -1, q.shape[3])
        out = F.scaled_dot_product_attention(rows, k, v, scale=options.scale).reshape(*q.shape[:3], -1)
    else:
        grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210  a bool also where sizes are symbols
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=is_causal, scale=options.scale, enable_gqa=grouped
        )
    return out[..., :value_width] if value_width < key_width else out


def attend_slots_causally(q: Tensor, k: Tensor, v: Tensor, biases: HeadBiases, options: Options) -> Tensor:
    """Attend causally by queries at the last of the keys' positions.

    Under autograd no mask is kept: queries of zeros stand at the positions before them instead. Windows of two segments
    share one, of a segment's rows, where that is faster: on a CPU, and where scores are stored.
    """
    query_time, time = q.shape[2], k.shape[2]
    if query_time == time:
        return attend_slots(q, k, v, None, True, biases, options)
    window = time > options.segment_len and time >= 2 * query_time
    if torch.is_grad_enabled() and not (window and (q.device.type == "cpu" or stores_scores(biases, options))):
        out = attend_slots(F.pad(q, (0, 0, time - query_time, 0)), k, v, None, True, biases, options)
        return out[:, :, time - query_time :]
    if query_time == 1:
        return attend_slots(q, k, v, None, False, biases, options)
    mask = torch.ones(query_time, time, dtype=torch.bool, device=q.device).tril(time - query_time)
    return attend_slots(q, k, v, mask, False, biases, options)


def blend(local: Tensor, memory_q: Tensor, state: MemoryState, gate: Tensor, options: Options) -> Tensor:
    """Blend what the memory before each slot recalls into local attention."""
    keep_gate = options.empty_memory == "gated"
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return read_and_blend(local, memory_q, *state, gate, keep_gate)
    if local.shape[2] == 1:
        blended = blend_one_query(local, memory_q, state.memory, state.normalizer, gate)
        if blended is not None:
            return blended
    # nothing is kept for a backward, so the result takes local attention's place
    return blend_into(local, local, memory_q, state.memory, state.normalizer, gate, keep_gate)


def part(x: Tensor, first: int, last: int) -> Tensor:
    """Return tokens in [first, last) of x [B, heads, T, width]; all of them as x, whose gradient is not copied then."""
    return x if (first, last) == (0, x.shape[2]) else x[:, :, first:last]


def to_slots(x: Tensor, first: int, last: int, segment_len: int) -> Tensor:
    """Return segments in [first, last) of x [B, heads, T, width] as [B · S, heads, L, width], by a view if possible."""
    segments = (last - first) // segment_len
    return part(x, first, last).unflatten(2, (segments, segment_len)).transpose(1, 2).flatten(0, 1)


def from_slots(x: Tensor, batch: int) -> Tensor:
    """Undo `to_slots`: [B · S, heads, L, width] → [B, heads, S · L, width]."""
    return x.unflatten(0, (batch, x.shape[0] // batch)).transpose(1, 2).flatten(2, 3)


def cuts(first: int, time: int, segment_len: int, edges: Sequence[int] = ()) -> Iterator[tuple[int, int, int, int]]:
    """Yield the runs of queries in [first, time): the rest of a segment, whole segments, an unfinished one.

    Each is its first position, one past its last, its first segment, and one past its last. Whole segments are cut
    before each of the `edges`, segments in rising order.
    """
    start = -(-first // segment_len) * segment_len
    whole = time // segment_len * segment_len
    if first < min(start, time):
        yield first, min(start, time), first // segment_len, first // segment_len + 1
    if start < whole:
        segment, stop = start // segment_len, whole // segment_len
        for i, j in pairwise([segment, *(edge for edge in edges if segment < edge < stop), stop]):
            yield i * segment_len, j * segment_len, i, j
    if max(start, whole) < time:
        yield max(start, whole), time, time // segment_len, time // segment_len + 1


def widened(own: Tensor, x: Tensor, sinks: Tensor | None, segment: int, stop: int, options: Options) -> Tensor:
    """Put sinks [B · S, ...] and the segment before, if it is seen, in front of the keys of [segment, stop)."""
    batch, L = len(x), options.segment_len
    parts = [own]
    if options.lookback and segment:
        parts.insert(0, to_slots(x, (segment - 1) * L, (stop - 1) * L, L))
    if sinks is not None:
        parts.insert(0, sinks.unflatten(0, (batch, len(sinks) // batch))[:, segment:stop].flatten(0, 1))
    return own if len(parts) == 1 else torch.cat(parts, dim=2)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    sinks: Sinks | None,
    biases: HeadBiases,
    options: Options,
) -> SegmentOutput:
    """Attend in rows of equal length: slots are views of q, k and v where strides allow.

    With a lookback or sinks, keys and values are copied into the window of every slot.
    """
    batch, _, time, _ = k.shape
    L, lookback, first_query = options.segment_len, options.lookback, time - q.shape[2]
    each = time // L
    folded = max(each - lookback, 0)
    k_slots, v_slots = (to_slots(x, 0, each * L, L) for x in (k, v))
    before = []
    if state is not None and folded:
        written = k_slots if memory_k is k and not lookback else to_slots(memory_k, 0, folded * L, L)
        values = to_slots(v, 0, folded * L, L) if lookback else v_slots
        m_before, z_before, m, z, _ = fold_segments(written, values, *state, None, None, options.update == "delta")
        state = MemoryState(m, z)
        before = [x.unflatten(0, (batch, folded)) for x in (m_before, z_before)]
    outs = []
    # where the segments of a run begin to see the one before, and the sinks
    edges = sorted({*range(1, lookback + 1), *([] if sinks is None else [sinks.unseen])})
    for first, last, segment, stop in cuts(first_query, time, L, edges):
        key_time = min(L, last - segment * L)
        run_time = min(key_time, last - first)
        run = first - first_query, last - first_query
        queries = to_slots(q, *run, run_time)
        keys, values = k_slots, v_slots
        if (segment, stop) != (0, each):
            keys, values = (to_slots(x, segment * L, last, key_time) for x in (k, v))
        extra = sinks[:2] if sinks is not None and segment >= sinks.unseen else (None, None)
        keys, values = (
            widened(own, x, more, segment, stop, options)
            for own, x, more in zip((keys, values), (k, v), extra, strict=True)
        )
        if options.causal:
            out = attend_slots_causally(queries, keys, values, biases, options)
        else:
            out = attend_slots(queries, keys, values, None, False, biases, options)
        if gate is not None and state is not None:
            i = max(segment - lookback, 0)
            j = i + stop - segment
            seen = state if i == folded else MemoryState(*(x[:, i:j].flatten(0, 1) for x in before))
            reading = queries if memory_q is q else to_slots(memory_q, *run, run_time)
            out = blend(out, reading, seen, gate, options)
        outs.append(from_slots(out, batch))
    if not outs:
        return SegmentOutput(empty_output(q, v), state)
    return SegmentOutput(outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), state)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, biases: HeadBiases, options: Options) -> Tensor:
    """Attend in rows of one segment under the RMT mask, block by block: no mask of T × T is needed."""
    time = k.shape[2]
    first, body = time - q.shape[2], time - options.num_write
    read, write = q[:, :, : max(options.num_read - first, 0)], q[:, :, max(body - first, 0) :]
    tokens = q[:, :, read.shape[2] : q.shape[2] - write.shape[2]]
    blocks = (
        attend_slots(read, k[:, :, : options.num_read], v[:, :, : options.num_read], None, False, biases, options),
        attend_slots_causally(tokens, k[:, :, :body], v[:, :, :body], biases, options),
        attend_slots(write, k, v, None, False, biases, options),
    )
    return torch.cat(blocks, dim=2)


class Keys(NamedTuple):
    """The keys of every slot, at consecutive positions, with the sinks of those that see them in front."""

    first: Tensor  # [F] the first one's position, or that which it takes
    k: Tensor  # [F, G, width, K]
    v: Tensor  # [F, G, width, V]
    held: Tensor  # [F, 1, 1, width]: which there are; of an empty slot all, so that no row of scores is empty


def gather_keys(k: Tensor, v: Tensor, slots: Slots, sinks: Sinks | None, longest: int, options: Options) -> Keys:
    """Gather the keys and values that the queries of every slot may see; longest: tokens of any sequence, at most."""
    time, L = k.shape[2], options.segment_len
    width, begin = min((options.lookback + 1) * L, longest), slots.begin
    empty = slots.begin == slots.end
    if options.lookback:
        begin = torch.where((slots.number > 0) & ~empty, begin - L, begin)
    if sinks is None:
        at = window(slots._replace(begin=begin), begin, width, time)
        held = at.inside | empty[:, None]
        return Keys(begin, gather_tokens(k, at), gather_tokens(v, at), held[:, None, None])
    count = sinks.k.shape[2]
    first = begin - count * sinks.seen
    at = window(slots._replace(begin=begin), first, width + count, time)
    # what is gathered is 0 where the sinks are not, and the other way round
    keys, values = (
        torch.cat([x[:, :, :count] + extra, x[:, :, count:]], dim=2)
        for x, extra in ((gather_tokens(k, at), sinks.k), (gather_tokens(v, at), sinks.v))
    )
    in_front = sinks.seen[:, None] & (torch.arange(width + count, device=k.device) < count)
    return Keys(first, keys, values, (at.inside | in_front | empty[:, None])[:, None, None])


def attend_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    bounds: Tensor,
    sinks: Sinks | None,
    biases: HeadBiases,
    options: Options,
) -> SegmentOutput:
    """Attend in sequences of any lengths: tokens are gathered into slots and scattered back."""
    batch, _, time, _ = k.shape
    query_time = q.shape[2]
    offset = time - query_time
    slots = slots_of(bounds, batch, time, options.segment_len)
    # a compiled graph knows no lengths but the tensor's own
    longest = time if torch.compiler.is_compiling() else int((bounds[:, 1] - bounds[:, 0]).max())
    width = min(options.segment_len, longest)
    seen = gather_keys(k, v, slots, sinks, longest, options)
    # the keys are those of the slot, and nothing in front of them
    alone = options.lookback == 0 and sinks is None
    seen_width = seen.k.shape[2]

    few = query_time == 0 or (query_time < seen_width and not torch.is_grad_enabled())
    # without a mask, queries stand at the positions of all keys, and are 0 outside of the slot
    aligned = options.causal and not few
    first_query = seen.first if aligned else slots.begin.clamp(min=offset) if few else slots.begin
    query_width = seen_width if aligned else query_time if few else width
    queries_at = window(slots, first_query, query_width, query_time, offset)
    queries, place = gather_tokens(q, queries_at), first_query - seen.first
    if options.causal and few:
        i = first_query[:, None] + torch.arange(query_time, device=k.device)
        j = seen.first[:, None] + torch.arange(seen_width, device=k.device)
        visible = (j[:, None] <= i[:, :, None]).unsqueeze(1) & seen.held
        out = attend_slots(queries, seen.k, seen.v, visible, False, biases, options, place)
    else:
        held = None if options.causal else seen.held
        out = attend_slots(queries, seen.k, seen.v, held, options.causal, biases, options, place)
    if aligned and not alone:
        rows = (slots.begin - seen.first)[:, None] + torch.arange(width, device=k.device)
        rows = rows.clamp(max=seen_width - 1)[:, None, :, None]
        out, queries = out.take_along_dim(rows, 2), queries.take_along_dim(rows, 2)
        queries_at = window(slots, slots.begin, width, query_time, offset)
    if gate is not None and state is not None:
        own_at = window(slots, slots.begin, width, time)
        written = seen.k if alone and memory_k is k else gather_tokens(memory_k, own_at)
        values = seen.v if alone else gather_tokens(v, own_at)
        owner = None if len(bounds) == batch else slots.sequence
        before, state = fold_sequences(written, values, slots, owner, state, options)
        reading = queries if memory_q is q else gather_tokens(memory_q, queries_at)
        out = blend(out, reading, before, gate, options)
    parts = [(out, queries_at)]
    if query_time and options.num_read and options.causal:
        at = window(slots, slots.begin, options.num_read, query_time, offset)
        read_k, read_v = (x[:, :, : options.num_read] for x in (seen.k, seen.v))
        parts.append((attend_slots(gather_tokens(q, at), read_k, read_v, None, False, biases, options), at))
    if query_time and options.num_write and options.causal:
        first_query = slots.end - options.num_write
        at = window(slots, first_query, options.num_write, query_time, offset)
        writing, place = gather_tokens(q, at), first_query - seen.first
        parts.append((attend_slots(writing, seen.k, seen.v, seen.held, False, biases, options, place), at))
    return SegmentOutput(scatter_tokens(parts, batch, query_time), state)


def fold_sequences(
    k: Tensor, v: Tensor, slots: Slots, owner: Tensor | None, state: MemoryState, options: Options
) -> tuple[MemoryState, MemoryState]:
    """Write the slots' own k [F, G, L, K] and v [F, G, L, V]; return the memory that each slot reads, and the last."""
    complete = slots.end - slots.begin == options.segment_len
    if options.lookback:
        # a sequence's last whole segment is left for the next call
        complete = complete & F.pad(complete[1:] & (slots.number[1:] > 0), (0, 1))
    m_before, z_before, m, z, _ = fold_segments(k, v, *state, complete, owner, options.update == "delta")
    before = MemoryState(m_before, z_before)
    if options.lookback:
        read = torch.arange(len(complete), device=k.device) - (slots.number > 0).long()
        before = MemoryState(*(x.index_select(0, read) for x in before))
    return before, MemoryState(m, z)


def torch_attention(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, memory_k: Tensor, gate: Tensor | None,
    state: MemoryState | None, bounds: Tensor | None, sinks: Sinks | None, biases: HeadBiases,
    options: Options,
) -> SegmentOutput:  # fmt: skip
    """Run a call of `segment_attention` on every segment at once.

    bounds [N, 2]: the rows' spans, or N sequences packed into one row; None for whole rows.
    """
    if bounds is not None:
        return attend_sequences(q, k, v, memory_q, memory_k, gate, state, bounds, sinks, biases, options)
    if options.causal and (options.num_read or options.num_write):
        return SegmentOutput(attend_blocks(q, k, v, biases, options), state)
    return attend_rows(q, k, v, memory_q, memory_k, gate, state, sinks, biases, options)


def torch_decode(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, gate: Tensor | None, state: MemoryState | None,
    lengths: Tensor | None, sinks: Sinks | None, biases: HeadBiases, options: Options,
) -> Tensor:  # fmt: skip
    """Run a call of `segment_decode`. lengths [B]: tokens in each row of k and v, the last of them q's."""
    batch, _, query_time, _ = q.shape
    if lengths is not None and not torch.compiler.is_compiling() and lengths.device.type == "cpu":
        # nothing waits for their values there, and most of a buffer may be yet to come
        each = [min(n, k.shape[2]) for n in lengths.tolist()]
        longest = max(1, *each)
        if longest < k.shape[2]:
            k, v = k[:, :, :longest], v[:, :, :longest]
        lengths = lengths if min(each) < max(longest, query_time) else None
    if lengths is None and query_time == 1 and sinks is None:
        out = attend_slots(q, k, v, None, False, biases, options)
        return out if gate is None or state is None else blend(out, memory_q, state, gate, options)
    time = k.shape[2]
    end = torch.full((batch,), time, device=q.device) if lengths is None else lengths.clamp(max=time)
    first = end - query_time
    position = (first[:, None] + torch.arange(query_time, device=q.device))[:, None, :, None]
    j = torch.arange(time, device=q.device)
    held = (j < end[:, None])[:, None, None]
    if lengths is not None:
        # tokens beyond a row's length may be anything, NaN too
        k, v = k.masked_fill(~held.mT, 0), v.masked_fill(~held.mT, 0)
    seen = held & (position >= 0) & ((j <= position) if options.causal else True)
    if sinks is not None:
        k, v = torch.cat([sinks.k, k], dim=2), torch.cat([sinks.v, v], dim=2)
        front = sinks.seen[:, None, None, None].expand(-1, -1, query_time, sinks.k.shape[2])
        seen, first = torch.cat([front, seen], dim=3), first + sinks.k.shape[2]
    out = attend_slots(q, k, v, seen | (position < 0), False, biases, options, first)
    if gate is not None and state is not None:
        out = blend(out, memory_q, state, gate, options)
    return out.masked_fill(position < 0, 0)
