"""Choose what is compiled ahead of time, for which GPUs, and compile it in processes."""

from __future__ import annotations

import itertools
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, NamedTuple

from ...kernels.triton.configs import TABLE, TARGETS, Tile
from ...kernels.triton.launch import Launch
from ..processes import each
from ..speed.workloads import DTYPES
from .ahead_of_time import ALONE, CASES, Compiled, CompileError, compile_launch, launches_of, signature

KERNELS = tuple(dict.fromkeys(kernel for kernel, _, _ in TABLE))
# where every case is compiled; elsewhere every kernel once, and attention without a memory beside it
WHOLE = ("bfloat16", 128)
ELSEWHERE = ("delta", "local", "delta, window", ALONE)
# float16 is bfloat16 by another name but where a kernel scales what it would lose
SCALED = ("weight_sums_kernel", "write_grad_kernel")


class Job(NamedTuple):
    """One launch to compile: `place` is its index among the launches of its case."""

    target: str
    dtype: str
    width: int
    case: str
    place: int
    kernel: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.case}, {self.dtype}, {self.width}, {self.target})"


@dataclass(frozen=True)
class Row:
    """Hold what became of a job: `compiled`, or the `error` that the compiler raised."""

    job: Job
    tile: Tile
    compiled: Compiled | None
    error: str = ""

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values: the job's fields, the tile, what was compiled or None, and the error."""
        compiled = None if self.compiled is None else asdict(self.compiled)
        return {**self.job._asdict(), "tile": asdict(self.tile), "compiled": compiled, "error": self.error}


@cache
def _launches(target: str, dtype: str, width: int, case: str) -> list[Launch]:
    """Return every launch of a case, recorded once for each process."""
    return launches_of(case, TARGETS[target], DTYPES[dtype], width)


def launch_of(job: Job) -> Launch:
    """Return the launch that a job compiles."""
    return _launches(job.target, job.dtype, job.width, job.case)[job.place]


def plan(
    targets: Sequence[str], dtypes: Sequence[str], widths: Sequence[int], kernels: Sequence[str], every: bool = False
) -> list[Job]:
    """Return launches that differ for the compiler, each once: every kernel for every target, dtype and width.

    every: every case of each dtype and width too, where else one stands for the others.
    """
    parts = itertools.product(targets, dtypes, widths)
    return [job for part in parts for job in _plan_one(*part, every) if job.kernel in kernels]


def _plan_one(target: str, dtype: str, width: int, every: bool) -> list[Job]:
    """Return the launches of one target, dtype and width that differ for the compiler, each once."""
    whole = every or (dtype, width) == WHOLE
    jobs: list[Job] = []
    seen: set[str] = set()
    for case in (*CASES, ALONE) if whole else ELSEWHERE:
        for place, launch in enumerate(_launches(target, dtype, width, case)):
            job = Job(target, dtype, width, case, place, launch.kernel.__name__)
            same = repr((job.kernel, signature(launch), launch.tile.num_warps, launch.tile.num_stages))
            known = any(other.kernel == job.kernel for other in jobs)
            new = whole or case == "delta" or not known or (case == "local" and job.kernel == "attend_kernel")
            if new and same not in seen and (every or dtype != "float16" or job.kernel in SCALED):
                seen.add(same)
                jobs.append(job)
    return jobs


def compile_job(job: Job) -> Row:
    """Compile a job's launch, and return its row.

    For a process of its own, since stderr is taken from the whole process: of what the compiler writes there only the
    first error is kept.
    """
    launch = launch_of(job)
    kept = os.dup(2)
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        os.dup2(said.fileno(), 2)
        try:
            return Row(job, launch.tile, compile_launch(launch, TARGETS[job.target]))
        except CompileError as error:
            said.seek(0)
            found = re.search(r"error: (.*)", said.read())
            lines = [str(error).partition("\n")[0], *([found.group(1)] if found else [])]
            return Row(job, launch.tile, None, "; ".join(line[:200] for line in lines))
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def compile_all(jobs: Sequence[Job], workers: int) -> Iterator[Row]:
    """Compile jobs in `workers` processes, and yield each row when it is done; a compiler may end its process."""
    return each(
        compile_job, jobs, workers, lambda job: Row(job, launch_of(job).tile, None, "the compiler ended its process")
    )
