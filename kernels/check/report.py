"""What a check has measured: a row for each output of each call, the worst of them, and how it is said."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..backends import NAMES
from .gates import DTYPES, OUTPUTS

DIFFERS = "differs between two runs"


@dataclass(frozen=True)
class Row:
    """One output of one call by one backend; the error is NaN where nothing could be measured."""

    backend: str
    dtype: str
    call: str
    output: str
    error: float
    gate: float
    problem: str | None = None

    @property
    def share(self) -> float:
        """The error as a share of its gate; infinite where nothing could be measured."""
        return math.inf if math.isnan(self.error) else self.error / self.gate

    @property
    def comparison(self) -> tuple[str, str, str]:
        """Return what was run twice to get this row."""
        return self.backend, self.dtype, self.call


@dataclass(frozen=True)
class CheckReport:
    """The result of `run_check`."""

    device: str
    versions: dict[str, str]
    # of the table, "full" or "small"; "given" where the caller chose the calls
    size: str
    calls: int
    rows: tuple[Row, ...]

    @property
    def failures(self) -> list[Row]:
        """The rows with a problem."""
        return [row for row in self.rows if row.problem is not None]

    @property
    def compared(self) -> int:
        """The number of comparisons: calls, once for each backend and dtype."""
        return len({row.comparison for row in self.rows})

    def worst(self) -> list[Row]:
        """Return for every backend, dtype and output the row with the largest share of its gate."""
        largest: dict[tuple[str, str, str], Row] = {}
        for row in self.rows:
            key = (row.backend, row.dtype, row.output)
            if key not in largest or row.share > largest[key].share:
                largest[key] = row
        order = {name: place for place, name in enumerate(OUTPUTS)}
        return sorted(
            largest.values(),
            key=lambda row: (_place(row.backend, NAMES), _place(row.dtype, DTYPES), order.get(row.output, len(order))),
        )

    def lines(self) -> list[str]:
        """Describe the failures, a line for each, and then how much was compared."""
        failed: dict[tuple[str, ...], list[Row]] = {}
        for row in self.failures:
            # a call that could not be measured at all takes one line, not one for each output
            output = "" if math.isnan(row.error) else row.output
            failed.setdefault((*row.comparison, output, row.problem or ""), []).append(row)
        lines = []
        for (backend, dtype, call, output, problem), rows in failed.items():
            outputs = ", ".join(row.output for row in rows)
            figures = f"error {rows[0].error:.2e}, gate {rows[0].gate:.0e}, " if output else ""
            lines.append(f"FAILED {backend}, {dtype}, {call!r}, {outputs}: {figures}{problem}")
        unequal = len({row.comparison for row in self.failures if DIFFERS in (row.problem or "")})
        void = len({row.comparison for row in self.rows if math.isnan(row.error)})
        equal = "bitwise equal" if not unequal else f"{unequal} of them not bitwise equal"
        lines.append(
            f"{self.compared} comparisons of {self.calls} calls, each run twice, {equal}"
            + (f"; {void} could not be measured" if void else "")
        )
        lines.append(f"{len(self.failures)} of {len(self.rows)} outputs failed" if failed else "passed")
        return lines

    def as_json(self) -> dict[str, Any]:
        """Return the report for `json.dumps`; an error that is not a number is None."""
        errors: dict[str, Any] = {}
        for row in self.rows:
            calls = errors.setdefault(row.backend, {}).setdefault(row.dtype, {})
            calls.setdefault(row.call, {})[row.output] = _number(row.error)
        return {
            "device": self.device,
            "versions": self.versions,
            "size": self.size,
            "calls": self.calls,
            "compared": self.compared,
            "passed": not self.failures,
            "failures": [_as_json(row) for row in self.failures],
            "worst": [_as_json(row) for row in self.worst()],
            "errors": errors,
        }


def _place(name: str, names: Sequence[str] | Mapping[str, Any]) -> int:
    return list(names).index(name)


def _number(error: float) -> float | None:
    return float(f"{error:.3g}") if math.isfinite(error) else None


def _as_json(row: Row) -> dict[str, Any]:
    return row.__dict__ | {"error": _number(row.error)}
