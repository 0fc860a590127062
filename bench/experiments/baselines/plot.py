"""The picture of the baselines: perplexity against bytes kept, along the row, and bytes kept against length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ....runs.figures import format_length
from ....runs.pictures import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    GREY,
    LIGHT_GREY,
    ORANGE,
    PINK,
    SKY,
    VERMILION,
    doubling,
    logarithmic,
    plain,
    save_picture,
)
from ...planner.units import in_bytes

# variant → colour, marker, line
LOOKS = {
    "local": (LIGHT_GREY, "s", "-"),
    "full": (BLACK, "o", ":"),
    "transformer-xl": (GREEN, "^", "-"),
    "lookback": (GREY, "<", "--"),
    "memorizing": (PINK, "v", "-"),
    "rmt": (ORANGE, "P", "-"),
    "linear": (BLUE, "D", "-"),
    "delta": (VERMILION, "X", "--"),
    "delta-lookback": (SKY, "*", "-"),
}
ON_THE_LEFT = ("linear", "transformer-xl")


def plot_baselines(path: Path, figures: dict[str, Any]) -> None:
    """Draw three pictures into one file, of the figures that `experiment` keeps."""
    figure = Figure(figsize=(14, 4.4), dpi=DPI, layout="constrained")
    first, second, third = figure.subplots(1, 3)
    _against_bytes(first, figures)
    _along_the_row(second, figures)
    _against_length(third, figures)
    for axes in (first, second, third):
        plain(axes)
    save_picture(figure, path)


def _against_bytes(axes: Axes, figures: dict[str, Any]) -> None:
    length = str(min(map(int, figures["kept"]["full"]["bytes"])))
    for name, (color, mark, _) in LOOKS.items():
        mean, deviation = figures["summary"][name]["perplexity"]
        kept = figures["kept"][name]["bytes"][length]
        axes.errorbar(kept, mean, deviation, color=color, marker=mark, linestyle="", capsize=3)
        # three keep about as much
        place, side = ((-6, 4), "right") if name in ON_THE_LEFT else ((6, 4), "left")
        axes.annotate(name, (kept, mean), place, textcoords="offset points", color=color, fontsize=9, ha=side)
    # 0 has a place
    axes.set_xscale("symlog", linthresh=1024)
    axes.set_xlim(-200, 8 * figures["kept"]["full"]["bytes"][length])
    axes.set_xlabel(f"bytes kept of {length} bytes of text")
    axes.set_ylabel("perplexity per byte, held-out text")
    axes.set_title(f"mean and deviation of {figures['summary']['local']['seeds']} seeds", loc="left")


def _along_the_row(axes: Axes, figures: dict[str, Any]) -> None:
    setup = figures["setup"]
    for name, (color, _, style) in LOOKS.items():
        values = np.exp([run["longer_by_position"] for run in figures["runs"] if run["variant"] == name]).mean(0)
        width = setup["row"] * setup["reach"] / len(values)
        axes.plot((np.arange(len(values)) + 0.5) * width, values, color=color, linestyle=style, label=name)
    axes.axvline(setup["row"], color="black", linewidth=0.8)
    axes.set_ylim(top=1.25 * np.exp([run["nats"] for run in figures["runs"]]).max())
    axes.annotate(
        "trained", (setup["row"], 0.02), (4, 0), xycoords=("data", "axes fraction"), textcoords="offset points"
    )
    axes.set_title(f"rows {setup['reach']} times as long as in training", loc="left")
    axes.set_xlabel("position in the row, bytes")


def _against_length(axes: Axes, figures: dict[str, Any]) -> None:
    for number, (name, (color, mark, style)) in enumerate(LOOKS.items()):
        kept = figures["kept"][name]["bytes"]
        lengths = list(map(int, kept))
        if any(kept.values()):
            # three keep about as much: the next lines are thinner, and one that they lie on is seen
            look: dict[str, Any] = {"color": color, "marker": mark, "linestyle": style, "linewidth": 4 - 0.4 * number}
            axes.plot(lengths, list(kept.values()), **look, label=name)
    doubling(axes, {length: format_length(length) for length in lengths})
    logarithmic(axes, in_bytes, base=2)
    axes.legend(frameon=False)
    axes.set_title("kept of one text (local: 0)", loc="left")
    axes.set_xlabel("length of the text, bytes")
