"""`backend="triton"`: segment attention and decoding by the kernels, as operations with one backward."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..sequences import layout_of, slot_count
from ..state import HeadBiases, MemoryState, Options, SegmentOutput, Sinks
from .attention import Reading, SavedRows, attend
from .attention_backward import key_grads, query_grads
from .decode import decode
from .launch import dense_rows, new_tokens
from .library import distinct, or_empty, or_none, register, with_flat_options
from .sink_grads import sink_grads
from .write import Normalizer, SegmentMemory, Written, products, write
from .write_backward import state_grads, write_grads

# queries of a group that one tile of the decoding kernel holds
DECODED_ROWS = 64


class Inputs(NamedTuple):
    """The tensors of a call."""

    q: Tensor  # [B, H, Tq, K]
    k: Tensor  # [B, G, Tk, K]
    v: Tensor  # [B, G, Tk, V]
    memory_q: Tensor | None = None  # None: q
    memory_k: Tensor | None = None  # None: k
    gate: Tensor | None = None  # float32 [H]; None: no memory
    memory: Tensor | None = None  # float32 [N, G, K, V], contiguous
    normalizer: Tensor | None = None  # float32 [N, G, K], contiguous
    sink_k: Tensor | None = None  # as `Sinks`; None: no sinks
    sink_v: Tensor | None = None
    sink_logits: Tensor | None = None  # as `HeadBiases`
    slopes: Tensor | None = None
    sink_seen: Tensor | None = None
    bounds: Tensor | None = None  # int64 [N, 2]: spans of rows, or sequences packed into one row; None: whole rows

    def sinks(self) -> Sinks | None:
        """Return the sinks of the call."""
        if self.sink_k is None or self.sink_v is None or self.sink_seen is None:
            return None
        return Sinks(self.sink_k, self.sink_v, self.sink_seen)

    def biases(self) -> HeadBiases:
        """Return what each head adds to its softmax."""
        return HeadBiases(self.slopes, self.sink_logits)


class SavedMemory(NamedTuple):
    """Hold what a backward needs of a write. What a call does not have is an empty tensor."""

    matrix: Tensor  # as `SegmentMemory` and its normalizer
    residual: Tensor
    z: Tensor
    inverse_peak: Tensor
    erased: Tensor  # as `Written`
    gamma: Tensor

    @classmethod
    def of(cls, written: Written) -> SavedMemory:
        """Return the tensors of a write that its backward needs."""
        matrix, residual, normalizer = written.before
        return cls(*or_empty(matrix, matrix, residual, *normalizer, written.erased, written.gamma))

    @classmethod
    def shapes(cls, k: Tensor, v: Tensor, slots: int, update: str, corrected: bool = False) -> SavedMemory:
        """Return what `of` returns for a write of k and v into `slots` slots, without data."""
        batch, groups, time, width = k.shape
        matrix = k.new_empty((slots, groups, width, v.shape[3]))
        residual = None if k.dtype == torch.float32 else matrix.new_empty(matrix.shape)
        z = k.new_empty((slots, groups, width), dtype=torch.float32)
        erased = z.new_empty((slots, groups, width, width)) if update == "delta" else None
        gamma = z.new_empty((batch, groups, time)) if corrected else None
        return cls(*or_empty(matrix, matrix, residual, z, z.new_empty((slots, groups)), erased, gamma))

    def before(self) -> SegmentMemory:
        """Return the memory before every slot."""
        return SegmentMemory(self.matrix, or_none(self.residual), Normalizer(self.z, self.inverse_peak))


# in place of the tensors of a `SavedMemory`
NOTHING = (None,) * len(SavedMemory._fields)


@with_flat_options
def attention_forward(inputs: list[Tensor | None], options: Options, save: bool) -> list[Tensor]:
    """Return the output, the state after, and, if `save`, the fields of `SavedRows` and `SavedMemory`.

    What a call does not have is an empty tensor: the state without a gate, for one.
    """
    call = Inputs(*inputs)  # type: ignore[arg-type]
    q, k, v, memory_q, memory_k, gate, memory, normalizer, *_ = call
    layout = layout_of(call.bounds, q.shape[0], k.shape[2], options.segment_len, options.lookback)
    if gate is None or memory is None or normalizer is None:
        out, rows = attend(q, k, v, call.sinks(), call.biases(), None, layout, options, save)
        return [out, *or_empty(q, None, None, *(rows or (None, None)), *NOTHING)]
    written = write(k if memory_k is None else memory_k, v, memory, normalizer, layout, options.update, save=save)
    reading = Reading(q if memory_q is None else memory_q, gate, written.before)
    out, rows = attend(q, k, v, call.sinks(), call.biases(), reading, layout, options, save)
    saved = SavedMemory.of(written) if save else NOTHING
    return [out, written.memory, written.normalizer, *or_empty(q, *(rows or (None, None)), *saved)]


@with_flat_options
def _forward_shapes(inputs: list[Tensor | None], options: Options, save: bool) -> list[Tensor]:
    q, k, v, _, _, gate, memory, normalizer, *_, bounds = Inputs(*inputs)  # type: ignore[arg-type]
    out, local = (new_tokens(q, q.shape[1], q.shape[2], v.shape[3]) for _ in range(2))
    lse2 = q.new_empty(q.shape[:3], dtype=torch.float32)
    if gate is None or memory is None or normalizer is None:
        return [out, *or_empty(q, None, None, None, lse2 if save else None, *NOTHING)]
    state = memory.new_empty(memory.shape), normalizer.new_empty(normalizer.shape)
    if not save:
        return [out, *state, *or_empty(q, None, None, *NOTHING)]
    slots = slot_count(None if bounds is None else len(bounds), q.shape[0], k.shape[2], options.segment_len)
    return [out, *state, local, lse2, *SavedMemory.shapes(k, v, slots, options.update)]


register("attend", attention_forward, _forward_shapes)


@with_flat_options
def attention_backward(
    inputs: list[Tensor | None], saved: list[Tensor], options: Options, dout: Tensor, dstate: list[Tensor]
) -> list[Tensor]:
    """Return the gradients of `Inputs` up to sink_logits, empty where there is none.

    saved: the fields of `SavedRows`, with the output as A_dot where there is no memory, and of `SavedMemory`.
    dstate: of the memory and normalizer after; nothing where there is no memory.
    """
    call = Inputs(*inputs)  # type: ignore[arg-type]
    q, k, v, memory_q, memory_k, gate, *_ = call
    layout = layout_of(call.bounds, q.shape[0], k.shape[2], options.segment_len, options.lookback)
    rows, saved_memory = SavedRows(*saved[:2]), SavedMemory(*saved[2:])
    dout = dense_rows(dout)
    before, groups = saved_memory.before(), k.shape[1]
    reading = None if gate is None else Reading(q if memory_q is None else memory_q, gate, before)
    sinks, biases = call.sinks(), call.biases()
    query = query_grads(q, k, v, sinks, biases, reading, rows, dout, layout, options)
    softmax = rows.lse2, dout, query.deltas.local
    dsinks = (None, None) if sinks is None else sink_grads(q, sinks, biases.slopes, *softmax, layout, options)
    if reading is None:
        dk, dv = key_grads(q, k, v, biases, *softmax, None, None, layout, options)
        return [query.q, dk, dv, *or_empty(q, None, None, None, None, None, *dsinks, query.sink_logits)]
    from_reads = products(
        reading.q, dout, groups, layout, normalizer=before.normalizer, gate=gate, memory_delta=query.deltas.memory,
        read=True, summed=True,
    )  # fmt: skip
    written = k if memory_k is None else memory_k
    dmemory, dnormalizer = (x.contiguous() for x in dstate)
    grads, dm, dz = state_grads(
        written, before, or_none(saved_memory.erased), dmemory, dnormalizer, *from_reads, layout
    )
    dwritten, dv, _ = write_grads(written, v, before.normalizer, grads, layout)
    shared = memory_k is None
    dk, dv = key_grads(q, k, v, biases, *softmax, dwritten if shared else None, dv, layout, options)
    others = query.memory_q, None if shared else dwritten, query.gate, dm, dz, *dsinks, query.sink_logits
    return [query.q, dk, dv, *or_empty(q, *others)]


@with_flat_options
def _backward_shapes(
    inputs: list[Tensor | None], saved: list[Tensor], options: Options, dout: Tensor, dstate: list[Tensor]
) -> list[Tensor]:
    q, k, v, memory_q, memory_k, gate, _, _, *sinks, _, _, _ = Inputs(*inputs)  # type: ignore[arg-type]
    tokens = [None if x is None else new_tokens(x, *x.shape[1:]) for x in (q, k, v, memory_q, memory_k)]
    state = (None, None, None) if gate is None else (gate, *dstate)
    others = [None if x is None else x.new_empty(x.shape) for x in (*state, *sinks)]
    return or_empty(q, *tokens, *others)


register("attend_backward", attention_backward, _backward_shapes)


@with_flat_options
def attention_decode(
    inputs: list[Tensor | None], options: Options, lengths: Tensor | None, counters: Tensor | None
) -> Tensor:
    """Return the output of the last queries of one unfinished segment; see `decode`."""
    call = Inputs(*inputs)  # type: ignore[arg-type]
    q, k, v, memory_q, _, gate, memory, normalizer, *_ = call
    state = None if memory is None or normalizer is None else MemoryState(memory, normalizer)
    reading = q if memory_q is None else memory_q
    return decode(q, k, v, call.sinks(), call.biases(), reading, gate, state, lengths, counters, options)


@with_flat_options
def _decode_shapes(
    inputs: list[Tensor | None], options: Options, lengths: Tensor | None, counters: Tensor | None
) -> Tensor:
    q, _, v, *_ = Inputs(*inputs)  # type: ignore[arg-type]
    return new_tokens(q, q.shape[1], q.shape[2], v.shape[3])


register("decode", attention_decode, _decode_shapes, mutates=["counters"])


class SegmentAttention(torch.autograd.Function):
    """The output, memory and normalizer of a call, differentiable once; without a gate the state is empty."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        inputs = Inputs(*tensors)  # type: ignore[arg-type]
        out, memory, normalizer, *saved = torch.ops.segattn.attend(inputs, *options, True)
        if inputs.gate is None:
            saved[0] = out
        # the backward starts from the memory before every slot, and does not need the initial one
        ctx.save_for_backward(*inputs._replace(memory=None, normalizer=None), *saved)
        ctx.options = options
        return out, memory, normalizer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, *dstate: Tensor) -> tuple[Tensor | None, ...]:
        # read once: a checkpoint computes them at each look
        tensors, count = ctx.saved_tensors, len(Inputs._fields)
        inputs, saved = Inputs(*tensors[:count]), tensors[count:]
        dstate = () if inputs.gate is None else dstate
        grads = torch.ops.segattn.attend_backward(inputs, saved, *ctx.options, dout, dstate)
        # a memory and normalizer come with a gate
        present = inputs._replace(memory=inputs.gate, normalizer=inputs.gate)[:-3]
        return None, *(None if x is None else grad for x, grad in zip(present, grads, strict=True)), None, None, None


def triton_attention(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, memory_k: Tensor, gate: Tensor | None,
    state: MemoryState | None, bounds: Tensor | None, sinks: Sinks | None, biases: HeadBiases, options: Options,
) -> SegmentOutput:  # fmt: skip
    """Run a call of `segment_attention` by the kernels.

    bounds [N, 2]: the rows' spans, or N sequences packed into one row; None for whole rows.
    """
    inputs = _inputs(q, k, v, memory_q, memory_k, gate, state, bounds, sinks, biases)
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        out, memory, normalizer = SegmentAttention.apply(options, *distinct(*inputs))
    elif bounds is None and _is_tail(q, k, options):
        tail = inputs if sinks is None else inputs._replace(**_last_sinks(sinks, len(q)))
        return SegmentOutput(torch.ops.segattn.decode(tail, *options, None, None), state)
    else:
        out, memory, normalizer, *_ = torch.ops.segattn.attend(inputs, *options, False)
    return SegmentOutput(out, None if state is None else MemoryState(memory, normalizer))


def _inputs(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, memory_k: Tensor, gate: Tensor | None,
    state: MemoryState | None, bounds: Tensor | None, sinks: Sinks | None, biases: HeadBiases,
) -> Inputs:  # fmt: skip
    """Return a call's tensors as the kernels take them: copied where a kernel could not step through them."""
    reading = None if memory_q is q or gate is None else dense_rows(memory_q)
    written = None if memory_k is k or gate is None else dense_rows(memory_k)
    memory, normalizer = (None, None) if state is None else (x.contiguous() for x in state)
    gate = None if gate is None else gate.contiguous()
    slopes, logits = (None if x is None else x.contiguous() for x in biases)
    inputs = Inputs(
        dense_rows(q), dense_rows(k), dense_rows(v), reading, written, gate, memory, normalizer,
        slopes=slopes, sink_logits=logits, bounds=bounds,
    )  # fmt: skip
    if sinks is None:
        return inputs
    return inputs._replace(sink_k=dense_rows(sinks.k), sink_v=dense_rows(sinks.v), sink_seen=sinks.seen.contiguous())


def _is_tail(q: Tensor, k: Tensor, options: Options) -> bool:
    """Return whether these are a few queries of the last segment, unfinished, which see all of k: for decoding."""
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    masked = options.causal and options.num_read + options.num_write > 0
    last = k.shape[2]
    if options.lookback and last > options.segment_len:
        last -= options.segment_len
    few = 0 < rows <= DECODED_ROWS and q.shape[2] < k.shape[2]
    return few and q.shape[2] <= last < options.segment_len and not masked


def _last_sinks(sinks: Sinks, batch: int) -> dict[str, Tensor]:
    """Return the sinks of every row's last segment, as decoding takes them."""
    k, v, seen = (x.unflatten(0, (batch, len(x) // batch))[:, -1] for x in sinks[:3])
    return {"sink_k": k, "sink_v": v, "sink_seen": seen.contiguous()}


def triton_decode(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, gate: Tensor | None, state: MemoryState | None,
    lengths: Tensor | None, sinks: Sinks | None, biases: HeadBiases, counters: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """Run a call of `segment_decode` by the kernels.

    lengths [B]: tokens in each row of k and v, the last of them q's. sinks: those of every row, [B, G, n, ·].

    Raises:
        ValueError: more queries than a tile holds.
    """
    rows = q.shape[1] // k.shape[1] * q.shape[2]
    if rows > DECODED_ROWS:
        raise ValueError(
            f"q must have at most {DECODED_ROWS} rows per key/value head, H / G · Tq, for the kernels, got {rows}: "
            f"use segment_attention, or pass backend='torch'"
        )
    lengths = None if lengths is None else lengths.contiguous()
    inputs = _inputs(q, k, v, memory_q, k, gate, state, None, sinks, biases)
    return torch.ops.segattn.decode(inputs, *options, lengths, counters)
