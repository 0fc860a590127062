"""Plots of rows. Each PNG carries the data it was drawn from, so that it can be held to the results."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from PIL import Image

from ...kernels.check.gates import GATES
from ...runs.figures import format_length
from ...runs.pictures import DPI, LINES, doubling, logarithmic, plain, save_picture
from ..speed.rows import Row
from .records import Result
from .tables import BY_LENGTH

DATA = "segattn data"
Data = dict[str, Any]


def by_length(results: Sequence[Result]) -> Data | None:
    """Return, for each series of cases and peer, tokens, milliseconds and bytes, and lengths out of memory."""
    found: Data = {}
    for row in _all(results):
        if BY_LENGTH not in row.group:
            continue
        panel = f"{row.device}, {row.dtype}, K {row.case['K']}, L {row.case['L']}, {row.direction}"
        line = found.setdefault(panel, {}).setdefault(row.peer, {"points": [], "out_of_memory": []})
        if row.ms is not None:
            line["points"].append([row.case["T"], row.ms.median, row.memory])
        elif row.status == "out of memory":
            line["out_of_memory"].append(row.case["T"])
    for lines in found.values():
        for line in lines.values():
            line["points"].sort()
            line["out_of_memory"].sort()
    return found or None


def floor_shares(results: Sequence[Result]) -> Data | None:
    """Return, for each direction and peer of a device, the cases, and the shares of the floor that were reached."""
    found: Data = {}
    for row in _all(results):
        if "floor_share" in row.facts:
            lines = found.setdefault(f"{row.device}, {row.direction}", {})
            case = row.group.removesuffix(f", {row.direction}")
            lines.setdefault(row.peer, []).append([case, row.facts["floor_share"]])
    return found or None


def errors(results: Sequence[Result]) -> Data | None:
    """Return, for each dtype and peer, the largest error of the output and of the gradients in all cases."""
    found: Data = {}
    for row in _all(results):
        if row.tokens_per_second is not None or row.direction == "decode":
            continue
        for name, error in row.errors.items():
            worst = found.setdefault(row.dtype, {}).setdefault(row.peer, {})
            kind = "output" if name == "out" else "gradients"
            worst[kind] = max(worst.get(kind, 0.0), error)
    return found or None


def _all(results: Sequence[Result]) -> list[Row]:
    return [row for result in results for row in result.rows]


def draw_lengths(data: Data) -> Figure:
    """Draw time and memory against length, axes logarithmic; a cross at the top where memory did not suffice."""
    figure = Figure(figsize=(10, 4.0 * len(data)), dpi=DPI, layout="constrained")
    panels = figure.subplots(len(data), 2, squeeze=False)
    for (title, lines), (times, memory) in zip(data.items(), panels, strict=True):
        for column, axes, label, scale in ((1, times, "milliseconds", 1.0), (2, memory, "peak, MiB", 2**-20)):
            for (name, line), (colour, marker) in zip(lines.items(), _looks(len(lines)), strict=True):
                points = [(x[0], scale * x[column]) for x in line["points"] if x[column]]
                # the next lines are thinner, and one that they lie on is seen
                width = 1.2 + 0.9 * (len(lines) - 1 - list(lines).index(name))
                look = {"color": colour, "marker": marker, "markersize": 3 + width, "linewidth": width}
                axes.plot(*_columns(points), **look, label=name)
                for time in line["out_of_memory"]:
                    # on the upper edge
                    axes.plot(time, 1.0, "x", color=colour, transform=axes.get_xaxis_transform(), clip_on=False)
            logarithmic(axes)
            ticks = sorted({x[0] for line in lines.values() for x in line["points"]} | _outs(lines))
            doubling(axes, {x: format_length(x) for x in ticks})
            axes.set_xlabel("tokens")
            axes.set_ylabel(label)
            plain(axes)
        times.set_title(title, loc="left", fontsize=9)
        out = " ✕: out of memory" if _outs(lines) else ""
        times.legend(frameon=False, fontsize=8, title=out or None)
    return figure


def _outs(lines: Mapping[str, Any]) -> set[int]:
    return {time for line in lines.values() for time in line["out_of_memory"]}


def draw_floor_shares(data: Data) -> Figure:
    """Draw shares of the floor: 1 is as fast as the device can be."""
    figure = Figure(figsize=(10, 3.6 * len(data)), dpi=DPI, layout="constrained")
    for (title, lines), axes in zip(data.items(), figure.subplots(len(data), 1, squeeze=False)[:, 0], strict=True):
        cases = list(dict.fromkeys(case for line in lines.values() for case, _ in line))
        for (name, line), (colour, marker) in zip(lines.items(), _looks(len(lines)), strict=True):
            places, shares = [cases.index(case) for case, _ in line], [share for _, share in line]
            axes.plot(places, shares, marker, color=colour, label=name)
        axes.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=7)
        axes.set_ylim(0, 1)
        axes.set_ylabel("share of the floor")
        axes.set_title(title, loc="left", fontsize=9)
        axes.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
        plain(axes)
    return figure


def draw_errors(data: Data) -> Figure:
    """Draw relative RMS errors to the float64 reference, and the largest that ours may have."""
    figure = Figure(figsize=(4.4 * len(data) + 2, 5.0), dpi=DPI, layout="constrained")
    panels = figure.subplots(1, len(data), squeeze=False, sharey=True)[0]
    names = list(dict.fromkeys(name for worst in data.values() for name in worst))
    for (dtype, worst), axes in zip(data.items(), panels, strict=True):
        for kind, (colour, marker) in zip(("output", "gradients"), LINES, strict=False):
            points = [(worst[name][kind], i) for i, name in enumerate(names) if kind in worst.get(name, {})]
            axes.plot(*_columns(points), marker, color=colour, label=kind)
            gate = GATES[dtype].outputs if kind == "output" else GATES[dtype].gradients
            axes.axvline(gate, color=colour, linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("relative RMS error; dotted: allowed to ours", fontsize=8)
        axes.set_title(dtype, loc="left", fontsize=9)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        plain(axes)
    panels[0].invert_yaxis()
    panels[0].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _looks(count: int) -> list[tuple[str, str]]:
    return [LINES[i % len(LINES)] for i in range(count)]


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


PLOTS: Mapping[str, tuple[Callable[[Sequence[Result]], Data | None], Callable[[Data], Figure]]] = {
    "lengths.png": (by_length, draw_lengths),
    "floor-shares.png": (floor_shares, draw_floor_shares),
    "errors.png": (errors, draw_errors),
}


def write(path: Path, data: Data, draw: Callable[[Data], Figure]) -> None:
    """Draw the data into a PNG, and write the data into it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(draw(data), path, {DATA: json.dumps(data), "Software": None})


def data_in(path: Path) -> Data | None:
    """Return the data that a plot was drawn from; None where there is no plot, or it does not say."""
    if not path.is_file():
        return None
    with Image.open(path) as image:
        text = image.info.get(DATA)
    return json.loads(text) if isinstance(text, str) else None
