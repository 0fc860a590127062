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
    """An instruction, or a label that branches name."""

    label: str
    instruction: str


class Loop(NamedTuple):
    """Instructions of a loop's body, and how many of them are for tensor cores."""

    instructions: int
    tensor_core: int


class Block(NamedTuple):
    """Instructions that run one after the other, and the blocks that may follow."""

    instructions: list[str]
    successors: list[int]


def sass(text: str) -> list[Line]:
    """Return the labels and instructions of the text that nvdisasm prints for an NVIDIA GPU."""
    lines = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\w+):", line):
            lines.append(Line(label.group(1), ""))
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;?\s*(/\*.*)?$", line):
            lines.append(Line("", instruction.group(1)))
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
    starts: list[list[str]] = [[]]
    names: dict[str, int] = {}
    for label, instruction in lines:
        ends = starts[-1] and (_BRANCH.search(starts[-1][-1]) or _END.match(starts[-1][-1]))
        if ends or (label and starts[-1]):
            starts.append([])
        if label:
            names[label] = len(starts) - 1
        else:
            starts[-1].append(instruction)
    found = []
    for i, block in enumerate(starts):
        last = block[-1] if block else ""
        branch = _BRANCH.search(last)
        onward = not (_END.match(last) or _ALWAYS.match(last))
        successors = [names[branch.group(1)]] if branch and branch.group(1) in names else []
        if onward and i + 1 < len(starts):
            successors.append(i + 1)
        found.append(Block(block, successors))
    return found


def _reached(edges: list[list[int]], start: int, without: int) -> set[int]:
    """Return the blocks that a way from `start` reaches without passing `without`."""
    seen, left = {start}, [start]
    while left:
        for i in edges[left.pop()]:
            if i != without and i not in seen:
                seen.add(i)
                left.append(i)
    return seen


def loops(lines: list[Line]) -> list[Loop]:
    """Return the innermost loops that hold tensor-core instructions, in the order of the code.

    A branch backwards makes a loop only where all ways to it pass its target: waits for memory lie behind the code.
    """
    graph = blocks(lines)
    forward = [block.successors for block in graph]
    backward: list[list[int]] = [[] for _ in graph]
    for i, following in enumerate(forward):
        for j in following:
            backward[j].append(i)
    bodies: dict[int, set[int]] = {}
    for head in range(len(graph)):
        before = _reached(forward, 0, head) if head else set()
        inside = _reached(forward, head, -1)
        ends = [i for i in backward[head] if i in inside and i not in before]
        if ends:
            bodies[head] = set().union({head}, *(_reached(backward, i, head) if i != head else {i} for i in ends))
    found = {}
    for head, body in bodies.items():
        instructions = [x for i in body for x in graph[i].instructions]
        count = tensor_core(instructions).total()
        if count:
            found[head] = Loop(len(instructions), count)
    inner = [head for head in found if not any(bodies[other] < bodies[head] for other in found)]
    return [found[head] for head in sorted(inner)]
