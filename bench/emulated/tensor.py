"""tcgen05: tensor memory of 128 lanes and 512 columns of 32 bits, and its matrix instructions."""

from __future__ import annotations

from typing import Any

import numpy as np

from .asynchronous import Mbarrier, Product
from .faults import Fault, Unsupported
from .machine import Machine, Step
from .matrix import Fragment, numbers
from .ptx import Address, Instruction, Operand
from .races import ANYONE, IN_FLIGHT, SEEN, Array, Ledger
from .registers import LOADING, Mask, flags_of, mark, release, require_written
from .tiles import Tile

LANES, COLUMNS = 128, 512


class TensorMemory:
    """Tensor memory of every program, with the order of accesses to every word.

    columns: allocated, of each program. storing: places before their wait.
    """

    def __init__(self, machine: Machine) -> None:
        self.words = np.zeros(machine.programs * LANES * COLUMNS, np.uint32)
        self.ledger = Ledger(machine.order, self.words.size)
        self.columns = np.zeros(machine.programs, np.int64)
        self.storing: list[tuple[Array, Array]] = []
        self.products: list[list[Product]] = [[] for _ in range(machine.programs)]

    def places(self, lanes: Array, columns: Array, program: Array) -> Array:
        """Return where words are.

        Raises:
            Fault: outside the allocated columns.
        """
        if (lanes >= LANES).any() or (columns < 0).any() or (columns >= self.columns[program]).any():
            raise Fault("bounds", f"column {int(columns.max())} of tensor memory is not allocated")
        return (program * LANES + lanes) * COLUMNS + columns


def tensor(machine: Machine, instruction: Instruction) -> Step:
    """Bind tcgen05."""
    binders = {
        "alloc": _allocate,
        "dealloc": _free,
        "ld": _load,
        "st": _store,
        "mma": _multiply,
        "commit": _commit,
        "wait::ld": _wait_load,
        "wait::st": _wait_store,
    }
    name = instruction.words[1]
    if name in ("relinquish_alloc_permit", "fence::before_thread_sync", "fence::after_thread_sync"):
        return lambda mask: None
    if name not in binders or "cta_group::2" in instruction.words:
        raise Unsupported(instruction.opcode)
    if machine.tensor is None:
        machine.tensor = TensorMemory(machine)
    return binders[name](machine, machine.tensor, instruction)


def _allocate(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """A warp writes the first of the columns that it gets to shared memory."""
    address = machine.address(instruction.operands[0], 4)
    count = machine.source(instruction.operands[1], "u32")

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        first = machine.full(mask) & (machine.lane == 0)
        lanes, program = np.flatnonzero(first), machine.program_of[first]
        start = memory.columns[program].astype(np.uint32)
        at = machine.shared.places(address(first), 4, program)
        machine.shared.store(at, start.view(np.uint8).reshape(-1, 4), lanes)
        memory.columns[program] += count.get()[0]
        if (memory.columns > COLUMNS).any() or np.unique(program).size != program.size:
            raise Fault("deadlock", f"waits for ever for {int(count.get()[0])} columns of tensor memory")

    return run


def _free(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """A warp gives columns back."""
    count = machine.source(instruction.operands[1], "u32")

    def run(mask: Mask) -> None:
        first = machine.full(mask) & (machine.lane == 0)
        memory.columns[machine.program_of[first]] -= count.get()[0]

    return run


def _words(machine: Machine, memory: TensorMemory, instruction: Instruction) -> tuple[Any, Fragment]:
    """Return what computes the places [lanes, registers] of a load or store, and its registers."""
    shape, operands = instruction.words[4], list(instruction.operands)
    vector = next(o for o in operands if isinstance(o, tuple) and not isinstance(o, Address))
    where = next(o for o in operands if isinstance(o, Address))
    split = next((o for o in operands if isinstance(o, int)), 0)
    registers = Fragment(machine, vector)
    if shape not in ("32x32b", "16x32bx2") or instruction.words[5:] != [f"x{len(registers.registers)}", "b32"]:
        raise Unsupported(instruction.opcode)
    address = machine.address(where, 4)

    def places(mask: Mask) -> Array:
        machine.whole(mask, 32, instruction.opcode)
        lanes, at = machine.lanes(mask), address(mask)
        lane, column = at >> 16, at & 0xFFFF
        if shape == "32x32b":
            lane = lane + machine.lane[lanes]
        else:  # the upper half of a warp has the same 16 lanes in other columns
            lane, column = lane + machine.lane[lanes] % 16, column + machine.lane[lanes] // 16 * split
        if (lane // 32 != machine.warp[lanes] % 4).any():
            raise Fault("bounds", "a warp reaches the lanes of tensor memory of another")
        columns = column[:, None] + np.arange(len(registers.registers))
        return memory.places(lane[:, None], columns, machine.program_of[lanes][:, None])

    return places, registers


def _load(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """tcgen05.ld: registers have the words after wait::ld."""
    places, target = _words(machine, memory, instruction)

    def run(mask: Mask) -> None:
        at, lanes = places(mask), machine.lanes(mask)
        never = memory.ledger.note_read(at.reshape(-1), 1, np.repeat(np.arange(machine.count)[lanes], at.shape[1]))
        words, blank = memory.words[at], never.reshape(at.shape)
        for i, register in enumerate(target.registers):
            register.fill(words[:, i], lanes, mask, blank[:, i] if blank[:, i].any() else None)
        mark(target.registers, machine.full(mask), LOADING)
        machine.loading.append(target.registers)

    return run


def _wait_load(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    def run(mask: Mask) -> None:
        for registers in machine.loading:
            release(registers, machine.full(mask))
        machine.loading = [
            r for r in machine.loading if any(x.flags is not None and (x.flags & LOADING).any() for x in r)
        ]

    return run


def _store(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """tcgen05.st: others may read the words after wait::st and a barrier."""
    places, origin = _words(machine, memory, instruction)

    def run(mask: Mask) -> None:
        at, lanes = places(mask), np.flatnonzero(machine.full(mask))
        flags = flags_of(origin.registers, mask)
        memory.ledger.note_write(at.reshape(-1), 1, np.repeat(lanes, at.shape[1]), stamp=IN_FLIGHT)
        memory.words[at] = np.stack([r.bits[lanes] for r in origin.registers], 1)
        memory.storing.append((lanes if flags is None else lanes[flags[lanes] == 0], at))

    return run


def _wait_store(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    def run(mask: Mask) -> None:
        here, left = machine.full(mask), []
        for lanes, at in memory.storing:
            now = here[lanes]
            memory.ledger.written[at[now]] = machine.order.stamp(lanes[now])[:, None]
            if not now.all():
                left.append((lanes[~now], at[~now]))
        memory.storing = left

    return run


_SWIZZLES = {0: 16, 2: 128, 4: 64, 6: 32}
_KINDS = {"kind::f16": {0: "f16", 1: "bf16"}, "kind::tf32": {2: "tf32"}}


class Shape:
    """An instruction descriptor of tcgen05.mma: formats, transpositions, M and N."""

    def __init__(self, descriptor: int, kind: str) -> None:
        kinds = _KINDS[kind]
        a, b = kinds.get(descriptor >> 7 & 7), kinds.get(descriptor >> 10 & 7)
        self.M, self.N = (descriptor >> 24 & 31) * 16, (descriptor >> 17 & 63) * 8
        self.transposed = descriptor >> 15 & 1 == 1, descriptor >> 16 & 1 == 1
        # a float32 result; no sparsity, negation or saturation
        if a is None or a != b or self.M not in (64, 128) or descriptor >> 4 & 3 != 1 or descriptor & 0xE080600F:
            raise Unsupported(f"tcgen05.mma with the descriptor {descriptor:#x}")
        self.kind: str = a

    def lanes(self) -> Array:
        """Return the lanes of tensor memory that have the rows of A and D: of 64 rows, the lower half of every 32."""
        row = np.arange(self.M)
        return row if self.M == LANES else row // 16 * 32 + row % 16


def _multiply(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """tcgen05.mma: D = A B + D in tensor memory, by one thread of each program; A in tensor or shared memory."""
    kind = instruction.words[3]
    d, a, b, shape, keep = instruction.operands
    if kind not in _KINDS or len(instruction.words) != 4:
        raise Unsupported(instruction.opcode)
    address_d, descriptor_b = machine.address(d, 4), machine.source(b, "b64")
    address_a = machine.address(a, 4) if isinstance(a, Address) else None
    descriptor_a = None if address_a else machine.source(a, "b64")
    how, accumulate = machine.source(shape, "b32"), machine.source(keep, "pred")
    used = [s.register for s in (descriptor_a, descriptor_b, how, accumulate) if s and s.register]

    def values(source: Any, lanes: Array) -> list[int]:
        return [int(x) for x in np.broadcast_to(source.get(), machine.count)[lanes]]

    def run(mask: Mask) -> None:
        require_written(used, mask, "an operand of a matrix instruction")
        lanes = np.flatnonzero(machine.full(mask))
        program = machine.program_of[lanes]
        shapes = values(how, lanes)
        if len(set(shapes)) > 1 or np.unique(program).size != program.size:
            raise Fault("matrix descriptor", "the threads of one instruction disagree, or are several of one program")
        form = Shape(shapes[0], kind)
        rows = form.lanes()

        def block(at: Array, columns: int) -> Array:
            return memory.places(
                rows[:, None] + (at >> 16)[:, None, None],
                (at & 0xFFFF)[:, None, None] + np.arange(columns),
                program[:, None, None],
            )

        def operand(source: Any, count: int, transposed: bool) -> Array:
            tiles = [Tile.of(x & ~(1 << 46), _SWIZZLES, 61) for x in values(source, lanes)]
            return machine.tiles.read(tiles, program, count, form.kind, transposed, lanes)

        if address_a is None:
            left = operand(descriptor_a, form.M, form.transposed[0])
        else:
            at = block(address_a(mask), 8)
            _require_ready(memory, at, lanes)
            left = numbers(memory.words[at], form.kind)
        right = operand(descriptor_b, form.N, form.transposed[1])
        at = block(address_d(mask), form.N)
        machine.operations += 2 * left.size * form.N
        sums = np.matmul(left, right.swapaxes(1, 2))
        adds = np.broadcast_to(accumulate.get(), machine.count)[lanes]
        if adds.any():
            _require_ready(memory, at[adds], lanes[adds])
            sums = np.where(adds[:, None, None], sums + memory.words[at].view(np.float32), sums)
        _require_free(memory, at, lanes)
        memory.words[at] = sums.view(np.uint32)
        memory.ledger.written[at] = IN_FLIGHT | ANYONE
        for i, p in enumerate(program):
            memory.products[p].append(Product(machine.tiles.stamp, at[i]))

    return run


def _require_ready(memory: TensorMemory, at: Array, lanes: Array) -> None:
    """Raise a fault unless words of tensor memory may be read by a matrix instruction of each lane."""
    prior = memory.ledger.written[at].reshape(len(lanes), -1)
    mine = prior == IN_FLIGHT | ANYONE  # of an earlier matrix instruction, which ends first
    if (prior == 0).any():
        raise Fault("uninitialised tensor memory", "a matrix instruction reads what was never written")
    if ((prior >= IN_FLIGHT) & ~mine).any():
        raise Fault("asynchronous copy", "a matrix instruction reads a tcgen05.st before the wait for it")
    if ((prior > memory.ledger.order.synced[lanes][:, None]) & ~mine).any():
        raise Fault("race", "a matrix instruction reads tensor memory written since the last barrier")


def _require_free(memory: TensorMemory, at: Array, lanes: Array) -> None:
    """Raise a fault if words of tensor memory that a matrix instruction writes may still be read or written."""
    since = memory.ledger.order.synced[lanes][:, None]
    written, read = (x[at].reshape(len(lanes), -1) for x in (memory.ledger.written, memory.ledger.read))
    if (read > since).any() or ((written > since) & (written != IN_FLIGHT | ANYONE)).any():
        raise Fault("race", "a matrix instruction writes tensor memory touched since the last barrier")


def _commit(machine: Machine, memory: TensorMemory, instruction: Instruction) -> Step:
    """tcgen05.commit: an mbarrier learns when the thread's matrix instructions have ended."""
    address = machine.address(instruction.operands[0], 4)

    def run(mask: Mask) -> None:
        lanes = np.flatnonzero(machine.full(mask))
        for place, program in zip(barriers(machine, address(mask), lanes), machine.program_of[lanes], strict=True):
            barrier = machine.mbarriers[place]
            barrier.tracked += memory.products[program]
            barrier.arrive()
        machine.wake("mbarrier", np.isin(machine.program_of, machine.program_of[lanes]))

    return run


def barriers(machine: Machine, addresses: Array, lanes: Array) -> list[int]:
    """Return the places of mbarriers, which lanes read.

    Raises:
        Fault: there is none.
    """
    at = machine.shared.places(addresses, 8, machine.program_of[lanes])
    machine.shared.load(at, 8, lanes)
    places: list[int] = at.tolist()
    if not set(places) <= set(machine.mbarriers):
        raise Fault("mbarrier", "there is none at this address")
    return places


def mbarrier(machine: Machine, instruction: Instruction) -> Step:
    """Bind mbarrier.init, .try_wait.parity and .inval, for the arrivals of tcgen05.commit."""
    name, operands = instruction.words[1], instruction.operands
    if name not in ("init", "inval", "try_wait") or (name == "try_wait" and instruction.words[2] != "parity"):
        raise Unsupported(instruction.opcode)
    address = machine.address(operands[name == "try_wait"], 4)
    if name != "try_wait":
        count = int(operands[1]) if name == "init" else 0  # type: ignore[arg-type]

        def change(mask: Mask) -> None:
            lanes = np.flatnonzero(machine.full(mask))
            at = machine.shared.places(address(mask), 8, machine.program_of[lanes])
            machine.shared.store(at, np.zeros((lanes.size, 8), np.uint8), lanes)
            for place in at.tolist():
                if name == "init":
                    machine.mbarriers[place] = Mbarrier(count)
                else:
                    machine.mbarriers.pop(place, None)

        return change
    return _try_wait(machine, operands, address)


def _try_wait(machine: Machine, operands: tuple[Operand, ...], address: Any) -> Step:
    """Bind a wait for the phase of a parity, in which lanes sleep until something arrives."""
    done, parity = machine.register(operands[0]), machine.source(operands[2], "u32")

    def run(mask: Mask) -> None:
        lanes = np.flatnonzero(machine.full(mask))
        places = np.array(barriers(machine, address(mask), lanes))
        wanted = np.broadcast_to(parity.get(), machine.count)[lanes]
        ended = np.ones(lanes.size, np.bool_)
        for place in np.unique(places).tolist():
            barrier, here = machine.mbarriers[place], places == place
            ended[here] = (barrier.phase & 1) != wanted[here]
            if ended[here].any():
                _end(machine, barrier)
        done.settle(mask, None)
        done.bits[lanes] = True
        if ended.all():
            return None
        waiting = np.zeros(machine.count, np.bool_)
        waiting[lanes[~ended]] = True
        machine.wait("mbarrier", machine.at, waiting)
        return waiting

    return run


def _end(machine: Machine, barrier: Mbarrier) -> None:
    """End the matrix instructions that an mbarrier tracks."""
    for product in barrier.tracked:
        if not product.done:
            product.done = True
            machine.shared.ledger.end_matrix_reads(product.stamp, seen=True)
            machine.tensor.ledger.written[product.places] = SEEN
    barrier.tracked = []
    for products in machine.tensor.products:
        products[:] = [p for p in products if not p.done]
