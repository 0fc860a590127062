"""Pictures of memory tasks: accuracy against length, and attention maps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from ...runs.pictures import BLUE, DPI, GREY, SEQUENTIAL, VERMILION, plain, save_picture
from . import published

# begin and end of rows
Span = tuple[int, int]
# labels that fit side by side on an axis of a picture's width
MOST_LABELS = 14


class Panel(NamedTuple):
    """The attention maps of one segment.

    title: names the segment.
    maps: probabilities [layers, heads, T, T], of each row (down) over columns (across).
    memory: rows of the memory, read and written.
    marked: rows of facts.
    """

    title: str
    maps: np.ndarray
    memory: list[Span]
    marked: list[Span]


def plot_accuracy(path: Path, figures: dict[str, Any]) -> None:
    """Draw the share of right answers by tokens, with 95 % intervals, the paper's curve, the trained length and chance.

    Tokens stand at the bottom, and the segments of the lengths measured at the top, since the paper's segments may be
    of other lengths.

    Args:
        path: of the picture, whose suffix names its format.
        figures: of an evaluation.
    """
    cells, segment_len = figures["lengths"], figures["segment_len"]
    tokens = [cell["tokens"] for cell in cells]
    shares = [100 * cell["accuracy"] for cell in cells]
    below = [100 * (cell["accuracy"] - cell["interval"][0]) for cell in cells]
    above = [100 * (cell["interval"][1] - cell["accuracy"]) for cell in cells]
    figure = Figure(figsize=(7.2, 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    handles: list[Any] = [
        axes.errorbar(
            tokens,
            shares,
            yerr=[below, above],
            color=BLUE,
            marker="o",
            markersize=4,
            capsize=3,
            elinewidth=1,
            label="this run",
        )
    ]
    paper = published.curve(figures["task"])
    if paper:
        at = [segments * published.SEGMENT_LEN for segments in paper]
        percent = [100 * x for x in paper.values()]
        # dashed, so that both are seen where they lie on each other
        look: dict[str, Any] = {"color": VERMILION, "linestyle": "--", "marker": "s", "markersize": 3}
        handles += axes.plot(at, percent, label=published.SHORT_SOURCE, **look)
    trained = figures["trained_segments"] * segment_len
    label = f"trained up to {trained:,} tokens"
    handles.append(axes.axvline(trained, color=GREY, linestyle="--", linewidth=1, label=label))
    handles.append(axes.axhline(100 * figures["chance"], color=GREY, linestyle=":", linewidth=1, label="chance"))
    _label_lengths(axes, [(cell["tokens"], cell["segments"]) for cell in cells], segment_len)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylim(0, 103)
    axes.set_ylabel("answered right, %")
    axes.set_title(figures["task"], loc="left")
    plain(axes, grid="y")
    figure.legend(handles=handles, fontsize=8, frameon=False, loc="outside lower center", ncols=4)
    save_picture(figure, path)


def _label_lengths(axes: Axes, lengths: Sequence[tuple[int, int]], segment_len: int) -> None:
    """Label an x axis at the bottom by powers of two of tokens, at the top by the segments of lengths.

    Args:
        lengths: tokens and segments of each, ascending; one too close to the one before has no label.
    """
    low, high = (math.log2(limit) for limit in axes.get_xlim())
    shown: list[tuple[int, int]] = []
    for tokens, segments in lengths:
        if not shown or math.log2(tokens / shown[-1][0]) > (high - low) / MOST_LABELS:
            shown.append((tokens, segments))
    measured = [tokens for tokens, _ in shown]
    step = math.ceil((high - low) / 8)
    powers = [2**at for at in range(math.ceil(low / step) * step, math.floor(high) + 1, step)]
    ticks = powers if len(powers) > 1 else measured
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    axes.set_xlabel("tokens")
    top = axes.secondary_xaxis("top")
    first, *others = (f"{segments:,}" for _, segments in shown)
    unit = "segment" if first == "1" else "segments"
    top.set_xticks(measured, [f"{first} {unit}", *others], fontsize=8)
    top.set_xlabel(f"lengths measured, in segments of {segment_len:,} tokens", fontsize=8)
    top.spines["top"].set_visible(False)
    for axis in (axes, top):
        axis.tick_params(axis="x", which="minor", length=0, labelbottom=False, labeltop=False)


def plot_attention(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Draw the attention maps of a few segments, one below the other, with memory rows and facts marked.

    Each layer has a row of maps, 20 inches wide at most up to 20 heads. Layers and heads count from 0 on.

    Args:
        path: of the picture, whose suffix names its format.
        panels: the segments.
        title: of the picture.
    """
    layers, heads = panels[0].maps.shape[:2]
    size = max(1.0, min(2.4, 20 / heads))
    width, height = max(size * heads + 1.4, 4.2), max(size * layers * len(panels) + 1.0, 3.0)
    # maps are square, and a figure that is not leaves its room to the labels
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
    figure.supxlabel("white: rows of the memory; orange: rows of facts", fontsize=7)
    length = min(0.6 * height, 4)
    place = {"shrink": length / height, "aspect": 20, "fraction": 0.3 / width, "pad": 0.2 / width}
    bar = figure.colorbar(grid[0, 0].images[0], ax=grid, **place)
    bar.set_label("attention of a row (down)\nto a column (across)", fontsize=7)
    bar.set_ticks([0, 0.1**0.5, 0.5**0.5, 1], labels=["0", "0.1", "0.5", "1"], fontsize=7)
    save_picture(figure, path)


def _draw_map(axes: Axes, panel: Panel, layer: int, head: int) -> None:
    # small weights matter, and most are small
    axes.imshow(panel.maps[layer, head] ** 0.5, cmap=SEQUENTIAL, vmin=0, vmax=1)
    for begin, end in panel.memory:
        axes.axhspan(begin - 0.5, end - 0.5, fill=False, edgecolor="white", linewidth=0.8)
        axes.axvspan(begin - 0.5, end - 0.5, fill=False, edgecolor="white", linewidth=0.8)
    for begin, end in panel.marked:
        axes.axvspan(begin - 0.5, end - 0.5, fill=False, edgecolor=VERMILION, linewidth=0.8)
