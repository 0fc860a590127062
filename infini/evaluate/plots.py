"""Pictures of the evaluations, in colours that are told apart without red and green."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...runs.figures import spoken
from ...runs.heat_map import DPI, draw_grid
from .perplexity import Bucket
from .retrieval import RetrievalCell

BLUE, GREY = "#0072B2", "#555555"


def plot_retrieval(path: Path, cells: Sequence[RetrievalCell], title: str) -> None:
    """Heat map of exact answers in per cent, length across and depth down. Cells that are not measured are empty."""
    lengths = sorted({cell.length for cell in cells})
    depths = sorted({cell.depth for cell in cells})
    share = {(cell.depth, cell.length): cell.exact for cell in cells}
    grid = [[share.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    size = (max(5.2, 2.2 + 0.8 * len(lengths)), 2.0 + 0.5 * len(depths))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(grid, cmap="cividis", vmin=0, vmax=1, aspect="auto")
    for (depth, length), value in share.items():
        color = "white" if value < 0.5 else "black"
        axes.text(
            lengths.index(length), depths.index(depth), f"{100 * value:.0f}", ha="center", va="center", color=color
        )
    axes.set_xticks(range(len(lengths)), [spoken(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
    axes.set_xlabel("tokens of text")
    axes.set_ylabel("depth of what is hidden")
    axes.set_title(title, loc="left")
    draw_grid(axes, len(lengths), len(depths))
    bar = figure.colorbar(picture, ax=axes, pad=0.02)
    bar.set_label("answered right, %")
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    FigureCanvasAgg(figure).print_png(path)


def plot_perplexity(path: Path, document: Sequence[Bucket], segment: Sequence[Bucket], mean: float, title: str) -> None:
    """Perplexity by position in the document, and where there are segments, beside it inside the segment."""
    figure = Figure(figsize=(9.6 if segment else 6.0, 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(
        1, 2 if segment else 1, sharey=True, squeeze=False, width_ratios=[2, 1][: 1 + bool(segment)]
    )
    _steps(panels[0, 0], document, "position in the document, tokens")
    panels[0, 0].axhline(mean, color=GREY, linestyle="--", linewidth=1)
    panels[0, 0].annotate(
        f"mean {mean:.4g}", (1, mean), (-4, 3), xycoords=("axes fraction", "data"), textcoords="offset points",
        ha="right", color=GREY, fontsize=8, bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )  # fmt: skip
    panels[0, 0].set_ylabel("perplexity")
    panels[0, 0].set_title(title, loc="left")
    if segment:
        _steps(panels[0, 1], segment, "position inside the segment")
    FigureCanvasAgg(figure).print_png(path)


def _steps(axes: Axes, buckets: Sequence[Bucket], label: str) -> None:
    """One level line per bucket."""
    axes.stairs(
        [bucket.perplexity for bucket in buckets],
        [*(bucket.begin for bucket in buckets), buckets[-1].end],
        baseline=None,
        color=BLUE,
        linewidth=1.8,
    )
    axes.set_xlabel(label)
    axes.grid(axis="y", color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
