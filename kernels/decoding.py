"""`segment_decode`: attention by the last tokens of an unfinished segment, from buffers of a fixed size."""

from __future__ import annotations

import torch
from torch import Tensor

from . import validation as check
from .autocast import autocast, autocast_holds, without_autocast
from .backends import HAS_TRITON, resolve
from .reference import reference_decode
from .state import HeadBiases, MemoryState, Options, Sinks
from .torch.attention import torch_decode

if HAS_TRITON:
    from .triton.ops import triton_decode


def segment_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    memory_q: Tensor | None = None,
    state: MemoryState | None = None,
    causal: bool = True,
    empty_memory: str = "local",
    scale: float | None = None,
    softcap: float | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_seen: Tensor | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    counters: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run `segment_attention` on a few last tokens, for decoding: one launch, and no gradients.

    k and v are buffers, of which each row's first `lengths` tokens count. On a GPU the lengths are read there: a CUDA
    graph of this call may be replayed while the buffers fill. When they hold a whole segment, fold it by `memory_write`
    and begin again.

    Args:
        q: [B, H, Tq, K], the last Tq of a row's tokens. Rows with fewer tokens than that give 0 for those before them.
        k, v: [B, G, L, K] and [B, G, L, V], the segment so far, q's own tokens included; with a lookback of 1, the
            segment before it and then the segment so far.
        lengths: int32 or int64 [B], tokens in each row's buffers, at most L; default L.
        gate: [H] β, with `state`; None: no memory.
        memory_q: what the memory is read by; default q.
        state: the memory before this segment, float32; needed with a gate. With a lookback of 1 that before the
            previous segment.
        causal, empty_memory, scale, softcap, sink_logits, alibi_slopes, backend: as in `segment_attention`.
        sink_k, sink_v: [B, G, n, K] and [B, G, n, V], the keys and values of each row's sinks, which are not in k.
        sink_seen: bool [B], which rows see their sinks; read on the device, as `lengths`. Default: all of them.
        counters: int32 [B · G] of zeros, left as zeros, for the kernel to count by. Default: made in each call, by a
            small launch of its own. Calls that may run at the same time must not share them.

    Returns:
        [B, H, Tq, V] in q's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
        RuntimeError: gradients are wanted, or forward-mode differentiation of another backend than "reference".
    """
    autocasts = isinstance(q, Tensor) and autocast_holds(q.device.type)
    if autocasts:
        q, k, v = autocast(q), autocast(k), autocast(v)
        memory_q, sink_k, sink_v = (None if x is None else autocast(x) for x in (memory_q, sink_k, sink_v))
    check.check_tokens(q, k, v)
    check.check_memory_inputs(q, k, memory_q, None)
    check.check_bool("causal", causal)
    check.check_choice("empty_memory", empty_memory, check.EMPTY_MEMORY)
    scale = check.check_scale(scale, q)
    biases = check.check_biases(sink_logits, alibi_slopes, q)
    if (gate is None) != (state is None):
        raise ValueError("gate and state go together: pass both, or neither for local attention alone")
    if gate is not None:
        check.check_per_head("gate", gate, q)
        gate = gate.to(check.state_dtype(q))
        state = check.check_state(state, q.shape[0], k, v)
    count = sink_k.shape[2] if isinstance(sink_k, Tensor) and sink_k.ndim == 4 else 1
    check.check_sinks(count, sink_k, sink_v, q.shape[0], None, k, v)
    if sink_seen is not None and sink_k is None:
        raise ValueError("sink_seen needs sink_k and sink_v, got sink_k=None")
    _check_per_row("lengths", lengths, "[B]", q.shape[0], (torch.int32, torch.int64), q)
    _check_per_row("sink_seen", sink_seen, "[B]", q.shape[0], (torch.bool,), q)
    _check_per_row("counters", counters, "[B · G]", k.shape[0] * k.shape[1], (torch.int32,), q)
    if counters is not None and not counters.is_contiguous():
        raise ValueError(f"counters must be contiguous, got strides {list(counters.stride())}")
    tensors = (q, k, v, gate, memory_q, sink_k, sink_v, *biases, *(state or ()))
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError("segment_decode has no gradients: call it under torch.no_grad(), or use segment_attention")
    chosen = resolve(backend, q, v)
    if chosen != "reference":
        check.check_no_tangent(*tensors)
    if q.shape[0] == 0 or q.shape[2] == 0:
        return q.new_empty((*q.shape[:3], v.shape[3]))
    options = Options(
        # one more than the buffers hold: the segment stays unfinished, so nothing is written, by no rule
        segment_len=k.shape[2] + 1,
        update="delta",
        causal=causal,
        num_read=0,
        num_write=0,
        empty_memory=empty_memory,
        scale=scale,
        softcap=check.check_softcap(softcap),
    )
    memory_q = q if memory_q is None else memory_q
    sinks = _sinks(sink_k, sink_v, sink_seen, chosen)
    run = without_autocast(_run) if autocasts else _run
    return run(chosen, q, k, v, memory_q, gate, state, lengths, sinks, biases, counters, options)


def _check_per_row(name: str, x: object, letters: str, size: int, dtypes: tuple[torch.dtype, ...], q: Tensor) -> None:
    """Check that an argument is None, or a tensor of so many numbers of one of these dtypes on q's device."""
    if x is None:
        return
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        wanted = " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        got = str(x.dtype) if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be {'a' if wanted == 'bool' else 'an'} {wanted} tensor, got {got}")
    check.check_shape(name, x, letters, (size,))
    check.check_device(name, x, "q", q)


def _sinks(k: Tensor | None, v: Tensor | None, seen: Tensor | None, backend: str) -> Sinks | None:
    """Return the sinks of every row, zeros where it does not see them; None where there are none."""
    if k is None or v is None or k.shape[2] == 0:
        return None
    if seen is None:
        return Sinks(k.contiguous(), v.contiguous(), torch.ones(len(k), dtype=torch.bool, device=k.device))
    if backend == "triton":
        # the kernel does not load those that a row does not see
        return Sinks(k, v, seen)
    unseen = ~seen[:, None, None, None]
    k, v = (x.masked_fill(unseen, 0).contiguous() for x in (k, v))
    return Sinks(k, v, seen)


def _run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, gate: Tensor | None, state: MemoryState | None,
    lengths: Tensor | None, sinks: Sinks | None, biases: HeadBiases, counters: Tensor | None, options: Options,
) -> Tensor:  # fmt: skip
    """Run a checked call by one of the backends."""
    if backend == "triton":
        return triton_decode(q, k, v, memory_q, gate, state, lengths, sinks, biases, counters, options)
    if backend == "torch":
        return torch_decode(q, k, v, memory_q, gate, state, lengths, sinks, biases, options)
    return reference_decode(q, k, v, memory_q, gate, state, lengths, sinks, biases, options)
