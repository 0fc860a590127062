"""A row of the tables: one peer in one direction, with the form that it has in pytest-benchmark's JSON.

pytest-benchmark knows the group, the times and their statistics; everything else stands in `extra_info`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from .timing import Times
from .workloads import BOTH

# the 20th to the 80th percentile of a ratio, over its median, beyond which a row is noisy
WIDE = 0.25
# this package: a failure of these is an error, and of others a limit
OURS = ("segattn", "torch backend", "compiled torch")
# directions whose memory is what is kept of the text, not the peak
KEEPING = ("decode", "generation")
# keys of `extra_info` with a field of their own
FIELDS = (
    *("provider", "baseline", "direction", "case", "ratio", "ratio_fifths", "ms", "ms_fifths"),
    *("peak_bytes", "kept_bytes", "errors", "error", "noisy"),
)


class ResultError(ValueError):
    """A file that is no result, or two that contradict each other."""


@dataclass(frozen=True)
class Row:
    """One peer in one direction.

    case: The sizes, the dtype and the name of what is measured.
    status: "timed", or why there are no times: "skipped", "failed", "wrong", "out of memory"; reason: in words.
    ratio: The times divided by the baseline's of the same round.
    ms: Milliseconds.
    memory: Bytes at most beyond the inputs, or bytes kept of the text.
    errors: Relative RMS errors, by output.
    facts: Whatever else is known: `launches`, `floor_share`, `tokens_per_second`.
    noisy: Why the times are not to be trusted, if so.
    seconds: Of every round.
    device: The name of the device, where the row comes from a file.
    """

    group: str
    peer: str
    baseline: str
    direction: str
    case: Mapping[str, Any] = field(default_factory=dict)
    status: str = "timed"
    reason: str = ""
    ratio: Times | None = None
    ms: Times | None = None
    memory: int | None = None
    errors: Mapping[str, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    noisy: str = ""
    seconds: Sequence[float] = ()
    device: str = ""

    @property
    def is_ours(self) -> bool:
        """Return whether the peer is this package."""
        return self.peer.startswith(OURS)

    @property
    def dtype(self) -> str:
        """The dtype of the inputs."""
        dtype: str = self.case.get("dtype", "float32")
        return dtype

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens read or written in a second, of recurrent models."""
        return self.facts.get("tokens_per_second")

    def timed(self, milliseconds: Sequence[float], beside: Sequence[float], **known: Any) -> Row:
        """Return the row with its times, the baseline's times of the same rounds, and the fields in `known`."""
        ratios = [own / base for own, base in zip(milliseconds, beside, strict=True)]
        seconds = [x / 1e3 for x in milliseconds]
        return replace(self, ratio=Times.of(ratios), ms=Times.of(milliseconds), seconds=seconds, **known)

    def refused(self, status: str, reason: str = "") -> Row:
        """Return the row without times, and why it has none."""
        return replace(self, status=status, reason=reason, ratio=None, ms=None, seconds=())

    def extra_info(self) -> dict[str, Any]:
        """Return what pytest-benchmark's figures lack."""
        # the file's word for a peer, kept so that results of earlier commits can be read and compared
        info: dict[str, Any] = {"provider": self.peer, "baseline": self.baseline, "direction": self.direction}
        info |= {"case": dict(self.case), **self.facts}
        if self.ratio is None or self.ms is None:
            errors = {"errors": dict(self.errors)} if self.errors else {}
            return info | {"group": self.group, "status": self.status, "reason": self.reason} | errors
        for name, times in (("ratio", self.ratio), ("ms", self.ms)):
            info |= {name: times.median, f"{name}_fifths": [times.low, times.high]}
        if self.memory is not None:
            info["kept_bytes" if self.direction in KEEPING else "peak_bytes"] = self.memory
        return info | {"errors": dict(self.errors)} | ({"noisy": self.noisy} if self.noisy else {})

    def as_benchmark(self) -> dict[str, Any]:
        """Return a timed row as pytest-benchmark would write it."""
        name = f"{self.group}, {self.peer}"
        return {
            "group": self.group,
            "name": name,
            "fullname": name,
            "params": None,
            "param": None,
            "extra_info": self.extra_info(),
            "options": {},
            "stats": stats_of(self.seconds),
        }


def stats_of(seconds: Sequence[float]) -> dict[str, Any]:
    """Return the statistics that pytest-benchmark keeps of a benchmark, by its names."""
    data = sorted(seconds)
    q1, median, q3 = statistics.quantiles(data, n=4, method="inclusive") if len(data) > 1 else data * 3
    mean, stddev = statistics.fmean(data), statistics.stdev(data) if len(data) > 1 else 0.0
    inside = [x for x in data if q1 - 1.5 * (q3 - q1) <= x <= q3 + 1.5 * (q3 - q1)]
    far, apart = len(data) - len(inside), sum(abs(x - mean) > stddev for x in data)
    return {
        "min": data[0],
        "max": data[-1],
        "mean": mean,
        "stddev": stddev,
        "rounds": len(data),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "iqr_outliers": far,
        "stddev_outliers": apart,
        "outliers": f"{apart};{far}",
        "ld15iqr": inside[0],
        "hd15iqr": inside[-1],
        "ops": 1 / mean,
        "total": sum(data),
        "data": list(seconds),
        "iterations": 1,
    }


def as_json(rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """Return the rows as they stand in a result: `benchmarks`, and `not_timed` with the reasons."""
    listed = list(rows)
    return {
        "benchmarks": [row.as_benchmark() for row in listed if row.ratio is not None],
        "not_timed": [row.extra_info() for row in listed if row.ratio is None],
    }


def from_json(document: Mapping[str, Any]) -> Iterator[Row]:
    """Return the rows of a result.

    Raises:
        ResultError: A figure is impossible.
        KeyError, TypeError: The document is no result.
    """
    device = document["machine_info"]["device"]
    for benchmark in document["benchmarks"]:
        info = benchmark["extra_info"]
        row = _untimed(info, benchmark["group"], device)
        row = replace(
            row,
            ratio=_times(row, "ratio", info),
            ms=_times(row, "ms", info),
            memory=info.get("peak_bytes", info.get("kept_bytes")),
            errors=info["errors"] if "errors" in info else {"out": info["error"]},
            noisy=info.get("noisy", ""),
            seconds=benchmark["stats"]["data"],
        )
        _check(row)
        yield row
    for info in document.get("not_timed", ()):
        row = _untimed(info, info["group"], device)
        yield replace(row, status=info["status"], reason=info["reason"], errors=info.get("errors", {}))


def _untimed(info: Mapping[str, Any], group: str, device: str) -> Row:
    facts = {name: value for name, value in info.items() if name not in (*FIELDS, "group", "status", "reason")}
    return Row(group, info["provider"], info["baseline"], info["direction"], info["case"], facts=facts, device=device)


def _times(row: Row, name: str, info: Mapping[str, Any]) -> Times:
    times = (info[name], *info[f"{name}_fifths"])
    if len(times) != 3 or not all(map(_is_positive, times)) or not times[1] <= times[0] <= times[2]:
        raise _impossible(row, name, "positive numbers, the median between its quantiles", times)
    return Times(*times)


def _check(row: Row) -> None:
    """Check that a timed row's figures are possible."""
    for name in ("floor_share", "tokens_per_second"):
        value = row.facts.get(name)
        if value is not None and not _is_positive(value):
            raise _impossible(row, name, "a positive number", value)
    sizes = {f"error of {name}": error for name, error in row.errors.items()}
    sizes |= {} if row.memory is None else {"memory": row.memory}
    for name, size in sizes.items():
        if not (_is_number(size) and 0 <= size < math.inf):
            raise _impossible(row, name, "a finite number, not negative", size)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _impossible(row: Row, name: str, wanted: str, value: object) -> ResultError:
    return ResultError(f"{name} of {row.peer}, {row.group}, must be {wanted}, got {value!r}")


def marked(rows: Iterable[Row]) -> list[Row]:
    """Return the rows, the noisy ones marked."""
    listed = list(rows)
    alone = {(str(x.case), x.peer): x.ms.median for x in listed if x.ms is not None and x.direction == "backward"}
    return [row if row.ratio is None else replace(row, noisy=_noise_of(row, alone)) for row in listed]


def _noise_of(row: Row, alone: Mapping[tuple[str, str], float]) -> str:
    if row.ratio is None or row.ms is None:
        return ""
    reasons, wide = [], (row.ratio.high - row.ratio.low) / row.ratio.median
    if wide > WIDE:
        reasons.append(f"p20-p80 is {wide:.0%} of the ratio")
    if row.direction == BOTH and alone.get((str(row.case), row.peer), 0.0) > row.ms.median:
        reasons.append("the backward alone took longer")
    return ", ".join(reasons)


def table(rows: Iterable[Row]) -> Iterator[tuple[str, list[str]]]:
    """Return each group's heading and lines, for a terminal."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group, listed in groups.items():
        yield f"{group}: p50 and p20-p80, ratio to {listed[0].baseline}", [_line(row) for row in listed]


def _line(row: Row) -> str:
    if row.ratio is None or row.ms is None:
        return f"{row.peer:34} {row.status}{': ' if row.reason else ''}{row.reason}"
    parts = [f"{row.peer:34} {_spread(row.ratio, 'ratio')} {_spread(row.ms, 'ms')}"]
    parts.append(f"{'-' if row.memory is None else _mebibytes(row.memory):>9} MiB")
    for name, form in (("tokens_per_second", "{:9.0f} tokens/s"), ("floor_share", "{:4.0%} of the floor")):
        if row.facts.get(name) is not None:
            parts.append(form.format(row.facts[name]))
    if row.facts.get("launches") is not None:
        parts.append(f"{row.facts['launches']} launches")
    if row.noisy:
        parts.append(f"noisy: {row.noisy}")
    return " ".join(parts)


def _spread(times: Times, unit: str) -> str:
    return f"{times.median:8.2f} {f'{times.low:.2f}-{times.high:.2f}':>17} {unit}"


def _mebibytes(count: int) -> str:
    size = count / 2**20
    return f"{size:.2f}" if size >= 0.1 else f"{size:.2g}"
