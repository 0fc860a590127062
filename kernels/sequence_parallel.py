"""Segment attention of a sequence that is spread over processes: they exchange what the memory holds, nothing else.

The memory before a rank's first token is all that it needs of earlier ranks: K × (V + 1) numbers per key/value head,
however long the sequence. By the linear rule it is a sum over ranks. By the delta rule each rank is, once its
normaliser is known, an affine map of the memory, M ← P M + B with P = Π (I − A_s); the ranks' maps are composed. A
rank's map costs it a pass over its keys, V + K wide, which computes every A_s once more than one process does. The
exchange ends before the call begins: what the state gives is blended in the one pass that also attends.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import validation as check
from .attention import segment_attention
from .autocast import autocast, autocast_holds
from .backends import resolve, takes_width
from .exchange import ANCHOR, Maps, Ranks, Sums, agree_on_runs, modes
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
    lookback: int = 0,
    sinks: int = 0,
    sink_logits: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    backend: str | None = None,
    want_state: bool = True,
    check_ranks: bool = True,
) -> SegmentOutput:
    """Run `segment_attention` on a sequence whose runs lie on the ranks of `group`, in their order.

    Every rank calls this with its run, and later goes backward through it. What is differentiated is the sum of all
    ranks' losses, by each rank's inputs; all ranks must want gradients of the same arguments. On a group of one
    it is `segment_attention`.

    Args:
        group: a `torch.distributed.ProcessGroup`, or one dimension of a `DeviceMesh`, such as mesh["sp"].
        q, k, v: this rank's run, [B, H, T, K], [B, G, T, K] and [B, G, T, V]: whole segments, as many as one likes; the
            last rank's may end with an unfinished one.
        segment_len, gate, update, memory_q, memory_k, causal, empty_memory, scale, softcap, sink_logits, alibi_slopes,
            backend: as in `segment_attention`, the same on every rank.
        state: the memory before the whole sequence. On every rank or on none; rank 0's is read and gets the gradient.
        cu_seqlens, spans: not taken, must be None.
        lookback, sinks: not taken, must be 0.
        want_state: False where nothing uses the state after the whole sequence, which then costs nothing: the state of
            the result is None. The same on every rank.
        check_ranks: let the ranks agree on their settings before they exchange anything, which costs one collective of
            24 bytes per rank, over the CPU where the group has a backend for it. False where they are known to.

    Returns:
        SegmentOutput(out, state): out [B, H, T, V] of this rank's run; state after the whole sequence, on every rank,
        if it is wanted.

    Raises:
        TypeError, ValueError: on every rank, if any rank's arguments are refused, settings differ, a rank holds no
            tokens, or one before the last a part of a segment.
        RuntimeError: another rank has ended, or does not answer within the group's timeout; or PyTorch's
            context_parallel is on.
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
    per_head: dict[str, Any] = {"gate": gate, "sink_logits": sink_logits, "alibi_slopes": alibi_slopes}
    tensors = {"q": q, "k": k, "v": v, "memory_q": memory_q, "memory_k": memory_k}
    problem: Exception | None = under_context_parallel("a sequence over several processes")
    if cu_seqlens is not None or spans is not None:
        problem = ValueError(
            "cu_seqlens and spans must be None for a sequence over several processes, got one of them: give each row "
            "one sequence, from the row's first token on"
        )
    if lookback or sinks:
        problem = ValueError(
            f"lookback and sinks must be 0 for a sequence over several processes, got lookback = {lookback}, sinks = "
            f"{sinks}, for which ranks would have to see each other's tokens: give each rank whole sequences"
        )
    if check_ranks:
        problem = problem or _problem(tensors, per_head, state, options)
        settings = {} if problem else {**_settings(tensors, per_head, state, options), "want_state": want_state}
        agree_on_runs(ranks, settings, 0 if problem else q.shape[2], segment_len, problem)
    elif problem:
        raise problem
    if ranks.size == 1 or gate is None:
        one = segment_attention(q, k, v, memory_q=memory_q, memory_k=memory_k, state=state, **per_head, **options)
        return one if want_state else SegmentOutput(one.out, None)
    written = k if memory_k is None else memory_k
    if autocast_holds(k.device.type):
        written, v = autocast(written), autocast(v)
    before, after = _states(ranks, written, v, state, segment_len, update, backend, want_state)
    out, _ = segment_attention(q, k, v, memory_q=memory_q, memory_k=memory_k, state=before, **per_head, **options)
    return SegmentOutput(out, after)


def under_context_parallel(what: str) -> RuntimeError | None:
    """Return an error if PyTorch's context_parallel is on, as that replaces PyTorch's attention."""
    # which the compiler cannot look at
    if torch.compiler.is_compiling():
        return None
    owner = getattr(F.scaled_dot_product_attention, "__module__", None) or ""
    if not owner.startswith("torch.distributed"):
        return None
    return RuntimeError(
        f"{what} must not be cut by torch.distributed.tensor.experimental.context_parallel: turn it off, and use "
        "segattn.shard_batch and segattn.sequence_parallel, or InfiniAttention's group"
    )


def _states(
    ranks: Ranks,
    k: Tensor,
    v: Tensor,
    state: MemoryState | None,
    segment_len: int,
    update: str,
    backend: str | None,
    want_after: bool,
) -> tuple[MemoryState, MemoryState | None]:
    """Return the memory before this rank's run, and after the last rank's if `want_after`."""
    batch, groups, _, width = k.shape
    zeros = MemoryState.zeros(batch, groups, width, v.shape[3], device=k.device, dtype=check.state_dtype(k))
    start = zeros if state is None or ranks.rank else state
    normalizer = start.normalizer.unsqueeze(-1)
    if update == "linear":
        written = _write(k, v, start, segment_len, update, backend)
        sums = torch.cat([written.memory, written.normalizer.unsqueeze(-1)], dim=-1)
        first = torch.cat([start.memory, normalizer], dim=-1)
        before, after = Sums.apply(ranks, ANCHOR, sums, first, want_after)
        return _columns(before), None if after is None else _columns(after)
    # key sums do not depend on the values: the narrowest will do
    few = MemoryState(zeros.memory[..., :16], start.normalizer)
    keys = _write(k, v[..., :16], few, segment_len, "linear", backend).normalizer.unsqueeze(-1)
    z, z_after = Sums.apply(ranks, ANCHOR, keys, normalizer, want_after)
    before = MemoryState(start.memory, z.squeeze(-1))
    m, m_after = Maps.apply(ranks, ANCHOR, _maps(k, v, before, segment_len, backend), start.memory, want_after)
    after = MemoryState(m_after, z_after.squeeze(-1)) if want_after else None
    return MemoryState(m, before.normalizer), after


def _columns(x: Tensor) -> MemoryState:
    """Return the state whose memory and normalizer are the columns of [M | z], [..., K, V + 1]."""
    return MemoryState(x[..., :-1], x[..., -1])


def _write(k: Tensor, v: Tensor, state: MemoryState, segment_len: int, update: str, backend: str | None) -> MemoryState:
    """Return the state with every whole segment of k and v folded in, by a call without queries."""
    gate = state.normalizer.new_zeros(k.shape[1])
    after = segment_attention(
        k[:, :, :0], k, v, segment_len=segment_len, gate=gate, update=update, state=state, backend=backend
    ).state
    if after is None:
        raise RuntimeError("attention with a gate must return a memory")
    return after


def _maps(k: Tensor, v: Tensor, start: MemoryState, segment_len: int, backend: str | None) -> Tensor:
    """Return [B | P], [B, G, K, V + K]: M after this run's keys and values, and I after its keys with zeros."""
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
    tensors: dict[str, Tensor | None],
    per_head: dict[str, Tensor | None],
    state: MemoryState | None,
    options: dict[str, Any],
) -> Exception | None:
    """Return the error that `segment_attention` raises for this rank's call cut to no tokens, or None."""
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
        segment_attention(**cut, **per_head, state=state, **options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        return error
    return None


def _settings(
    tensors: dict[str, Tensor | None],
    per_head: dict[str, Tensor | None],
    state: MemoryState | None,
    options: dict[str, Any],
) -> dict[str, object]:
    """Return the settings that must be equal on every rank, by name."""
    sizes = {
        f"{name}'s {what}": x.shape[dim]
        for name, x in tensors.items()
        if x is not None
        for dim, what in ((0, "batch size"), (1, "heads"), (3, "width"))
    }
    kinds = {f"{name}'s dtype": x.dtype for name, x in tensors.items() if x is not None}
    passed = {f"{name} given": x is not None for name, x in {**tensors, **per_head, "state": state}.items()}
    return {**options, **kinds, **sizes, **passed, **modes(tensors["q"].device.type)}  # type: ignore[union-attr]
