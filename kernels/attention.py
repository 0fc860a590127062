"""`segment_attention`: one differentiable operation over every backend."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import validation as check
from .autocast import autocast, autocast_holds, without_autocast
from .backends import HAS_TRITON, resolve
from .inference import savable
from .reference import reference_attention
from .sequences import checked_bounds
from .sinks import sinks_of
from .state import HeadBiases, MemoryState, Options, SegmentOutput, Sinks, empty_output
from .torch.attention import torch_attention

if HAS_TRITON:
    from .triton.ops import triton_attention


def segment_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    segment_len: int,
    gate: Tensor | None = None,
    update: str = "delta",
    memory_q: Tensor | None = None,
    memory_k: Tensor | None = None,
    state: MemoryState | None = None,
    cu_seqlens: Tensor | None = None,
    spans: Tensor | None = None,
    causal: bool = True,
    num_read: int = 0,
    num_write: int = 0,
    empty_memory: str = "local",
    scale: float | None = None,
    softcap: float | None = None,
    lookback: int = 0,
    sinks: int = 0,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    past: int | Tensor = 0,
    backend: str | None = None,
) -> SegmentOutput:
    """Attend inside segments of `segment_len` tokens, and blend in what a memory recalls of earlier ones.

    Infini-attention, arXiv 2404.07143 equations 6 to 10: local attention, retrieval, update, gate. The equations as
    computed here, forward and backward, are in `infini/README.md`. Gradients reach every tensor argument, and cross
    segments through the memory. There is no second derivative, and no forward mode. Finite inputs give finite results
    as long as q kᵀ and the memory's sums stay inside the range of float32.

    Args:
        q: [B, H, Tq, K], the last Tq of the Tk positions. bfloat16, float16, float32 or float64; any strides.
        k, v: [B, G, Tk, K] and [B, G, Tk, V], from a segment boundary on; q's dtype. Head h of q uses h // (H / G).
        segment_len: tokens per segment, L.
        gate: [H] β; sigmoid(β) weighs the memory. None: no memory, and the returned state is None.
        update: "delta" writes what the memory does not already return for a key, "linear" adds values as they are.
        memory_q, memory_k: what the memory reads and writes by, before rotary embedding; default q and k. Not looked at
            without a gate.
        state: the memory to begin with, float32 (float64 for float64 inputs); default empty.
        cu_seqlens: int [N + 1] offsets from 0 to T of packed sequences (B = 1), each with its own segments and state.
        spans: int [B, 2], each row's first real token and one past its last. Its segments start there; padding is
            neither attended nor written, and gives 0.
        causal: False lets the queries of a segment see all of its keys.
        num_read, num_write: memory tokens at the ends of a sequence (RMT, arXiv 2207.06881): key j is visible to row i
            where j <= i, j < num_read or i >= T - num_write. For sequences of one segment, without a gate.
        empty_memory: where the memory holds nothing, "local" leaves local attention alone, "gated" keeps the gate, as
            the paper's equation reads.
        scale: of the local scores, positive; default 1 / sqrt(K).
        softcap: scores s become softcap · tanh(s / softcap), as in Gemma 2; positive; default None, not capped.
        lookback: 1 lets a query also see the whole segment before its own (Transformer-XL, arXiv 1901.02860, with
            gradients). Nothing is seen twice: the memory that a segment reads ends one segment earlier, and so does
            the returned state. 0 or 1.
        sinks: the number of first tokens of each sequence that every later one sees (StreamingLLM, arXiv 2309.17453),
            in one softmax with its window; at most segment_len. The memory holds them too.
        sink_k, sink_v: their keys and values, k's dtype: [N, G, sinks, K] and [N, G, sinks, V] with N states, or
            [N, G, S, sinks, ·], one for each of the S = ceil(Tk / L) segments of k (for rotary positions within the
            window). Default: the first tokens of k and v.
        sink_logits: [H], one more logit of each head's softmax, of nothing: exp(sink_logits) joins the sum that the
            weights are divided by (attention sinks as in GPT-OSS, arXiv 2508.10925). Neither scaled nor capped.
        alibi_slopes: [H]; a score loses slope · |i − j| (ALiBi, arXiv 2108.12409), after the cap. Not trained. Sinks
            stand directly before the window, whatever their distance in the sequence.
        past: tokens of each sequence before the first of k, whole segments: an integer, or one for each as integers
            [N]. Above 0 sink_k and sink_v must be passed. Not looked at without sinks.
        backend: "triton", "torch", "reference", or None: triton on a GPU (torch for float64), torch elsewhere. triton
            takes K and V from 16 to 256 in steps of 8.

    Returns:
        SegmentOutput(out, state): out [B, H, Tq, V]; state with every segment completed inside k and v folded in, with
        lookback=1 all but the last. Keys and values of the segments that are not are the caller's to keep, and to pass
        again; with lookback=1 the first of them is then only seen, and q begins after it.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
        RuntimeError: forward-mode differentiation, of another backend than "reference".
    """
    if isinstance(q, Tensor) and autocast_holds(q.device.type):
        q, k, v = autocast(q), autocast(k), autocast(v)
        memory_q, memory_k, sink_k, sink_v = (
            None if x is None else autocast(x) for x in (memory_q, memory_k, sink_k, sink_v)
        )
    check.check_tokens(q, k, v)
    segment_len = check.check_integer("segment_len", segment_len, 1)
    check.check_bool("causal", causal)
    check.check_choice("update", update, check.UPDATES)
    check.check_choice("empty_memory", empty_memory, check.EMPTY_MEMORY)
    check.check_memory_inputs(q, k, memory_q, memory_k)
    check.check_offsets(cu_seqlens, spans, q)
    offsets = spans if cu_seqlens is None else cu_seqlens
    check.check_block_mask(num_read, num_write, gate, k.shape[2], segment_len, offsets is not None)
    lookback, sinks = check.check_lookback(lookback, sinks, segment_len, bool(num_read or num_write))
    scale = check.check_scale(scale, q)
    softcap = check.check_softcap(softcap)
    biases = check.check_biases(sink_logits, alibi_slopes, q)
    options = Options(segment_len, update, causal, num_read, num_write, empty_memory, scale, softcap, lookback)
    chosen = resolve(backend, q, v)

    sequences = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    check.check_sinks(sinks, sink_k, sink_v, sequences, -(-k.shape[2] // segment_len), k, v)
    past = check.check_past(past, sequences, segment_len, sink_k, k) if sinks else 0
    if gate is not None:
        check.check_per_head("gate", gate, q)
        gate = gate.to(check.state_dtype(q))
        state = check.check_state(_empty(sequences, k, v) if state is None else state, sequences, k, v)
    elif state is not None:
        raise ValueError("state needs a gate to be read by: pass gate of shape [H], got gate=None")
    bounds = None
    if offsets is not None:
        blocks = num_read + num_write
        longest = segment_len if blocks else -1
        bounds = checked_bounds(offsets, cu_seqlens is not None, k.shape[2], longest, blocks)
    elif isinstance(past, Tensor):
        # rows that see the sinks from different segments on are laid out one by one
        bounds = F.pad(past.new_full((sequences, 1), k.shape[2], dtype=torch.int64), (1, 0))

    if k.shape[2] == 0 or sequences == 0:
        return SegmentOutput(empty_output(q, v), None if state is None else MemoryState(*(x.clone() for x in state)))
    if gate is not None and memory_k is not None and memory_k.requires_grad and k.shape[2] // segment_len <= lookback:
        # nothing is written by it, yet its gradient is zeros, not None: processes that add theirs up each need one
        gate = gate + memory_k[:, :, :0].sum(dtype=gate.dtype)
    memory_q, memory_k = q if memory_q is None else memory_q, k if memory_k is None else memory_k
    if chosen != "reference":
        check.check_no_tangent(q, k, v, memory_q, memory_k, sink_k, sink_v, gate, *biases, *(state or ()))
    extra = sinks_of(k, v, sink_k, sink_v, past, bounds, sinks, options) if sinks else None
    return _run(chosen, q, k, v, memory_q, memory_k, gate, state, bounds, extra, biases, options)


@without_autocast
def _run(
    backend: str, q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, memory_k: Tensor, gate: Tensor | None,
    state: MemoryState | None, bounds: Tensor | None, sinks: Sinks | None, biases: HeadBiases,
    options: Options,
) -> SegmentOutput:  # fmt: skip
    """Run a checked call. bounds [N, 2]: rows' spans, or N sequences packed into one row; None for whole rows."""
    q, k, v, memory_q, memory_k, gate, bounds, slopes, logits, *held = savable(
        q, k, v, memory_q, memory_k, gate, bounds, *biases, *(state or ())
    )
    biases = HeadBiases(slopes, logits)
    state = None if state is None else MemoryState(*held)
    if backend == "triton":
        return triton_attention(q, k, v, memory_q, memory_k, gate, state, bounds, sinks, biases, options)
    if backend == "torch":
        return torch_attention(q, k, v, memory_q, memory_k, gate, state, bounds, sinks, biases, options)
    return reference_attention(q, k, v, memory_q, memory_k, gate, state, bounds, sinks, biases, options)


def _empty(sequences: int, k: Tensor, v: Tensor) -> MemoryState:
    _, groups, _, width = k.shape
    return MemoryState.zeros(sequences, groups, width, v.shape[3], device=k.device, dtype=check.state_dtype(k))
