"""What heat maps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes

DPI = 160


def draw_grid(axes: Axes, columns: int, rows: int) -> None:
    """White lines between the cells, and no frame."""
    axes.set_xticks([x - 0.5 for x in range(1, columns)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(1, rows)], minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def draw_numbers(axes: Axes, values: Sequence[Sequence[float]], form: str, light: Callable[[float], bool]) -> None:
    """Each cell's number in its place, white where the cell is dark."""
    for row, across in enumerate(values):
        for column, value in enumerate(across):
            color = "white" if light(value) else "black"
            axes.text(column, row, format(value, form), ha="center", va="center", color=color)
