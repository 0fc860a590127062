"""Predict how long a program takes on an NVIDIA GPU, from its machine code: a model of one sub-core, not a measurement.

A multiprocessor has four sub-cores, each with a quarter of a program's warps. In the model warps issue in order, one
instruction a clock among them, once the stall count and the scoreboards of the control word allow it and the pipe is
free. `HGMMA` runs behind on the tensor core, in the order of issue, as fast as its operations and its operands' shared
memory allow.

Limits: latencies and the pipes' rates are assumptions; the multiprocessor's other sub-cores do the same at the same
time; loads take as long as from a near cache, whatever they are, and L2's bandwidth and bank conflicts are left out;
`tcgen05` is not known, as its shapes are not in the code. Rates of local attention come out up to 1.4 times those that
are published for such a loop in Triton (`tests/bench/test_model.py`): kernels compare, times are rough.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from .gpus import RATES
from .machine_code import Block, back_edges, reached

# what mma.sync reaches of the rate of wgmma
SYNCHRONOUS = {"sm_90": 0.62}
SUB_CORES = 4
SHARED_BANDWIDTH = 128  # bytes of a multiprocessor in a clock
BARRIER = 18  # clocks from the last arrival
READ = 12  # clocks until a source register is free
COPIED = 600  # clocks until cp.async has landed

_FLOAT = re.compile(r"(FFMA|FMUL|FADD)2?$")
_MULTIPLY = re.compile(r"(IMAD|HFMA2|HMUL2|HADD2)$")
_INTEGER = re.compile(
    r"(FMNMX3?|FSEL|FSETP|SEL|ISETP|PLOP3|LOP3|SHF|PRMT|IADD3?|LEA|VIADD|VIADDMNMX|IMNMX|VIMNMX3?|F2FP|SGXT|IABS|BMSK"
    r"|MOV|P2R|R2P|FSET|R2UR)$"
)
_MEMORY = re.compile(r"(LDS|STS|LDSM|STSM|SHFL|LDGSTS|LDG|STG|LDL|STL)$")
_UNIFORM = re.compile(r"U(?!T)")
# clocks from issue until a scoreboard is released; 12 of others
_LATENCY = {
    "MUFU": 20, "LDS": 30, "LDSM": 33, "SHFL": 25, "STS": 20, "LDGSTS": 20, "STG": 20, "S2R": 25, "S2UR": 25,
    "R2UR": 14, "LDG": 300, "LDL": 40, "STL": 20, "LDC": 40, "ULDC": 30, "MEMBAR": 15, "FENCE": 10, "SYNCS": 22,
    "VOTE": 12, "VOTEU": 12, "POPC": 20,
}  # fmt: skip


class Step(NamedTuple):
    """Hold an instruction as a sub-core issues it."""

    pipe: str
    clocks: float  # for which the pipe takes no other
    latency: int  # until its results are there
    stall: int  # until the warp's next
    waits: tuple[int, ...]  # scoreboards that must be released
    written: int  # the scoreboard that its results release, that its sources do
    read: int
    effect: str = ""  # of those that other steps wait for, and such waits
    amount: float = 0.0  # clocks of a product; groups that a wait leaves under way
    last: bool = False  # the last of a group


@cache
def step(instruction: str, control: int, target: str) -> Step:
    """Return what an instruction does, by its text and its control word."""
    words = re.sub(r"^@!?U?P\w+\s+", "", instruction).split(None, 1)
    opcode, operands = words[0], words[1] if len(words) > 1 else ""
    name = opcode.partition(".")[0]
    pipe, clocks = _pipe(name, opcode, target)
    waits = tuple(i for i in range(6) if control >> 11 + i & 1)
    plain = Step(
        pipe, clocks, _LATENCY.get(name, 12), max(1, control & 15), waits, control >> 5 & 7, control >> 8 & 7
    )  # fmt: skip
    if name == "HGMMA":
        return plain._replace(effect="product", amount=_product(opcode, operands, target), last="gsb" in operands)
    if opcode == "WARPGROUP.DEPBAR.LE" and "gsb" in operands:
        return plain._replace(effect="wait for products", amount=_count(operands))
    if name == "DEPBAR" and "SB0" in operands:
        return plain._replace(effect="wait for copies", amount=_count(operands))
    effect = {"LDGSTS": "copy", "LDGDEPBAR": "end copies"}.get(name, "")
    return plain._replace(effect="barrier" if opcode.startswith("BAR.SYNC") else effect)


def _pipe(name: str, opcode: str, target: str) -> tuple[str, float]:
    """Return the pipe of an instruction, and for how long it is taken."""
    if name in ("HMMA", "IMMA"):
        return "tensor core", _tile(opcode, target)
    if _FLOAT.match(name):
        return "float", 1
    if _MULTIPLY.match(name):
        return "float", 2
    if name == "MUFU":
        return "special", 8
    if _INTEGER.match(name):
        return "integer", 2
    if _MEMORY.match(name):
        wide = 16 if ".128" in opcode or (name in ("LDSM", "STSM") and ".4" in opcode) else 8 if ".64" in opcode else 4
        return "memory", wide if name in ("LDS", "STS", "LDSM", "STSM") else 4
    return ("uniform", 2) if _UNIFORM.match(name) else ("other", 1)


def _count(operands: str) -> int:
    """Return the groups that a wait leaves under way."""
    return int(re.findall(r"0x([0-9a-f]+)", operands)[-1], 16)


def _fused(target: str) -> int:
    """Return the fused multiply-adds of bfloat16 that a multiprocessor does in a clock."""
    return RATES[target].operations // 2


def _tile(opcode: str, target: str) -> float:
    """Return the clocks of an `mma.sync` on a sub-core: 16 rows, 8 columns, and as deep as the opcode says."""
    depth = int(re.findall(r"\.168(\d+)", opcode)[0])
    rate = _fused(target) / SUB_CORES * SYNCHRONOUS.get(target, 1.0)
    return 16 * 8 * depth / (rate / 2 if "TF32" in opcode else rate)


def _product(opcode: str, operands: str, target: str) -> float:
    """Return the clocks of a warpgroup's product: of its operations, or of its operands in shared memory."""
    m, n, k = map(int, re.findall(r"\.(\d+)x(\d+)x(\d+)", opcode)[0])
    wide = "TF32" in opcode
    size = 4 if wide else 2
    rows = m if operands.split(",")[1].strip().startswith("gdesc") else 0
    return max(m * n * k / _fused(target) * (2 if wide else 1), (rows + n) * k * size / SHARED_BANDWIDTH)


class LoopsError(ValueError):
    """Error of code whose loops are not those that were expected."""


def walk(graph: list[Block], trips: Sequence[int], target: str) -> list[Step]:
    """Return the steps of a program that goes round its loops so often, in their order in the code.

    At other branches it takes the way on which most of the loops ahead lie, or else the next block.

    Raises:
        LoopsError: the code has more or fewer loops, or one whose end does not decide whether it goes on.
    """
    forward = [block.successors for block in graph]
    alive = reached(forward, 0, -1)
    ends = {head: tails for head, tails in back_edges(graph).items() if head in alive}
    if len(ends) != len(trips):
        raise LoopsError(f"{len(ends)} loops where {len(trips)} were expected, of {tuple(trips)} rounds")
    rounds = dict(zip(sorted(ends), trips, strict=True))
    onward = [[j for j in following if i not in ends.get(j, ())] for i, following in enumerate(forward)]
    ahead = [reached(onward, i, -1) for i in range(len(graph))]
    left, at, steps = dict(rounds), 0, []
    while True:
        block = graph[at]
        steps += [step(text, control, target) for text, control in zip(block.instructions, block.controls, strict=True)]
        for head in (j for j in forward[at] if at in ends.get(j, ())):
            left[head] -= 1
            if left[head] > 0:
                # loops inside begin anew
                left |= {j: rounds[j] for j in rounds if j != head and j in ahead[head] and at in ahead[j]}
                at = head
                break
        else:
            if not forward[at]:
                return steps
            if not onward[at]:
                raise LoopsError("a loop's end does not decide whether it goes on")
            at = max(onward[at], key=lambda j: (_open(ahead[j], left), -_closed(ahead[j], rounds), j == at + 1))


def _open(blocks: set[int], left: dict[int, int]) -> int:
    """Return how many loops begin in these blocks that are still to be run."""
    return sum(count > 0 for head, count in left.items() if head in blocks)


def _closed(blocks: set[int], rounds: dict[int, int]) -> int:
    """Return how many loops begin in these blocks that must not run."""
    return sum(count == 0 for head, count in rounds.items() if head in blocks)


class _Warp:
    """Hold how far a warp is."""

    def __init__(self, program: int, begin: float) -> None:
        self.program = program
        self.place = 0
        self.ready = begin
        self.scoreboards = [0.0] * 8
        self.products: list[float] = []  # when each group is done
        self.copied = 0.0
        self.copies: list[float] = []
        self.barriers = 0
        self.at_barrier = False
        self.issued = 0.0


def clocks(steps: Sequence[Step], warps: int, programs: int) -> float:
    """Return the clocks that a multiprocessor takes for `programs` programs at once, of so many warps each."""
    share = max(1, warps // SUB_CORES)
    alive = [_Warp(program, 500.0 * program) for program in range(programs) for _ in range(share)]
    free: dict[str, float] = {}
    arrivals: dict[tuple[int, int], list[float]] = {}
    now, product_free, latest = 0.0, 0.0, alive[0]

    def earliest(warp: _Warp) -> float:
        """Return when a warp's next step can be issued, for what is known."""
        x = steps[warp.place]
        at = max(warp.ready, free.get(x.pipe, 0.0))
        for i in x.waits:
            at = max(at, warp.scoreboards[i])
        if warp.at_barrier:
            there = arrivals[warp.program, warp.barriers]
            at = max(at, max(there) + BARRIER) if len(there) == share else math.inf
        if x.effect in ("wait for products", "wait for copies"):
            groups = warp.products if x.effect == "wait for products" else warp.copies
            done = len(groups) - int(x.amount)
            at = max(at, groups[done - 1]) if done > 0 else at
        return at

    while alive:
        when, _, _, warp = min(
            ((max(earliest(w), now), w is not latest, w.issued, w) for w in alive), key=lambda found: found[:3]
        )
        if when == math.inf:
            raise LoopsError("the warps of a program wait for each other")
        x = steps[warp.place]
        warp.at_barrier = False
        free[x.pipe] = when + x.clocks
        if x.effect == "product":
            product_free = max(product_free, when) + x.amount
            if x.last:
                warp.products.append(product_free)
        elif x.effect == "copy":
            warp.copied = when + COPIED
        elif x.effect == "end copies":
            warp.copies.append(warp.copied)
        elif x.effect == "barrier":
            warp.barriers += 1
            warp.at_barrier = True
            arrivals.setdefault((warp.program, warp.barriers), []).append(when)
        done = when + x.clocks
        warp.scoreboards[x.written] = max(warp.scoreboards[x.written], done + x.latency)
        warp.scoreboards[x.read] = max(warp.scoreboards[x.read], done + READ)
        warp.ready, warp.issued, latest = when + x.stall, when, warp
        warp.place += 1
        now = when + 1
        if warp.place == len(steps):
            alive.remove(warp)
    return max(now, product_free)
