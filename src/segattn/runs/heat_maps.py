"""Two heat maps that runs share: what is recalled by length and depth, and a model's gates by layer and head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from .figures import format_length
from .pictures import BLACK, DPI, SEQUENTIAL, draw_grid, draw_numbers, save_picture

NUMBERED_HEADS = 16


def plot_recall(
    path: Path,
    shares: Mapping[tuple[float, int], float],
    title: str,
    label: str,
    trained_length: int | None = None,
) -> None:
    """Draw the share that is recalled, in per cent, with lengths across and depths down.

    Args:
        shares: (depth from 0 to 1, length in tokens) → share from 0 to 1; a pair that is missing is an empty cell.
        label: what is counted, beside the colours.
        trained_length: a line is drawn behind this length, and lengths are told as multiples of it too.
    """
    depths, lengths = (sorted(set(places)) for places in zip(*shares, strict=True))
    grid = [[shares.get((depth, length), float("nan")) for length in lengths] for depth in depths]
    size = (max(5.2, 2.0 + 0.95 * len(lengths)), 2.1 + 0.55 * len(depths))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(grid, cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    draw_numbers(axes, grid, lambda share: f"{100 * share:.0f}")
    times = {length: "" if trained_length is None else f"\n{length / trained_length:g}×" for length in lengths}
    axes.set_xticks(range(len(lengths)), [format_length(length) + times[length] for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{100 * depth:g} %" for depth in depths])
    axes.set_xlabel("tokens of text" + (", and multiples of the trained length" if trained_length else ""))
    axes.set_ylabel("depth of what is hidden")
    axes.set_title(title, loc="left", pad=18 if trained_length else None)
    draw_grid(axes, len(lengths), len(depths))
    if trained_length in lengths and lengths[-1] > trained_length:
        _mark_trained(axes, lengths.index(trained_length) + 0.5)
    _colorbar(image, label, {0: "0", 0.25: "25", 0.5: "50", 0.75: "75", 1: "100"})
    save_picture(figure, path)


def plot_gates(path: Path, share: Tensor, layers: Sequence[int], title: str) -> None:
    """Draw the memory's share [layers, heads] of every head, sigmoid(β): 0 is local attention alone, 1 memory alone.

    Args:
        layers: the numbers of the layers, from 0 on as in the model; heads count from 0 on too.
    """
    rows, heads = share.shape
    numbered = heads <= NUMBERED_HEADS
    size = (2.6 + heads * (0.7 if numbered else 0.28), 1.8 + (0.45 if numbered else 0.34) * rows)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(share.cpu().numpy(), cmap=SEQUENTIAL, vmin=0, vmax=1, aspect="auto")
    if numbered:
        draw_numbers(axes, share.tolist(), "{:.2f}".format)
    ticks = range(0, heads, 1 if numbered else 4)
    axes.set_xticks(ticks, [str(head) for head in ticks])
    axes.set_yticks(range(rows), [str(layer) for layer in layers])
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.set_title(title, loc="left")
    draw_grid(axes, heads, rows)
    _colorbar(image, "sigmoid(β)", {0: "0, local", 0.5: "0.5", 1: "1, memory"})
    save_picture(figure, path)


def _mark_trained(axes: Axes, edge: float) -> None:
    axes.axvline(edge, color=BLACK, linewidth=2)
    axes.annotate(
        "trained up to here",
        (edge, 1),
        (-4, 4),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        fontsize=7,
    )


def _colorbar(image: AxesImage, label: str, ticks: Mapping[float, str]) -> None:
    bar = image.axes.figure.colorbar(image, ax=image.axes, pad=0.03)
    bar.set_label(label)
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
