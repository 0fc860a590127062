"""Packed sequences and padded rows, laid out as segments.

A *slot* holds one segment of one sequence: L consecutive tokens, the last slot of a sequence perhaps fewer, spare slots
none. The number of slots follows from shapes alone, so that nothing here waits for the device and compiled graphs stay
whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("segattn::checked_bounds", mutates_args=())
def checked_bounds(offsets: Tensor, packed: bool, time: int, longest: int, shortest: int) -> Tensor:
    """Return cu_seqlens [N + 1] (`packed`) or spans [B, 2] as int64 [N, 2], once their values are checked.

    longest, shortest: bounds on a sequence's tokens (longest = -1: none), which the RMT mask needs.

    Raises:
        ValueError: offsets that decrease, do not cover [0, time], or leave a row empty; a sequence out of its bounds.
    """
    bounds = torch.stack([offsets[:-1], offsets[1:]], dim=1) if packed else offsets
    pairs = bounds.tolist()
    if packed and (offsets[0] != 0 or offsets[-1] != time or any(a > b for a, b in pairs)):
        raise ValueError(f"cu_seqlens must rise from 0 to T = {time} without decreasing, got {offsets.tolist()}")
    for row, (begin, end) in enumerate(pairs):
        if not packed and not (0 <= begin < end <= time or time == begin == end == 0):
            raise ValueError(
                f"spans[{row}] must be [first, last + 1] of at least one token inside [0, {time}], "
                f"got [{begin}, {end}]; drop rows that are all padding"
            )
        if longest >= 0 and end - begin > longest:
            raise ValueError(
                f"num_read and num_write need sequences of one segment, at most {longest} tokens, got {end - begin}"
            )
        if 0 < end - begin < shortest:
            raise ValueError(
                f"num_read + num_write = {shortest} must not exceed a sequence's length, got {end - begin}"
            )
    return bounds.to(torch.int64, copy=True).contiguous()


@checked_bounds.register_fake
def _(offsets: Tensor, packed: bool, time: int, longest: int, shortest: int) -> Tensor:
    sequences = offsets.shape[0] - 1 if packed else offsets.shape[0]
    return offsets.new_empty((sequences, 2), dtype=torch.int64)


class Slots(NamedTuple):
    """The places of all segments, in F slots."""

    row: Tensor  # [F] batch row
    sequence: Tensor  # [F] which sequence; N for a spare slot
    number: Tensor  # [F] which segment of it, from 0
    begin: Tensor  # [F] first position
    end: Tensor  # [F] one past the last; = begin for a spare slot


def slots_of(bounds: Tensor, batch: int, time: int, segment_len: int) -> Slots:
    """Return the slots of every sequence in order: rows with their own span (N = B), or packed into one row (B = 1)."""
    sequences = bounds.shape[0]
    begin, end = bounds.unbind(1)
    per_row = -(-time // segment_len)
    if sequences == batch:
        sequence = torch.arange(batch, device=bounds.device).repeat_interleave(per_row)
        number = torch.arange(per_row, device=bounds.device).repeat(batch)
        row = sequence
    else:
        # Σ ceil(len / L) ≤ T // L + N
        last = (-(-(end - begin) // segment_len)).cumsum(0)
        slot = torch.arange(time // segment_len + sequences, device=bounds.device)
        sequence = torch.searchsorted(last, slot, right=True)
        number = slot - F.pad(last, (1, 0))[sequence]
        row = torch.zeros_like(slot)
        begin, end = (F.pad(x, (0, 1), value=time) for x in (begin, end))
    first = begin[sequence] + number * segment_len
    stop = torch.minimum(first + segment_len, end[sequence])
    return Slots(row, sequence, number, torch.minimum(first, stop), stop)


class Window(NamedTuple):
    """Some positions of every slot: the tokens that stand there, and which belong to the slot. Both [F, width]."""

    token: Tensor  # row · time + position; some other one outside the slot
    inside: Tensor


def window(slots: Slots, first: Tensor, width: int, time: int, offset: int = 0) -> Window:
    """Return `width` positions from `first` [F] on, in a tensor whose first token is at position `offset`."""
    position = first[:, None] + torch.arange(width, device=first.device)
    inside = (position >= slots.begin.clamp(min=offset)[:, None]) & (position < slots.end[:, None])
    return Window(slots.row[:, None] * time + (position - offset).clamp(0, time - 1), inside)


def gather_tokens(x: Tensor, at: Window) -> Tensor:
    """Gather [B, heads, T, width] into [F, heads, L, width], 0 outside the slots: padding may hold NaN."""
    tokens = x.transpose(1, 2).flatten(0, 1).index_select(0, at.token.flatten())
    return tokens.unflatten(0, at.token.shape).masked_fill(~at.inside[..., None, None], 0).transpose(1, 2)


def scatter_tokens(parts: Sequence[tuple[Tensor, Window]], batch: int, time: int) -> Tensor:
    """Scatter [F, heads, L, width] into [B, heads, T, width]: 0 where no slot holds it; later parts prevail."""
    heads, width = parts[0][0].shape[1], parts[0][0].shape[3]
    tokens = parts[0][0].new_zeros(batch * time + 1, heads, width)
    for values, at in parts:
        target = torch.where(at.inside, at.token, batch * time).flatten()
        tokens = tokens.index_copy(0, target, values.transpose(1, 2).flatten(0, 1))
    return tokens[:-1].unflatten(0, (batch, time)).transpose(1, 2)


class Layout(NamedTuple):
    """The segments of a call, as a kernel finds them: F slots, from shapes alone where every row is whole."""

    time: int
    segment_len: int
    sequences: int  # N
    total: int  # F
    per_row: int  # slots of each row, where slots is None
    slots: Tensor | None = None  # int64 [F, 5]: row, first position, one past the last, those two of its sequence
    runs: Tensor | None = None  # int64 [N, 2]: a sequence's first slot, and its tokens
    lookback: int = 0  # segments before its own that a query sees


def slot_count(sequences: int | None, batch: int, time: int, segment_len: int) -> int:
    """Return F, enough for any lengths of `sequences`; None: whole rows."""
    per_row = -(-time // segment_len)
    return batch * per_row if sequences is None or sequences == batch else time // segment_len + sequences


def layout_of(bounds: Tensor | None, batch: int, time: int, segment_len: int, lookback: int = 0) -> Layout:
    """Lay out rows of `time` tokens, rows with their own span, or sequences packed into one row."""
    per_row = -(-time // segment_len)
    if bounds is None:
        return Layout(time, segment_len, batch, batch * per_row, per_row, lookback=lookback)
    slots = slots_of(bounds, batch, time, segment_len)
    lengths = bounds[:, 1] - bounds[:, 0]
    held = torch.full_like(lengths, per_row) if len(bounds) == batch else -(-lengths // segment_len)
    # a spare slot's sequence lies behind all others
    sequence = F.pad(bounds, (0, 0, 0, 1), value=time)[slots.sequence]
    places = torch.cat([torch.stack([slots.row, slots.begin, slots.end], 1), sequence], 1)
    runs = torch.stack([held.cumsum(0) - held, lengths], 1)
    return Layout(time, segment_len, len(bounds), len(places), per_row, places, runs, lookback)
