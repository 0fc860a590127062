"""Who is measured: ours, local attention alone, and public ways to do the whole, over the same q, k, v and gate.

Each provider is a function of (inputs, segment_len) that returns [B, H, T, V].
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.operation import segment_attention
from .workloads import Inputs

Function = Callable[[Inputs, int], Tensor]


@dataclass(frozen=True)
class Provider:
    """update: the rule that it follows; None for local attention alone."""

    run: Function
    update: str | None


def sdpa_local(inputs: Inputs, segment_len: int) -> Tensor:
    """PyTorch's own attention over the segments and nothing else: the floor that ratios are taken to."""
    q, k, v = (x.unflatten(2, (-1, segment_len)).flatten(1, 2) for x in inputs[:3])
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(inputs.v.shape)


def ours(inputs: Inputs, segment_len: int, *, update: str, backend: str) -> Tensor:
    q, k, v, gate = inputs
    return segment_attention(q, k, v, segment_len=segment_len, gate=gate, update=update, backend=backend).out


def ours_local(inputs: Inputs, segment_len: int) -> Tensor:
    return segment_attention(*inputs[:3], segment_len=segment_len).out


def eager_loop(inputs: Inputs, segment_len: int, *, update: str) -> Tensor:
    """The public form at its best: fused local attention per segment, then the memory, differentiated by PyTorch."""
    q, k, v, gate = inputs
    g = gate.sigmoid()[:, None, None]
    memory = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    normalizer = q.new_zeros(*q.shape[:2], q.shape[3], 1)
    outs = []
    segments = zip(*(x.split(segment_len, dim=2) for x in (q, k, v)), strict=True)
    for i, (q_s, k_s, v_s) in enumerate(segments):
        out = F.scaled_dot_product_attention(q_s, k_s, v_s, is_causal=True)
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


class _Unrotated(nn.Module):
    def rotate_queries_with_cached_keys(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return q, k


def infini_transformer_pytorch(inputs: Inputs, segment_len: int, *, update: str) -> Tensor:
    """The package's `CausalAttention` per segment, without norm, projections and rotary embedding."""
    from infini_transformer_pytorch.infini_transformer import CausalAttention

    q, k, v, gate = inputs
    heads, width = q.shape[1], q.shape[3]
    layer = CausalAttention(1, dim_head=width, heads=heads, use_mem_delta_rule=update == "delta").to(q.device, q.dtype)
    layer.norm = layer.to_qkv = layer.to_out = nn.Identity()
    layer.rotary_emb = _Unrotated()
    # its gate weighs local attention, ours the memory
    del layer.fastweight_mem.head_gates
    layer.fastweight_mem.head_gates = -gate
    x = torch.cat([x.transpose(1, 2).flatten(2) for x in (q, k, v)], dim=-1)
    memories, outs = None, []
    for piece in x.split(segment_len, dim=1):
        out, _, memories = layer(piece, past_memories=memories, return_new_memories=True)
        outs.append(out)
    return torch.cat(outs, dim=1).unflatten(2, (heads, width)).transpose(1, 2)


BASELINE = "SDPA local"

PROVIDERS = {
    BASELINE: Provider(sdpa_local, None),
    "segattn local": Provider(ours_local, None),
} | {
    f"{name} {update}": Provider(functools.partial(run, update=update), update)
    for name, run in (
        ("segattn", functools.partial(ours, backend="torch")),
        ("eager loop", eager_loop),
        ("infini-transformer-pytorch", infini_transformer_pytorch),
    )
    for update in ("linear", "delta")
}


def check(provider: Provider, inputs: Inputs, segment_len: int) -> float:
    """Relative RMS error against the reference: the gate before any timing."""
    q, k, v, gate = inputs
    with torch.no_grad():
        out = provider.run(inputs, segment_len)
        expected = segment_attention(
            q,
            k,
            v,
            segment_len=segment_len,
            gate=gate if provider.update else None,
            update=provider.update or "delta",
            backend="reference",
        ).out
    return float((out - expected).norm() / expected.norm())
