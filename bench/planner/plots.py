"""Pictures of plans: costs by length, savings by length, and traffic by ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...runs.figures import format_length
from ...runs.pictures import (
    BLACK,
    BLUE,
    DPI,
    GREEN,
    LIGHT_GREY,
    ORANGE,
    PINK,
    SEQUENTIAL,
    SKY,
    VERMILION,
    doubling,
    logarithmic,
    plain,
)
from .published import SEGMENT_LEN
from .units import in_bytes, in_flops, in_seconds

# Schemes that cost the same lie on each other: each is drawn over the one before, and thinner, so that all are seen.
SCHEME_LOOKS: dict[str, dict[str, Any]] = {
    "local": {"color": LIGHT_GREY, "marker": "v", "markersize": 11, "linewidth": 8},
    "infini": {"color": BLUE, "marker": "D", "markersize": 7, "linewidth": 5.5},
    "armt": {"color": PINK, "marker": "^", "markersize": 6, "linewidth": 3.5},
    "rmt": {"color": ORANGE, "marker": "s", "markersize": 4, "linewidth": 2},
    "full": {"color": BLACK, "marker": "o", "markersize": 2.5, "linewidth": 0.8},
}
# figure, title, what writes its ticks, and whose powers they are
PANELS: tuple[tuple[str, str, Callable[[float], str], int], ...] = (
    ("forward_flops", "FLOPs of a forward pass", in_flops, 10),
    ("prefill_floor_s", "prefill floor", in_seconds, 10),
    ("decode_floor_s_per_token", "decode floor of a token", in_seconds, 10),
    ("kept_bytes", "state and cache of a sequence", in_bytes, 2),
    ("activation_bytes", "activations of a sequence", in_bytes, 2),
)
EXCHANGE_LOOKS: dict[str, dict[str, Any]] = {
    "ring": {"color": VERMILION, "marker": "o"},
    "ulysses": {"color": ORANGE, "marker": "s"},
    "linear": {"color": SKY, "marker": "D"},
    "linear scan": {"color": GREEN, "marker": "^"},
    "delta": {"color": BLUE, "marker": "v"},
}
EXCHANGE_PANELS: tuple[tuple[str, str, Callable[[float], str], int], ...] = (
    ("bytes", "bytes that a rank sends, a layer and step", in_bytes, 2),
    ("seconds", "time, a layer and step", in_seconds, 10),
)


def plan_figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw every cost against the length of the text, a line for each scheme."""
    figure = Figure(figsize=(3.5 * len(PANELS), 3.9), dpi=DPI, layout="constrained")
    rows = [row | {"kept_bytes": row["state_bytes"] + row["cache_bytes"]} for row in rows]
    panels = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for axes, (name, label, unit, base) in zip(panels, PANELS, strict=True):
        for scheme, look in SCHEME_LOOKS.items():
            points = [(row["length"], row[name]) for row in rows if row["scheme"] == scheme]
            axes.plot(*zip(*points, strict=True), **look, label=scheme)
        logarithmic(axes, unit, base)
        axes.set_title(label, loc="left", fontsize=9)
        _over_tokens(axes, [row["length"] for row in rows])
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    figure.suptitle(title, fontsize=9)
    return figure


def savings_figure(rows: Sequence[dict[str, Any]]) -> Figure:
    """Draw FLOPs of full attention over those of segments, by length of the text (arXiv 2304.11062, figure 3)."""
    figure = Figure(figsize=(6.8, 4.4), dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        # the light end of the map is too faint for a line on white
        color = colormaps[SEQUENTIAL](0.85 * number / max(1, len(rows) - 1))
        tokens = [n * SEGMENT_LEN for n in row["segments"]]
        label = f"{row['shape']}, at last {row['saving'][-1]:.1f} ×"
        axes.plot(tokens, row["saving"], color=color, marker="o", markersize=3, label=label)
        axes.plot(tokens, row["saving_with_memory"], color=color, linestyle=":", linewidth=1)
    logarithmic(axes, "{:g} ×".format)
    axes.set_ylabel("FLOPs of full attention over RMT's")
    _over_tokens(axes, [n * SEGMENT_LEN for n in rows[0]["segments"]])
    axes.set_title("segments of 512 tokens; dotted: memory tokens counted", loc="left", fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def exchange_figure(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Draw bytes and seconds against ranks, a line for each scheme and length; those of shorter texts are paler."""
    figure = Figure(figsize=(11, 4.6), dpi=DPI, layout="constrained")
    lengths = sorted({row["length"] for row in rows})
    ranks = sorted({row["ranks"] for row in rows})
    panels = figure.subplots(1, 2)
    for axes, (quantity, label, unit, base) in zip(panels, EXCHANGE_PANELS, strict=True):
        for number, length in enumerate(lengths):
            # the longer the text, the darker
            shade = 0.3 + 0.7 * (number + 1) / len(lengths)
            for scheme, look in EXCHANGE_LOOKS.items():
                points = [(row["ranks"], row[quantity][scheme]) for row in rows if row["length"] == length]
                points = [(at, value) for at, value in points if value]
                if not points:
                    continue
                name = scheme if number == len(lengths) - 1 else "_"
                axes.plot(*zip(*points, strict=True), **look, alpha=shade, markersize=5, label=name)
                if scheme == "ring":
                    # to the right of the last point, where no other line begins
                    place: dict[str, Any] = {"textcoords": "offset points", "va": "center", "fontsize": 7}
                    axes.annotate(format_length(length), points[-1], (6, 0), annotation_clip=False, **place)
        logarithmic(axes, unit, base)
        doubling(axes, {n: f"{n:,}" for n in ranks}, fontsize=7)
        axes.set_xlabel("ranks")
        axes.margins(x=0.09)
        axes.set_title(label, loc="left", fontsize=9)
        plain(axes)
    figure.legend(*panels[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5)
    note = "at ring's last point: tokens of text; the shorter the text, the paler the line"
    figure.suptitle(f"{title}\n{note}", fontsize=9)
    return figure


def _over_tokens(axes: Axes, lengths: Sequence[int]) -> None:
    ticks = sorted(set(lengths))
    # as many as can be read
    ticks = ticks[:: -(-len(ticks) // 8)]
    doubling(axes, {n: format_length(n) for n in ticks}, fontsize=7)
    axes.set_xlabel("tokens of text")
    plain(axes)
