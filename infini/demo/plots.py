"""The demo's pictures: recall by length and depth, and the gates by layer and head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from ...runs.heat_map import DPI, draw_grid, draw_numbers
from .evaluation import Cell


def plot_recall(path: Path, cells: Sequence[Cell], trained_length: int, title: str) -> None:
    """Heat map of exact recall in per cent, length across and depth down; a line after the trained length."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    share = {(cell.depth, cell.length): cell.exact for cell in cells}
    grid = [[share[depth, length] for length in lengths] for depth in depths]
    figure = Figure(
        figsize=(max(5.2, 1.9 + 0.95 * len(lengths)), 2.1 + 0.55 * len(depths)), dpi=DPI, layout="constrained"
    )
    axes = figure.add_subplot()
    picture = axes.imshow(grid, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    draw_numbers(axes, [[100 * value for value in values] for values in grid], ".0f", light=lambda x: x < 15 or x > 85)
    axes.set_xticks(range(len(lengths)), [f"{length:,}\n{length / trained_length:g}×" for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
    axes.set_xlabel("tokens of text, and multiples of the trained length")
    axes.set_ylabel("depth of the passkey")
    axes.set_title(title, loc="left", pad=18)
    if trained_length in lengths and lengths[-1] > trained_length:
        edge = lengths.index(trained_length) + 0.5
        axes.axvline(edge, color="black", linewidth=2)
        axes.annotate(
            "trained up to here",
            (edge, 1),
            (-4, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )
    draw_grid(axes, len(lengths), len(depths))
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.set_label("passkeys recalled whole, %")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    FigureCanvasAgg(figure).print_png(path)


def plot_gates(path: Path, gates: Tensor, title: str) -> None:
    """Heat map of sigmoid(β) [layers, heads]: 0 is local attention alone, 1 memory alone."""
    layers, heads = gates.shape
    figure = Figure(figsize=(2.4 + 0.8 * heads, 1.8 + 0.6 * layers), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(gates.cpu().numpy(), cmap="PuOr", vmin=0, vmax=1, aspect="auto")
    draw_numbers(axes, gates.tolist(), ".2f", light=lambda x: abs(x - 0.5) > 0.25)
    axes.set_xticks(range(heads), [str(head + 1) for head in range(heads)])
    axes.set_yticks(range(layers), [str(layer + 1) for layer in range(layers)])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title)
    draw_grid(axes, heads, layers)
    bar = figure.colorbar(picture, ax=axes, pad=0.04)
    bar.set_label("sigmoid(β)")
    bar.set_ticks([0, 0.5, 1], labels=["local", "0.5", "memory"])
    FigureCanvasAgg(figure).print_png(path)
