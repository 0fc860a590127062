"""Pictures of memory tasks: accuracy against length, and attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ...runs.pictures import BLUE, DPI, GREY, SEQUENTIAL, VERMILION, plain, save_picture
from . import published


def plot_accuracy(path: Path, figures: dict[str, Any]) -> None:
    """Draw the share of right answers by tokens, with 95 % intervals, beside the paper's, trained length and chance."""
    cells = figures["lengths"]
    tokens = [cell["tokens"] for cell in cells]
    shares = [100 * cell["accuracy"] for cell in cells]
    below = [100 * (cell["accuracy"] - cell["interval"][0]) for cell in cells]
    above = [100 * (cell["interval"][1] - cell["accuracy"]) for cell in cells]
    figure = Figure(figsize=(7.2, 4.2), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.errorbar(tokens, shares, yerr=[below, above], color=BLUE, marker="o", markersize=4, capsize=3, label="here")
    # of the lengths that are measured, since others have no ticks
    longest = max(cell["segments"] for cell in cells)
    paper = {int(n): 100 * share for n, share in figures["published"].items() if int(n) <= longest}
    if paper:
        lengths = [segments * figures["segment_len"] for segments in paper]
        look: dict[str, Any] = {"color": VERMILION, "marker": "s", "markersize": 3, "linestyle": "--"}
        axes.plot(lengths, list(paper.values()), **look, label=published.SHORT_SOURCE)
    trained = figures["trained_segments"] * figures["segment_len"]
    axes.axvline(trained, color=GREY, linestyle="--", linewidth=1, label=f"trained up to {trained:,} tokens")
    axes.axhline(100 * figures["chance"], color=GREY, linestyle=":", linewidth=1, label="chance")
    axes.set_xticks(tokens, [f"{cell['segments']:,}\n{cell['tokens']:,}" for cell in cells], fontsize=8)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 103)
    axes.set_xlabel("segments, and tokens")
    axes.set_ylabel("answered right, %")
    axes.set_title(figures["task"], loc="left")
    plain(axes, grid="y")
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    save_picture(figure, path)


def plot_attention(path: Path, panels: Sequence[Any], title: str) -> None:
    """Draw attention maps [layers, heads, rows, columns] of a few segments below each other, memory and facts marked.

    Each layer has a row of maps, 20 inches wide at most up to 20 heads. Layers and heads count from 0 on.

    Args:
        panels: each with `title`, `maps`, `memory` and `marked` (begin and end of rows).
    """
    layers, heads = panels[0].maps.shape[:2]
    size = max(1.0, min(2.4, 20 / heads))
    width, height = size * heads + 1.4, size * layers * len(panels) + 0.8
    # maps are square, and labels have the room that is left of a figure that is not
    figure = Figure(figsize=(width, height), dpi=DPI, layout="compressed")
    grid = figure.subplots(layers * len(panels), heads, squeeze=False)
    for number, panel in enumerate(panels):
        for layer in range(layers):
            for head in range(heads):
                axes = grid[number * layers + layer, head]
                _draw_map(axes, panel, layer, head)
                axes.tick_params(labelsize=6, labelleft=head == 0, labelbottom=layer == layers - 1)
            grid[number * layers + layer, 0].set_ylabel(f"{panel.title}\nlayer {layer}", fontsize=7)
        for head in range(heads):
            grid[number * layers, head].set_title(f"head {head}", fontsize=7)
    figure.suptitle(title, fontsize=9)
    length = min(0.6 * height, 4)
    place = {"shrink": length / height, "aspect": 20, "fraction": 0.3 / width, "pad": 0.2 / width}
    bar = figure.colorbar(grid[0, 0].images[0], ax=grid, **place)
    bar.set_label("attention of a row (down)\nto a column (across)", fontsize=7)
    bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.5", "1"], fontsize=7)
    save_picture(figure, path)


def _draw_map(axes: Axes, panel: Any, layer: int, head: int) -> None:
    # most weights are small, and differences between them matter: their square roots
    axes.imshow(panel.maps[layer, head] ** 0.5, cmap=SEQUENTIAL, vmin=0, vmax=1)
    for begin, end in panel.memory:
        axes.axhspan(begin - 0.5, end - 0.5, fill=False, edgecolor="white", linewidth=0.8)
        axes.axvspan(begin - 0.5, end - 0.5, fill=False, edgecolor="white", linewidth=0.8)
    for begin, end in panel.marked:
        axes.axvspan(begin - 0.5, end - 0.5, fill=False, edgecolor=VERMILION, linewidth=1)
