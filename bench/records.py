"""Committed results as rows of one kind, whichever command wrote them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .cases import DIRECTIONS
from .peers import BASELINE

# where pytest-benchmark's file has a model's sizes in place of a case
GROUP = re.compile(r"B(?P<B>\d+)-H(?P<H>\d+)-T(?P<T>\d+)-K(?P<K>\d+)-L(?P<L>\d+)")


class ResultError(ValueError):
    """A file that is no result, or two that contradict each other."""


class Key(NamedTuple):
    """What is measured: two rows of one key are measurements of the same."""

    device: str
    group: str
    provider: str


@dataclass(frozen=True)
class Record:
    """One provider in one direction.

    ratio: to the group's baseline, p50, p20, p80; None where it was not timed. ms: likewise, in milliseconds.
    memory: bytes at most beyond the inputs, or kept of the text. sizes: of the case, where the file has them.
    """

    key: Key
    direction: str
    baseline: str
    status: str = "timed"
    reason: str = ""
    ratio: tuple[float, float, float] | None = None
    ms: tuple[float, float, float] | None = None
    memory: int | None = None
    dtype: str = "float32"
    errors: Mapping[str, float] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    floor_share: float | None = None
    tokens_per_second: float | None = None
    rounds: int = 0


@dataclass(frozen=True)
class Result:
    """One file: its rows, and what they depend on."""

    name: str
    records: tuple[Record, ...]
    conditions: str


def read(path: Path) -> Result:
    """A file of `pytest bench/ --benchmark-json` or of `bench/on_device`.

    Raises:
        ResultError: it is neither.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in document:
            return Result(path.name, tuple(_of_suite(document)), _suite_conditions(document))
        if "timings" in document:
            return Result(path.name, tuple(_of_device(document)), _device_conditions(document))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path} must be a result of pytest bench/ or bench/on_device: {error!r}") from error
    raise ResultError(f"{path} must be a result of pytest bench/ or bench/on_device, got other JSON")


def read_all(folder: Path) -> list[Result]:
    """The results that lie in the folder itself, by name.

    Raises:
        ResultError: a file is no result, or two have the same measurement, and neither can be told to be the one.
    """
    found = [read(path) for path in sorted(folder.glob("*.json"))]
    at: dict[Key, str] = {}
    for result in found:
        for record in result.records:
            other = at.setdefault(record.key, result.name)
            if other != result.name:
                raise ResultError(
                    f"{other} and {result.name} in {folder} must not both have {', '.join(record.key)}: delete one file"
                )
    return found


def _of_suite(document: Mapping[str, Any]) -> Iterable[Record]:
    device = document["machine_info"]["device"]
    for row in document["benchmarks"]:
        info, group = row["extra_info"], row["group"]
        case = info.get("case", {})
        times = sorted(1e3 * x for x in row["stats"]["data"])
        low, high = info.get("ms_fifths", (times[0], times[-1]))
        found = GROUP.match(group)
        sizes = case or ({name: int(x) for name, x in found.groupdict().items()} if found else {})
        yield Record(
            Key(device, group, info["provider"]),
            info.get("direction", group.rpartition(", ")[2]),
            info.get("baseline", "SDPA local"),
            ratio=(info["ratio"], *info.get("ratio_fifths", (info["ratio"], info["ratio"]))),
            ms=(info.get("ms", 1e3 * row["stats"]["median"]), low, high),
            memory=info.get("peak_bytes", info.get("kept_bytes")),
            dtype=case.get("dtype", "float32"),
            errors=info.get("errors", {"out": info["error"]}),
            sizes=_numbers(sizes),
            tokens_per_second=info.get("tokens_per_second"),
            rounds=row["stats"]["rounds"],
        )
    for row in document.get("not_timed", ()):
        yield Record(
            Key(device, row["group"], row["provider"]),
            row["direction"],
            row["baseline"],
            row["status"],
            row["reason"],
            dtype=row["case"]["dtype"],
            sizes=_numbers(row["case"]),
        )


def _numbers(case: Mapping[str, Any]) -> dict[str, int]:
    return {name: value for name, value in case.items() if isinstance(value, int)}


def _of_device(document: Mapping[str, Any]) -> Iterable[Record]:
    device = document["device"]["name"]
    for case in document["timings"]:
        sizes = {name: case[name] for name in ("B", "H", "G", "T", "K", "L") if name in case}
        peers = case["peers"]
        for direction in case.get("directions", DIRECTIONS):
            base = peers.get(BASELINE, {}).get(direction, {}).get("median_ms")
            for name, peer in peers.items():
                key = Key(device, f"{case['name']} {case['dtype']}, {direction}", name)
                measured = peer.get(direction, {})
                ms = _three(measured, 1.0) if peer["status"] == "timed" and "median_ms" in measured else None
                yield Record(
                    key,
                    direction,
                    BASELINE,
                    "timed" if ms else "failed" if peer["status"] == "timed" else peer["status"],
                    peer.get("reason", ""),
                    None if ms is None or base is None else _three(measured, base),
                    ms,
                    measured.get("peak_bytes"),
                    case["dtype"],
                    peer.get("errors", {}),
                    sizes,
                    measured.get("floor_share"),
                    rounds=measured.get("rounds", 0),
                )


def _three(measured: Mapping[str, float], unit: float) -> tuple[float, float, float]:
    return tuple(measured[name] / unit for name in ("median_ms", "low_ms", "high_ms"))  # type: ignore[return-value]


def _suite_conditions(document: Mapping[str, Any]) -> str:
    machine, commit = document["machine_info"], document["commit_info"]
    threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
    rounds = sorted({row["stats"]["rounds"] for row in document["benchmarks"]})
    spread = f"{rounds[0]} to {rounds[-1]}" if len(rounds) > 1 else "".join(map(str, rounds))
    return ", ".join(
        (
            f"{machine['device']} ({machine['cpu_capability']}), {threads}",
            f"PyTorch {machine['torch']}, Python {machine['python']}",
            f"median of {spread} rounds",
            _commit(commit["id"], commit["dirty"]),
        )
    )


def _device_conditions(document: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value)
    limits = document["device"].get("limits", {})
    power = f", {limits['power.limit']}, driver {limits['driver_version']}" if limits else ""
    return f"{document['device']['name']}{power}, {versions}, {_commit(document['commit'], document['dirty'])}"


def _commit(commit: str | None, dirty: bool | None) -> str:
    return f"commit {(commit or 'unknown')[:12]}{' with changes' if dirty else ''}"
