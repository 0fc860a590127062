"""Rotary position embedding (arXiv 2104.09864): channel i of the first half is paired with channel i of the second."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate x [B, heads, T, K], K even, by the angles of its positions [T] or [B, T].

    Angles are computed in float64, by which a distance of some tokens is as exact a million tokens into a text.
    """
    half = x.shape[-1] // 2
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    frequency = base ** (-torch.arange(half, device=x.device, dtype=exact) / half)
    angle = positions.to(exact).unsqueeze(-1) * frequency
    if angle.ndim == 3:
        angle = angle.unsqueeze(1)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    left, right = x.split(half, dim=-1)
    return torch.cat([left * cos - right * sin, right * cos + left * sin], dim=-1)


def unrotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Undo the rotary embedding of x [B, heads, T, K], computing in float32 or wider.

    Args:
        x: rotated queries or keys.
        cos, sin: [1 or B, T, R] of the angles, R ≤ K the number of rotated channels, whose two halves are equal. A
            common scale of both, as YaRN and longrope have one, is undone too.

    Returns:
        x before the rotation, in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(device=x.device, dtype=dtype).unsqueeze(1) for part in (cos, sin))
    rotated = x[..., : cos.shape[-1]].to(dtype)
    left, right = rotated.chunk(2, dim=-1)
    swapped = torch.cat([right, -left], dim=-1)
    plain = (rotated * cos + swapped * sin) / (cos * cos + sin * sin)
    return torch.cat([plain.to(x.dtype), x[..., cos.shape[-1] :]], dim=-1)
