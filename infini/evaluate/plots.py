"""The picture of a perplexity by position."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...runs.pictures import BLUE, DPI, GREY, plain, save_picture
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


def _steps(axes: Axes, buckets: Sequence[Bucket], label: str) -> None:
    """Draw a level line for each bucket."""
    edges = [*(bucket.begin for bucket in buckets), buckets[-1].end]
    axes.stairs([bucket.perplexity for bucket in buckets], edges, baseline=None, color=BLUE, linewidth=1.8)
    axes.set_xlabel(label)
    plain(axes, grid="y")
