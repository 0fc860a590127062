"""The picture of `recurrent_lengths`: seconds per token, and bytes, against the length of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ....runs.pictures import BLACK, BLUE, DPI, VERMILION, doubling, logarithmic, plain, save_picture

LOOKS = {"RMT": (BLUE, "o"), "ARMT": (VERMILION, "s"), "full attention": (BLACK, "^")}


def plot_lengths(path: Path, figures: dict[str, Any]) -> None:
    """Draw every round as a faint dot, and lines between the medians; bytes kept of the text have open markers."""
    figure = Figure(figsize=(10, 4.0), dpi=DPI, layout="constrained")
    times, memory = figure.subplots(1, 2)
    _lines(times, figures, "seconds_per_token", 1e6, "-")
    times.set_ylabel("µs per token")
    times.set_ylim(bottom=0)
    times.legend(frameon=False)
    _lines(memory, figures, "peak_bytes", 2**-20, "-")
    _lines(memory, figures, "kept_bytes", 2**-20, ":")
    logarithmic(memory)
    memory.set_ylabel("MiB: at most (solid), kept of the text (dotted)")
    save_picture(figure, path)


def _lines(axes: Axes, figures: dict[str, Any], key: str, scale: float, style: str) -> None:
    for name, (colour, marker) in LOOKS.items():
        rows = [x for x in figures["summary"] if x["reader"] == name]
        values = [scale * x[key] for x in rows]
        # markers of lines that meet are seen through each other
        fill = colour if style == "-" else "none"
        look: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": fill, "label": name}
        axes.plot([x["segments"] for x in rows], values, style, **look)
        single = [x for x in figures["readings"] if x["reader"] == name]
        axes.scatter([x["segments"] for x in single], [scale * x[key] for x in single], color=colour, s=6, alpha=0.4)
    doubling(axes, {x["segments"]: f"{x['segments']:,}\n{x['tokens']:,}" for x in figures["summary"]}, fontsize=8)
    axes.set_xlabel("segments, and tokens")
    plain(axes, grid="y")
