"""Segment attention of a sequence that is spread over processes: they exchange what the memory holds, nothing else.

The memory before a rank's first token is all that it needs of earlier ranks: K × (V + 1) numbers per key/value head,
however long the sequence. By the linear rule it is a sum over ranks. By the delta rule each rank is, once its
normaliser is known, an affine map of the memory, M ← P M + B with P = Π (I − A_s); the ranks' maps are composed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import validation as check
from .autocast import autocast, autocast_holds
from .backends import resolve, takes_width
from .exchange import Maps, Ranks, Sums, agree, anchor
from .operation import segment_attention
from .state import MemoryState, SegmentOutput


def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    group: Any,
    segment_len: int,
    gate: Tensor | None = None,
    update: str = "delta",
    memory_q: Tensor | None = None,
    memory_k: Tensor | None = None,
    state: MemoryState | None = None,
    cu_seqlens: Tensor | None = None,
    spans: Tensor | None = None,
    causal: bool = True,
    empty_memory: str = "local",
    scale: float | None = None,
    softcap: float | None = None,
    backend: str | None = None,
    check_ranks: bool = True,
) -> SegmentOutput:
    """`segment_attention` of a sequence whose runs lie on the ranks of `group`, in their order.

    Every rank calls this with its own run, and later goes backward through it. Gradients are of the sum of what the
    ranks differentiate, each for its own inputs; all must ask for gradients of the same arguments. On a group of one
    it is `segment_attention`.

    Args:
        group: a `torch.distributed.ProcessGroup`, or one dimension of a `DeviceMesh`, such as mesh["sp"].
        q, k, v: this rank's run, [B, H, T, K], [B, G, T, K] and [B, G, T, V]: whole segments, as many as one likes; the
            last rank's may end with an unfinished one.
        segment_len, gate, update, memory_q, memory_k, causal, empty_memory, scale, softcap, backend: as in
            `segment_attention`, the same on every rank.
        state: the memory before the whole sequence. On every rank or on none; rank 0's is read and gets the gradient.
        cu_seqlens, spans: not taken, must be None.
        check_ranks: let the ranks agree on their settings before they exchange anything, which costs one collective of
            24 bytes per rank, over the CPU where the group has a backend for it. False where they are known to.

    Returns:
        SegmentOutput(out, state): out [B, H, T, V] of this rank's run; state after the whole sequence, on every rank.

    Raises:
        TypeError, ValueError: on every rank, if any rank's arguments are refused, settings differ, a rank holds no
            tokens, or one before the last a part of a segment.
        RuntimeError: another rank has ended, or does not answer within the group's timeout.
    """
    ranks = Ranks.of(group)
    options: dict[str, Any] = {
        "segment_len": segment_len,
        "update": update,
        "causal": causal,
        "empty_memory": empty_memory,
        "scale": scale,
        "softcap": softcap,
        "backend": backend,
    }
    tensors = {"q": q, "k": k, "v": v, "memory_q": memory_q, "memory_k": memory_k}
    problem: Exception | None = None
    if cu_seqlens is not None or spans is not None:
        problem = ValueError(
            "cu_seqlens and spans must be None for a sequence over several processes, got one of them: give each row "
            "one sequence, from the row's first token on"
        )
    if check_ranks:
        problem = problem or _problem(tensors, gate, state, options)
        settings = {} if problem else _settings(tensors, gate, state, options)
        agree(ranks, settings, 0 if problem else q.shape[2], segment_len, problem)
    elif problem:
        raise problem
    if ranks.size == 1 or gate is None:
        return segment_attention(q, k, v, gate=gate, memory_q=memory_q, memory_k=memory_k, state=state, **options)
    written = k if memory_k is None else memory_k
    if autocast_holds(k.device.type):
        written, v = autocast(written), autocast(v)
    before, after = _states(ranks, written, v, state, segment_len, update, backend)
    out, _ = segment_attention(q, k, v, gate=gate, memory_q=memory_q, memory_k=memory_k, state=before, **options)
    return SegmentOutput(out, after)


def _states(
    ranks: Ranks, k: Tensor, v: Tensor, state: MemoryState | None, segment_len: int, update: str, backend: str | None
) -> tuple[MemoryState, MemoryState]:
    """The memory before this rank's run, and after the last rank's."""
    batch, groups, _, width = k.shape
    zeros = MemoryState.zeros(batch, groups, width, v.shape[3], device=k.device, dtype=check.state_dtype(k))
    start = zeros if state is None or ranks.rank else state
    normalizer = start.normalizer.unsqueeze(-1)
    if update == "linear":
        written = _write(k, v, start, segment_len, update, backend)
        sums = torch.cat([written.memory, written.normalizer.unsqueeze(-1)], dim=-1)
        both = Sums.apply(ranks, anchor(), sums, torch.cat([start.memory, normalizer], dim=-1))
        before, after = (MemoryState(x[..., :-1], x[..., -1]) for x in both)
        return before, after
    # of the values only that there are some
    few = MemoryState(zeros.memory[..., :16], start.normalizer)
    keys = _write(k, v[..., :16], few, segment_len, "linear", backend).normalizer.unsqueeze(-1)
    z_before, z_after = (x.squeeze(-1) for x in Sums.apply(ranks, anchor(), keys, normalizer))
    maps = _maps(k, v, MemoryState(start.memory, z_before), segment_len, backend)
    m_before, m_after = Maps.apply(ranks, anchor(), maps, start.memory)
    return MemoryState(m_before, z_before), MemoryState(m_after, z_after)


def _write(k: Tensor, v: Tensor, state: MemoryState, segment_len: int, update: str, backend: str | None) -> MemoryState:
    """The state with every whole segment of k and v folded in: a call without queries."""
    gate = state.normalizer.new_zeros(k.shape[1])
    after = segment_attention(
        k[:, :, :0], k, v, segment_len=segment_len, gate=gate, update=update, state=state, backend=backend
    ).state
    if after is None:
        raise RuntimeError("attention with a gate must return a memory")
    return after


def _maps(k: Tensor, v: Tensor, start: MemoryState, segment_len: int, backend: str | None) -> Tensor:
    """[B | P], [B, G, K, V + K]: where M and I go when this run's keys are written with its values, and with zeros."""
    width = k.shape[3]
    # as large as the memory is, beside which float16 would lose it
    size = start.normalizer.detach().amax(-1)[..., None, None]
    size = torch.where(size > 0, size, 1)
    identity = size * torch.eye(width, dtype=size.dtype, device=k.device)
    nothing = v.new_zeros(()).expand(*v.shape[:3], width)
    if resolve(backend, k, v) == "triton" and not takes_width(v.shape[3] + width):
        memories = [
            _write(k, values, MemoryState(memory, start.normalizer), segment_len, "delta", backend).memory
            for values, memory in ((v, start.memory), (nothing, identity))
        ]
    else:
        both = MemoryState(torch.cat([start.memory, identity], dim=-1), start.normalizer)
        after = _write(k, torch.cat([v, nothing], dim=-1), both, segment_len, "delta", backend).memory
        memories = list(after.tensor_split((v.shape[3],), dim=-1))
    return torch.cat([memories[0], memories[1] / size], dim=-1)


def _problem(
    tensors: dict[str, Tensor | None], gate: Tensor | None, state: MemoryState | None, options: dict[str, Any]
) -> Exception | None:
    """What `segment_attention` would refuse of this rank's call, found by a call without tokens."""
    try:
        for name, x in tensors.items():
            if x is None and name.startswith("memory"):
                continue
            check.check_floating(name, x)
            if x is not None and (x.ndim != 4 or x.shape[2] != tensors["q"].shape[2]):  # type: ignore[union-attr]
                raise ValueError(
                    f"{name} must have 4 dimensions [batch, heads, time, width] and q's time, got {list(x.shape)}"
                )
        cut = {name: None if x is None else x[:, :, :0] for name, x in tensors.items()}
        segment_attention(**cut, gate=gate, state=state, **options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        return error
    return None


def _settings(
    tensors: dict[str, Tensor | None], gate: Tensor | None, state: MemoryState | None, options: dict[str, Any]
) -> dict[str, object]:
    """What must be equal on every rank, by name."""
    sizes = {
        f"{name}'s {what}": x.shape[dim]
        for name, x in tensors.items()
        if x is not None
        for dim, what in ((0, "batch size"), (1, "heads"), (3, "width"))
    }
    kinds = {f"{name}'s dtype": x.dtype for name, x in tensors.items() if x is not None}
    given = {f"{name} given": x is not None for name, x in {**tensors, "gate": gate, "state": state}.items()}
    return {**options, **kinds, **sizes, **given, "torch.is_grad_enabled()": torch.is_grad_enabled()}
