"""The gates of a converted model, by layer and head: which heads look at the segment, and which into the memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from ...runs.heat_map import DPI, draw_grid, draw_numbers
from ..huggingface.settings import GATE, trunk_of

# sigmoid(β) below which a head is local, and above whose complement it is of the memory
LOCAL = 0.1
NUMBERED_HEADS = 16


class GateMap(NamedTuple):
    """layers: indices of the converted ones; share: float32 [layers, heads], sigmoid(β), the share of the memory."""

    layers: list[int]
    share: Tensor

    def rows(self) -> list[dict[str, Any]]:
        """Of each layer: least, mean and largest share, and how many heads are local, mixed, and of the memory."""
        return [
            {"layer": layer, "share": share.tolist(), **_summary(share)}
            for layer, share in zip(self.layers, self.share, strict=True)
        ]


def gate_map(model: nn.Module) -> GateMap:
    """The gates as they are now.

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


def plot_gate_map(path: Path, gates: GateMap, title: str) -> None:
    """Heat map of sigmoid(β), layers down and heads across: orange is local attention, violet the memory."""
    layers, heads = gates.share.shape
    size = (2.6 + heads * (0.7 if heads <= NUMBERED_HEADS else 0.28), 1.8 + 0.34 * layers)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(gates.share.numpy(), cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    if heads <= NUMBERED_HEADS:
        draw_numbers(axes, gates.share.tolist(), ".2f", light=lambda x: abs(x - 0.5) > 0.25)
    step = 1 if heads <= NUMBERED_HEADS else 4
    axes.set_xticks(range(0, heads, step), [str(head) for head in range(0, heads, step)])
    axes.set_yticks(range(layers), [str(layer) for layer in gates.layers])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left")
    draw_grid(axes, heads, layers)
    bar = figure.colorbar(picture, ax=axes, pad=0.03)
    bar.set_label("sigmoid(β)")
    bar.set_ticks([0, 0.5, 1], labels=["local", "0.5", "memory"])
    FigureCanvasAgg(figure).print_png(path)


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
