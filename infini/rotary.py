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
