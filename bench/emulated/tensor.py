"""tcgen05: tensor memory of 128 lanes and 512 columns of 32 bits, and its matrix instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .asynchronous import Product
from .faults import Fault, Unsupported
from .machine import Machine, Source, Step
from .matrix import Fragment, numbers
from .mbarriers import mbarriers_at
from .memory import LIMIT
from .ptx import Address, Instruction, number
from .races import ANYONE, COMMITTED, IN_FLIGHT, Array, Ledger
from .registers import LOADING, Mask, Register, alter, flags_of, require_written
from .tiles import Tile

LANES, COLUMNS = 128, 512
OF_WORDS = 26  # bytes that are held for each word
# the stamp of what a matrix instruction under way writes
_PRODUCT = IN_FLIGHT | ANYONE


class TensorMemory:
    """Tensor memory of every program, with the order of accesses to every word.

    columns: which are allocated, [programs, columns]. loading, storing: lanes and places before their wait. products:
    of each lane, under way. writing: how many products under way write each word. committing: the lane of each program
    that executes tcgen05.commit, -1: none has.
    """

    def __init__(self, machine: Machine) -> None:
        if machine.programs * LANES * COLUMNS * OF_WORDS > LIMIT:
            fit = LIMIT // (LANES * COLUMNS * OF_WORDS)
            raise Unsupported(f"tensor memory must be of {fit} programs at most, got {machine.programs}")
        self.words = np.zeros(machine.programs * LANES * COLUMNS, np.uint32)
        self.ledger = Ledger(machine.order, self.words.size)
        self.columns = np.zeros((machine.programs, COLUMNS), np.bool_)
        self.loading: list[tuple[Array, Array]] = []
        self.storing: list[tuple[Array, Array]] = []
        self.products: dict[int, list[Product]] = {}
        self.writing = np.zeros(self.words.size, np.int32)
        self.committing = np.full(machine.programs, -1)

    def places(self, lanes: Array, columns: Array, program: Array) -> Array:
        """Return where words are.

        Raises:
            Fault: outside the allocated columns.
        """
        inside = (lanes < LANES) & (columns < COLUMNS)
        if not inside.all() or not self.columns[program, columns].all():
            raise Fault("bounds", f"column {int(columns.max())} of tensor memory is not allocated")
        return (program * LANES + lanes) * COLUMNS + columns

    def require_ready(self, at: Array, lanes: Array, sums: bool) -> None:
        """Raise a fault unless words may be read by a matrix instruction of each lane; sums: as what it adds to."""
        written, order = self.ledger.written[at].reshape(len(lanes), -1), self.ledger.order
        recent = self.ledger.since(order.synced, written, lanes)
        if sums:  # earlier products with the same sums end first
            recent &= (written != _PRODUCT) & (written & COMMITTED == 0)
        if (written == 0).any():
            raise Fault("uninitialised tensor memory", "a matrix instruction reads what was never written")
        if (recent & (written >= IN_FLIGHT)).any():
            raise Fault("asynchronous copy", "a matrix instruction reads tensor memory before the wait for its writer")
        if recent.any():
            where = order.place(int(written[recent].max()))
            raise Fault("race", f"a matrix instruction reads tensor memory written since the last barrier, at {where}")

    def end(self, product: Product, stamp: int) -> None:
        """Note that a product has ended, by the stamp of that end, but where later ones are under way."""
        self.writing[product.places] -= 1
        self.ledger.written[product.places[self.writing[product.places] == 0]] = stamp

    def require_free(self, at: Array, lanes: Array) -> None:
        """Raise a fault unless words may be written by a matrix instruction of each lane."""
        written, read = (x[at].reshape(len(lanes), -1) for x in (self.ledger.written, self.ledger.read))
        since = self.ledger.order.synced[lanes][:, None]
        if ((read > since) | ((written > since) & (written != _PRODUCT) & (written & COMMITTED == 0))).any():
            raise Fault("race", "a matrix instruction writes tensor memory touched since the last barrier")


def tensor(machine: Machine, instruction: Instruction) -> Step:
    """Bind tcgen05."""
    name = instruction.words[1]
    if "cta_group::2" in instruction.words:
        raise Unsupported(instruction.opcode)
    if machine.tensor is None:
        machine.tensor = TensorMemory(machine)
    return _BINDERS[name](machine, machine.tensor, instruction)


def _allocate(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.alloc: a warp writes the first of the columns that it gets to shared memory."""
    address = machine.address(instruction.operands[0], 4)
    count = _columns(instruction)

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        first = machine.full(mask) & (machine.lane == 0)
        lanes, program = np.flatnonzero(first), machine.program_of[first]
        free = ~memory.columns[program].reshape(lanes.size, -1, count).any(2)
        if not free.any(1).all():
            raise Fault("deadlock", f"waits for ever for {count} columns of tensor memory")
        start = (free.argmax(1) * count).astype(np.uint32)
        memory.columns[program[:, None], start[:, None] + np.arange(count)] = True
        at = machine.shared.places(address(first), 4, program)
        machine.shared.store(at, start.view(np.uint8).reshape(-1, 4), lanes)

    return run


def _free(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.dealloc: a warp gives columns back, for others it is as if it wrote there."""
    start, count = machine.source(instruction.operands[0], "u32"), _columns(instruction)
    used = [start.register] if start.register else []

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        require_written(used, mask, "the address of tensor memory")
        lanes = np.flatnonzero(machine.full(mask) & (machine.lane == 0))
        program, first = machine.program_of[lanes], machine.each(start, lanes).astype(np.int64)
        if (first % count).any():
            raise Fault("tensor memory", f"{count} columns given back that are not allocated together")
        column = first[:, None] + np.arange(count)
        at = memory.places(np.arange(LANES)[:, None], column[:, None], program[:, None, None]).reshape(-1)
        memory.ledger.note_write(at, 1, np.repeat(lanes, LANES * count), np.ones(at.size, np.bool_))
        memory.columns[program[:, None], column] = False

    return run


def _columns(instruction: Instruction) -> int:
    """Return how many columns an instruction allocates or gives back."""
    count = number(instruction.operands[1])
    if count not in (32, 64, 128, 256, 512):
        raise Unsupported(f"{instruction.opcode} of {count} columns, they must be a power of two from 32 to 512")
    return count


def _words(
    machine: Machine, memory: TensorMemory, instruction: Instruction
) -> tuple[Callable[[Mask], Array], Fragment]:
    """Return what computes the places [lanes, registers] of a load or store, and its registers."""
    shape, operands = instruction.words[4], instruction.operands
    where = next(o for o in operands if isinstance(o, Address))
    split = next((o for o in operands if isinstance(o, int)), 0)
    registers = Fragment(machine, next(o for o in operands if isinstance(o, tuple) and not isinstance(o, Address)))
    count = len(registers.registers)
    if shape not in ("32x32b", "16x32bx2") or instruction.words[5:] != [f"x{count}", "b32"]:
        raise Unsupported(instruction.opcode)
    address = machine.address(where, 4)

    def places(mask: Mask) -> Array:
        machine.whole(mask, 32, instruction.opcode)
        lanes, at = machine.lanes(mask), address(mask)
        if (at.reshape(-1, 32) != at[::32, None]).any():
            raise Fault("tensor memory", "the threads of a warp disagree about an address")
        lane, column, thread = at >> 16, at & 0xFFFF, machine.lane[lanes]
        if shape == "32x32b":
            lane = lane + thread
        else:  # the upper half of a warp has the same 16 lanes in other columns
            lane, column = lane + thread % 16, column + thread // 16 * split
        if (lane // 32 != machine.warp_of[lanes] % 4).any():
            raise Fault("bounds", "a warp reaches the lanes of tensor memory of another")
        return memory.places(lane[:, None], column[:, None] + np.arange(count), machine.program_of[lanes][:, None])

    return places, registers


def _load(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.ld: registers have the words after wait::ld."""
    places, target = _words(machine, memory, instruction)

    def run(mask: Mask) -> None:
        at, lanes = places(mask), np.flatnonzero(machine.full(mask))
        never = memory.ledger.note_read(at.reshape(-1), 1, np.repeat(lanes, at.shape[1])).reshape(at.shape)
        memory.ledger.read[at] = machine.order.who[lanes][:, None] | IN_FLIGHT
        memory.loading.append((lanes, at))
        for register, words, blank in zip(target.registers, memory.words[at].T, never.T, strict=True):
            register.fill(words, lanes, mask, blank if blank.any() else None)
        loading = machine.full(mask) * LOADING
        alter(target.registers, lambda flags: flags | loading)
        machine.loading.append(target.registers)

    return run


def _wait_load(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.wait::ld."""

    def run(mask: Mask) -> None:
        here = machine.full(mask)
        memory.loading = _end_accesses(machine, memory.loading, memory.ledger.read, here)
        for registers in machine.loading:
            alter(registers, lambda flags: np.where(here, flags & ~LOADING, flags))
        machine.loading = [registers for registers in machine.loading if any(_loading(r) for r in registers)]

    return run


def _loading(register: Register) -> bool:
    return register.flags is not None and bool((register.flags & LOADING).any())


def _store(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.st: others may read the words after wait::st and a barrier."""
    places, origin = _words(machine, memory, instruction)

    def run(mask: Mask) -> None:
        at, lanes = places(mask), np.flatnonzero(machine.full(mask))
        flags = flags_of(origin.registers, mask)
        memory.ledger.note_write(at.reshape(-1), 1, np.repeat(lanes, at.shape[1]), stamp=IN_FLIGHT)
        memory.words[at] = np.stack([r.bits[lanes] for r in origin.registers], 1)
        written = np.ones(lanes.size, np.bool_) if flags is None else flags[lanes] == 0
        memory.ledger.written[at[~written]] = 0
        memory.storing.append((lanes[written], at[written]))

    return run


def _wait_store(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.wait::st."""

    def run(mask: Mask) -> None:
        memory.storing = _end_accesses(machine, memory.storing, memory.ledger.written, machine.full(mask))

    return run


def _end_accesses(
    machine: Machine, accesses: list[tuple[Array, Array]], stamps: Array, here: Array
) -> list[tuple[Array, Array]]:
    """End the loads or stores of the lanes that wait here, and return the others."""
    left = []
    for lanes, at in accesses:
        now = here[lanes]
        stamps[at[now]] = machine.order.stamp(lanes[now])[:, None]
        if not now.all():
            left.append((lanes[~now], at[~now]))
    return left


_SWIZZLES = {0: 16, 2: 128, 4: 64, 6: 32}
_KINDS = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}}


class Shape(NamedTuple):
    """Hold what an instruction descriptor of tcgen05.mma says: the format of A and B, which are transposed, M and N."""

    kind: str
    transposed: tuple[bool, bool]
    M: int
    N: int

    @classmethod
    def of(cls, descriptor: int, kind: str) -> Shape:
        """Read a descriptor. D is in float32; sparsity, negation and saturation are not supported."""
        a, b = (_KINDS[kind].get(descriptor >> bit & 7) for bit in (7, 10))
        M, N = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
        legal = a == b and M in (64, 128) and N in range(M // 8, 257, M // 8)
        if a is None or not legal or descriptor >> 4 & 3 != 1 or descriptor & 0xE080604F:
            raise Unsupported(f"tcgen05.mma with the descriptor {descriptor:#x}")
        return cls(a, (descriptor >> 15 & 1 == 1, descriptor >> 16 & 1 == 1), M, N)

    def lanes(self) -> Array:
        """Return the lanes of tensor memory that have the rows of A and D: of 64 rows, the lower half of every 32."""
        row = np.arange(self.M)
        return row if self.M == LANES else row // 16 * 32 + row % 16


def _multiply(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.mma: D = A B + D in tensor memory, by one thread of each program; A in tensor or shared memory."""
    kind = instruction.words[3]
    d, a, b, shape, keep = instruction.operands
    if kind not in _KINDS or len(instruction.words) != 4:
        raise Unsupported(instruction.opcode)
    address_d, descriptor_b = machine.address(d, 4), machine.source(b, "b64")
    address_a = machine.address(a, 4) if isinstance(a, Address) else None
    descriptor_a = None if address_a else machine.source(a, "b64")
    how, accumulate = machine.source(shape, "b32"), machine.source(keep, "pred")
    used = [s.register for s in (descriptor_a, descriptor_b, how, accumulate) if s and s.register]

    def run(mask: Mask) -> None:
        require_written(used, mask, "an operand of a matrix instruction")
        lanes = np.flatnonzero(machine.full(mask))
        program = machine.program_of[lanes]
        shapes = set(machine.each(how, lanes).tolist())
        if len(shapes) > 1 or np.unique(program).size != program.size:
            raise Fault("matrix descriptor", "the threads of one instruction disagree, or are several of one program")
        form = Shape.of(shapes.pop(), kind)

        def block(at: Array, columns: int) -> Array:
            """Return the places of the rows of A or D, [programs, M, columns]."""
            lane, column = form.lanes()[:, None] + (at >> 16)[:, None, None], (at & 0xFFFF)[:, None, None]
            return memory.places(lane, column + np.arange(columns), program[:, None, None])

        def operand(source: Source, rows: int, transposed: bool) -> Array:
            tiles = [Tile.of(x ^ 1 << 46, _SWIZZLES, 61) for x in machine.each(source, lanes).tolist()]
            return machine.tiles.read(tiles, program, rows, form.kind, transposed, lanes[:, None])

        if descriptor_a is not None:
            left = operand(descriptor_a, form.M, form.transposed[0])
        elif address_a is not None:
            at = block(address_a(mask), 8)
            memory.require_ready(at, lanes, sums=False)
            left = numbers(memory.words[at], form.kind)
        right = operand(descriptor_b, form.N, form.transposed[1])
        machine.operations += 2 * left.size * form.N
        sums, at = np.matmul(left, right.swapaxes(1, 2)), block(address_d(mask), form.N)
        adds = machine.each(accumulate, lanes)
        if adds.any():
            memory.require_ready(at[adds], lanes[adds], sums=True)
            sums = np.where(adds[:, None, None], sums + memory.words[at].view(np.float32), sums)
        memory.require_free(at, lanes)
        memory.words[at] = sums.view(np.uint32)
        memory.ledger.written[at] = _PRODUCT
        memory.writing[at] += 1
        for i, lane in enumerate(lanes.tolist()):
            memory.products.setdefault(lane, []).append(Product(machine.tiles.reads[i], at[i]))

    return run


def _commit(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """Bind tcgen05.commit: an mbarrier learns when the executing thread's matrix instructions have ended."""
    address = machine.address(instruction.operands[0], 4)

    def run(mask: Mask) -> None:
        lanes = np.flatnonzero(machine.full(mask))
        barriers, which = mbarriers_at(machine, address(mask), lanes)
        program = machine.program_of[lanes]
        before, memory.committing[program] = memory.committing[program], lanes
        if ((before >= 0) & (before != lanes)).any() or (memory.committing[program] != lanes).any():
            raise Unsupported(f"{instruction.opcode} by several threads of a program")
        commit = machine.order.commit()
        for i, lane in zip(which.tolist(), lanes.tolist(), strict=True):
            barriers[i].arrive(commit, memory.products.get(lane, []))
        machine.wake("mbarrier", np.isin(machine.program_of, machine.program_of[lanes]))

    return run


_BINDERS: dict[str, Callable[[Machine, TensorMemory, Instruction], Step]] = {
    "alloc": _allocate,
    "dealloc": _free,
    "ld": _load,
    "st": _store,
    "mma": _multiply,
    "commit": _commit,
    "wait::ld": _wait_load,
    "wait::st": _wait_store,
    "relinquish_alloc_permit": lambda machine, memory, instruction: lambda mask: None,
    # Triton leaves out the fences that the ISA wants around barriers, and its registers of tcgen05.ld move before
    # wait::ld, which the ISA forbids: neither is checked
}
