"""Choose which calls are executed for which GPUs, execute them in processes, and keep what came of each."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...kernels.check.gates import DTYPES, relative_error
from ...kernels.triton.configs import TARGETS
from ...kernels.triton.launch import recording
from ..compiled.ahead_of_time import CompileError
from ..processes import each
from ..speed.machine import versions
from .cases import CASES, Case
from .counts import Counts
from .faults import Fault, Unsupported
from .launches import Launched, emulating

ROOMS = Path(__file__).resolve().parents[2]


class Job(NamedTuple):
    """One call to execute."""

    target: str
    dtype: str
    call: str
    counted: bool = False
    strict: bool = False

    def __str__(self) -> str:
        return f"{self.call} ({self.dtype}, {self.target})"


class Measured(NamedTuple):
    """The relative error of an output or a gradient, and the largest that is allowed."""

    error: float
    gate: float


@dataclass(frozen=True)
class Row:
    """Hold what became of a job.

    Attributes:
        measured: by the name of an output or gradient; nothing where the call had no end.
        problem: what was raised, by the launch behind the last of `launches`; "" where nothing was.
        kind: of the problem, such as "race".
    """

    job: Job
    launches: tuple[Launched, ...]
    measured: dict[str, Measured]
    seconds: float
    problem: str = ""
    kind: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self) | {"job": list(self.job), "measured": {k: list(v) for k, v in self.measured.items()}}

    @classmethod
    def of_json(cls, values: dict[str, Any]) -> Row:
        """Return the row that `as_json` gave the values of."""
        return cls(
            **values
            | {
                "job": Job(*values["job"]),
                "launches": tuple(_launched(**x) for x in values["launches"]),
                "measured": {name: Measured(*x) for name, x in values["measured"].items()},
            }
        )


def _launched(counts: dict[str, Any] | None, **values: Any) -> Launched:
    return Launched(counts=None if counts is None else Counts(**counts), **values)


def plan(
    targets: Sequence[str], dtypes: Sequence[str], calls: Sequence[str], kernels: Sequence[str], *how: bool
) -> list[Job]:
    """Return the jobs of calls in which one of the kernels runs; how: the last fields of them all."""
    chosen = [name for name in calls if set(kernels) & set(kernels_of(name))]
    return [Job(*parts, *how) for parts in itertools.product(targets, dtypes, chosen)]


@cache
def kernels_of(call: str) -> tuple[str, ...]:
    """Return the names of the kernels that a call launches, which are the same on every GPU."""
    case = CASES[call]
    with recording(TARGETS["sm_80"]) as launches:
        case.evaluate(case.draw(torch.bfloat16), "triton")
    return tuple(dict.fromkeys(launch.kernel.__name__ for launch in launches))


def execute_job(job: Job) -> Row:
    """Execute a job's call, and measure it."""
    torch.set_num_threads(1)
    begin = time.monotonic()
    case = CASES[job.call]
    made = case.draw(DTYPES[job.dtype])
    with emulating(TARGETS[job.target], counting=job.counted, strict=job.strict) as launches:
        try:
            values = case.evaluate(made, "triton")
        except (Fault, Unsupported, CompileError) as error:
            kind = error.kind if isinstance(error, Fault) else type(error).__name__
            return Row(job, tuple(launches), {}, time.monotonic() - begin, str(error), kind)
    measured = measure(case, made, values, job.dtype)
    return Row(job, tuple(launches), measured, time.monotonic() - begin)


def measure(
    case: Case, made: dict[str, torch.Tensor], values: dict[str, torch.Tensor], dtype: str
) -> dict[str, Measured]:
    """Compare values with the float64 reference of the same tensors; an error is NaN where a value is not finite."""
    exact = {name: x.double() for name, x in made.items()}
    expected = case.evaluate(exact, "reference")
    least = case.least(exact, expected)
    return {
        name: Measured(
            relative_error(values[name], x, max(float(x.norm()), least.get(name, 0.0))), case.gate(name, dtype)
        )
        for name, x in expected.items()
    }


def execute_all(jobs: Sequence[Job], workers: int, kept: Path | None) -> Iterator[Row]:
    """Execute jobs in `workers` processes, and yield each row when it is there.

    Args:
        kept: a file of one row a line, to which rows are added; those in it of the same sources are not made again.
    """
    sources = fingerprint()
    done = _read(kept, sources)
    yield from (done[job] for job in jobs if job in done)
    left = [job for job in jobs if job not in done]
    for row in each(execute_job, left, workers, lambda job: Row(job, (), {}, 0.0, "its process ended", "ended")):
        if kept is not None and row.kind != "ended":
            with kept.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"sources": sources, **row.as_json()}) + "\n")
        yield row


def fingerprint() -> str:
    """Return a hash of the kernels, the executor, the calls, and the versions of what compiles them."""
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for room in ("kernels", "bench/compiled", "bench/emulated"):
        for path in sorted((ROOMS / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _read(kept: Path | None, sources: str) -> dict[Job, Row]:
    """Return the rows of a file that come from these sources; a line that was cut short is none."""
    rows: dict[Job, Row] = {}
    if kept is None or not kept.exists():
        return rows
    for line in kept.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            continue
        if values.pop("sources") == sources:
            row = Row.of_json(values)
            rows[row.job] = row
    return rows
