"""Committed results as rows of one kind, whichever command wrote them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..speed.peers import BASELINE
from ..speed.workloads import DIRECTIONS

# where pytest-benchmark's file has a model's sizes in place of a case
GROUP = re.compile(r"B(?P<B>\d+)-H(?P<H>\d+)-T(?P<T>\d+)-K(?P<K>\d+)-L(?P<L>\d+)")
FACTS = ("cpu_capability", "threads", "torch", "python")


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
    noisy: why its times are not to be trusted, if so.
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
    noisy: str = ""

    def __post_init__(self) -> None:
        """
        Raises:
            ResultError: a figure that cannot be, with what it is of.
        """
        times = {"ratio": self.ratio, "ms": self.ms}
        for name, three in times.items():
            if three is not None and not _are_quantiles(three):
                raise self._error(name, "positive numbers, the median between its quantiles", three)
        for name in ("floor_share", "tokens_per_second"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value):
                raise self._error(name, "a positive number", value)
        if self.memory is not None and not (_is_number(self.memory) and 0 <= self.memory < math.inf):
            raise self._error("memory", "a finite number, not negative", self.memory)
        for name, error in self.errors.items():
            # of what is wrong also infinite
            if not _is_number(error) or (self.status == "timed" and not 0 <= error < math.inf):
                raise self._error(f"error of {name}", "a finite number, not negative", error)

    def _error(self, name: str, wanted: str, value: object) -> ResultError:
        return ResultError(f"{name} of {self.key.provider}, {self.key.group}, must be {wanted}, got {value!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is_number(value) and 0 < value < math.inf


def _are_quantiles(three: Sequence[Any]) -> bool:
    """p50, p20, p80."""
    return len(three) == 3 and all(map(_is_positive, three)) and three[1] <= three[0] <= three[2]


@dataclass(frozen=True)
class Result:
    """One file: its rows, and what they depend on.

    facts: what of it must be alike for two files to be compared, by name.
    """

    name: str
    records: tuple[Record, ...]
    conditions: str
    facts: Mapping[str, object] = field(default_factory=dict)


def read(path: Path) -> Result:
    """A file of `pytest bench/ --benchmark-json` or of `bench/on_device`.

    Raises:
        ResultError: it is neither, or a figure in it cannot be.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in document:
            machine = document["machine_info"]
            facts = {name: machine.get(name) for name in FACTS}
            return Result(path.name, tuple(_of_suite(document)), _suite_conditions(document), facts)
        if "timings" in document:
            facts = {name: value for name, value in document["versions"].items() if value}
            return Result(path.name, tuple(_of_device(document)), _device_conditions(document), facts)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
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
            noisy=info.get("noisy", ""),
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
    has_spread = any("ratio_fifths" in row["extra_info"] for row in document["benchmarks"])
    return ", ".join(
        (
            f"{machine['device']} ({machine['cpu_capability']}), {threads}",
            f"PyTorch {machine['torch']}, Python {machine['python']}",
            f"median{' (and p20-p80)' if has_spread else ''} of {spread} rounds",
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
