"""The picture of the questions: answers right by the length of the book, and what is kept of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ....runs.figures import format_length
from ....runs.pictures import (
    BLACK,
    BLUE,
    DPI,
    GREY,
    ORANGE,
    VERMILION,
    doubling,
    logarithmic,
    plain,
    save_picture,
)

LOOKS = {
    "full": ("full attention", BLACK, "^"),
    "delta": ("Infini-attention, delta", VERMILION, "o"),
    "rmt": ("RMT", BLUE, "s"),
    "armt": ("ARMT", ORANGE, "v"),
}


def plot_questions(path: Path, figures: dict[str, Any]) -> None:
    """Draw a line for each model: its share of right answers, and the bytes that it keeps of a book."""
    setup = figures["setup"]
    figure = Figure(figsize=(10, 4.0), dpi=DPI, layout="constrained")
    shares, memory = figure.subplots(1, 2)
    for run in figures["runs"]:
        title, color, marker = LOOKS[run["model"]]
        cells = run["lengths"]
        at, right = [cell["length"] for cell in cells], [100 * cell["right"] for cell in cells]
        below = [y - 100 * cell["interval"][0] for y, cell in zip(right, cells, strict=True)]
        above = [100 * cell["interval"][1] - y for y, cell in zip(right, cells, strict=True)]
        look: dict[str, Any] = {"color": color, "marker": marker, "markersize": 4, "label": title}
        shares.errorbar(at, right, yerr=[below, above], capsize=2, elinewidth=0.8, **look)
        memory.plot(at, [cell["kept_bytes"] / 2**10 for cell in cells], **look)
    trained = setup["segments"][-1] * setup["segment_len"]
    shares.axvline(trained, color=GREY, linestyle="--", linewidth=1, label=f"trained up to {trained:,} tokens")
    shares.axhline(100 * figures["chance"], color=GREY, linestyle=":", linewidth=1, label="guessing")
    shares.set_ylim(-3, 103)
    shares.set_ylabel("right, %")
    # of books within a segment nothing is kept
    if all(cell["kept_bytes"] for run in figures["runs"] for cell in run["lengths"]):
        logarithmic(memory)
    memory.set_ylabel("kept of a book, KiB")
    # the other panel has no room for it
    memory.legend(*shares.get_legend_handles_labels(), loc=(0.55, 0.5), frameon=False, fontsize=8)
    for axes in (shares, memory):
        doubling(axes, {length: format_length(length) for length in setup["lengths"]}, fontsize=8)
        axes.set_xlabel("tokens of the book")
        plain(axes)
    save_picture(figure, path)
