"""The picture of `book_experiment`: perplexity by position, lines of the mean over seeds, bands of their spread."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ....runs.pictures import BLACK, BLUE, DPI, LIGHT_GREY, VERMILION, plain, save_picture

LOOKS = {"full": (BLACK, ":"), "local": (LIGHT_GREY, "-"), "linear": (BLUE, "-"), "delta": (VERMILION, "--")}


def plot_book(path: Path, figures: dict[str, Any]) -> None:
    """Draw it by position in rows as long as in training, by place in the segment, and by position in longer rows."""
    setup = figures["setup"]
    row, longer, segment_len = setup["row"], setup["row"] * setup["reach"], setup["segment_len"]
    figure = Figure(figsize=(13, 4.2), dpi=DPI, layout="constrained")
    first, second, third = figure.subplots(1, 3)
    _lines(first, figures["runs"], "by_segment", row)
    first.set_title("rows as long as in training", loc="left")
    first.set_xlabel("position in the row, bytes")
    first.set_ylabel("perplexity per byte, held-out text")
    first.legend(frameon=False, loc="upper right", ncols=2)
    # room for it
    first.set_ylim(top=first.get_ylim()[1] + 0.2 * (first.get_ylim()[1] - first.get_ylim()[0]))
    _lines(second, figures["runs"], "by_place_in_segment", segment_len)
    second.set_title(f"inside segments of {segment_len}, all but a row's first", loc="left")
    second.set_xlabel("place in the segment, bytes")
    _lines(third, figures["runs"], "longer_by_position", longer)
    third.axvline(row, color="black", linewidth=0.8)
    third.annotate(
        "trained length", (row, 0.02), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points"
    )
    third.set_title(f"rows {setup['reach']} times as long", loc="left")
    third.set_xlabel("position in the row, bytes")
    # what a model does that was never trained so far out may leave the picture
    third.set_ylim(first.get_ylim())
    for axes in (first, second, third):
        plain(axes)
    save_picture(figure, path)


def _lines(axes: Axes, runs: Sequence[dict[str, Any]], name: str, length: int) -> None:
    for variant, (color, style) in LOOKS.items():
        values = np.exp([run[name] for run in runs if run["variant"] == variant])
        if not len(values):
            continue
        width = length / values.shape[1]
        places = (np.arange(values.shape[1]) + (0.5 if width > 1 else 0)) * width
        mean, deviation = values.mean(0), values.std(0, ddof=min(1, len(values) - 1))
        axes.plot(places, mean, color=color, linestyle=style, label=f"{variant} ({len(values)} seeds)")
        axes.fill_between(places, mean - deviation, mean + deviation, color=color, alpha=0.2, linewidth=0)
