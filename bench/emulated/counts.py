"""What a launch's code did, counted: a profile without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .machine import Run
from .ptx import Instruction, Program
from .races import Array
from .traffic import SECTOR, WARP

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
_MATRIX = re.compile(r"m(\d+)n(\d+)k(\d+)")


@dataclass(frozen=True)
class Counts:
    """The counts of one launch.

    Attributes:
        issued: instructions of warps, by class.
        loop: of those, in the innermost loops with matrix instructions, for each pair of a row and a column that a
            tile of theirs has: thread instructions, by class; empty where there is no such loop.
        loaded, stored: bytes of global memory that lanes asked for.
        sectors: bytes in the sectors that this took.
        footprint: bytes of global memory that were read or written at all, each of both once.
        passes, least: over shared memory, and without bank conflicts.
        loop_conflicts: passes too many inside those loops.
        operations: of matrix instructions.
        waits: instructions that wait, of one program, by opcode.
    """

    issued: dict[str, int]
    loop: dict[str, float]
    loaded: int
    stored: int
    sectors: int
    footprint: int
    passes: int
    least: int
    loop_conflicts: int
    operations: int
    waits: dict[str, float]


def class_of(opcode: str) -> str:
    """Return the class of an instruction."""
    return next((name for name, pattern in CLASSES.items() if re.match(pattern, opcode)), OTHER)


def count(program: Program, programs: int, run: Run, pairs: int | None) -> Counts:
    """Return the counts of a launch that was executed with `counting`.

    pairs: rows times columns of the tile that a round of a main loop works on; None: it has no such tile.
    """
    traffic, code, issued = run.traffic, program.instructions, run.by_instruction
    if traffic is None:
        raise ValueError("run must be of execute(..., counting=True)")
    warps, loops = program.threads // WARP, list(main_loops(program))
    inside = np.zeros(len(code), np.bool_)
    for loop in loops:
        inside[loop.start : loop.stop] = True
    rounds = sum(int(issued[loop.stop - 1]) for loop in loops) // warps
    return Counts(
        issued=_by_class(code, issued),
        loop={name: n * WARP / (rounds * pairs) for name, n in _by_class(code, issued * inside).items()}
        if pairs and rounds
        else {},
        loaded=int(traffic.loaded.sum()),
        stored=int(traffic.stored.sum()),
        sectors=SECTOR * int(traffic.sectors.sum()),
        footprint=2 * int(np.count_nonzero(traffic.read) + np.count_nonzero(traffic.written)),
        passes=int(traffic.passes.sum()),
        least=int(traffic.least.sum()),
        loop_conflicts=int((traffic.passes - traffic.least)[inside].sum()),
        operations=int(traffic.products.sum())
        + sum(_operations(i) * int(n) for i, n in zip(code, issued, strict=True)),
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


def _operations(instruction: Instruction) -> float:
    """Return the operations of a matrix instruction for each warp that issues it, by the shape in its name."""
    shape = _MATRIX.search(instruction.opcode)
    if shape is None or class_of(instruction.opcode) != "matrix":
        return 0
    m, n, k = map(int, shape.groups())
    # four warps issue one of wgmma
    return 2 * m * n * k / (4 if instruction.words[0] == "wgmma" else 1)
