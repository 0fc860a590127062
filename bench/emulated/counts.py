"""Count what a launch's code did: a profile without a GPU.

Instructions are those of PTX. ptxas drops moves and joins others; a wait at an mbarrier counts each time it is tried.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from .machine import Run
from .ptx import Instruction, Program
from .races import Array
from .traffic import SECTOR

# the first of these that an opcode matches is its class
CLASSES = {
    "matrix": r"mma|wgmma\.mma|tcgen05\.mma",
    "global": r"(ld|st|atom|red)\.(.*\.)?global|cp\.async\.c[ag]",
    "shared": r"(ld|st)\.(.*\.)?shared|ldmatrix|stmatrix|tcgen05\.(ld|st)",
    "wait": r"bar\.|barrier|mbarrier|fence|membar|nanosleep|cp\.async|wgmma|tcgen05",
    "special": r"(ex2|lg2|rcp|rsqrt|sqrt|sin|cos|tanh|div)\.",
    "convert": r"cvt",
    "float": r"\w+\.(.*\.)?(f32|f16|bf16|f32x2|f16x2|bf16x2)$",
    "branch": r"bra|ret|exit|call",
}
OTHER = "integer"
WAITS = r"bar\.|barrier|mbarrier\.try_wait|cp\.async\.wait|wgmma\.wait|tcgen05\.wait"
STORES = ("st", "atom", "red")
WARP = 32


@dataclass(frozen=True)
class Counts:
    """Hold the counts of one launch.

    Attributes:
        issued: instructions of warps, by class.
        loop: thread instructions of the innermost loops with matrix instructions, for each pair of a row and a column
            of the tiles that they work on, by class; empty where there is no such loop.
        loaded, stored: bytes of global memory that lanes asked for.
        sectors: bytes of the sectors that this took; least: the fewest that hold them.
        tensors: bytes of the launch's tensors, each once.
        passes: over shared memory; least_passes: without bank conflicts; loop_conflicts: the difference inside `loop`.
        operations: of matrix instructions.
        waits: instructions that wait, of each warp, by opcode.
    """

    issued: dict[str, int]
    loop: dict[str, float]
    loaded: int
    stored: int
    sectors: int
    least: int
    tensors: int
    passes: int
    least_passes: int
    loop_conflicts: int
    operations: int
    waits: dict[str, float]


def class_of(opcode: str) -> str:
    """Return the class of an instruction."""
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), OTHER)


def count(run: Run, programs: int, arguments: Sequence[Tensor | int | float], pairs: int | None) -> Counts:
    """Return the counts of a launch that was executed with `counting`.

    pairs: rows times columns of the tile that a round of a main loop works on; None: it has no such tile.
    """
    code, issued = run.program.instructions, np.array(run.issued)
    warps, loops = run.program.threads // WARP, list(main_loops(run.program))
    inside = np.zeros(len(code), np.bool_)
    for loop in loops:
        inside[loop.start : loop.stop] = True
    rounds = sum(int(issued[loop.stop - 1]) for loop in loops) // warps
    per_pair = WARP / (rounds * pairs) if pairs and rounds else 0.0
    moved = {at: x for (at, space), x in run.traffic.items() if space == "global"}
    passed = {at: x for (at, space), x in run.traffic.items() if space == "shared"}
    stored = sum(int(x.bytes) for at, x in moved.items() if code[at].words[0] in STORES)
    tensors = {x.untyped_storage().data_ptr(): x.nbytes for x in arguments if isinstance(x, Tensor)}
    return Counts(
        issued=_by_class(code, issued),
        loop={name: n * per_pair for name, n in _by_class(code, issued * inside).items()} if per_pair else {},
        loaded=sum(x.bytes for x in moved.values()) - stored,
        stored=stored,
        sectors=SECTOR * sum(x.moved for x in moved.values()),
        least=SECTOR * sum(x.least for x in moved.values()),
        tensors=sum(tensors.values()),
        passes=sum(x.moved for x in passed.values()),
        least_passes=sum(x.least for x in passed.values()),
        loop_conflicts=sum(x.moved - x.least for at, x in passed.items() if inside[at]),
        operations=int(run.operations),
        waits={name: n / programs / warps for name, n in _waits(code, issued).items()},
    )


def main_loops(program: Program) -> Iterator[range]:
    """Yield the innermost loops with matrix instructions, from the target of a branch backwards to the branch."""
    code = program.instructions
    matrix = [class_of(i.opcode) == "matrix" for i in code]
    spans = [
        range(start, at + 1)
        for at, i in enumerate(code)
        if class_of(i.opcode) == "branch"
        for start in (program.labels.get(str(x)) for x in i.operands[:1])
        if start is not None and start <= at and any(matrix[start : at + 1])
    ]
    for span in spans:
        if not any(other != span and other.start >= span.start and other.stop <= span.stop for other in spans):
            yield span


def _by_class(code: Sequence[Instruction], issued: Array) -> dict[str, int]:
    """Sum counts by class, the most frequent first."""
    sums: dict[str, int] = {}
    for instruction, n in zip(code, issued.tolist(), strict=True):
        if n:
            name = class_of(instruction.opcode)
            sums[name] = sums.get(name, 0) + n
    return dict(sorted(sums.items(), key=lambda x: -x[1]))


def _waits(code: Sequence[Instruction], issued: Array) -> dict[str, int]:
    """Sum the counts of instructions that wait, by opcode without what only says how."""
    sums: dict[str, int] = {}
    for instruction, n in zip(code, issued.tolist(), strict=True):
        if n and re.match(WAITS, instruction.opcode):
            name = ".".join(instruction.words[:3])
            sums[name] = sums.get(name, 0) + n
    return sums
