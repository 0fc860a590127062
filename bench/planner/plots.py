"""Pictures of plans, in colours that are told apart without red and green."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from ...runs.figures import spoken
from ...runs.heat_map import DPI
from .published import SEGMENT_LEN

SCHEME_LOOKS = {
    "full": ("#000000", "o"),
    "local": ("#999999", "v"),
    "rmt": ("#E69F00", "s"),
    "infini": ("#0072B2", "D"),
    "armt": ("#CC79A7", "^"),
}
PANELS = (
    ("forward_flops", "FLOPs of a forward pass"),
    ("prefill_floor_s", "prefill floor, seconds"),
    ("decode_floor_s_per_token", "decode floor, seconds a token"),
    ("kept_bytes", "state and cache of a sequence, bytes"),
    ("activation_bytes", "activations of a sequence, bytes"),
)
EXCHANGE_LOOKS = {
    "ring": ("#D55E00", "o"),
    "ulysses": ("#E69F00", "s"),
    "linear": ("#56B4E9", "D"),
    "linear scan": ("#009E73", "^"),
    "delta": ("#0072B2", "v"),
}


def plot_plan(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Every cost against the length of the text, a line for each scheme."""
    figure = plan_figure(rows, title)
    FigureCanvasAgg(figure).print_png(path)


def plan_figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(3.5 * len(PANELS), 3.8), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for axes, (name, label) in zip(panels, PANELS, strict=True):
        for scheme, (color, marker) in SCHEME_LOOKS.items():
            own = [row | {"kept_bytes": row["state_bytes"] + row["cache_bytes"]} for row in rows]
            own = [row for row in own if row["scheme"] == scheme]
            lengths, values = [row["length"] for row in own], [row[name] for row in own]
            axes.plot(lengths, values, color=color, marker=marker, markersize=4, label=scheme)
        axes.set_yscale("log")
        axes.set_title(label, loc="left", fontsize=9)
        _over_tokens(axes, [row["length"] for row in rows])
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def plot_savings(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """FLOPs of full attention over those of segments, against the length of the text (arXiv 2304.11062, figure 3)."""
    FigureCanvasAgg(savings_figure(rows)).print_png(path)


def savings_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(6.8, 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    colors = colormaps["cividis"].resampled(len(rows))
    for number, row in enumerate(rows):
        tokens = [n * SEGMENT_LEN for n in row["segments"]]
        label = f"{row['shape']}, at last {row['saving'][-1]:.1f} ×"
        axes.plot(tokens, row["saving"], color=colors(number), marker="o", markersize=3, label=label)
        axes.plot(tokens, row["saving_with_memory"], color=colors(number), linestyle=":", linewidth=1)
    axes.set_yscale("log")
    axes.set_ylabel("FLOPs of full attention over RMT's")
    _over_tokens(axes, [n * SEGMENT_LEN for n in rows[0]["segments"]])
    axes.set_title("segments of 512 tokens; dotted: memory tokens counted", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def plot_exchange(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """Bytes and seconds against ranks: lines of each length for ring and Ulysses, one for a state."""
    FigureCanvasAgg(exchange_figure(rows, title)).print_png(path)


def exchange_figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    figure = Figure(figsize=(11, 4.2), dpi=DPI, layout="constrained")
    lengths = sorted({row["length"] for row in rows})
    ranks = sorted({row["ranks"] for row in rows})
    labels = {"bytes": "bytes that a rank sends, a layer and step", "seconds": "seconds a layer and step"}
    panels = figure.subplots(1, 2)
    for axes, (quantity, label) in zip(panels, labels.items(), strict=True):
        for number, length in enumerate(lengths):
            # the longer the text, the darker
            shade = 0.3 + 0.7 * (number + 1) / len(lengths)
            for scheme, (color, marker) in EXCHANGE_LOOKS.items():
                points = [(row["ranks"], row[quantity][scheme]) for row in rows if row["length"] == length]
                points = [(at, value) for at, value in points if value]
                name = scheme if number == len(lengths) - 1 else "_"
                axes.plot(*_columns(points), color=color, alpha=shade, marker=marker, markersize=4, label=name)
                if points and scheme == "ring":
                    axes.annotate(spoken(length), points[0], (-4, 4), textcoords="offset points", fontsize=7)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(ranks, [str(n) for n in ranks], fontsize=7)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("ranks")
        axes.set_title(label, loc="left", fontsize=9)
        _plain(axes)
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure


def _columns(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [at for at, _ in points], [value for _, value in points]


def _over_tokens(axes: Axes, lengths: Sequence[int]) -> None:
    ticks = sorted(set(lengths))
    # as many as can be read
    ticks = ticks[:: -(-len(ticks) // 8)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [spoken(n) for n in ticks], fontsize=7)
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of text")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.5)
