"""The memory of the `torch` backend: every segment at once, with the closed-form backward.

Two registered operations on slots (F segments, consecutive within a sequence):

- `fold_segments` writes: M and z before every segment, and after the last one.
- `read_and_blend` reads them for every query and blends the result with local attention.

With u = σ(k) / σ(k) z, a segment's write is M ← M + B − A M, where B = σ(k)ᵀ v and A = uᵀ σ(k) (0 for the linear rule).
A is symmetric, so the adjoint of the scan is the scan run backwards.

Nothing here depends on the size of σ: z is divided by its peak, and rows are normalised before they are multiplied,
never after, so that every factor stays bounded.

Segments are handled block by block, everything of a block while it is in cache: features are computed again in the
backward rather than stored. On a CPU, blocks of an empty memory and those that no gradient comes back to are skipped.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from ..autocast import without_autocast
from ..state import least_weight, over_peak

# tokens × width of one pass: about a core's cache on a CPU, a bound on scratch memory elsewhere
_BLOCK = {"cpu": 2**18}
_BLOCK_ELSEWHERE = 2**24
# weights and normalizers between its inverse and it need no care in float32, and no memory with them is empty
_FAR = 1e10


def feature_map_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Return grad · σ'(x) in one pass: σ' is exp(x) below zero and 1 above, the derivative of ELU."""
    return torch.ops.aten.elu_backward.default(grad, 1, 1, 1, False, x)


def feature_map(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return σ(x) = ELU(x) + 1 in `dtype`, as σ'(x) (1 + max(x, 0)) so that small values keep their digits.

    It is contiguous, whatever x is, as products of matrices then need no copy of it.
    """
    x = x.to(dtype)
    return feature_map_backward(torch.clamp_min(x, 0, out=x.new_empty(x.shape)).add_(1), x)


def inverse_weight(features: Tensor, z: Tensor, inverse_peak: Tensor) -> Tensor:
    """Return 1 / σ z [..., L, 1] for features σ [..., L, K], z [..., K] over its peak; 0 where σ z is too small.

    The sum of products is faster than a product of matrices with one column.
    """
    weight = (features * z.unsqueeze(-2)).sum(-1, keepdim=True)
    if _is_moderate(z) and _is_moderate(inverse_peak):
        # σ z is not small beside σ then
        filled = weight.abs() >= torch.finfo(weight.dtype).tiny
    else:
        filled = weight.abs() >= least_weight(features.amax(-1, keepdim=True), inverse_peak.unsqueeze(-2))
    return torch.where(filled, weight.reciprocal(), 0)


def _is_moderate(x: Tensor) -> bool:
    """Return whether all numbers are known to lie between 1 / `_FAR` and it: on a CPU, where nothing waits for them."""
    if x.device.type != "cpu":
        return False
    least, largest = x.aminmax()
    return least.item() >= 1 / _FAR and largest.item() <= _FAR


def _is_zero(*tensors: Tensor) -> bool:
    """Return whether all is known to be 0: on a CPU, where nothing waits for the values."""
    return all(x.device.type == "cpu" and not x.any() for x in tensors)


def _blocks(x: Tensor, dims: int) -> list[tuple[slice, ...]]:
    """Return the parts of x that one pass handles, as slices of its first `dims` dimensions.

    Where not all fits into one, the first dimension is divided first. Parts that differ in it alone stand in a row.
    """
    room = _BLOCK.get(x.device.type, _BLOCK_ELSEWHERE) // max(1, math.prod(x.shape[dims:]))
    cuts = []
    for dim in reversed(range(dims)):
        # of two or three segments, heads would be copied to lie side by side, for few passes less
        size = 1 if dim == 0 and room < 4 else max(1, min(room, x.shape[dim]))
        room //= size
        cuts.append([slice(i, i + size) for i in range(0, x.shape[dim], size)])
    return [part[::-1] for part in itertools.product(*cuts)]


class _Slots:
    """View tensors of slots [F, ...] by segment, [S, N, ...]; where slots have owners, as [F, 1, ...].

    owner [F]: the sequence of each slot, in order, N for a spare one; None where every sequence has F / N slots.
    """

    def __init__(self, slots: int, sequences: int, owner: Tensor | None) -> None:
        self.rows = sequences if owner is None else 1
        self.segments = slots // self.rows if self.rows else 0
        self.sequences = sequences
        self.owners = None if owner is None else owner.tolist()

    def view(self, x: Tensor) -> Tensor:
        """Return the view of a tensor [F, ...]."""
        return x.unflatten(0, (self.rows, self.segments)).transpose(0, 1)

    def scanned(self, x: Tensor) -> Tensor:
        """Return a copy of a state [N, ...] for `scan` to write to, with one for spare slots if slots have owners."""
        return torch.cat([x, x.new_zeros(0 if self.owners is None else 1, *x.shape[1:])])

    def scan(
        self,
        block: tuple[slice, ...],
        before: Tensor,
        state: Tensor,
        added: Tensor,
        erased: Tensor | None = None,
        *,
        backward: bool = False,
    ) -> Tensor:
        """Run X ← X + added_s − erased_s X over a block's segments; return X before each, a part of `before`.

        state: X of every sequence, [N, G, ...], which is written to. backward: begin with the last segment.
        """
        segments, rows, heads = block
        before = before[block]
        for s in reversed(range(len(added))) if backward else range(len(added)):
            n = rows if self.owners is None else slice(self.owners[segments][s], self.owners[segments][s] + 1)
            x = state[n, heads]
            before[s] = x
            x += added[s]
            if erased is not None:
                x -= erased[s] @ before[s]
        return before


def _write_only(complete: Tensor | None, *per_slot: Tensor) -> None:
    """Let segments that are not complete write nothing."""
    if complete is not None:
        for x in per_slot:
            x.masked_fill_(~complete.view(*complete.shape, *[1] * (x.ndim - 2)), 0)


@torch.library.custom_op("segattn::fold_segments", mutates_args=())
def fold_segments(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Write segments k [F, G, L, K], v [F, G, L, V] into memory [N, G, K, V], normalizer [N, G, K].

    complete [F] bool: segments to write, None for all. owner [F]: see `_Slots`.
    Returns M and z before every segment, [F, ...], then after the last, [N, ...]; and for a backward of the delta rule
    A of every segment, [F, G, K, K], which is empty for the linear one.
    """
    (slots, groups, _, width), dtype, layout = k.shape, memory.dtype, _Slots(len(k), len(memory), owner)
    m_before = memory.new_empty(slots, *memory.shape[1:])
    z_before = normalizer.new_empty(slots, groups, width)
    erased = memory.new_zeros(slots if delta else 0, groups, width, width)
    m, z = layout.scanned(memory), layout.scanned(normalizer)
    k, v, m_slots, z_slots = (layout.view(x) for x in (k, v, m_before, z_before))
    for block in _blocks(k, 3):
        whole = None if complete is None else layout.view(complete)[block[:2]]
        features = feature_map(k[block], dtype)
        added, sums = features.mT @ v[block].to(dtype), features.sum(-2)
        _write_only(whole, added, sums)
        known, a = layout.scan(block, z_slots, z, sums), None
        if delta and not _is_zero(known):
            peaks, inverse_peak = over_peak(known)
            u = features * inverse_weight(features, peaks, inverse_peak)
            a = (u.mT @ features).mul_(inverse_peak.unsqueeze(-1))
            _write_only(whole, a)
            layout.view(erased)[block] = a
        layout.scan(block, m_slots, m, added, a)
    return m_before, z_before, m[: len(memory)], z[: len(memory)], erased


@fold_segments.register_fake
def _(
    k: Tensor,
    v: Tensor,
    memory: Tensor,
    normalizer: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots, groups, _, width = k.shape
    return (
        memory.new_empty(slots, *memory.shape[1:]),
        normalizer.new_empty(slots, *normalizer.shape[1:]),
        memory.new_empty(memory.shape),
        normalizer.new_empty(normalizer.shape),
        memory.new_empty(slots if delta else 0, groups, width, width),
    )


@torch.library.custom_op("segattn::fold_segments_backward", mutates_args=())
@without_autocast
def fold_segments_backward(
    k: Tensor,
    v: Tensor,
    m_before: Tensor,
    z_before: Tensor,
    erased: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
    dm_before: Tensor,
    dz_before: Tensor,
    dm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of k, v, memory and normalizer: the adjoint of `fold_segments`."""
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    dtype, sequences, layout = dm.dtype, len(dm), _Slots(len(k), len(dm), owner)
    dm, dz = layout.scanned(dm), layout.scanned(dz)
    dm_slots, dz_slots = torch.empty_like(m_before), torch.empty_like(z_before)
    dm_after, dz_after, dk_slots, dv_slots = (layout.view(x) for x in (dm_slots, dz_slots, dk, dv))
    k, v, m_before, z_before, dm_before, dz_before = (
        layout.view(x) for x in (k, v, m_before, z_before, dm_before, dz_before)
    )
    for block in reversed(_blocks(k, 3)):
        whole = None if complete is None else layout.view(complete)[block[:2]]
        remembers = delta and not _is_zero(z_before[block])
        a = layout.view(erased)[block] if remembers else None
        # the adjoint of M after each segment
        after = layout.scan(block, dm_after, dm, dm_before[block], a, backward=True)
        _write_only(whole, after)
        if _is_zero(after, dz, dz_before[block]):
            dk_slots[block], dv_slots[block] = 0, 0
            continue
        features = feature_map(k[block], dtype)
        dv_slots[block] = features @ after
        dfeatures, from_weights = v[block].to(dtype) @ after.mT, dz_before[block]
        if remembers:
            z, inverse_peak = over_peak(z_before[block])
            # u and the weight's gradient, both times the peak
            u = features * inverse_weight(features, z, inverse_peak)
            c = after @ (m_before[block] * inverse_peak.unsqueeze(-1)).mT
            back = u @ (c + c.mT)
            dweight = (back * u).sum(-1, keepdim=True).mul_(0.5)
            from_weights = torch.addcmul(from_weights, features.mul_(dweight).sum(-2), inverse_peak)
            dfeatures.sub_(back).addcmul_(dweight, z.unsqueeze(-2))
        after = layout.scan(block, dz_after, dz, from_weights, backward=True)
        _write_only(whole, after)
        dk_slots[block] = feature_map_backward(dfeatures.add_(after.unsqueeze(-2)), k[block].to(dtype))
    return dk, dv, dm[:sequences], dz[:sequences]


@fold_segments_backward.register_fake
def _(
    k: Tensor,
    v: Tensor,
    m_before: Tensor,
    z_before: Tensor,
    erased: Tensor,
    complete: Tensor | None,
    owner: Tensor | None,
    delta: bool,
    dm_before: Tensor,
    dz_before: Tensor,
    dm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(k), torch.empty_like(v), dm.new_empty(dm.shape), dz.new_empty(dz.shape)


def no_second_derivative(ctx: object, *grads: Tensor) -> None:
    """Refuse to differentiate a backward."""
    raise RuntimeError("segment_attention has no second derivative: its backward is a closed form of its own")


def nothing_saved(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    """Save nothing for a backward that there is not."""


def _fold_setup(ctx, inputs, output):  # type: ignore[no-untyped-def]
    k, v, _, _, complete, owner, delta = inputs
    m_before, z_before, _, _, erased = output
    ctx.save_for_backward(k, v, m_before, z_before, erased, complete, owner)
    ctx.mark_non_differentiable(erased)
    ctx.delta = delta


def _fold_backward(ctx, dm_before, dz_before, dm, dz, _):  # type: ignore[no-untyped-def]
    k, v, m_before, z_before, erased, complete, owner = ctx.saved_tensors
    grads = fold_segments_backward(
        k, v, m_before, z_before, erased, complete, owner, ctx.delta, dm_before, dz_before, dm, dz
    )
    return *grads, None, None, None


fold_segments.register_autograd(_fold_backward, setup_context=_fold_setup)
fold_segments_backward.register_autograd(no_second_derivative, setup_context=nothing_saved)


def _by_group(x: Tensor, groups: int) -> Tensor:
    """Split heads by group: [F, H, ...] → [F, G, H / G, ...]."""
    return x.unflatten(1, (groups, x.shape[1] // groups))


def _queries(q: Tensor, z: Tensor, inverse_peak: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return σ(q) [F, G, R, L, K], 1 / σ(q) z [F, G, R, L, 1] for z over its peak, and where that is not 0."""
    features = feature_map(q, z.dtype)
    inverse = inverse_weight(features, z.unsqueeze(2), inverse_peak.unsqueeze(2))
    return features, inverse, inverse != 0


def blend_one_query(local: Tensor, q: Tensor, memory: Tensor, normalizer: Tensor, gate: Tensor) -> Tensor | None:
    """Return g A_mem + (1 − g) A_dot for one query of each head, [B, H, 1, ·], in as few operations as there can be.

    None where factors must be bounded first, or a memory may be empty: `blend_into` does that.
    """
    _, groups, key_width, width = memory.shape
    features = feature_map(q.reshape(len(q) * groups, -1, key_width), memory.dtype)
    weight = torch.bmm(features, normalizer.reshape(-1, key_width, 1))
    if not (_is_moderate(normalizer) and _is_moderate(weight)):
        return None
    recalled = torch.bmm(features.div_(weight), memory.reshape(-1, key_width, width)).view(local.shape)
    return torch.lerp(local.to(memory.dtype), recalled, gate.sigmoid().view(-1, 1, 1)).to(local.dtype)


def blend_into(
    out: Tensor, local: Tensor, q: Tensor, memory: Tensor, normalizer: Tensor, gate: Tensor, keep_gate: bool
) -> Tensor:
    """Write g A_mem + (1 − g) A_dot to `out`, which may be `local` itself."""
    groups, dtype = memory.shape[1], memory.dtype
    g = gate.to(dtype).sigmoid().view(groups, -1, 1, 1)
    z, inverse_peak = over_peak(normalizer)
    memory = (memory * inverse_peak.unsqueeze(-1)).unsqueeze(2)
    q, local, blended = (_by_group(x, groups) for x in (q, local, out))
    for block in _blocks(q, 2):
        share = g[block[1]]
        if _is_zero(z[block]):
            if keep_gate:
                torch.mul(local[block], 1 - share, out=blended[block])
            elif out is not local:
                blended[block] = local[block]
            continue
        features, inverse, filled = _queries(q[block], z[block], inverse_peak[block])
        recalled = features.mul_(inverse * share) @ memory[block]
        local_share = 1 - (share if keep_gate else share * filled)
        torch.addcmul(recalled, local[block].to(dtype), local_share, out=blended[block])
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
    g = gate.to(dtype).sigmoid().view(groups, -1, 1, 1)
    z, inverse_peak = over_peak(normalizer)
    peak_memory = (memory * inverse_peak.unsqueeze(-1)).unsqueeze(2)
    dlocal, dq = torch.empty_like(local), torch.empty_like(q)
    dmemory, dnormalizer, dweight = torch.zeros_like(memory), torch.zeros_like(normalizer), torch.zeros_like(g)
    q, local, dout, dlocal_out, dq_out = (_by_group(x, groups) for x in (q, local, dout, dlocal, dq))
    for block in _blocks(q, 2):
        share = g[block[1]]
        if not keep_gate and _is_zero(z[block]):
            dlocal_out[block], dq_out[block] = dout[block], 0
            continue
        features, inverse, filled = _queries(q[block], z[block], inverse_peak[block])
        do, weight = dout[block].to(dtype), share if keep_gate else share * filled
        torch.mul(do, 1 - weight, out=dlocal_out[block])
        slope = features.clamp(max=1)
        u = features.mul_(inverse)
        back = do @ peak_memory[block].mT
        memory_delta = (u * back).sum(-1, keepdim=True)
        row_delta = (do * local[block]).sum(-1, keepdim=True)
        dweight[block[1]] += ((memory_delta - row_delta) * weight).sum((0, 3), keepdim=True)[0]
        dmemory[block] = ((u.mT @ do) * share).sum(2)
        dnormalizer[block] = -(u * (memory_delta * share)).sum((2, 3))
        back.addcmul_(memory_delta, z[block][:, :, None, None], value=-1)
        dq_out[block] = back.mul_(slope).mul_(inverse * share)
    dmemory *= inverse_peak.unsqueeze(-1)
    dnormalizer *= inverse_peak
    return dlocal, dq, dmemory, dnormalizer, (dweight * (1 - g)).flatten().to(gate.dtype)


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
read_and_blend_backward.register_autograd(no_second_derivative, setup_context=nothing_saved)
