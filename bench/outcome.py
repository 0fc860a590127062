"""How a command that makes rows of a table ends: its data, its last lines, its exit status."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .speed.machine import versions


def refused(command: str, why: str) -> int:
    """Say why a command cannot begin, and return its exit status."""
    sys.stderr.write(f"{command}: {why}\n")
    return 2


def finish(done: str, rows: Sequence[Any], failures: Sequence[str], file: Path | None) -> int:
    """Say what was done and what failed, and return the exit status.

    Args:
        done: such as "14 calls in 49 s".
        rows: of the table; each has `as_json`.
        failures: a line each.
        file: where rows, failures and versions are written as JSON; None: nowhere.
    """
    if file is not None:
        document = {"versions": versions(), "rows": [row.as_json() for row in rows], "failures": failures}
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"\n{done}, {len(failures)} failures\n")
    for line in failures:
        sys.stdout.write(f"  {line}\n")
    return 1 if failures else 0
