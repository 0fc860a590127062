"""The kernels as operations that PyTorch knows: opaque to the compiler, with shapes for it, and one backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sequences import layout_of, slot_count
from ..state import Options
from .attention import attend
from .attention_backward import key_grads, query_grads
from .decode import decode
from .launch import dense_rows, new_tokens
from .write import products, write
from .write_backward import state_grads, write_grads

LIBRARY = torch.library.Library("segattn", "FRAGMENT")
_TOKENS = "Tensor q, Tensor k, Tensor v, Tensor? memory_q, Tensor? memory_k, Tensor? gate"
_OPTIONS = (
    "SymInt segment_len, bool delta, bool causal, SymInt num_read, SymInt num_write, bool always, "
    "float scale, float? softcap"
)


class Kept(NamedTuple):
    """What a backward needs beside the inputs. Fields that do not exist in a call are empty tensors."""

    local: Tensor  # A_dot [B, H, Tq, V] where there is a memory
    statistic: Tensor  # float32 [B, H, Tq]
    before: Tensor  # M / peak, the inputs' dtype [F, G, K, V]
    rest: Tensor  # what that rounding lost, where it is not float32
    z_before: Tensor  # z / peak, float32 [F, G, K]
    inverse_peak: Tensor  # float32 [F, G]
    erased: Tensor  # A, float32 [F, G, K, K], by the delta rule


def _options(
    segment_len: int,
    delta: bool,
    causal: bool,
    num_read: int,
    num_write: int,
    always: bool,
    scale: float,
    softcap: float | None,
) -> Options:
    update, empty_memory = "delta" if delta else "linear", "gated" if always else "local"
    return Options(segment_len, update, causal, num_read, num_write, empty_memory, scale, softcap)


def or_empty(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Operations return tensors only: an empty one stands for None."""
    return tuple(like.new_empty(0) if x is None else x for x in tensors)


def or_none(x: Tensor) -> Tensor | None:
    """The inverse."""
    return x if x.numel() else None


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same, but none of them twice: a compiled graph takes a function's inputs one by one."""
    seen: list[Tensor | None] = []
    for x in tensors:
        again = x is not None and any(x is other for other in seen)
        seen.append(x.view_as(x) if x is not None and again else x)
    return tuple(seen)


LIBRARY.define(
    f"attend({_TOKENS}, Tensor? memory, Tensor? normalizer, Tensor? bounds, {_OPTIONS}, bool keep) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    bounds: Tensor | None,
    segment_len: int,
    delta: bool,
    causal: bool,
    num_read: int,
    num_write: int,
    always: bool,
    scale: float,
    softcap: float | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    """The output, the state after, and what is kept; memory_q, memory_k None: q and k."""
    options = _options(segment_len, delta, causal, num_read, num_write, always, scale, softcap)
    layout = layout_of(bounds, q.shape[0], k.shape[2], segment_len)
    if gate is None or memory is None or normalizer is None:
        out, _, statistic = attend(q, k, v, q, None, None, None, layout, options, keep)
        return out, *or_empty(q, None, None, None, statistic, None, None, None, None, None)
    written = write(k if memory_k is None else memory_k, v, memory, normalizer, layout, segment_len, delta, keep=keep)
    asking = q if memory_q is None else memory_q
    out, local, statistic = attend(q, k, v, asking, gate, written.before, written.z_before, layout, options, keep)
    kept = Kept(
        *or_empty(
            q, local, statistic, written.before, written.rest, written.z_before, written.inverse_peak, written.erased
        )
    )
    if not keep:
        kept = Kept(*or_empty(q, *(None for _ in kept)))
    return out, written.memory, written.normalizer, *kept


@torch.library.register_fake("segattn::attend", lib=LIBRARY)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor | None,
    memory: Tensor | None,
    normalizer: Tensor | None,
    bounds: Tensor | None,
    segment_len: int,
    delta: bool,
    causal: bool,
    num_read: int,
    num_write: int,
    always: bool,
    scale: float,
    softcap: float | None,
    keep: bool,
) -> tuple[Tensor, ...]:
    batch, heads, query_time, key_width = q.shape
    groups, time, value_width = v.shape[1:]
    count = slot_count(None if bounds is None else bounds.shape[0], batch, time, segment_len)
    out = new_tokens(q, heads, query_time, value_width)
    statistic = q.new_empty((batch, heads, query_time), dtype=torch.float32) if keep else None
    if memory is None or normalizer is None:
        return out, *or_empty(q, None, None, None, statistic, None, None, None, None, None)
    state = memory.new_empty(memory.shape), normalizer.new_empty(normalizer.shape)
    if not keep:
        return out, *state, *or_empty(q, *(None for _ in Kept._fields))
    kept = Kept(
        new_tokens(q, heads, query_time, value_width),
        q.new_empty((batch, heads, query_time), dtype=torch.float32),
        q.new_empty((count, groups, key_width, value_width)),
        q.new_empty(0 if q.dtype == torch.float32 else (count, groups, key_width, value_width)),
        q.new_empty((count, groups, key_width), dtype=torch.float32),
        q.new_empty((count, groups), dtype=torch.float32),
        q.new_empty((count, groups, key_width, key_width), dtype=torch.float32) if delta else q.new_empty(0),
    )
    return out, *state, *kept


LIBRARY.define(
    f"attend_backward({_TOKENS}, Tensor local, Tensor statistic, Tensor before, Tensor rest, Tensor z_before, "
    f"Tensor inverse_peak, Tensor erased, Tensor? bounds, {_OPTIONS}, Tensor dout, Tensor? dmemory, "
    "Tensor? dnormalizer) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _attend_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor | None,
    local: Tensor,
    statistic: Tensor,
    before: Tensor,
    rest: Tensor,
    z_before: Tensor,
    inverse_peak: Tensor,
    erased: Tensor,
    bounds: Tensor | None,
    segment_len: int,
    delta: bool,
    causal: bool,
    num_read: int,
    num_write: int,
    always: bool,
    scale: float,
    softcap: float | None,
    dout: Tensor,
    dmemory: Tensor | None,
    dnormalizer: Tensor | None,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, memory_q, memory_k, gate, memory and normalizer; local is the output without a memory."""
    options = _options(segment_len, delta, causal, num_read, num_write, always, scale, softcap)
    groups, time = k.shape[1:3]
    layout = layout_of(bounds, q.shape[0], time, segment_len)
    dout = dense_rows(dout)
    if gate is None or dmemory is None or dnormalizer is None:
        dq, _, row_sum, _, _ = query_grads(
            q, k, v, None, local, statistic, None, None, None, None, dout, layout, options
        )
        dk, dv = key_grads(q, k, v, statistic, dout, row_sum, None, None, layout, options)
        return dq, dk, dv, *or_empty(q, None, None, None, None, None)
    dmemory, dnormalizer = dmemory.contiguous(), dnormalizer.contiguous()
    dq, dmemory_q, row_sum, along, dgate = query_grads(
        q, k, v, memory_q, local, statistic, gate, before, or_none(rest), z_before, dout, layout, options
    )
    asking = q if memory_q is None else memory_q
    read, read_sums = products(
        *(asking, dout, z_before, inverse_peak, gate, None, along, groups, time, layout, segment_len),
        elu=True,
        whole=False,
        summed=True,
    )
    written = k if memory_k is None else memory_k
    grads = state_grads(
        written, before, or_none(rest), z_before, inverse_peak, or_none(erased), dmemory, dnormalizer, read,
        read_sums, layout, segment_len,
    )  # fmt: skip
    dwritten, dv, _ = write_grads(written, v, None, None, z_before, grads, layout, segment_len)
    shared = memory_k is None
    dk, dv = key_grads(q, k, v, statistic, dout, row_sum, dwritten if shared else None, dv, layout, options)
    dmemory_k = None if shared else dwritten
    return dq, dk, dv, *or_empty(q, dmemory_q, dmemory_k, dgate), grads.memory, grads.normalizer


@torch.library.register_fake("segattn::attend_backward", lib=LIBRARY)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor | None,
    memory_k: Tensor | None,
    gate: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *_, dmemory, dnormalizer = rest
    grads = tuple(new_tokens(x, *x.shape[1:]) for x in (q, k, v))
    if gate is None or dmemory is None or dnormalizer is None:
        return *grads, *or_empty(q, None, None, None, None, None)
    dmemory_q = None if memory_q is None else new_tokens(q, *q.shape[1:])
    dmemory_k = None if memory_k is None else new_tokens(memory_k, *memory_k.shape[1:])
    return (
        *grads,
        *or_empty(q, dmemory_q, dmemory_k),
        gate.new_empty(gate.shape),
        dmemory.new_empty(dmemory.shape),
        dnormalizer.new_empty(dnormalizer.shape),
    )


LIBRARY.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor? memory_q, Tensor? gate, Tensor? memory, Tensor? normalizer, "
    "Tensor? lengths, Tensor(a!)? counters, bool causal, bool always, float scale, float? softcap) -> Tensor"
)


def _decode(q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor | None, gate: Tensor | None, *rest: Any) -> Tensor:
    return decode(q, k, v, q if memory_q is None else memory_q, gate, *rest)


@torch.library.register_fake("segattn::decode", lib=LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    return new_tokens(q, q.shape[1], q.shape[2], v.shape[3])


for device in ("CPU", "CUDA"):
    LIBRARY.impl("attend", _attend, device)
    LIBRARY.impl("attend_backward", _attend_backward, device)
    LIBRARY.impl("decode", _decode, device)


class Attend(torch.autograd.Function):
    """(out, memory, normalizer) of a call, differentiable once; memory and normalizer are empty without a gate."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        memory_q: Tensor | None,
        memory_k: Tensor | None,
        gate: Tensor | None,
        memory: Tensor | None,
        normalizer: Tensor | None,
        bounds: Tensor | None,
        *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, *state_and_kept = torch.ops.segattn.attend(
            q, k, v, memory_q, memory_k, gate, memory, normalizer, bounds, *options, True
        )
        memory_after, normalizer_after, *kept = state_and_kept
        if gate is None:
            kept[0] = out
        ctx.save_for_backward(q, k, v, memory_q, memory_k, gate, bounds, *kept)
        ctx.options = options
        return out, memory_after, normalizer_after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dmemory: Tensor, dnormalizer: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, memory_q, memory_k, gate, bounds, *kept = ctx.saved_tensors
        without = gate is None
        grads = torch.ops.segattn.attend_backward(
            *(q, k, v, memory_q, memory_k, gate, *kept, bounds, *ctx.options, dout),
            None if without else dmemory,
            None if without else dnormalizer,
        )
        given = (q, k, v, memory_q, memory_k, gate, None if without else dmemory, None if without else dnormalizer)
        found = (None if x is None else grad for x, grad in zip(given, grads, strict=True))
        return *found, None, *(None for _ in ctx.options)
