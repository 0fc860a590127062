"""The memory on its own: what the associative RMT (arXiv 2407.04841) reads and writes between segments."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from . import validation as check
from .autocast import without_autocast
from .backends import HAS_TRITON, resolve_memory
from .inference import savable
from .state import MemoryState

if HAS_TRITON:
    from .triton.memory_ops import triton_memory_read, triton_memory_write

FEATURE_MAPS = ("elu1", None)


def _check_tokens(name: str, x: Tensor, feature_map: str | None) -> None:
    if feature_map not in FEATURE_MAPS:
        raise ValueError(f"feature_map must be 'elu1' or None (inputs already mapped), got {feature_map!r}")
    check.check_floating(name, x)
    if x.ndim != 4:
        raise ValueError(f"{name} must have 4 dimensions [batch, heads, time, width], got shape {list(x.shape)}")


def _features(x: Tensor, feature_map: str | None) -> Tensor:
    x = x.to(check.state_dtype(x))
    return reference.feature_map(x) if feature_map == "elu1" else x


@without_autocast
def memory_read(
    q: Tensor, state: MemoryState, *, feature_map: str | None = "elu1", backend: str | None = None
) -> Tensor:
    """Read the memory: A_mem = σ(q) M / σ(q) z, 0 where it is empty (arXiv 2404.07143, equation 7).

    Args:
        q: [B, H, T, K]. With G memories per sequence, head h reads memory h // (H / G).
        state: memory [B, G, K, V] and normalizer [B, G, K], float32 (float64 for float64 q).
        feature_map: "elu1" for σ = ELU + 1, None for q already mapped.
        backend: "triton", "torch", "reference" (the same as torch), or None: triton on a GPU where it takes the dtype
            and K and V (16 to 256 in steps of 8), torch elsewhere.

    Returns:
        [B, H, T, V] in q's dtype.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    _check_tokens("q", q, feature_map)
    pair = isinstance(state, (MemoryState, tuple)) and len(state) == 2
    if not pair or not all(isinstance(x, Tensor) and x.ndim >= 3 for x in state):
        raise TypeError(f"state must be a MemoryState(memory, normalizer), got {type(state).__name__}")
    groups = state[0].shape[1]
    if groups == 0 or q.shape[1] % groups:
        raise ValueError(
            f"q must have a multiple of the memory's heads: H % G == 0, got H = {q.shape[1]}, G = {groups}"
        )
    like = q[:, :1].expand(-1, groups, -1, -1)
    q, memory, normalizer = savable(q, *check.check_state(state, q.shape[0], like, state[0]))
    if resolve_memory(backend, q, memory) == "triton" and q.numel():
        return triton_memory_read(q, MemoryState(memory, normalizer), feature_map is not None)
    features = _features(q, feature_map)
    repeated = MemoryState(memory.unsqueeze(2), normalizer.unsqueeze(2))
    recalled, _ = reference.read(features.unflatten(1, (groups, q.shape[1] // groups)), repeated)
    return recalled.flatten(1, 2).to(q.dtype)


@without_autocast
def memory_write(
    k: Tensor,
    v: Tensor,
    state: MemoryState | None = None,
    *,
    update: str = "delta",
    beta: Tensor | None = None,
    corrected: bool = False,
    feature_map: str | None = "elu1",
    backend: str | None = None,
) -> MemoryState:
    """Write T tokens at once, all against the memory as it was: M + Σ β_t σ(k_t)ᵀ (v_t − v̄_t), z + Σ γ_t σ(k_t).

    v̄ is what the memory returns for k by the delta rule, 0 by the linear one (arXiv 2404.07143, equations 8 and 9).

    Args:
        k, v: [B, G, T, K] and [B, G, T, V].
        state: the memory to write into, float32 (float64 for float64 inputs); default empty.
        update: "delta" or "linear".
        beta: [B, G, T] write strengths; default 1.
        corrected: γ = clip(1 − z σ(k) / ‖σ(k)‖², 0, 1), without gradient, so that a key written again adds nothing to z
            (arXiv 2407.04841); otherwise γ = 1.
        feature_map: "elu1" for σ = ELU + 1, None for k already mapped.
        backend: "triton", "torch", "reference" (the same as torch), or None: triton on a GPU where it takes the dtype
            and K and V (16 to 256 in steps of 8), torch elsewhere.

    Returns:
        The new MemoryState; the one passed in is left as it was.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was.
    """
    _check_tokens("k", k, feature_map)
    check.check_floating("v", v)
    check.check_like("v", v, "k", k)
    check.check_shape("v", v, "[B, G, T, V]", (*k.shape[:3], v.shape[-1] if v.ndim else 0))
    check.check_choice("update", update, check.UPDATES)
    if state is None:
        batch, groups, _, width = k.shape
        state = MemoryState.zeros(batch, groups, width, v.shape[3], device=k.device, dtype=check.state_dtype(k))
    state = check.check_state(state, k.shape[0], k, v)
    if beta is not None:
        check.check_floating("beta", beta)
        check.check_shape("beta", beta, "[B, G, T]", k.shape[:3])
        check.check_device("beta", beta, "k", k)
    k, v, beta, *held = savable(k, v, beta, *state)
    state = MemoryState(*held)
    if resolve_memory(backend, k, v) == "triton" and k.numel():
        return triton_memory_write(k, v, state, update, beta, corrected, feature_map is not None)
    features = _features(k, feature_map)
    value = v.to(features.dtype)
    if update == "delta":
        value = value - reference.read(features, state)[0]
    if beta is not None:
        value = value * beta.to(features.dtype).unsqueeze(-1)
    counted = features
    if corrected:
        with torch.no_grad():
            square = features.square().sum(-1, keepdim=True)
            known = features @ state.normalizer.unsqueeze(-1)
            gamma = torch.where(square > 0, 1 - known / square.clamp(min=torch.finfo(square.dtype).tiny), 0).clamp(0, 1)
        counted = features * gamma
    return MemoryState(state.memory + features.mT @ value, state.normalizer + counted.sum(-2))
