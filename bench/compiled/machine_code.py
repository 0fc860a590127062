"""Read machine code: its instructions, its innermost loops, and its use of tensor cores."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

# an opcode of every target's tensor cores
TENSOR_CORE = re.compile(r"\b(UTCHMMA|UTCQMMA|HGMMA|QGMMA|HMMA|IMMA|v_s?mfma)(?=[._\s])")
_BRANCH = re.compile(r"\b(?:BRA|s_branch|s_cbranch_\w+)\b.*?(\.L\w+)")
_ALWAYS = re.compile(r"(?:BRA(?:\.U)?|s_branch)[\s`(]+\.L")
_END = re.compile(r"^(EXIT|RET\S*|s_endpgm|s_setpc_b64)\b")


class Line(NamedTuple):
    """Hold an instruction and, on NVIDIA's GPUs, its control word; or a label that branches name."""

    label: str
    instruction: str
    control: int = 0


class Loop(NamedTuple):
    """Instructions of a loop's body, and how many of them are for tensor cores."""

    instructions: int
    tensor_core: int


class Block(NamedTuple):
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[str]
    successors: list[int]
    controls: tuple[int, ...] = ()


def sass(text: str) -> list[Line]:
    """Return the labels and instructions of the text that nvdisasm prints for an NVIDIA GPU.

    With -hex it prints the two words of every instruction too: the second, on a line of its own, ends in the control
    word.
    """
    lines: list[Line] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            lines.append(Line(label.group(1), ""))
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;?\s*(/\*.*)?$", line):
            lines.append(Line("", instruction.group(1)))
        elif word := re.match(r"\s*/\* 0x([0-9a-f]{16}) \*/$", line):
            lines[-1] = lines[-1]._replace(control=int(word.group(1), 16) >> 41)
    return lines


def amdgcn(text: str) -> list[Line]:
    """Return the labels and instructions of the assembly that LLVM writes for an AMD GPU."""
    lines = []
    for line in text.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            lines.append(Line(label.group(1), ""))
        elif instruction := re.match(r"\t([a-z]\w+[^;]*)", line):
            lines.append(Line("", instruction.group(1).strip()))
    return lines


def tensor_core(instructions: Iterable[str]) -> Counter[str]:
    """Count the tensor-core instructions, by opcode."""
    return Counter(found.group(1) for x in instructions if (found := TENSOR_CORE.search(x)))


def blocks(lines: list[Line]) -> list[Block]:
    """Cut code into basic blocks, in its order: one ends at a branch, at the code's end, and before a label.

    A branch to a label that the code does not hold has no successor.
    """
    starts: list[list[Line]] = [[]]
    names: dict[str, int] = {}
    for line in lines:
        last = starts[-1][-1].instruction if starts[-1] else ""
        if starts[-1] and (line.label or _BRANCH.search(last) or _END.match(last)):
            starts.append([])
        if line.label:
            names[line.label] = len(starts) - 1
        else:
            starts[-1].append(line)
    found = []
    for i, block in enumerate(starts):
        last = block[-1].instruction if block else ""
        branch = _BRANCH.search(last)
        onward = not (_END.match(last) or _ALWAYS.match(last))
        successors = [names[branch.group(1)]] if branch and branch.group(1) in names else []
        if onward and i + 1 < len(starts):
            successors.append(i + 1)
        found.append(Block([x.instruction for x in block], successors, tuple(x.control for x in block)))
    return found


def reached(edges: list[list[int]], start: int, without: int) -> set[int]:
    """Return the blocks that a way from `start` reaches without passing `without`."""
    seen, left = {start}, [start]
    while left:
        for i in edges[left.pop()]:
            if i != without and i not in seen:
                seen.add(i)
                left.append(i)
    return seen


def back_edges(graph: list[Block]) -> dict[int, list[int]]:
    """Return the blocks that begin a loop, each with those that branch back to it.

    A branch backwards makes a loop only where all ways to it pass its target: waits for memory lie behind the code.
    """
    forward = [block.successors for block in graph]
    found = {}
    for head in range(len(graph)):
        before = reached(forward, 0, head) if head else set()
        inside = reached(forward, head, -1)
        ends = [i for i, following in enumerate(forward) if head in following and i in inside and i not in before]
        if ends:
            found[head] = ends
    return found


def loops(lines: list[Line]) -> list[Loop]:
    """Return the innermost loops that hold tensor-core instructions, in the order of the code."""
    graph = blocks(lines)
    backward: list[list[int]] = [[] for _ in graph]
    for i, block in enumerate(graph):
        for j in block.successors:
            backward[j].append(i)
    bodies = {
        head: set().union({head}, *(reached(backward, i, head) if i != head else {i} for i in ends))
        for head, ends in back_edges(graph).items()
    }
    found = {}
    for head, body in bodies.items():
        instructions = [x for i in body for x in graph[i].instructions]
        count = tensor_core(instructions).total()
        if count:
            found[head] = Loop(len(instructions), count)
    inner = [head for head in found if not any(bodies[other] < bodies[head] for other in found)]
    return [found[head] for head in sorted(inner)]
