"""Predict the time of a call's kernels on a GPU that is not here, and what the memory costs beside local attention.

Every launch is compiled, and its program walked on the model of `sub_core`. A launch takes as long as its programs in
turn, or as its tensors take through the device's memory, each once. Launches begin when the one before has ended; the
host's time, and what a launch costs in itself, are left out. Exit status: 0, or 2 where nothing can be predicted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ...kernels.triton.configs import TARGETS
from ...kernels.triton.launch import Launch
from ..outcome import refused
from ..planner.floors import Sizes, local_forward
from ..processes import each
from ..speed.workloads import DTYPES
from .ahead_of_time import CASES, CompileError, Shape, build, launches, read_cubin, resident_warps
from .gpus import GPUS
from .machine_code import blocks
from .sub_core import LoopsError, Step, clocks, walk

TABLE = Path(__file__).parents[1] / "results" / "compiled" / "model.json"
DTYPE = "bfloat16"
# a kernel may take this much more time than the committed table says
SLACK = 0.03
# rounds of a short loop that the compiler makes one of, before a loop for those that are left
UNROLLED = 4


class Workload(NamedTuple):
    """Hold the sizes of a causal call in bfloat16, forward and backward, on a GPU of a target. K: of a head, V too."""

    B: int
    H: int
    G: int
    T: int
    K: int
    L: int
    update: str = "delta"
    target: str = "sm_90"

    def __str__(self) -> str:
        heads = f"H {self.H}" if self.H == self.G else f"H {self.H}/{self.G}"
        return f"{self.update}, {self.target}, B {self.B}, {heads}, T {self.T}, K {self.K}, L {self.L}"

    def launches(self, local: bool) -> list[Launch]:
        """Return every launch, of local attention alone or of the whole."""
        case = CASES["local"] if local else CASES["delta"]._replace(delta=self.update == "delta")
        shape = Shape(self.B, self.H, self.G, self.T, self.L)
        target = TARGETS[self.target]._replace(processors=GPUS[self.target].multiprocessors)
        return launches(target, DTYPES[DTYPE], self.K, case, shape)


WORKLOADS = (
    Workload(1, 16, 16, 32768, 128, 2048),
    Workload(1, 32, 8, 32768, 128, 2048),
    Workload(1, 8, 8, 4096, 128, 2048),
    Workload(1, 8, 2, 4096, 128, 2048),
    Workload(1, 16, 16, 32768, 64, 2048),
    Workload(1, 16, 16, 32768, 128, 2048, "linear"),
)


class Work(NamedTuple):
    """Hold the rounds of a program's loops, in the order of the source; and those of the launch's longest program."""

    usual: tuple[int, ...]
    longest: tuple[int, ...]


def _mean(counts: Iterable[int]) -> int:
    values = list(counts)
    return round(sum(values) / len(values))


def _chunks(launch: Launch, width: int, loops: int = 1) -> tuple[int, ...]:
    """Return the rounds of so many loops over chunks of a width; none for a single round, which is no loop in code."""
    rounds = math.ceil(width / launch.tile.CHUNK)
    return (rounds,) * loops if rounds > 1 else ()


def _of_features(launch: Launch, loops: int) -> tuple[int, ...]:
    """Return the rounds of so many loops over chunks of the features."""
    return _chunks(launch, launch.arguments["k"].width.value, loops)


def _of_memory(launch: Launch) -> tuple[int, ...]:
    """Return the rounds of the two loops that read the memory, where there is one."""
    return () if launch.arguments["reading"].gate is None else _of_features(launch, 2)


def _queries(launch: Launch, begin: tuple[int, ...], end: tuple[int, ...]) -> Work:
    tile, length = launch.tile, launch.arguments["segment_len"]
    whole = [(first + 1) // tile.BLOCK_N for first in range(0, length, tile.BLOCK_M)]
    seen = [math.ceil((first + tile.BLOCK_M) / tile.BLOCK_N) for first in range(0, length, tile.BLOCK_M)]
    masked = max(b - a for a, b in zip(whole, seen, strict=True))
    return Work((*begin, _mean(whole), masked, *end), (*begin, whole[-1], masked, *end))


def _key_grad(launch: Launch) -> Work:
    tile, arguments = launch.tile, launch.arguments
    members = arguments["q"].heads // arguments["k"].heads
    half = max(16, tile.BLOCK_M // 2)
    diagonal = math.ceil((tile.BLOCK_N - 1) / half)
    whole = [
        max(arguments["segment_len"] - first - diagonal * half, 0) // tile.BLOCK_M
        for first in range(0, arguments["segment_len"], tile.BLOCK_N)
    ]
    masked = members * diagonal
    return Work((masked, members * _mean(whole)), (masked, members * whole[0]))


def _even(count: Callable[[Launch], tuple[int, ...]]) -> Callable[[Launch], Work]:
    return lambda launch: Work(count(launch), count(launch))


def _tiles(launch: Launch) -> int:
    """Return the tiles of tokens of a segment, or of its parts."""
    return math.ceil(launch.arguments["segment_len"] / launch.tile.BLOCK_N / launch.arguments.get("splits", 1))


def _members(launch: Launch) -> int:
    return launch.arguments["x"].heads // launch.arguments["groups"]


def _write_grad(launch: Launch) -> Work:
    passes = 1 if launch.arguments["grads"].curvature is None else 2
    # the first loop is that of tokens that were not written
    rounds = (0, launch.arguments["steps"], *_of_features(launch, passes))
    return Work(rounds, rounds)


WORK: dict[str, Callable[[Launch], Work]] = {
    "attend_kernel": lambda x: _queries(x, (), _of_memory(x)),
    "query_grad_kernel": lambda x: _queries(x, _of_memory(x), ()),
    "key_grad_kernel": _key_grad,
    "normalizer_kernel": _even(lambda x: (math.ceil((x.arguments["segments"] + 1) / x.tile.BLOCK_N),)),
    "product_kernel": _even(lambda x: (_members(x), _tiles(x))),
    "add_parts_kernel": _even(lambda x: divmod(x.arguments["splits"], UNROLLED)),
    "scan_kernel": _even(lambda x: (x.arguments["segments"],)),
    "curvature_kernel": _even(lambda x: _chunks(x, x.arguments["V"])),
    "weight_sums_kernel": _even(lambda x: (_tiles(x), *_of_features(x, 1))),
    "write_grad_kernel": _write_grad,
}


class Job(NamedTuple):
    """One launch of a workload; `place` is its index among its launches."""

    workload: Workload
    local: bool
    place: int


class Prediction(NamedTuple):
    """Hold the predicted time of a launch in microseconds: of its programs, and of its tensors through the memory."""

    kernel: str
    forward: bool
    programs: int
    resident: int  # of a multiprocessor
    programs_time: float
    memory_time: float
    error: str = ""

    @property
    def time(self) -> float:
        """Return the longer of the two times, which the launch takes."""
        return max(self.programs_time, self.memory_time)


@cache
def _launches(workload: Workload, local: bool) -> list[Launch]:
    return workload.launches(local)


def _role(launch: Launch) -> str:
    """Return the kernel's name, and which of its uses this is."""
    name, arguments = launch.kernel.__name__.removesuffix("_kernel"), launch.arguments
    if name == "product":
        return f"{name} {'R' if arguments['READ'] else 'A' if arguments['y'] is None else 'B'}"
    return f"{name}{', reversed' if arguments.get('REVERSE') else ''}"


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors of a launch's argument."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for x in value:
            yield from _tensors(x)


def predict(job: Job) -> Prediction:
    """Compile a launch and predict its time."""
    found = _launches(job.workload, job.local)
    launch, target = found[job.place], job.workload.target
    gpu, name = GPUS[target], _role(launch)
    attend = next(i for i, x in enumerate(found) if x.kernel.__name__ == "attend_kernel")
    tensors = {id(x): x.numel() * x.element_size() for x in _tensors(tuple(launch.arguments.values()))}
    memory_time = sum(tensors.values()) / gpu.bytes
    try:
        compiled = build(launch, TARGETS[target])
        registers, _, lines = read_cubin(compiled.asm["cubin"])
        warps = launch.tile.num_warps
        resident = resident_warps(target, warps, registers, compiled.metadata.shared, 0) // warps
        work, graph = WORK[launch.kernel.__name__](launch), blocks(lines)
        usual, longest = (walk(graph, trips, target) for trips in work)
        count = _launch_clocks(launch.programs, usual, longest, warps, resident, gpu.multiprocessors)
    except (CompileError, LoopsError) as error:
        return Prediction(name, job.place <= attend, launch.programs, 0, math.nan, memory_time, str(error))
    return Prediction(name, job.place <= attend, launch.programs, resident, count / gpu.clocks, memory_time)


def _launch_clocks(
    programs: int, usual: Sequence[Step], longest: Sequence[Step], warps: int, resident: int, multiprocessors: int
) -> float:
    """Return the clocks of a launch: full rounds of the resident programs, and what is left over spread out.

    Programs of unlike length begin as others end, the longest first.
    """
    at_once = resident * multiprocessors
    rounds, left = divmod(programs, at_once)
    spread = math.ceil(left / multiprocessors)
    if usual != longest or rounds >= 4:
        full = clocks(usual, warps, resident if rounds else spread)
        return max(programs / at_once * full if rounds else 0.0, clocks(longest, warps, 1))
    return (rounds * clocks(usual, warps, resident) if rounds else 0.0) + (
        clocks(usual, warps, spread) if left else 0.0
    )


def predict_all(
    workloads: Sequence[Workload], workers: int
) -> dict[Workload, tuple[list[Prediction], list[Prediction]]]:
    """Return for every workload the predictions of local attention's launches, and of the whole's."""
    jobs = [
        Job(workload, local, place)
        for workload in workloads
        for local in (True, False)
        for place in range(len(_launches(workload, local)))
    ]
    found = dict(each(_answer, jobs, workers, lambda job: (job, _ended(job))))
    return {
        workload: tuple(  # type: ignore[misc]
            [found[job] for job in jobs if job[:2] == (workload, local)] for local in (True, False)
        )
        for workload in workloads
    }


def _answer(job: Job) -> tuple[Job, Prediction]:
    return job, predict(job)


def _ended(job: Job) -> Prediction:
    return Prediction("", False, 0, 0, math.nan, math.nan, "the compiler ended its process")


class Times(NamedTuple):
    """Hold the microseconds of a call's forward and of its backward."""

    forward: float
    backward: float

    @classmethod
    def of(cls, predictions: Iterable[Prediction]) -> Times:
        """Return the sums over a call's launches."""
        found = list(predictions)
        return cls(*(sum(x.time for x in found if x.forward is forward) for forward in (True, False)))

    @property
    def both(self) -> float:
        """Return the time of forward and backward together."""
        return self.forward + self.backward


def lines(workload: Workload, local: list[Prediction], whole: list[Prediction]) -> Iterator[str]:
    """Yield the lines of a workload's table."""
    yield f"\n{workload}\n{'µs':>9} {'of memory':>9} {'programs':>8} {'resident':>8}  kernel"
    for heading, predictions in (("local alone", local), ("with the memory", whole)):
        yield f"{heading}:"
        for x in predictions:
            direction = "forward" if x.forward else "backward"
            yield (
                f"{x.programs_time:9.1f} {x.memory_time:9.1f} {x.programs:8} {x.resident:8}  {x.kernel} ({direction})"
                f"{': ' if x.error else ''}{x.error}"
            )
    bare, full = Times.of(local), Times.of(whole)
    sizes = Sizes(*workload[:5], workload.K, workload.L, DTYPES[DTYPE].itemsize)
    rate = local_forward(sizes).operations / bare.forward * 1e-6
    yield (
        f"forward {full.forward:.0f} of {bare.forward:.0f} µs local alone ({rate:.0f} TFLOP/s): "
        f"{full.forward / bare.forward:.2f}; with the backward {full.both:.0f} of {bare.both:.0f} µs: "
        f"{full.both / bare.both:.2f}"
    )


def as_json(workload: Workload, local: list[Prediction], whole: list[Prediction]) -> dict[str, Any]:
    """Return a workload's table as data: microseconds by kernel, and the whole over local attention alone."""
    bare, full = Times.of(local), Times.of(whole)
    return {
        "workload": workload._asdict(),
        "local": {x.kernel: round(x.time, 1) for x in local},
        "whole": {x.kernel: round(x.time, 1) for x in whole},
        "forward over local": round(full.forward / bare.forward, 3),
        "both over local": round(full.both / bare.both, 3),
    }


def slower(workers: int, committed: Sequence[dict[str, Any]] | None = None) -> list[str]:
    """Predict the committed table's workloads again, and return a line for every kernel that has become slower."""
    rows = json.loads(TABLE.read_text(encoding="utf-8")) if committed is None else committed
    workloads = [Workload(**row["workload"]) for row in rows]
    found = predict_all(workloads, workers)
    problems = []
    for row, workload in zip(rows, workloads, strict=True):
        for part, predictions in zip(("local", "whole"), found[workload], strict=True):
            for x in predictions:
                known = row[part].get(x.kernel, 0.0)
                if x.error or x.time > known * (1 + SLACK):
                    problems.append(
                        f"{x.kernel} ({part}, {workload}): {x.error or f'{x.time:.1f} µs, {known} in {TABLE.name}'}"
                    )
    return problems


def _workload(text: str, update: str, target: str) -> Workload:
    """Return the workload of "B,H,G,T,K,L".

    Raises:
        ValueError: anything but six positive integers, G a divisor of H.
    """
    numbers = [int(x) if x.isdecimal() else 0 for x in text.split(",")]
    if len(numbers) != 6 or min(numbers) < 1 or numbers[1] % numbers[2]:
        raise ValueError(f"a workload must be six positive integers B,H,G,T,K,L, G a divisor of H, got {text!r}")
    batch, heads, groups, time, width, segment_len = numbers
    return Workload(batch, heads, groups, time, width, segment_len, update, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(
        prog="ci/compile model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workloads", nargs="*", metavar="B,H,G,T,K,L", help="default: those of the committed table")
    parser.add_argument("--update", choices=("delta", "linear"), default="delta", help="default: delta")
    parser.add_argument("--target", choices=tuple(GPUS), default="sm_90", help="default: sm_90")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as data too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default: one per core")
    parser.add_argument("--here", action="store_true", help="use the environment that is active, make none")
    given = parser.parse_args(arguments)
    try:
        if given.jobs < 1:
            raise ValueError(f"--jobs must be positive, got {given.jobs}")
        workloads = [_workload(x, given.update, given.target) for x in given.workloads] or WORKLOADS
    except ValueError as error:
        return refused("ci/compile model", str(error))
    found = predict_all(workloads, given.jobs)
    for workload, predictions in found.items():
        for line in lines(workload, *predictions):
            sys.stdout.write(f"{line}\n")
    if given.json is not None:
        document = [as_json(workload, *predictions) for workload, predictions in found.items()]
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0
