"""`backend="torch"`: all segments at once, by PyTorch's own attention and the memory's closed forms.

CPU, CUDA and MPS run the same code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import gather_tokens, scatter_tokens, slots_of, windows
from .state import MemoryState, SegmentOutput, empty_output
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
    """What blending needs besides the memory."""

    gate: Tensor
    always: bool

    def __call__(self, local: Tensor, memory_q: Tensor, state: MemoryState) -> Tensor:
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return read_and_blend(local, memory_q, *state, self.gate, self.always)
        # nothing is kept for a backward, so the result takes local attention's place
        return blend_into(local, local, memory_q, *state, self.gate, self.always)


def to_slots(x: Tensor, first: int, last: int, segment_len: int) -> Tensor:
    """Tokens first … last of x [B, heads, T, width], whole segments, as [B · S, heads, L, width]; a view where strides allow."""
    segments = (last - first) // segment_len
    return x[:, :, first:last].unflatten(2, (segments, segment_len)).transpose(1, 2).flatten(0, 1)


def from_slots(x: Tensor, batch: int) -> Tensor:
    """The inverse: [B · S, heads, L, width] → [B, heads, S · L, width]."""
    return x.unflatten(0, (batch, x.shape[0] // batch)).transpose(1, 2).flatten(2, 3)


def cuts(first: int, time: int, segment_len: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, segment) of the query runs in [first, time): the rest of a segment, whole segments, an unfinished one."""
    start = -(-first // segment_len) * segment_len
    whole = time // segment_len * segment_len
    if first < min(start, time):
        yield first, min(start, time), first // segment_len
    if start < whole:
        yield start, whole, start // segment_len
    if max(start, whole) < time:
        yield max(start, whole), time, time // segment_len


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    reader: Reader | None,
    state: MemoryState | None,
    *,
    segment_len: int,
    delta: bool,
    causal: bool,
    mask: Tensor | None,
    scale: float,
) -> SegmentOutput:
    """Rows of equal length: slots are views of k and v, no mask is stored where the kernels know it."""
    batch, _, time, _ = k.shape
    first_query = time - q.shape[2]
    each = time // segment_len
    whole = each * segment_len
    before = None
    if state is not None:
        m_before, z_before, *last = fold_segments(
            to_slots(memory_k, 0, whole, segment_len), to_slots(v, 0, whole, segment_len), *state, None, None, delta
        )
        state = MemoryState(*last)
        before = (m_before.unflatten(0, (batch, each)), z_before.unflatten(0, (batch, each)))
    outs = []
    for first, last_query, segment in cuts(first_query, time, segment_len):
        start = segment * segment_len
        many = last_query - start > segment_len
        length = segment_len if many else last_query - first
        keys = segment_len if many else last_query - start
        queries = slice(first - first_query, last_query - first_query)
        is_causal = causal and mask is None
        bias = mask
        if is_causal and length < keys:
            is_causal, bias = False, torch.ones(length, keys, dtype=torch.bool, device=q.device).tril(keys - length)
        local = attend(
            to_slots(q[:, :, queries], 0, last_query - first, length),
            to_slots(k, start, last_query, keys),
            to_slots(v, start, last_query, keys),
            bias,
            is_causal,
            scale,
        )
        if reader is not None and before is not None and state is not None:
            segments = slice(segment, last_query // segment_len) if many else slice(segment, segment + 1)
            held = MemoryState(*(x[:, segments].flatten(0, 1) for x in before)) if segment < each else state
            local = reader(local, to_slots(memory_q[:, :, queries], 0, last_query - first, length), held)
        outs.append(from_slots(local, batch))
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
    *,
    segment_len: int,
    delta: bool,
    causal: bool,
    num_read: int,
    num_write: int,
    scale: float,
) -> SegmentOutput:
    """Sequences of any lengths: tokens are gathered into slots and scattered back."""
    batch, _, time, _ = k.shape
    query_time = q.shape[2]
    slots = slots_of(bounds, batch, time, segment_len)
    key_index, key_inside = windows(slots, slots.begin, segment_len, time)
    first_query = slots.begin.clamp(min=time - query_time)
    # a slot's queries follow one another: fewer than L of them when the call brings fewer
    width = min(query_time, segment_len)
    query_index, query_inside = windows(slots, first_query, width, query_time, time - query_time)

    mask = None
    if not causal or num_read or num_write or query_time < time:
        i = first_query[:, None, None] + torch.arange(width, device=k.device)[:, None]
        j = slots.begin[:, None, None] + torch.arange(segment_len, device=k.device)
        mask = (j <= i) | (j < slots.sequence_begin[:, None, None] + num_read) | (i >= slots.sequence_end[:, None, None] - num_write)
        # rows outside the slot see everything, so that no row is empty
        mask = ((mask | (not causal)) & key_inside[:, None]) | ~query_inside[:, :, None]
        mask = mask.unsqueeze(1)
    values = gather_tokens(v, key_index)
    out = attend(gather_tokens(q, query_index), gather_tokens(k, key_index), values, mask, mask is None, scale)
    if reader is not None and state is not None:
        owner = None if len(bounds) == batch else slots.sequence
        keys = gather_tokens(memory_k, key_index)
        m_before, z_before, *last = fold_segments(keys, values, *state, key_inside[:, -1], owner, delta)
        state = MemoryState(*last)
        out = reader(out, gather_tokens(memory_q, query_index), MemoryState(m_before, z_before))
    return SegmentOutput(scatter_tokens(out, query_index, query_inside, batch, query_time), state)


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    bounds: Tensor | None,
    *,
    segment_len: int,
    update: str,
    causal: bool,
    num_read: int,
    num_write: int,
    empty_memory: str,
    scale: float,
) -> SegmentOutput:
    """Arguments as `operation.segment_attention` passes them, already checked."""
    reader = None if gate is None else Reader(gate, empty_memory == "gated")
    delta = update == "delta"
    if bounds is not None:
        return attend_sequences(
            q, k, v, memory_q, memory_k, reader, state, bounds,
            segment_len=segment_len, delta=delta, causal=causal, num_read=num_read, num_write=num_write, scale=scale,
        )  # fmt: skip
    mask = None
    if causal and (num_read or num_write):
        time = k.shape[2]
        i = torch.arange(time - q.shape[2], time, device=q.device)[:, None]
        j = torch.arange(time, device=q.device)
        mask = (j <= i) | (j < num_read) | (i >= time - num_write)
    return attend_rows(
        q, k, v, memory_q, memory_k, reader, state,
        segment_len=segment_len, delta=delta, causal=causal, mask=mask, scale=scale,
    )  # fmt: skip
