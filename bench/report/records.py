"""Committed results: pytest-benchmark's JSON files in a folder, as rows, with the conditions beneath the tables."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..speed.rows import ResultError, Row, from_json

# which must be alike for two results to be compared
FACTS = ("cpu_capability", "threads", "torch", "triton", "python", "cuda", "hip")


class Key(NamedTuple):
    """Hold what is measured: two rows of one key are measurements of the same."""

    device: str
    group: str
    peer: str

    @classmethod
    def of(cls, row: Row) -> Key:
        """Return a row's key."""
        return cls(row.device, row.group, row.peer)


@dataclass(frozen=True)
class Result:
    """One file.

    conditions: The line beneath its tables.
    facts: Conditions by name, which must be alike for two files to be compared.
    """

    name: str
    rows: tuple[Row, ...]
    conditions: str
    facts: Mapping[str, object] = field(default_factory=dict)


def read(path: Path) -> Result:
    """Return a file of `pytest bench/ --benchmark-json` or of `bench/on_device`.

    Raises:
        ResultError: The file is neither, or a figure in it is impossible.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        rows, machine = tuple(from_json(document)), document["machine_info"]
        facts = {name: machine[name] for name in FACTS if name in machine}
        return Result(path.name, rows, _conditions(document, rows), facts)
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ResultError(f"{path} must be a result of pytest bench/ or bench/on_device: {error!r}") from error


def read_all(folder: Path) -> list[Result]:
    """Return the results that lie in the folder itself, by name.

    Raises:
        ResultError: A file is no result, or two files have the same measurement.
    """
    results = [read(path) for path in sorted(folder.glob("*.json"))]
    at: dict[Key, str] = {}
    for result in results:
        for key in map(Key.of, result.rows):
            other = at.setdefault(key, result.name)
            if other != result.name:
                raise ResultError(
                    f"{other} and {result.name} in {folder} must not both have {', '.join(key)}: delete one file"
                )
    return results


def _conditions(document: Mapping[str, Any], rows: tuple[Row, ...]) -> str:
    machine, commit = document["machine_info"], document["commit_info"]
    limits = machine.get("limits", {})
    if limits:
        device = f"{machine['device']}, {limits['power.limit']}, driver {limits['driver_version']}"
    else:
        threads = "1 thread" if machine["threads"] == 1 else f"{machine['threads']} threads"
        device = f"{machine['device']} ({machine['cpu_capability']}), {threads}"
    counts = sorted({len(row.seconds) for row in rows if row.seconds})
    rounds = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else "".join(map(str, counts))
    changes = " with changes" if commit["dirty"] else ""
    return ", ".join(
        (
            device,
            f"PyTorch {machine['torch']}, Python {machine['python']}",
            f"median (and p20-p80) of {rounds} rounds",
            f"commit {(commit['id'] or 'unknown')[:12]}{changes}",
        )
    )
