"""The gates of a converted model by layer and head: which heads attend to the segment, and which to the memory."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..huggingface.settings import GATE, trunk_of

# a head is local whose sigmoid(β) is below this, and of the memory whose sigmoid(β) is above 1 - this
LOCAL = 0.1


class GateMap(NamedTuple):
    """The memory's share of every head.

    layers: indices of the converted layers, from 0 on.
    share: float32 [layers, heads], sigmoid(β).
    """

    layers: list[int]
    share: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """Return for each layer the shares, their range and mean, and how many heads are local, mixed and memory."""
        return [
            {"layer": layer, "share": share.tolist(), **_summary(share)}
            for layer, share in zip(self.layers, self.share, strict=True)
        ]


def gate_map(model: nn.Module) -> GateMap:
    """Read the gates of a model.

    Raises:
        ValueError: the model is not converted.
    """
    gated = {
        attention.layer_idx: getattr(attention, GATE)
        for attention in trunk_of(model).modules()
        if GATE in attention._modules
    }
    layers = sorted(gated)
    with torch.no_grad():
        return GateMap(layers, torch.stack([gated[layer]().sigmoid().float().cpu() for layer in layers]))


def _summary(share: Tensor) -> dict[str, Any]:
    local, memory = int((share < LOCAL).sum()), int((share > 1 - LOCAL).sum())
    return {
        "least": share.min().item(),
        "mean": share.mean().item(),
        "largest": share.max().item(),
        "local": local,
        "mixed": len(share) - local - memory,
        "memory": memory,
    }
