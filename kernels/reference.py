"""The specification: the equations of `infini/README.md`, a visible loop over segments, differentiated by PyTorch.

Slow on purpose. Everything else in the package is key_rows to it, best in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .state import HeadBiases, MemoryState, Options, SegmentOutput, Sinks, least_weight


def feature_map(x: Tensor) -> Tensor:
    """Return σ(x) = ELU(x) + 1, as exp(x) below zero so that small values keep their digits."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, distance: Tensor, biases: HeadBiases, options: Options
) -> Tensor:
    """Return softmax(q kᵀ · scale) v over the visible keys, scores perhaps capped and biased.

    visible, distance: [Lq, Lk], may a query see a key, and how far is it.
    """
    scores = q @ k.mT * options.scale
    if options.softcap is not None:
        scores = options.softcap * (scores / options.softcap).tanh()
    if biases.slopes is not None:
        scores = scores - biases.slopes[:, None, None] * distance
    scores = scores.masked_fill(~visible, float("-inf"))
    if biases.sink_logits is not None:
        sink = biases.sink_logits[:, None, None].expand(-1, scores.shape[1], 1)
        scores, v = torch.cat([scores, sink], dim=2), F.pad(v, (0, 0, 0, 1))
    return scores.softmax(-1) @ v


def visibility(rows: Tensor, keys: Tensor, length: int, options: Options) -> Tensor:
    """Return [Lq, Lk]: may the query at position `rows` see the key at `keys`? `length` is that of the sequence."""
    i, j = rows[:, None], keys[None, :]
    return (j <= i) | (j < options.num_read) | (i >= length - options.num_write) | (not options.causal)


def read(features: Tensor, state: MemoryState) -> tuple[Tensor, Tensor]:
    """Return A_mem = σ(q) M / σ(q) z, 0 where the memory is empty, and in which rows [..., L, 1] it is not.

    Both are taken over z's largest entry, which cancels, so that small features do not vanish in their product.
    """
    limits = torch.finfo(features.dtype)
    peak = state.normalizer.detach().abs().amax(-1, keepdim=True)
    peak = peak.masked_fill(peak < limits.tiny / limits.eps, torch.inf)
    weight = features @ (state.normalizer / peak).unsqueeze(-1)
    largest = features.detach().abs().amax(-1, keepdim=True)
    filled = weight.abs() >= least_weight(largest, peak.reciprocal().unsqueeze(-1))
    return torch.where(
        filled, features @ (state.memory / peak.unsqueeze(-1)) / weight.masked_fill(~filled, 1), 0
    ), filled


def write(features: Tensor, v: Tensor, state: MemoryState, update: str) -> MemoryState:
    """Return M + σ(k)ᵀ v and z + Σ σ(k); the delta rule writes v less what the memory already returns for k."""
    value = v - read(features, state)[0] if update == "delta" else v
    return MemoryState(state.memory + features.mT @ value, state.normalizer + features.sum(-2))


def blend(local: Tensor, recalled: Tensor, filled: Tensor, gate: Tensor, empty_memory: str) -> Tensor:
    """Return g A_mem + (1 − g) A_dot; with `empty_memory="local"`, g = 0 where the memory is empty."""
    g = gate.sigmoid()[:, None, None].expand_as(recalled)
    if empty_memory == "local":
        g = g * filled
    return g * recalled + (1 - g) * local


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    first_query: int,
    sinks: Sinks | None,
    biases: HeadBiases,
    options: Options,
) -> tuple[Tensor, MemoryState | None]:
    """Run one sequence: q [H, Tq, K] from position `first_query` on; k, v [H, T, ·] repeated over the group.

    sinks: of this sequence's segments, [S, H, n, ·].
    """
    length, L, lookback = k.shape[-2], options.segment_len, options.lookback
    position = torch.arange(length, device=q.device)
    outs = [q[:, :0, :1].expand(-1, -1, v.shape[-1])]
    states = [] if state is None else [state]
    for s, start in enumerate(range(0, length, L)):
        segment = slice(start, min(start + L, length))
        window = slice(max(start - lookback * L, 0), segment.stop)
        rows = slice(max(start - first_query, 0), max(segment.stop - first_query, 0))
        i, j = position[first_query:][rows], position[window]
        visible, distance = visibility(i, j, length, options), (i[:, None] - j).abs()
        keys, values = k[:, window], v[:, window]
        if sinks is not None and sinks.seen[s]:
            count = sinks.k.shape[2]
            keys, values = torch.cat([sinks.k[s], keys], dim=1), torch.cat([sinks.v[s], values], dim=1)
            visible = F.pad(visible, (count, 0), value=True)
            # as if they stood directly before the window
            front = torch.arange(window.start - count, window.start, device=q.device)
            distance = torch.cat([i[:, None] - front, distance], dim=1)
        out = softmax_attention(q[:, rows], keys, values, visible, distance, biases, options)
        if gate is not None and states:
            before = states[max(s - lookback, 0)]
            out = blend(out, *read(feature_map(memory_q[:, rows]), before), gate, options.empty_memory)
            if segment.stop - start == L:
                states.append(write(feature_map(memory_k[:, segment]), v[:, segment], states[-1], options.update))
        outs.append(out)
    return torch.cat(outs, dim=1), states[max(len(states) - 1 - lookback, 0)] if states else None


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, memory_k: Tensor, gate: Tensor | None,
    state: MemoryState | None, bounds: Tensor | None, sinks: Sinks | None, biases: HeadBiases,
    options: Options,
) -> SegmentOutput:  # fmt: skip
    """Run a call sequence by sequence.

    bounds [N, 2]: the rows' spans, or N sequences packed into one row; None for whole rows.
    """
    batch, _, query_time, _ = q.shape
    time, repeat = k.shape[2], q.shape[1] // k.shape[1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    wide_q, wide_mq = q.to(dtype), memory_q.to(dtype)
    wide_k, wide_v, wide_mk = (x.to(dtype).repeat_interleave(repeat, 1) for x in (k, v, memory_k))
    wide_gate = None if gate is None else gate.to(dtype)
    biases = HeadBiases(*(None if x is None else x.to(dtype) for x in biases))
    out, states = q.new_zeros(*q.shape[:3], v.shape[3]), []
    spans = [[0, time]] * batch if bounds is None else bounds.tolist()
    slot = 0
    for n, (begin, end) in enumerate(spans):
        row, offset = n if len(spans) == batch else 0, time - query_time
        query_rows, key_rows = slice(max(begin - offset, 0), max(end - offset, 0)), slice(begin, end)
        piece, last = attend_sequence(
            wide_q[row, :, query_rows],
            wide_k[row, :, key_rows],
            wide_v[row, :, key_rows],
            wide_mq[row, :, query_rows],
            wide_mk[row, :, key_rows],
            wide_gate,
            None if state is None else MemoryState(*(x[n].repeat_interleave(repeat, 0) for x in state)),
            max(offset - begin, 0),
            None if sinks is None else _of_slots(sinks, slot, dtype, repeat),
            biases,
            options,
        )
        # every row has the slots of a whole one, packed sequences their own
        slot += -(-(time if len(spans) == batch else end - begin) // options.segment_len)
        out[row, :, query_rows] = piece.to(q.dtype)
        if last is not None:
            # the group's heads hold equal memories
            states.append(MemoryState(last.memory[::repeat], last.normalizer[::repeat]))
    if state is None:
        return SegmentOutput(out, None)
    return SegmentOutput(
        out, MemoryState(torch.stack([s.memory for s in states]), torch.stack([s.normalizer for s in states]))
    )


def _of_slots(sinks: Sinks, first: int, dtype: torch.dtype, repeat: int) -> Sinks:
    """Return the sinks from slot `first` on, in `dtype`, repeated over the group."""
    k, v = (x[first:].to(dtype).repeat_interleave(repeat, 1) for x in (sinks.k, sinks.v))
    return Sinks(k, v, sinks.seen[first:])


def reference_decode(
    q: Tensor, k: Tensor, v: Tensor, memory_q: Tensor, gate: Tensor | None, state: MemoryState | None,
    lengths: Tensor | None, sinks: Sinks | None, biases: HeadBiases, options: Options,
) -> Tensor:  # fmt: skip
    """Run a decoding step row by row, each as the call of `segment_attention` that it stands for."""
    time, query_time = k.shape[2], q.shape[2]
    out = q.new_zeros((*q.shape[:3], v.shape[3]))
    for n, length in enumerate([time] * len(q) if lengths is None else lengths.clamp(max=time).tolist()):
        row, first = slice(n, n + 1), max(query_time - length, 0)
        keys, values = (x[row, :, :length] for x in (k, v))
        before = None if state is None else MemoryState(*(x[row] for x in state))
        extra = None if sinks is None else Sinks(sinks.k[row], sinks.v[row], sinks.seen[row])
        q_row, memory_row = (x[row, :, first:] for x in (q, memory_q))
        out[row, :, first:] = reference_attention(
            q_row, keys, values, memory_row, keys, gate, before, None, extra, biases, options
        ).out
    return out
