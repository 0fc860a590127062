"""The specification: the equations of `infini/README.md`, a visible loop over segments, differentiated by PyTorch.

Slow on purpose. Everything else in the package is held to it, best in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .state import MemoryState, SegmentOutput


def feature_map(x: Tensor) -> Tensor:
    """σ(x) = ELU(x) + 1, as exp(x) below zero so that small values keep their digits."""
    return torch.where(x > 0, x + 1, x.clamp(max=0).exp())


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> Tensor:
    """softmax(q kᵀ · scale) v over the visible keys; visible [Lq, Lk]."""
    scores = (q @ k.mT * scale).masked_fill(~visible, float("-inf"))
    return scores.softmax(-1) @ v


def read(features: Tensor, state: MemoryState) -> tuple[Tensor, Tensor]:
    """A_mem = σ(q) M / σ(q) z, and which rows [..., L, 1] found anything: an empty memory gives 0."""
    weight = features @ state.normalizer.unsqueeze(-1)
    found = weight.abs() >= torch.finfo(weight.dtype).tiny
    return torch.where(found, features @ state.memory / weight.masked_fill(~found, 1), 0), found


def write(features: Tensor, v: Tensor, state: MemoryState, update: str) -> MemoryState:
    """M + σ(k)ᵀ (v − what the memory already returns for k) by the delta rule, M + σ(k)ᵀ v by the linear; z + Σ σ(k)."""
    value = v - read(features, state)[0] if update == "delta" else v
    return MemoryState(state.memory + features.mT @ value, state.normalizer + features.sum(-2))


def visibility(rows: Tensor, keys: Tensor, length: int, causal: bool, num_read: int, num_write: int) -> Tensor:
    """[Lq, Lk]: may the query at position `rows` see the key at `keys`? `length` is that of the sequence."""
    i, j = rows[:, None], keys[None, :]
    return (j <= i) | (j < num_read) | (i >= length - num_write) | (not causal)


def blend(local: Tensor, recalled: Tensor, found: Tensor, gate: Tensor, empty_memory: str) -> Tensor:
    """g A_mem + (1 − g) A_dot; with `empty_memory="local"` g = 0 where the memory holds nothing."""
    g = gate.sigmoid()[:, None, None].expand_as(recalled)
    if empty_memory == "local":
        g = g * found
    return g * recalled + (1 - g) * local


def attend_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    memory_q: Tensor,
    memory_k: Tensor,
    gate: Tensor | None,
    state: MemoryState | None,
    *,
    first_query: int,
    segment_len: int,
    update: str,
    causal: bool,
    num_read: int,
    num_write: int,
    empty_memory: str,
    scale: float,
) -> tuple[Tensor, MemoryState | None]:
    """One sequence without padding: q [H, Tq, K] at positions `first_query` and on; k, v [H, T, ·], repeated over the group."""
    length = k.shape[-2]
    outs = [q[:, :0, :1].expand(-1, -1, v.shape[-1])]
    for start in range(0, length, segment_len):
        stop = min(start + segment_len, length)
        rows = slice(max(start - first_query, 0), max(stop - first_query, 0))
        positions = torch.arange(length, device=q.device)
        visible = visibility(positions[first_query:][rows], positions[start:stop], length, causal, num_read, num_write)
        out = attend(q[:, rows], k[:, start:stop], v[:, start:stop], visible, scale)
        if gate is not None and state is not None:
            recalled, found = read(feature_map(memory_q[:, rows]), state)
            out = blend(out, recalled, found, gate, empty_memory)
            if stop - start == segment_len:
                state = write(feature_map(memory_k[:, start:stop]), v[:, start:stop], state, update)
        outs.append(out)
    return torch.cat(outs, dim=1), state


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
    """Sequence by sequence; arguments as `operation.segment_attention` passes them, already checked."""
    batch, heads, query_time, _ = q.shape
    groups, time = k.shape[1], k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    spans = [(0, time)] * batch if bounds is None else bounds.tolist()
    pieces, states = [], []
    for n, (begin, end) in enumerate(spans):
        row = n if len(spans) == batch else 0
        first = min(max(time - query_time, begin), end)
        asked, held = slice(first - (time - query_time), end - (time - query_time)), slice(begin, end)
        repeat = heads // groups
        out, last = attend_sequence(
            q[row, :, asked].to(dtype),
            *(x[row, :, held].to(dtype).repeat_interleave(repeat, 0) for x in (k, v)),
            memory_q[row, :, asked].to(dtype),
            memory_k[row, :, held].to(dtype).repeat_interleave(repeat, 0),
            None if gate is None else gate.to(dtype),
            None if state is None else MemoryState(*(x[n].repeat_interleave(repeat, 0) for x in state)),
            first_query=first - begin,
            segment_len=segment_len,
            update=update,
            causal=causal,
            num_read=num_read,
            num_write=num_write,
            empty_memory=empty_memory,
            scale=scale,
        )
        pieces.append((row, asked, out))
        # the group's heads hold equal memories
        states.append(None if last is None else MemoryState(*(x[::repeat] for x in last)))
    out = q.new_zeros(batch, heads, query_time, v.shape[-1])
    for row, asked, piece in pieces:
        out[row, :, asked] = piece.to(q.dtype)
    if state is None or not states:
        return SegmentOutput(out, state)
    return SegmentOutput(out, MemoryState(*(torch.stack(x) for x in zip(*states, strict=True))))
