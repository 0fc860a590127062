"""Choose which calls are executed for which GPUs, execute them in processes, and keep what came of each."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...kernels.check.gates import DTYPES, relative_error
from ...kernels.triton.configs import TARGETS
from ...kernels.triton.launch import recording
from ..compiled.ahead_of_time import CompileError
from ..processes import each
from .cases import CASES, Case
from .faults import Fault, Unsupported
from .launches import Launched, emulating


class Job(NamedTuple):
    """One call to execute."""

    target: str
    dtype: str
    call: str
    counted: bool = False

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


def plan(
    targets: Sequence[str], dtypes: Sequence[str], calls: Sequence[str], kernels: Sequence[str], counted: bool = False
) -> list[Job]:
    """Return the jobs of calls in which one of the kernels runs."""
    chosen = [name for name in calls if set(kernels) & set(kernels_of(name))]
    return [Job(*parts, counted) for parts in itertools.product(targets, dtypes, chosen)]


def kernels_of(call: str) -> tuple[str, ...]:
    """Return the names of the kernels that a call launches."""
    return tuple(dict.fromkeys(launches_of(call)))


@cache
def launches_of(call: str) -> tuple[str, ...]:
    """Return the name of the kernel of each launch of a call; they are the same on every GPU."""
    case = CASES[call]
    with recording(TARGETS["sm_80"]) as launches:
        case.evaluate(case.draw(torch.bfloat16), "triton")
    return tuple(launch.kernel.__name__ for launch in launches)


def execute_job(job: Job, kept: Path | None = None) -> Row:
    """Execute a job's call, and measure it; kept: as `emulating` takes it."""
    torch.set_num_threads(1)
    begin = time.monotonic()
    case = CASES[job.call]
    made = case.draw(DTYPES[job.dtype])
    with emulating(TARGETS[job.target], counting=job.counted, kept=kept) as launches:
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
        kept: a folder of launches, as `emulating` takes it.
    """
    yield from each(
        partial(execute_job, kept=kept), jobs, workers, lambda job: Row(job, (), {}, 0.0, "its process ended", "ended")
    )
