"""The memory of the `torch` backend: every segment at once, with the closed-form backward.

Two registered operations on slots (F segments, consecutive within a sequence):

- `fold_segments` writes: M and z before every segment, and after the last one.
- `read_and_blend` reads them for every query and blends the result with local attention.

With u = σ(k) / σ(k) z, a segment's write is M ← M + B − A M, where B = σ(k)ᵀ v and A = uᵀ σ(k) (0 for the linear rule).
A is symmetric, so the adjoint of the scan is the scan run backwards.

Nothing here depends on the size of σ: z is divided by its peak, and rows are normalised before they are multiplied,
never after, so that every factor stays bounded.

Features are recomputed block by block, in cache, rather than stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..state import over_peak

Step = tuple[slice | Tensor, slice | Tensor]

# tokens × width of one pass: about a core's cache on a CPU, a bound on scratch memory elsewhere
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**24


def feature_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return σ(x) = ELU(x) + 1 in `dtype`, as exp(x) below zero so that small values keep their digits."""
    x = x.to(dtype)
    return x.clamp(max=0).exp_().add_(x.clamp(min=0))


def feature_map_grad(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return σ'(x) in `dtype`: exp(x) below zero, 1 above; that is min(σ(x), 1)."""
    return x.to(dtype).clamp(max=0).exp_()


def reciprocal(weight: Tensor) -> Tensor:
    """Return 1 / weight; 0 where the weight is 0 or has underflowed."""
    normal = weight.abs() >= torch.finfo(weight.dtype).tiny
    return torch.where(normal, weight.reciprocal(), 0)


def _dot(rows: Tensor, vector: Tensor) -> Tensor:
    """Return rows [..., L, K] · vector [..., K] as [..., L, 1], faster than a product of matrices with one column."""
    return (rows * vector.unsqueeze(-2)).sum(-1, keepdim=True)


def _blocks(x: Tensor) -> Iterator[tuple[slice, slice]]:
    """Yield the parts of x [F, G, ...] that one pass handles: runs of slots, or of one slot's heads."""
    slots, heads = x.shape[:2]
    room = max(1, _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // max(1, x[:1, :1].numel()))
    many, wide = max(1, room // heads), min(room, heads)
    for i in range(0, slots, many):
        for j in range(0, heads, wide):
            yield slice(i, min(i + many, slots)), slice(j, min(j + wide, heads))


def _steps(slots: int, sequences: int, owner: Tensor | None) -> list[Step]:
    """Return, for s = 1, 2, …, the slots that hold the s-th segment of a sequence, and those sequences.

    owner [F]: the sequence of each slot, N for a spare one; None where every sequence has F / N slots.
    """
    if owner is None:
        each = slots // sequences if sequences else 0
        return [(slice(s, None, each), slice(None)) for s in range(each)]
    steps: list[tuple[list[int], list[int]]] = []
    seen = [0] * (sequences + 1)
    for slot, sequence in enumerate(owner.tolist()):
        if sequence == sequences:
            continue
        if seen[sequence] == len(steps):
            steps.append(([], []))
        for column, value in zip(steps[seen[sequence]], (slot, sequence), strict=True):
            column.append(value)
        seen[sequence] += 1
    return [tuple(torch.tensor(x, device=owner.device) for x in step) for step in steps]  # type: ignore[misc]


def _scan(steps: Sequence[Step], initial: Tensor, added: Tensor, erased: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run X ← X + added_s − erased_s X; return X before every segment [F, ...], and the last X [N, ...]."""
    state = initial.clone()
    before = torch.zeros_like(added)
    for slots, rows in steps:
        x = state[rows].clone()
        before[slots] = x
        x += added[slots]
        if erased is not None:
            x -= erased[slots] @ before[slots]
        state[rows] = x
    return before, state


def _erased(k: Tensor, normalizer: Tensor) -> Tensor:
    """Return A = uᵀ σ(k) per segment, [F, G, K, K]."""
    z, inverse_peak = over_peak(normalizer)
    erased = normalizer.new_empty(*normalizer.shape, normalizer.shape[-1])
    for block in _blocks(k):
        features = feature_map(k[block], normalizer.dtype)
        u = features * reciprocal(_dot(features, z[block]))
        erased[block] = u.mT @ features
    return erased.mul_(inverse_peak.unsqueeze(-1))


def _write_only(complete: Tensor | None, *per_slot: Tensor) -> None:
    """Let segments that are not complete write nothing."""
    if complete is not None:
        for x in per_slot:
            x.masked_fill_(~complete.view(-1, *[1] * (x.ndim - 1)), 0)


@torch.library.custom_op("segattn::fold_segments", mutates_args=())
def fold_segments(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write segments k [F, G, L, K], v [F, G, L, V] into memory [N, G, K, V], normalizer [N, G, K].

    complete [F] bool: segments to write, None for all. owner [F]: see `_steps`.
    Returns M and z before every segment, [F, ...], then after the last, [N, ...].
    """
    steps = _steps(len(k), len(memory), owner)
    written = memory.new_empty(len(k), *memory.shape[1:])
    sums = normalizer.new_empty(len(k), *normalizer.shape[1:])
    for block in _blocks(k):
        features = feature_map(k[block], memory.dtype)
        torch.sum(features, -2, out=sums[block])
        written[block] = features.mT @ v[block].to(memory.dtype)
    _write_only(complete, written, sums)
    z_before, z = _scan(steps, normalizer, sums)
    erased = _erased(k, z_before) if delta else None
    if erased is not None:
        _write_only(complete, erased)
    m_before, m = _scan(steps, memory, written, erased)
    return m_before, z_before, m, z


@fold_segments.register_fake
def _(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    slots = k.shape[0]
    return (
        memory.new_empty(slots, *memory.shape[1:]),
        normalizer.new_empty(slots, *normalizer.shape[1:]),
        memory.new_empty(memory.shape),
        normalizer.new_empty(normalizer.shape),
    )


@torch.library.custom_op("segattn::fold_segments_backward", mutates_args=())
@without_autocast
def fold_segments_backward(
    k: Tensor,
    v: Tensor,
    m_before: Tensor,
    z_before: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
    dm_before: Tensor,
    dz_before: Tensor,
    dm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of k, v, memory and normalizer: the adjoint of `fold_segments`."""
    steps = _steps(len(k), len(dm), owner)[::-1]
    dtype = dm.dtype
    erased = _erased(k, z_before) if delta else None
    if erased is not None:
        _write_only(complete, erased)
    # the adjoint of M after each segment, then of z
    dm_after, dm_initial = _scan(steps, dm, dm_before, erased)
    _write_only(complete, dm_after)

    dk, dv = torch.empty_like(k, dtype=dtype), torch.empty_like(v)
    from_weights = torch.zeros_like(dz_before)
    z, inverse_peak = over_peak(z_before)
    for block in _blocks(k):
        features = feature_map(k[block], dtype)
        dv[block] = features @ dm_after[block]
        dfeatures = v[block].to(dtype) @ dm_after[block].mT
        if delta:
            # u and the weight's gradient, both times the peak
            u = features * reciprocal(_dot(features, z[block]))
            c = dm_after[block] @ (m_before[block] * inverse_peak[block].unsqueeze(-1)).mT
            back = u @ c
            dweight = (back * u).sum(-1, keepdim=True)
            from_weights[block] = (dweight * features).sum(-2) * inverse_peak[block]
            dfeatures += dweight * z[block].unsqueeze(-2)
            dfeatures -= back.add_(u @ c.mT)
        dk[block] = dfeatures
    dz_after, dz_initial = _scan(steps, dz, dz_before + from_weights)
    _write_only(complete, dz_after)
    for block in _blocks(k):
        dk[block] = (dk[block] + dz_after[block].unsqueeze(-2)).mul_(feature_map_grad(k[block], dtype))
    return dk.to(k.dtype), dv, dm_initial, dz_initial


@fold_segments_backward.register_fake
def _(
    k: Tensor,
    v: Tensor,
    m_before: Tensor,
    z_before: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
    dm_before: Tensor,
    dz_before: Tensor,
    dm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v), dm.new_empty(dm.shape), dz.new_empty(dz.shape)


def _no_second_derivative(ctx: object, *grads: Tensor) -> None:
    raise RuntimeError("segment_attention has no second derivative: its backward is a closed form of its own")


def _nothing_saved(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    return None


def _fold_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    k, v, _, _, complete, owner, delta = inputs
    ctx.save_for_backward(k, v, output[0], output[1], complete, owner)
    ctx.delta = delta


def _fold_backward(ctx, dm_before, dz_before, dm, dz):  # type: ignore[no-untyped-def]
    k, v, m_before, z_before, complete, owner = ctx.saved_tensors
    grads = fold_segments_backward(k, v, m_before, z_before, complete, owner, ctx.delta, dm_before, dz_before, dm, dz)
    return *grads, None, None, None


fold_segments.register_autograd(_fold_backward, setup_context=_fold_setup)
fold_segments_backward.register_autograd(_no_second_derivative, setup_context=_nothing_saved)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Split heads by group: [F, H, ...] → [F, G, H / G, ...]."""
    return x.unflatten(1, (groups, x.shape[1] // groups))


def _queries(q: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ(q) [F, G, R, L, K], 1 / σ(q) z [F, G, R, L, 1] for z over its peak, and where z is not 0."""
    features = feature_map(q, z.dtype)
    inverse = reciprocal(_dot(features, z.unsqueeze(2)))
    return features, inverse, inverse != 0


def blend_into(
    out: Tensor, local: Tensor, q: Tensor, memory: Tensor, normalizer: Tensor, gate: Tensor, keep_gate: bool
) -> Tensor:
    """Write g A_mem + (1 − g) A_dot to `out`, which may be `local` itself."""
    groups, dtype = memory.shape[1], memory.dtype
    g = _by_group(gate.to(dtype).sigmoid().view(1, -1, 1, 1), groups)
    z, inverse_peak = over_peak(normalizer)
    memory = memory * inverse_peak.unsqueeze(-1)
    q, local, blended = (_by_group(x, groups) for x in (q, local, out))
    for block in _blocks(q):
        features, inverse, filled = _queries(q[block], z[block])
        share = g[:, block[1]]
        recalled = features.mul_(inverse * share) @ memory[block].unsqueeze(2)
        local_share = 1 - (share if keep_gate else share * filled)
        blended[block] = torch.addcmul(recalled, local[block].to(dtype), local_share)
    return out


@torch.library.custom_op("segattn::read_and_blend", mutates_args=())
def read_and_blend(
    local: Tensor, q: Tensor, memory: Tensor, normalizer: Tensor, gate: Tensor, keep_gate: bool
) -> Tensor:
    """Read memory [F, G, K, V], normalizer [F, G, K] for q [F, H, L, K]; blend with local [F, H, L, V] by gate [H].

    keep_gate: keep the gate where the memory is empty, too (`empty_memory="gated"`).
    """
    return blend_into(torch.empty_like(local), local, q, memory, normalizer, gate, keep_gate)


@read_and_blend.register_fake
def _(local: Tensor, q: Tensor, memory: Tensor, normalizer: Tensor, gate: Tensor, keep_gate: bool) -> Tensor:
    return torch.empty_like(local)


@torch.library.custom_op("segattn::read_and_blend_backward", mutates_args=())
@without_autocast
def read_and_blend_backward(
    local: Tensor, q: Tensor, memory: Tensor, normalizer: Tensor, gate: Tensor, keep_gate: bool, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of local, q, memory, normalizer and gate: the adjoint of `read_and_blend`."""
    groups, dtype = memory.shape[1], memory.dtype
    g = _by_group(gate.to(dtype).sigmoid().view(1, -1, 1, 1), groups)
    z, inverse_peak = over_peak(normalizer)
    memory = memory * inverse_peak.unsqueeze(-1)
    dlocal, dq = torch.empty_like(local), torch.empty_like(q)
    dmemory, dnormalizer = torch.empty_like(memory), torch.empty_like(normalizer)
    dweight = torch.zeros_like(g[0])
    q, local, dout, dlocal_out, dq_out = (_by_group(x, groups) for x in (q, local, dout, dlocal, dq))
    for block in _blocks(q):
        features, inverse, filled = _queries(q[block], z[block])
        do, share = dout[block].to(dtype), g[:, block[1]]
        weight = share if keep_gate else share * filled
        dlocal_out[block] = do * (1 - weight)
        slope = features.clamp(max=1).mul_(inverse).mul_(share)
        u = features.mul_(inverse)
        back = do @ memory[block].unsqueeze(2).mT
        memory_delta = (u * back).sum(-1, keepdim=True)
        row_delta = (do * local[block]).sum(-1, keepdim=True)
        dweight[block[1]] += ((memory_delta - row_delta) * weight).sum((0, 3), keepdim=True)[0]
        dmemory[block] = (u.mT @ (do * share)).sum(2)
        dnormalizer[block] = -(u * (memory_delta * share)).sum((2, 3))
        dq_out[block] = back.sub_(memory_delta * z[block][:, :, None, None]).mul_(slope)
    dmemory *= inverse_peak.unsqueeze(-1)
    dnormalizer *= inverse_peak
    return dlocal, dq, dmemory, dnormalizer, (dweight * (1 - g[0])).flatten().to(gate.dtype)


@read_and_blend_backward.register_fake
def _(
    local: Tensor, q: Tensor, memory: Tensor, normalizer: Tensor, gate: Tensor, keep_gate: bool, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(torch.empty_like(x) for x in (local, q, memory, normalizer, gate))  # type: ignore[return-value]


def _read_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    *tensors, keep_gate = inputs
    ctx.save_for_backward(*tensors)
    ctx.keep_gate = keep_gate


def _read_backward(ctx, dout):  # type: ignore[no-untyped-def]
    return *read_and_blend_backward(*ctx.saved_tensors, ctx.keep_gate, dout), None


read_and_blend.register_autograd(_read_backward, setup_context=_read_setup)
read_and_blend_backward.register_autograd(_no_second_derivative, setup_context=_nothing_saved)
