"""`backend="torch"`: all segments at once, by PyTorch's own attention and the memory's closed forms.

CPU, CUDA and MPS run the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import gather_tokens, scatter_tokens, slots_of, window
from .state import MemoryState, Options, SegmentOutput, empty_output
from .torch_memory import blend_into, fold_segments, read_and_blend


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float) -> Tensor:
    """Local attention of slots: q [F, H, Lq, K], k [F, G, Lk, K], v [F, G, Lk, V]; the fused kernels want K = V."""
    key_width, value_width = q.shape[-1], v.shape[-1]
    if key_width < value_width:
        q, k = (F.pad(x, (0, value_width - key_width)) for x in (q, k))
    elif value_width < key_width:
        v = F.pad(v, (0, key_width - value_width))
    grouped = True if q.shape[1] != k.shape[1] else False  # noqa: SIM210  a bool also where compiled sizes are symbols
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out[..., :value_width]


class Reader(NamedTuple):
    """Blends what a memory recalls into local attention."""

    gate: Tensor
    always: bool

    def __call__(self, local: Tensor, memory_q: Tensor, state: MemoryState) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return read_and_blend(local, memory_q, *state, self.gate, self.always)
        # nothing is kept for a backward, so the result takes local attention's place
        return blend_into(local, local, memory_q, *state, self.gate, self.always)


def to_slots(x: Tensor, first: int, last: int, segment_len: int) -> Tensor:
    """Segments in [first, last) of x [B, heads, T, width] as [B · S, heads, L, width]; a view where strides allow."""
    segments = (last - first) // segment_len
    return x[:, :, first:last].unflatten(2, (segments, segment_len)).transpose(1, 2).flatten(0, 1)


def from_slots(x: Tensor, batch: int) -> Tensor:
    """The inverse: [B · S, heads, L, width] → [B, heads, S · L, width]."""
    return x.unflatten(0, (batch, x.shape[0] // batch)).transpose(1, 2).flatten(2, 3)


def cuts(first: int, time: int, segment_len: int) -> Iterator[tuple[int, int, int, int]]:
    """Runs of queries in [first, time): the rest of a segment, whole segments, an unfinished one.

    Each as first position, one past the last, first segment, one past the last.
    """
    start = -(-first // segment_len) * segment_len
    whole = time // segment_len * segment_len
    if first < min(start, time):
        yield first, min(start, time), first // segment_len, first // segment_len + 1
    if start < whole:
        yield start, whole, start // segment_len, whole // segment_len
    if max(start, whole) < time:
        yield max(start, whole), time, time // segment_len, time // segment_len + 1


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    reader: Reader | None,
    state: MemoryState | None,
    mask: Tensor | None,
    options: Options,
) -> SegmentOutput:
    """Rows of equal length: slots are views of q, k and v, and causality needs no mask but in a segment's rest.

    mask [Tq, Tk]: in place of causality, for rows of one segment.
    """
    batch, _, time, _ = k.shape
    L, first_query = options.segment_len, time - q.shape[2]
    each = time // L
    k_slots, v_slots = (to_slots(x, 0, each * L, L) for x in (k, v))
    before = None
    if state is not None:
        written = k_slots if memory_k is k else to_slots(memory_k, 0, each * L, L)
        m_before, z_before, m, z = fold_segments(written, v_slots, *state, None, None, options.update == "delta")
        state = MemoryState(m, z)
        before = [x.unflatten(0, (batch, each)) for x in (m_before, z_before)]
    outs = []
    for first, last, segment, stop in cuts(first_query, time, L):
        held = min(L, last - segment * L)
        asked = min(held, last - first)
        mine = slice(first - first_query, last - first_query)
        queries = to_slots(q[:, :, mine], 0, last - first, asked)
        keys, values = k_slots, v_slots
        if (segment, stop) != (0, each):
            keys, values = (to_slots(x, segment * L, last, held) for x in (k, v))
        is_causal, visible = options.causal and mask is None, mask
        if is_causal and asked < held:
            is_causal, visible = False, torch.ones(asked, held, dtype=torch.bool, device=q.device).tril(held - asked)
        out = attend(queries, keys, values, visible, is_causal, options.scale)
        if reader is not None and before is not None and state is not None:
            seen = state if segment == each else MemoryState(*(x[:, segment:stop].flatten(0, 1) for x in before))
            out = reader(
                out, queries if memory_q is q else to_slots(memory_q[:, :, mine], 0, last - first, asked), seen
            )
        outs.append(from_slots(out, batch))
    if not outs:
        return SegmentOutput(empty_output(q, v), state)
    return SegmentOutput(outs[0] if len(outs) == 1 else torch.cat(outs, dim=2), state)


def attend_sequences(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    reader: Reader | None,
    state: MemoryState | None,
    bounds: Tensor,
    options: Options,
) -> SegmentOutput:
    """Sequences of any lengths: tokens are gathered into slots and scattered back."""
    batch, _, time, _ = k.shape
    L, query_time = options.segment_len, q.shape[2]
    slots = slots_of(bounds, batch, time, L)
    keys_at = window(slots, slots.begin, L, time)
    first_query = slots.begin.clamp(min=time - query_time)
    # a slot's queries follow one another: fewer than L of them when the call brings fewer
    width = min(query_time, L)
    queries_at = window(slots, first_query, width, query_time, time - query_time)

    mask = None
    if not options.causal or options.num_read or options.num_write or query_time < time:
        i = first_query[:, None, None] + torch.arange(width, device=k.device)[:, None]
        j = slots.begin[:, None, None] + torch.arange(L, device=k.device)
        read = j < slots.sequence_begin[:, None, None] + options.num_read
        write = i >= slots.sequence_end[:, None, None] - options.num_write
        mask = ((j <= i) | read | write | (not options.causal)) & keys_at.inside[:, None]
        # rows outside the slot see everything, so that no row is empty
        mask = (mask | ~queries_at.inside[:, :, None]).unsqueeze(1)
    queries = gather_tokens(q, queries_at)
    keys, values = gather_tokens(k, keys_at), gather_tokens(v, keys_at)
    out = attend(queries, keys, values, mask, mask is None, options.scale)
    if reader is not None and state is not None:
        owner = None if len(bounds) == batch else slots.sequence
        written = keys if memory_k is k else gather_tokens(memory_k, keys_at)
        complete = keys_at.inside[:, -1]
        m_before, z_before, m, z = fold_segments(written, values, *state, complete, owner, options.update == "delta")
        state = MemoryState(m, z)
        asked = queries if memory_q is q else gather_tokens(memory_q, queries_at)
        out = reader(out, asked, MemoryState(m_before, z_before))
    return SegmentOutput(scatter_tokens(out, queries_at, batch, query_time), state)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    bounds: Tensor | None,
    options: Options,
) -> SegmentOutput:
    """bounds [N, 2]: the rows' spans, or N sequences packed into one row; None for whole rows."""
    reader = None if gate is None else Reader(gate, options.empty_memory == "gated")
    if bounds is not None:
        return attend_sequences(q, k, v, memory_q, memory_k, reader, state, bounds, options)
    mask = None
    if options.causal and (options.num_read or options.num_write):
        time = k.shape[2]
        i = torch.arange(time - q.shape[2], time, device=q.device)[:, None]
        j = torch.arange(time, device=q.device)
        mask = (j <= i) | (j < options.num_read) | (i >= time - options.num_write)
    return attend_rows(q, k, v, memory_q, memory_k, reader, state, mask, options)
