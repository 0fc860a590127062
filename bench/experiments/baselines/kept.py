"""Keys and values that are kept of earlier segments, as a value, and what of them stood before each segment."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Kept(NamedTuple):
    """The newest tokens' keys [B, H, C, K] and values [B, H, C, V], without a graph."""

    keys: Tensor
    values: Tensor

    @classmethod
    def nothing(cls, k: Tensor, v: Tensor) -> Kept:
        """Return the state of no tokens, for keys and values like these."""
        return cls(k[:, :, :0].detach(), v[:, :, :0].detach())

    def joined(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values with new ones [B, H, T, ·] behind."""
        return torch.cat([self.keys, k], 2), torch.cat([self.values, v], 2)

    def after(self, k: Tensor, v: Tensor, limit: int | None = None) -> Kept:
        """Return the state with new tokens behind; beyond `limit` the oldest are dropped."""
        joined = self.joined(k.detach(), v.detach())
        length = joined[0].shape[2]
        first = 0 if limit is None else max(0, length - limit)
        # cloned, so that what was dropped is not kept alive
        return Kept(*(x[:, :, first:].clone() if first else x for x in joined))


def before_segments(kept: Tensor, new: Tensor, width: int, segment_len: int) -> Tensor:
    """Return the `width` places before each segment of `new`, [B, H, S, width, ·], detached; 0 where nothing stands.

    Args:
        kept: [B, H, C, ·] of the tokens before, C ≤ width.
        new: [B, H, S · segment_len, ·].
    """
    earlier = F.pad(torch.cat([kept, new.detach()], 2), (0, 0, width - kept.shape[2], 0))
    return earlier[:, :, : width + new.shape[2] - segment_len].unfold(2, width, segment_len).mT


def numbers_before(kept: int, time: int, width: int, segment_len: int) -> Tensor:
    """Return how many of the `width` places before each segment hold a token, int64 [S]."""
    return (kept + torch.arange(0, time, segment_len)).clamp(max=width)
