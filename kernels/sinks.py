"""Sinks: the first tokens of a sequence, laid out as extra keys of every slot that sees them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .sequences import Slots, slots_of
from .state import Options, Sinks


def sinks_of(
    k: Tensor,
    v: Tensor,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    past: int | Tensor,
    bounds: Tensor | None,
    count: int,
    options: Options,
) -> Sinks:
    """Return the sinks of a checked call: those that are passed, or the first `count` tokens of every sequence.

    A slot sees them where its window of `lookback` + 1 segments does not begin with them.
    """
    batch, _, time, _ = k.shape
    before = past // options.segment_len
    if bounds is None:
        slots, number = None, torch.arange(-(-time // options.segment_len), device=k.device).repeat(batch)
        seen = number + before > options.lookback
    else:
        slots = slots_of(bounds, batch, time, options.segment_len)
        if isinstance(before, Tensor):
            before = before[slots.sequence.clamp(max=len(bounds) - 1)]
        seen = (slots.number + before > options.lookback) & (slots.begin < slots.end)
    unseen = ~seen[:, None, None, None]
    keys, values = (
        _to_slots(_first_tokens(x, bounds, count) if passed is None else passed, slots, batch, len(seen))
        .masked_fill(unseen, 0)
        .contiguous()
        for x, passed in ((k, sink_k), (v, sink_v))
    )
    return Sinks(keys, values, seen, 0 if isinstance(before, Tensor) else max(options.lookback + 1 - before, 0))


def _first_tokens(x: Tensor, bounds: Tensor | None, count: int) -> Tensor:
    """Return the first `count` tokens of every sequence in x [B, heads, T, width] as [N, heads, count, width].

    What a sequence of fewer tokens has in their place is of no account: it has no segment that sees them.
    """
    if bounds is None:
        return F.pad(x[:, :, :count], (0, 0, 0, max(count - x.shape[2], 0)))
    position = (bounds[:, :1] + torch.arange(count, device=x.device)).clamp(max=x.shape[2] - 1)
    row = torch.arange(x.shape[0], device=x.device)[:, None] if len(bounds) == x.shape[0] else 0
    return x.transpose(1, 2)[row, position].transpose(1, 2)


def _to_slots(x: Tensor, slots: Slots | None, batch: int, total: int) -> Tensor:
    """Return x [N, G, n, width], or [N, G, S, n, width] with one for each segment, as [F, G, n, width]."""
    if slots is None or len(x) == batch:
        each = x.transpose(1, 2) if x.ndim == 5 else x.unsqueeze(1).expand(-1, total // batch, -1, -1, -1)
        return each.flatten(0, 1)
    if x.ndim == 4:
        return repeat_over_slots(x, slots.sequence)
    at = slots.sequence * x.shape[2] + slots.number
    return x.transpose(1, 2).flatten(0, 1).index_select(0, at.clamp(max=len(x) * x.shape[2] - 1))


@torch.library.custom_op("segattn::repeat_over_slots", mutates_args=())
def repeat_over_slots(x: Tensor, sequence: Tensor) -> Tensor:
    """Return x [N, ...] as [F, ...], for every slot that of its sequence [F]; of a spare slot, N, the last one."""
    return x.index_select(0, sequence.clamp(max=len(x) - 1))


@repeat_over_slots.register_fake
def _(x: Tensor, sequence: Tensor) -> Tensor:
    return x.new_empty((sequence.shape[0], *x.shape[1:]))


@torch.library.custom_op("segattn::sum_over_slots", mutates_args=())
def sum_over_slots(x: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    """Return the sum of x [F, ...] over the slots of every sequence, [N, ...]: the adjoint of `repeat_over_slots`.

    The sum is at least in float32, and its order is fixed: two runs agree to the bit.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = wide.new_zeros((sequences + 1, *x.shape[1:]))
    if x.device.type == "cpu":
        total.index_add_(0, sequence, wide)
    else:
        # on a GPU this one sorts, while index_add_ has atomics; on a CPU it is the other way round
        total.index_put_((sequence,), wide, accumulate=True)
    return total[:-1].to(x.dtype, copy=True)


@sum_over_slots.register_fake
def _(x: Tensor, sequence: Tensor, sequences: int) -> Tensor:
    return x.new_empty((sequences, *x.shape[1:]))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, sequence = inputs
    ctx.save_for_backward(sequence)
    ctx.sequences = len(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (sequence,) = ctx.saved_tensors
    return sum_over_slots(grad, sequence, ctx.sequences), None


repeat_over_slots.register_autograd(_backward, setup_context=_setup)
