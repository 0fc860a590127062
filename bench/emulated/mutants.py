"""Mutants of a program: each with one instruction taken out or changed."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from .ptx import Address, Instruction, Program, elements

# all of these are tried, of the other kinds a sample
EACH = ("barrier", "fence", "wait")
KINDS = (*EACH, "mask", "bound", "fragment", "offset")


class Mutant(NamedTuple):
    """A changed instruction, None where it is taken out, at its place in the program.

    kept: so many threads, the first of every program, execute the instruction as it was.
    """

    at: int
    kind: str
    change: str
    instruction: Instruction | None
    kept: int = 0


def mutants(program: Program) -> Iterator[Mutant]:
    """Yield every mutant of a program."""
    begun = [x.operands[0] for x in program.instructions if x.words[:2] == ["mbarrier", "init"]]
    mbarriers = list(dict.fromkeys(place for place in begun if isinstance(place, Address)))
    for at, x in enumerate(program.instructions):
        name, *words = x.words
        if name == "bar":
            yield Mutant(at, "barrier", "taken out", None)
        yield from _by_some(program, at, _unordered(at, x, mbarriers))
        if name == "bra" and x.predicate and program.instructions[at - 1].words[1:2] == ["try_wait"]:
            yield Mutant(at, "wait", "not tried again", None)
        if x.predicate and name != "bra":
            yield Mutant(at, "mask", f"without {x.predicate}", replace(x, predicate="", negated=False))
        if name == "setp" and words[0] in _OFF_BY_ONE and words[-1][0] in "su":
            opcode = ".".join((name, _OFF_BY_ONE[words[0]], *words[1:]))
            yield Mutant(at, "bound", opcode, replace(x, opcode=opcode))
        yield from _misplaced(at, x)


def _unordered(at: int, x: Instruction, mbarriers: Sequence[Address]) -> Iterator[Mutant]:
    """Yield mutants that lack a fence, an order or a wait, or wait at another of the mbarriers."""
    name, *words = x.words
    if name == "fence" or words[:1] == ["fence"]:
        yield Mutant(at, "fence", "taken out", None)
    elif "acq_rel" in words:
        yield Mutant(at, "fence", "relaxed", replace(x, opcode=x.opcode.replace("acq_rel", "relaxed")))
    elif "wait_group" in words:
        later = int(str(x.operands[0])) + 1
        yield Mutant(at, "wait", f"for all but {later}", replace(x, operands=(later,)))
    elif words[:1] in (["wait::ld"], ["wait::st"], ["dealloc"], ["inval"]):
        yield Mutant(at, "wait", "taken out", None)
    elif words[:1] == ["try_wait"]:
        done, here, parity = x.operands
        yield Mutant(at, "wait", "said to have ended", replace(x, opcode="setp.eq.s32", operands=(done, 0, 0)))
        if others := [other for other in mbarriers if other != here]:
            other = others[mbarriers.index(here) % len(others) if here in mbarriers else 0]
            yield Mutant(at, "wait", f"at [{other.base}]", replace(x, operands=(done, other, parity)))


def _by_some(program: Program, at: int, mutants: Iterable[Mutant]) -> Iterator[Mutant]:
    """Yield mutants, and where several warps or warpgroups execute the instruction, those in which the first does."""
    first = 128 if program.instructions[at].words[0] == "wgmma" else 32
    for mutant in mutants:
        yield mutant
        if program.threads > first and not program.instructions[at].predicate:
            yield mutant._replace(change=f"{mutant.change} past thread {first}", kept=first)


_OFF_BY_ONE = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt"}


def _misplaced(at: int, x: Instruction) -> Iterator[Mutant]:
    """Yield mutants whose fragments are swapped, or one of whose addresses is off by what is accessed there."""
    name, *words = x.words
    matrix = name in ("mma", "ldmatrix", "stmatrix") or words[:1] in (["mma_async"], ["ld"], ["st"])
    for i, operand in enumerate(x.operands):
        parts = elements(operand)
        if matrix and len(parts) > 1 and parts[0] != parts[1]:
            swapped = (parts[1], parts[0], *parts[2:])
            operands = (*x.operands[:i], swapped, *x.operands[i + 1 :])
            yield Mutant(at, "fragment", f"{parts[0]} for {parts[1]}", replace(x, operands=operands))
        elif (
            isinstance(operand, Address) and name in ("ld", "st", "ldmatrix", "stmatrix", "cp") and "param" not in words
        ):
            moved = operand._replace(offset=operand.offset + _width(x))
            operands = (*x.operands[:i], moved, *x.operands[i + 1 :])
            yield Mutant(
                at, "offset", f"{operand.base} + {operand.offset} by {_width(x)} more", replace(x, operands=operands)
            )


def _width(x: Instruction) -> int:
    """Return the bytes that an instruction accesses at one address."""
    if x.words[0] not in ("ld", "st"):
        return int(str(x.operands[2])) if x.words[0] == "cp" else 16
    vector = next((int(w[1:]) for w in x.words if w in ("v2", "v4")), 1)
    return int(x.words[-1][1:]) // 8 * vector


def sample(program: Program, each: int, seed: int) -> list[Mutant]:
    """Return all mutants of the kinds of `EACH`, and at most `each` of every other kind."""
    draw, chosen = random.Random(f"{seed} {program.digest}"), []
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in mutants(program):
        by_kind.setdefault(mutant.kind, []).append(mutant)
    for kind, found in by_kind.items():
        chosen += found if kind in EACH else draw.sample(found, min(each, len(found)))
    return chosen
