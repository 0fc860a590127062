"""Parse PTX: the text of one kernel becomes instructions whose operands are names, numbers, addresses and vectors."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Union

from .faults import Unsupported

TARGETS = ("sm_80", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a")
VERSIONS = ((7, 0), (9, 2))  # the oldest and the newest that were read
REGISTERS = {"pred": 1, "b16": 2, "b32": 4, "b64": 8}


class Address(NamedTuple):
    """The operand [base + offset], in bytes."""

    base: str
    offset: int


# a register, special register, parameter or variable by its name; the bits of a number; an address; {a, b, c} or p|q
Operand = Union[str, int, Address, tuple["Operand", ...]]  # noqa: UP007, before Python 3.14 it names itself


def elements(operand: Operand) -> Sequence[Operand]:
    """Return the operands of a vector, or the one."""
    return operand if isinstance(operand, tuple) and not isinstance(operand, Address) else (operand,)


def number(operand: Operand) -> int:
    """Return an operand that must be a number.

    Raises:
        Unsupported: it is not.
    """
    if not isinstance(operand, int):
        raise Unsupported(f"{operand!r} where a number must be")
    return operand


@dataclass(frozen=True)
class Instruction:
    """One instruction, which runs where `predicate` holds, or where it does not if `negated`."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str
    negated: bool
    line: int
    source: str

    @property
    def words(self) -> list[str]:
        """The opcode's parts between dots."""
        return self.opcode.split(".")


@dataclass(frozen=True)
class Program:
    """A kernel: `parameters` by name and `registers` by name in bytes (1: a predicate), `threads` of one program.

    variables: names for the start of shared memory. labels: the instruction that follows each.
    """

    name: str
    target: str
    parameters: dict[str, int]
    threads: int
    registers: dict[str, int]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    variables: frozenset[str]

    @cached_property
    def digest(self) -> str:
        """A hash of the instructions, wherever they come from in a source."""
        code = [(x.opcode, x.operands, x.predicate, x.negated) for x in self.instructions]
        rest = self.target, self.parameters, self.threads, self.registers, self.labels, sorted(self.variables)
        return hashlib.sha256(repr((rest, code)).encode()).hexdigest()[:16]


_TOKEN = re.compile(
    r"\.loc\s+(?P<file>\d+)\s+(?P<line>\d+)[^\n/]*(?://\s*(?P<comment>[^\n]*))?"
    r"|(?://|\.(?:pragma|file|section)\b)[^\n]*"
    r"|(?P<brace>[{}])|(?P<label>[$\w]+):(?!:)|(?P<statement>[^;\s][^;]*);"
)


def parse(text: str) -> Program:
    """Parse the PTX of one kernel.

    Raises:
        Unsupported: another version or target of PTX, no kernel or several, or a statement of another form.
    """
    version, target = _header(text, r"^\.version\s+(\d+\.\d+)\s"), _header(text, r"^\.target\s+([\w]+)")
    if not VERSIONS[0] <= tuple(int(n) for n in version.split(".")) <= VERSIONS[1]:
        raise Unsupported(f"PTX must be of a version between 7.0 and 9.2, got {version}")
    if target not in TARGETS:
        raise Unsupported(f"PTX must be for one of {', '.join(TARGETS)}, got {target}")
    entries = list(re.finditer(r"\.entry\s+([$\w]+)\s*\(([^)]*)\)([^{]*)\{", text))
    if len(entries) != 1:
        raise Unsupported(f"PTX must have one kernel, got {len(entries)}")
    name, parameters, directives = entries[0].groups()
    threads = re.search(r"\.reqntid\s+(\d+)((?:\s*,\s*\d+)*)", directives)
    if threads is None or set(re.findall(r"\d+", threads[2])) - {"1"}:
        raise Unsupported(f"{name} must state its threads, in one dimension, by .reqntid, got {directives.strip()!r}")
    if int(threads[1]) % 32 or not 0 < int(threads[1]) <= 1024:
        raise Unsupported(f"{name} must have whole warps of threads, at most 1024, got {threads[1]}")
    body = _Body(dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"]*)"', text, re.M)))
    body.read(text, entries[0].end())
    return Program(
        name,
        target,
        {p: int(bits) // 8 for bits, p in re.findall(r"\.param\s+\.[a-z](\d+)[^,]*?([$\w]+)\s*(?:,|$)", parameters)},
        int(threads[1]),
        body.registers,
        tuple(body.resolved()),
        body.labels,
        frozenset(re.findall(r"\.extern\s+\.shared[^;]*?([$\w]+)\[\]", text)),
    )


def _header(text: str, pattern: str) -> str:
    match = re.search(pattern, text, re.M)
    if match is None:
        raise Unsupported(f"PTX must begin with .version and .target, nothing matches {pattern}")
    return match[1]


class _Body:
    """The statements between a kernel's braces. Each pair of braces inside has names of its own, as inline PTX has."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files
        self.registers: dict[str, int] = {}
        self.labels: dict[str, int] = {}
        self.instructions: list[tuple[Instruction, tuple[int, ...]]] = []
        self.scopes, self.opened = [0], 0

    def read(self, text: str, start: int) -> None:
        """Read from `start`, which follows the opening brace, to the brace that closes it."""
        line, source, before = 1, "", 0
        for token in _TOKEN.finditer(text, start):
            line, before = line + text.count("\n", before, token.start()), token.start()
            if token["file"]:
                source = token["comment"] or f"{self.files.get(token['file'], token['file'])}:{token['line']}"
            elif token["label"]:
                self.labels[_scoped(token["label"], self.scopes[-1])] = len(self.instructions)
            elif token["brace"] == "{":
                self.opened += 1
                self.scopes.append(self.opened)
            elif token["brace"]:
                self.scopes.pop()
                if not self.scopes:
                    return
            elif token["statement"]:
                self._statement(token["statement"], line, source)
        raise Unsupported("PTX must close the braces of its kernel")

    def _statement(self, statement: str, line: int, source: str) -> None:
        """Note the registers that a statement declares, or its instruction."""
        if declared := re.match(r"\.reg\s*\.(\w+)\s+(.*)", statement):
            if declared[1] not in REGISTERS:
                raise Unsupported(f"line {line}: registers of type .{declared[1]}")
            for name, count in re.findall(r"([%$\w]+)(?:<(\d+)>)?", declared[2]):
                names = [f"{name}{i}" for i in range(int(count))] if count else [name]
                self.registers.update((_scoped(n, self.scopes[-1]), REGISTERS[declared[1]]) for n in names)
            return
        match = re.fullmatch(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
        if match is None:
            raise Unsupported(f"line {line}: {statement}")
        negated, predicate, opcode, operands = match.groups()
        try:
            parsed = tuple(self._operand(x) for x in _split(operands))
        except ValueError as error:
            raise Unsupported(f"line {line}: {statement}: {error}") from error
        instruction = Instruction(opcode, parsed, self._name(predicate or ""), bool(negated), line, source)
        self.instructions.append((instruction, tuple(self.scopes)))

    def _name(self, name: str) -> str:
        """Return the name of a register in the innermost scope that declares it; other names as they are."""
        scopes = reversed(self.scopes)
        return next((n for n in (_scoped(name, scope) for scope in scopes) if n in self.registers), name)

    def _operand(self, text: str) -> Operand:
        """Parse one operand."""
        if text[0] in "{[":
            inside = text[1:-1].strip()
            if text[0] == "{":
                return tuple(self._operand(x) for x in _split(inside))
            base, _, offset = inside.partition("+")
            return Address(self._name(base.strip()), int(offset or "0", 0))
        if "|" in text:
            return tuple(self._operand(x.strip()) for x in text.split("|"))
        if re.match(r"0[fF][0-9A-Fa-f]{8}", text):
            return int(text[2:], 16)
        if re.match(r"-?\d", text):
            if re.match(r"-?0\d", text):
                raise Unsupported(f"the octal number {text}")
            return int(text.rstrip("U"), 0)
        return self._name(text)

    def resolved(self) -> Iterator[Instruction]:
        """Yield the instructions, labels under the names of the scopes that they are in."""
        for instruction, scopes in self.instructions:
            if instruction.words[0] == "bra":
                names = (_scoped(str(x), scope) for scope in reversed(scopes) for x in instruction.operands[:1])
                label = next((n for n in names if n in self.labels), None)
                if label is None:
                    raise Unsupported(f"line {instruction.line}: no label {', '.join(map(str, instruction.operands))}")
                yield replace(instruction, operands=(label,))
            else:
                yield instruction


def _scoped(name: str, scope: int) -> str:
    return f"{name}@{scope}" if scope else name


def _split(text: str) -> list[str]:
    """Split operands at the commas outside braces and brackets."""
    parts = re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text)
    return [part.strip() for part in parts if part.strip()]
