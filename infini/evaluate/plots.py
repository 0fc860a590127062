"""The pictures of a perplexity by position, and of a benchmark by length."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, cycle, product
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...runs.figures import format_length
from ...runs.pictures import BLACK, BLUE, DPI, GREY, LINES, doubling, logarithmic, plain, save_picture
from .perplexity import Bucket


def plot_perplexity(path: Path, document: Sequence[Bucket], segment: Sequence[Bucket], mean: float, title: str) -> None:
    """Draw the perplexity by position in the document and, where there are segments, by position inside the segment."""
    figure = Figure(figsize=(9.6 if segment else 6.0, 3.8), dpi=DPI, layout="constrained")
    widths = [2, 1] if segment else [1]
    panels = figure.subplots(1, len(widths), sharey=True, squeeze=False, width_ratios=widths)[0]
    _steps(panels[0], document, "position in the document, tokens")
    panels[0].axhline(mean, color=GREY, linestyle="--", linewidth=1)
    panels[0].annotate(
        f"mean {mean:.4g}",
        (1, mean),
        (-4, 3),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        color=GREY,
        fontsize=8,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
    panels[0].set_ylabel("perplexity")
    panels[0].set_title(title, loc="left")
    if segment:
        _steps(panels[1], segment, "position inside the segment, tokens")
    save_picture(figure, path)


def plot_benchmark(path: Path, cells: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the score of each task by length, and the most memory held, where it is known."""
    lengths = sorted({cell["length"] for cell in cells})
    watched = [cell for cell in cells if cell["peak_bytes"] is not None]
    figure = Figure(figsize=(9.6 if watched else 5.6, 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, 2 if watched else 1, squeeze=False)[0]
    for task, (color, marker) in zip(dict.fromkeys(cell["task"] for cell in cells), LINES, strict=False):
        look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "label": task}
        of_task = [cell for cell in cells if cell["task"] == task]
        panels[0].plot([x["length"] for x in of_task], [100 * x["score"] for x in of_task], **look)
        held = [(x["length"], x["peak_bytes"] / 2**20) for x in watched if x["task"] == task]
        if held:
            panels[1].plot(*zip(*held, strict=True), **look)
    panels[0].set_ylim(-3, 103)
    panels[0].set_ylabel("right, %")
    panels[0].set_title(title, loc="left")
    panels[0].legend(frameon=False, fontsize=8)
    if watched:
        panels[1].set_ylim(0, 1.1 * max(cell["peak_bytes"] for cell in watched) / 2**20)
        panels[1].set_ylabel("most memory held by the process, MiB")
    for axes in panels:
        doubling(axes, {length: format_length(length) for length in lengths})
        axes.set_xlabel("tokens of text")
        plain(axes)
    save_picture(figure, path)


def plot_conversions(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Draw the perplexity of each row by position in the text, over that of the first row."""
    figure = Figure(figsize=(9.6, 4.2), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    colors = [color for color, _ in LINES if color != BLACK]
    looks = chain([("-", BLACK)], cycle(product(("-", "--", ":", "-."), colors)))
    for row, (style, color) in zip(rows, looks, strict=False):
        pairs = list(zip(row["by_position"], rows[0]["by_position"], strict=True))
        centres = [(bucket["begin"] + bucket["end"]) / 2 for bucket, _ in pairs]
        ratios = [bucket["perplexity"] / first["perplexity"] for bucket, first in pairs]
        label = f"{row['conversion']}: {row['perplexity']:.4g}"
        axes.plot(centres, ratios, style, color=color, linewidth=1.5, label=label)
    logarithmic(axes)
    plain(axes, grid="y")
    axes.set_xlabel("position in the text, tokens")
    axes.set_ylabel(f"perplexity ÷ {rows[0]['conversion']}")
    axes.set_title(title, loc="left")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save_picture(figure, path)


def _steps(axes: Axes, buckets: Sequence[Bucket], label: str) -> None:
    """Draw a level line for each bucket."""
    edges = [*(bucket.begin for bucket in buckets), buckets[-1].end]
    axes.stairs([bucket.perplexity for bucket in buckets], edges, baseline=None, color=BLUE, linewidth=1.8)
    axes.set_xlabel(label)
    plain(axes, grid="y")
