"""Rotary position embedding (arXiv 2104.09864), in halves."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Turn x [B, heads, T, K] by its positions [T] or [B, T]; angles in float32, K even."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = positions.to(torch.float32).unsqueeze(-1) * frequency
    if angle.ndim == 3:
        angle = angle.unsqueeze(1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.split(half, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo the rotary embedding of x [B, heads, T, K] by cos and sin [1 or B, T, R], R ≤ K its turned part.

    Halves of cos and sin are equal. A scale in both, as of YaRN and longrope, is undone as well. At least in float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(device=x.device, dtype=dtype).unsqueeze(1) for part in (cos, sin))
    turned = x[..., : cos.shape[-1]].to(dtype)
    left, right = turned.chunk(2, dim=-1)
    half = torch.cat([right, -left], dim=-1)
    plain = (turned * cos + half * sin) / (cos * cos + sin * sin)
    return torch.cat([plain.to(x.dtype), x[..., cos.shape[-1] :]], dim=-1)
