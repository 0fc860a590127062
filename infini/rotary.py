"""Rotary position embedding (arXiv 2104.09864), and how to undo it, whichever channels of a head are paired."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate x [B, heads, T, K], K even, by the angles of its positions [T] or [B, T].

    Channel i of the first half is paired with channel i of the second. Angles are computed in float64, by which a
    distance of some tokens is as exact a million tokens into a text.
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


def sink_positions(starts: Tensor, sinks: int, before: int) -> Tensor:
    """Return the positions of the sinks as each segment sees them, just before its window, int64 [S, sinks].

    Args:
        starts: int64 [S], position of each segment's first token.
        sinks: number of sinks.
        before: tokens before a segment that its window holds.
    """
    return (starts - before)[:, None] + torch.arange(-sinks, 0, device=starts.device)


def rotate_by(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, last: bool = False) -> Tensor:
    """Rotate x [B, heads, T, K] by angles whose cosines and sines are passed, computing in float32 or wider.

    Args:
        x: queries or keys.
        cos, sin: [1 or B, T, R / 2] of the angles, one for each pair of the R ≤ K rotated channels. A common scale of
            both, as YaRN and longrope have one, multiplies these channels.
        interleaved: the pairs are channels 2i and 2i + 1; default: channel i of the rotated channels' first half and
            channel i of their second.
        last: the rotated channels are the last ones of a head; default: the first.

    Returns:
        x after the rotation, in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (part.to(device=x.device, dtype=dtype).unsqueeze(1) for part in (cos, sin))
    width = 2 * cos.shape[-1]
    begin = x.shape[-1] - width if last else 0
    turned = x[..., begin : begin + width].to(dtype)
    left, right = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = left * cos - right * sin, right * cos + left * sin
    turned = (torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)).to(x.dtype)
    if width == x.shape[-1]:
        return turned
    return torch.cat([x[..., :begin], turned, x[..., begin + width :]], dim=-1)


def inverse(cos: Tensor, sin: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines by which `rotate_by` undoes a rotation of tensors of `dtype` by these."""
    cos, sin = (part.to(torch.promote_types(dtype, torch.float32)) for part in (cos, sin))
    squared = cos * cos + sin * sin
    return cos / squared, -sin / squared


def unrotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False, last: bool = False) -> Tensor:
    """Undo `rotate_by`: the arguments and the result are those, the other way round."""
    return rotate_by(x, *inverse(cos, sin, x.dtype), interleaved=interleaved, last=last)
