"""The look of every picture: one palette that colour-blind readers tell apart, plain axes, files of any format."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .checkpoint import replacing

DPI = 160
# of Okabe and Ito, with greys in place of the yellow, which is too faint on white
BLACK, GREY, LIGHT_GREY = "#000000", "#555555", "#999999"
BLUE, SKY, GREEN = "#0072B2", "#56B4E9", "#009E73"
VERMILION, ORANGE, PINK = "#D55E00", "#E69F00", "#CC79A7"
# from dark to light, for heat maps and for lines in an order
SEQUENTIAL = "viridis"
# colour and marker of a picture's first line, its second, ...
LINES = (
    (BLUE, "o"),
    (VERMILION, "s"),
    (GREEN, "^"),
    (BLACK, "D"),
    (ORANGE, "v"),
    (PINK, "P"),
    (SKY, "X"),
    (LIGHT_GREY, "*"),
)


def save_picture(figure: Figure, path: Path, metadata: Mapping[str, str | None] | None = None) -> None:
    """Write a picture in the format that the path's suffix names, whole, or leave what was there.

    Args:
        metadata: kept in the file, where its format has a place for it.

    Raises:
        ValueError: matplotlib writes no such format.
    """
    kind = picture_format(path)
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=None if metadata is None else dict(metadata))


def picture_format(path: Path) -> str:
    """Return the format that the path's suffix names.

    Raises:
        ValueError: matplotlib writes no such format.
    """
    kind, known = path.suffix.removeprefix(".").lower(), FigureCanvasBase.get_supported_filetypes()
    if kind not in known:
        raise ValueError(f"path must end in one of {', '.join(f'.{x}' for x in sorted(known))}, got {str(path)!r}")
    return kind


def plain(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Leave faint lines behind the data, and no frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.3, linewidth=0.5)
    axes.set_axisbelow(True)


def logarithmic(axes: Axes, form: Callable[[float], str] = "{:g}".format, base: int = 10) -> None:
    """Make the y axis logarithmic, once the data are drawn, with a few ticks that `form` writes.

    Args:
        base: 2 for ticks at powers of two; 10 for those at powers of ten, and 2 and 5 times them on a short axis. An
            axis on which there would be no two of these has ticks at equal distances.
    """
    axes.set_yscale("log", base=base)
    low, high = axes.get_ylim()
    between = (1.0, 2.0, 5.0) if base == 10 and high < 1000 * low else (1.0,)
    few = MaxNLocator(6, steps=[1, 2, 5, 10]) if base == 10 and high < 4 * low else None
    axes.yaxis.set_major_locator(few or LogLocator(base=base, subs=between, numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: form(value)))
    axes.yaxis.set_minor_locator(NullLocator())


def doubling(axes: Axes, ticks: Mapping[int, str], fontsize: float | None = None) -> None:
    """Make the x axis logarithmic, of base 2, with these ticks alone, by the words that stand at them."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(ticks), list(ticks.values()), fontsize=fontsize)
    axes.xaxis.set_minor_formatter(NullFormatter())


def draw_grid(axes: Axes, columns: int, rows: int) -> None:
    """Draw white lines between the cells of a heat map, and no frame."""
    axes.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def draw_numbers(axes: Axes, shares: Sequence[Sequence[float]], form: Callable[[float], str]) -> None:
    """Write the share of each cell of a heat map in its place, white where the cell is dark; a NaN has no number."""
    for row, across in enumerate(shares):
        for column, share in enumerate(across):
            if not math.isnan(share):
                color = "white" if share < 0.5 else "black"
                axes.text(column, row, form(share), ha="center", va="center", color=color)
