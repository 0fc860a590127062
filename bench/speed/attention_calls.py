"""Ways to compute segment attention, or attention alone: ours, PyTorch's, and public implementations.

Each is a function of (q, k, v, gate, segment_len) → [B, H, T, V].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.attention import segment_attention
from ...kernels.check.check import available

Function = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


def backend_here(device: torch.device) -> str:
    """Return "triton" where the kernels run on a device, interpreted or not, else "torch"."""
    return available(device)[-1]


def ours(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, update: str | None, backend: str | None = None
) -> Tensor:
    """Return `segment_attention`, by default from the kernels where they run, the interpreter included."""
    backend = backend or backend_here(q.device)
    if update is None:
        return segment_attention(q, k, v, segment_len=segment_len, backend=backend).out
    return segment_attention(q, k, v, segment_len=segment_len, gate=gate, update=update, backend=backend).out


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, backend: SDPBackend | None = None
) -> Tensor:
    """Return PyTorch's causal attention over each row of its inputs, by one of its kernels."""
    grouped = q.shape[1] != k.shape[1]
    if backend is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


@functools.cache
def _flex_parts(time: int, segment_len: int, device: torch.device) -> tuple[Callable[..., Tensor], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def inside(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i >= j) & (i // segment_len == j // segment_len)

    mask = create_block_mask(inside, None, None, time, time, device=str(device))
    return torch.compile(flex_attention, dynamic=False), mask


def flex(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int) -> Tensor:
    """Return FlexAttention over the whole text with a block mask; the mask is made once, untimed."""
    run, mask = _flex_parts(q.shape[2], segment_len, q.device)
    return run(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def eager_loop(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, update: str | None) -> Tensor:
    """Return the public form at its best: fused local attention per segment, then the memory, autograd through both.

    In the inputs' dtype throughout. Without an update, the attention alone.
    """
    g = gate.to(q.dtype).sigmoid()[:, None, None]
    memory = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    normalizer = q.new_zeros(*q.shape[:2], q.shape[3], 1)
    outs = []
    segments = zip(*(x.split(segment_len, dim=2) for x in (q, k, v)), strict=True)
    for i, (q_s, k_s, v_s) in enumerate(segments):
        out = F.scaled_dot_product_attention(q_s, k_s, v_s, is_causal=True)
        if update is None:
            outs.append(out)
            continue
        features = F.elu(k_s) + 1
        value = v_s
        if i:
            asked = F.elu(q_s) + 1
            out = g * (asked @ memory / (asked @ normalizer)) + (1 - g) * out
            if update == "delta":
                value = v_s - features @ memory / (features @ normalizer)
        memory = memory + features.mT @ value
        normalizer = normalizer + features.sum(2).unsqueeze(-1)
        outs.append(out)
    return torch.cat(outs, dim=2)


def memory_after(
    k: Tensor, v: Tensor, memory: Tensor, normalizer: Tensor, update: str = "delta"
) -> tuple[Tensor, Tensor]:
    """Return memory [B, G, K, V] and normalizer [B, G, K] with a segment written, in their dtype, by PyTorch."""
    features, v = (F.elu(k) + 1).to(memory.dtype), v.to(memory.dtype)
    if update == "delta":
        weight = features @ normalizer.unsqueeze(-1)
        v = v - torch.where(weight > 0, features @ memory / weight, 0.0)
    return memory + features.mT @ v, normalizer + features.sum(2)


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function through torch.compile, compiled for each rule at its first call."""

    @functools.cache
    def by_rule(update: str) -> Function:
        torch._dynamo.config.recompile_limit = 64
        return torch.compile(functools.partial(function, update=update), dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, update: str) -> Tensor:
        return by_rule(update)(q, k, v, gate, segment_len)

    return run


class _Unrotated(nn.Module):
    """A rotary embedding that turns nothing."""

    def rotate_queries_with_cached_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


@functools.cache
def _published_layer(heads: int, width: int, update: str, device: torch.device, dtype: torch.dtype) -> Any:
    """Return the package's layer without what surrounds its attention: norm, projections, their split, and rotary."""
    from infini_transformer_pytorch.infini_transformer import CausalAttention

    layer = CausalAttention(1, dim_head=width, heads=heads, use_mem_delta_rule=update == "delta").to(device, dtype)
    layer.norm = layer.to_qkv = layer.split_heads = layer.merge_heads = layer.to_out = nn.Identity()
    layer.rotary_emb = _Unrotated()
    del layer.fastweight_mem.head_gates
    return layer


def infini_transformer_pytorch(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int, *, update: str
) -> Tensor:
    """Return the package's `CausalAttention` per segment; the layer is made once, untimed."""
    layer = _published_layer(q.shape[1], q.shape[3], update, q.device, q.dtype)
    # the package's gate weighs local attention, ours the memory
    layer.fastweight_mem.head_gates = -gate.to(q.dtype)
    memories, outs = None, []
    for piece in zip(*(x.split(segment_len, dim=2) for x in (q, k, v)), strict=True):
        out, _, memories = layer(piece, past_memories=memories, return_new_memories=True)
        outs.append(out)
    # the layer would keep the graph of the gate's gradient
    del layer.fastweight_mem.head_gates
    return torch.cat(outs, dim=2)


# write strength and decay of every token, in the delta rule of flash-linear-attention
STRENGTH, LOG_DECAY = 0.5, -0.05


def fla_linear(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int) -> Tensor:
    """Return flash-linear-attention's linear attention: no segments, no normaliser."""
    from fla.ops.linear_attn import chunk_linear_attn

    out, _ = chunk_linear_attn(*(x.transpose(1, 2) for x in (q, k, v)), normalize=False)
    return out.transpose(1, 2)


def fla_gated_delta(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int) -> Tensor:
    """Return flash-linear-attention's gated delta rule, its nearest, with keys brought to length 1, as it needs."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule

    strength = q.new_full((q.shape[0], q.shape[2], q.shape[1]), STRENGTH)
    decay = torch.full_like(strength, LOG_DECAY, dtype=torch.float32)
    q, k, v = (x.transpose(1, 2) for x in (q, F.normalize(k, dim=-1), v))
    out, _ = chunk_gated_delta_rule(q, k, v, decay, strength)
    return out.transpose(1, 2)


def linear_by_definition(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int) -> Tensor:
    """Return o_t = Σ_{j ≤ t} (q_t · k_j) v_j / √K."""
    outs, stop = [], 0
    # scores of a whole long text are too many to hold
    for rows in q.split(1024, dim=2):
        start, stop = stop, stop + rows.shape[2]
        outs.append((rows @ k[:, :, :stop].mT).tril(start) @ v[:, :, :stop])
    return torch.cat(outs, dim=2) * q.shape[3] ** -0.5


def gated_delta_by_definition(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, segment_len: int) -> Tensor:
    """Return S_tᵀ q_t / √K, S_t = e^g S_{t−1} + β k_t (v_t − k_tᵀ e^g S_{t−1})ᵀ (arXiv 2412.06464, equation 10)."""
    k = F.normalize(k, dim=-1)
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outs = []
    for q_t, k_t, v_t in zip(*(x.split(1, dim=2) for x in (q, k, v)), strict=True):
        state = state * torch.tensor(LOG_DECAY, dtype=q.dtype).exp()
        state = state + STRENGTH * k_t.mT @ (v_t - k_t @ state)
        outs.append(q_t @ state)
    return torch.cat(outs, dim=2) * q.shape[3] ** -0.5
