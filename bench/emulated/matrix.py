"""Matrix instructions of a warp and of a warpgroup: mma.sync, ldmatrix, stmatrix, wgmma.

A fragment is [registers, 32 lanes] of 32-bit words, each with two halves or one tf32 number along K. Which word of a
matrix a register holds does not depend on the format, so that layouts are stated once, in words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .faults import Fault, Unsupported
from .formats import HALVES, widen
from .machine import Machine, Source, Step
from .ptx import Instruction, Operand, elements, number
from .races import Array
from .registers import NEVER_WRITTEN, Mask, Register, alter, flags_of, require_written
from .tiles import Tile

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4  # of a lane in 8 rows of 4 words


class Layout(NamedTuple):
    """Say where each lane's registers lie in a matrix: rows and columns, [registers, 32]."""

    rows: Array
    columns: Array


_R = np.arange(4)[:, None]
# A, 16 rows of 8 words: registers go down by 8 rows, then right by 4 words
A = Layout(ROW + 8 * (_R % 2), COLUMN + 4 * (_R // 2))
# B transposed, 8 rows of 8 words: registers go right by 4 words
B = Layout(ROW + 0 * _R[:2], COLUMN + 4 * _R[:2])


def result(registers: int) -> Layout:
    """Return the layout of C and D, 16 rows of float32: pairs of columns, down by 8 rows, then right by 8 columns."""
    r = np.arange(registers)[:, None]
    return Layout(ROW + 8 * (r // 2 % 2), 2 * COLUMN + r % 2 + 8 * (r // 4))


def numbers(words: Array, kind: str) -> Array:
    """Return the float32 values of words along the last dimension: two of each for halves."""
    words = np.ascontiguousarray(words)
    return widen(words.view(np.uint16) if kind in HALVES else words, kind)


class Fragment:
    """The registers of a matrix operand, in every warp."""

    def __init__(self, machine: Machine, operand: Operand) -> None:
        names = operand if isinstance(operand, tuple) else (operand,)
        self.registers = [machine.register(name) for name in names]

    def gather(self) -> Array:
        """Return the words, [warps, registers, 32]."""
        return np.stack([r.bits for r in self.registers]).reshape(len(self.registers), -1, 32).swapaxes(0, 1)

    def matrix(self, layout: Layout, rows: int) -> Array:
        """Return the words as matrices, [warps, rows, words]."""
        words = self.gather()
        matrix = np.empty((words.shape[0], rows, int(layout.columns.max()) + 1), np.uint32)
        matrix[:, layout.rows, layout.columns] = words
        return matrix

    def write(self, words: Array, mask: Mask, flags: Array | None) -> None:
        """Write words [warps, registers, 32] to the registers of lanes."""
        for register, values in zip(self.registers, words.swapaxes(0, 1).reshape(len(self.registers), -1), strict=True):
            register.write(values, mask, flags)


def over_warps(flags: Array | None) -> Array | None:
    """Return flags spread over each warp, as every lane's result depends on the others'."""
    return None if flags is None else np.repeat(flags.reshape(-1, 32).max(1), 32)


def _shape(instruction: Instruction) -> tuple[int, int, int]:
    """Return M, N and K."""
    match = re.search(r"\.m(\d+)n(\d+)k(\d+)", instruction.opcode)
    if match is None:
        raise Unsupported(f"the shape of {instruction.opcode}")
    return int(match[1]), int(match[2]), int(match[3])


def multiply(machine: Machine, instruction: Instruction) -> Step:
    """Bind mma.sync: D = A B + C, 16 × 8, of halves or tf32 into float32."""
    words, kind = instruction.words, instruction.words[-2]
    if words[1:3] != ["sync", "aligned"] or words[4:] != ["row", "col", "f32", kind, kind, "f32"]:
        raise Unsupported(instruction.opcode)
    M, N, K = _shape(instruction)
    d, a, b, c = (Fragment(machine, o) for o in instruction.operands)
    counts = [len(x.registers) for x in (d, a, b, c)]
    known = kind in (*HALVES, "tf32") and (16 if kind in HALVES else 8) == K
    if not known or M != 16 or N != 8 or counts != [4, 4, 2, 4]:
        raise Unsupported(instruction.opcode)
    layout_d = result(4)
    inputs = a.registers + b.registers + c.registers

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        machine.operations += 2 * M * N * K * int(np.count_nonzero(machine.full(mask))) // 32
        flags = over_warps(flags_of(inputs, mask))
        left, right = numbers(a.matrix(A, 16), kind), numbers(b.matrix(B, 8), kind)
        product = np.matmul(left, right.swapaxes(1, 2))[:, layout_d.rows, layout_d.columns]
        d.write((product + c.gather().view(np.float32)).view(np.uint32), mask, flags)

    return run


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """Return how many 8 × 8 matrices ldmatrix or stmatrix moves, and whether it transposes them."""
    _, *words = instruction.words
    words = [w.partition("::")[0] for w in words]
    count = next((int(w[1:]) for w in words if w in ("x1", "x2", "x4")), 0)
    rest = [w for w in words if w not in (f"x{count}", "trans")]
    if not count or rest != ["sync", "aligned", "m8n8", "shared", "b16"]:
        raise Unsupported(instruction.opcode)
    return count, "trans" in words


def _rows(machine: Machine, operand: Operand, count: int) -> Any:
    """Return what computes the lanes that hold the addresses of rows, and where those are in shared memory."""
    address = machine.address(operand, 4)
    giving = machine.lane < 8 * count

    def compute(mask: Mask) -> tuple[Array, Array]:
        give = giving if mask is None else giving & mask
        lanes = np.flatnonzero(give)
        return lanes, machine.in_shared(address(give), 16, lanes)

    return compute


def load(machine: Machine, instruction: Instruction) -> Step:
    """Bind ldmatrix: lane i gives the address of row i % 8 of matrix i / 8, and gets a word of each."""
    count, transposed = _matrices(instruction)
    target = Fragment(machine, instruction.operands[0])
    rows = _rows(machine, instruction.operands[1], count)

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        lanes, at = rows(mask)
        data, never = machine.shared.load(at, 16, lanes)
        halves = data.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1, count, 32)
        if never is not None:
            never = np.repeat(never.reshape(-1, 8 * count).any(1), 32)
        for i, register in enumerate(target.registers):
            register.fill(words[:, i].reshape(-1), machine.lanes(mask), mask, never)

    return run


def store(machine: Machine, instruction: Instruction) -> Step:
    """Bind stmatrix, the other way than ldmatrix."""
    count, transposed = _matrices(instruction)
    origin = Fragment(machine, instruction.operands[1])
    rows = _rows(machine, instruction.operands[0], count)

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        flags = over_warps(flags_of(origin.registers, mask))
        words = origin.gather() if mask is None else origin.gather()[mask[::32]]
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            halves = halves.swapaxes(2, 3)
        lanes, at = rows(mask)
        data = np.ascontiguousarray(halves).view(np.uint8).reshape(-1, 16)
        machine.shared.store(at, data, lanes, None if flags is None else flags[lanes] > 0)

    return run


_HOPPER_SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}


def warpgroup(machine: Machine, instruction: Instruction) -> Step:
    """Bind wgmma: its fences, groups and waits, and the products themselves."""
    name, operands, groups = instruction.words[1], instruction.operands, machine.warpgroups
    if machine.threads % 128:
        raise Unsupported(f"{instruction.opcode} in programs of {machine.threads} threads, which are no warpgroups")
    if name == "mma_async":
        return _product(machine, instruction)

    def run(mask: Mask) -> None:
        machine.whole(mask, 128, instruction.opcode)
        if name == "fence":
            groups.fenced[machine.lanes(mask)] = machine.order.now
        elif name == "commit_group":
            groups.committed[machine.lanes(mask)] += 1
        else:
            groups.finish(machine.full(mask), number(operands[0]))

    if instruction.words[2:] != ["sync", "aligned"] or name not in ("fence", "commit_group", "wait_group"):
        raise Unsupported(instruction.opcode)
    return run


def _product(machine: Machine, instruction: Instruction) -> Step:
    """Bind wgmma.mma_async: D = A B + D, 64 × N for each warpgroup; A in registers or shared memory."""
    words, operands, kind = instruction.words, instruction.operands, instruction.words[-1]
    M, N, K = _shape(instruction)
    signs, transposes = operands[4:6], [x == 1 for x in operands[6:]]
    in_registers, half = isinstance(operands[1], tuple), kind in HALVES
    if (
        words[2:4] + words[5:] != ["sync", "aligned", "f32", kind, kind]
        or kind not in (*HALVES, "tf32")
        or (M, K, len(transposes)) != (64, 16 if half else 8, (2 - in_registers) * half)
        or signs != (1, 1)
        or N not in range(8, 257, 8)
        or len(elements(operands[0])) != N // 2
    ):
        raise Unsupported(instruction.opcode)
    d, b, keep = Fragment(machine, operands[0]), machine.source(operands[2], "b64"), machine.source(operands[3], "pred")
    a = Fragment(machine, operands[1]) if in_registers else machine.source(operands[1], "b64")
    layout_d = result(N // 2)
    inputs = a.registers if isinstance(a, Fragment) else []
    read = [s.register for s in (a, b, keep) if isinstance(s, Source) and s.register]
    for register in d.registers:  # A's follow the data: compilers write them after the fence, and ptxas waits
        register.watch(machine.order)

    def tiles(source: Source, rows: int, transposed: bool, leaders: Array) -> Array:
        """Return the tiles of warpgroups as float32, [warpgroups, rows, K]."""
        descriptors = machine.each(source).reshape(-1, 128)[leaders // 128]
        if (descriptors != descriptors[:, :1]).any():
            raise Fault("matrix descriptor", "the threads of a warpgroup disagree")
        found = [Tile.of(int(x), _HOPPER_SWIZZLES, 62) for x in descriptors[:, 0]]
        return machine.tiles.read(
            found, machine.program_of[leaders], rows, kind, transposed, leaders[:, None] + np.arange(128)
        )

    def run(mask: Mask) -> None:
        machine.whole(mask, 128, instruction.opcode)
        require_written(read, mask, "a matrix descriptor")
        where = machine.full(mask)
        lanes, leaders = np.flatnonzero(where), np.flatnonzero(where[::128]) * 128
        machine.warpgroups.require_fenced(d.registers, lanes)
        machine.operations += 2 * M * N * K * leaders.size
        never = over_warps(flags_of(inputs, mask))
        if isinstance(a, Fragment):
            left = numbers(a.matrix(A, 16), kind).reshape(-1, 64, K)[leaders // 128]
        else:
            left = tiles(a, 64, transposes[:1] == [True], leaders)
        right = tiles(b, N, transposes[-1:] == [True], leaders)
        product = np.matmul(left, right.swapaxes(1, 2)).reshape(-1, 16, N)[:, layout_d.rows, layout_d.columns]
        sums, keeps = product.swapaxes(0, 1).reshape(len(d.registers), -1), machine.each(keep, lanes)
        if keeps.any():
            require_accumulators(d.registers, lanes[keeps])
            sums = np.where(keeps, sums + np.stack([r.bits[lanes] for r in d.registers]).view(np.float32), sums)
        for register, values in zip(d.registers, sums.view(np.uint32), strict=True):
            register.bits[lanes] = values
        alter(d.registers, lambda flags: np.where(where, np.uint8(0) if never is None else never, flags))
        machine.warpgroups.start(where, d.registers, dict(zip(leaders.tolist(), machine.tiles.reads, strict=True)))

    return run


def require_accumulators(registers: Sequence[Register], lanes: Array) -> None:
    """Raise a fault if sums that are added to were never written."""
    for register in registers:
        if register.flags is not None and (register.flags[lanes] & NEVER_WRITTEN).any():
            raise Fault("uninitialised register", "an accumulator was never written")
