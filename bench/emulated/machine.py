"""The machine: one lane for every thread of every program, all at the lowest instruction that any has reached."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .asynchronous import Copies, Mbarrier, Warpgroups
from .faults import Fault, Unsupported
from .formats import BITS, HALVES, numpy_type, widen
from .memory import LIMIT, Global, Shared
from .ptx import Address, Operand, Program
from .races import Array, Lanes, Order
from .registers import NEVER_WRITTEN, Mask, Register, require_written
from .tiles import Operands
from .traffic import Traffic, global_traffic, shared_traffic

# runs an instruction on lanes, and returns those that must wait where they are
Step = Callable[[Mask], Mask]


class Source(NamedTuple):
    """An operand that is read: `get` returns the values of all lanes, or one for all; `fixed` if they do not move."""

    get: Callable[[], Array]
    fixed: Array | None
    register: Register | None


class Code(NamedTuple):
    """An instruction made ready: what it does, its predicate, and for a branch where it goes (-1: no branch)."""

    run: Step
    predicate: Register | None
    negated: bool
    target: int


@dataclass(frozen=True)
class Run:
    """Hold what a kernel did.

    steps: instructions executed by the machine, each for many lanes at once.
    issued: of every instruction of the program, by how many warps.
    operations: of matrix instructions, two for each product that is added.
    traffic: of instructions by their index in the program, and "global" or "shared", if it was counted.
    """

    program: Program
    steps: int
    issued: tuple[int, ...]
    operations: int
    traffic: dict[tuple[int, str], Traffic]

    def by_opcode(self) -> Counter[str]:
        """Return the instructions that warps executed, by opcode."""
        counts: Counter[str] = Counter()
        for instruction, count in zip(self.program.instructions, self.issued, strict=True):
            counts[instruction.opcode] += count
        return +counts


def _registers(sizes: dict[str, int], lanes: int) -> dict[str, Register]:
    """Return registers of `sizes` bytes, never written."""
    fresh = np.full(lanes, NEVER_WRITTEN)
    registers: dict[str, Register] = {}
    for size in set(sizes.values()):
        names = [name for name, its in sizes.items() if its == size]
        bank = np.zeros((len(names), lanes), np.bool_ if size == 1 else BITS[size])
        registers |= {name: Register(bits, fresh) for name, bits in zip(names, bank, strict=True)}
    return registers


class Machine:
    """All lanes of a kernel's programs, with their registers and memory."""

    def __init__(
        self,
        program: Program,
        programs: int,
        parameters: dict[str, bytes],
        memory: Global,
        shared: int,
        counting: bool = False,
    ) -> None:
        self.program, self.programs, self.threads = program, programs, program.threads
        self.count = programs * program.threads
        self.parameters, self.memory = parameters, memory
        need = self.count * sum(program.registers.values())
        if need > LIMIT:
            raise Unsupported(f"registers must fit {LIMIT} bytes, got {programs} programs that need {need}")
        self.order = Order(self.count, self.threads, program.instructions)
        memory.follow(self.order)
        self.shared = Shared(self.order, programs, shared)
        lane = np.arange(self.count)
        self.lane, self.warp, self.program_of = lane % 32, lane // 32, self.order.program
        self.warp_of = self.warp % (self.threads // 32)
        self.special = {"%tid.x": lane % self.threads, "%ctaid.x": lane // self.threads}
        self.registers = _registers(program.registers, self.count)
        self.traffic: dict[tuple[int, str], Traffic] | None = {} if counting else None
        self.operations = 0
        self.copies = Copies(self.shared, self.count)
        self.warpgroups = Warpgroups(self.shared, self.count)
        self.tiles = Operands(self.shared)
        self.tensor: Any = None
        self.loading: list[list[Register]] = []  # what tcgen05.ld writes before the wait for it
        self.waiting: dict[str, dict[int, Array]] = {"barrier": {}, "mbarrier": {}}
        self.mbarriers: dict[int, Mbarrier] = {}  # by their places
        self.shared.guarded = self.mbarriers
        self.ready: dict[int, Array] = {}
        self.arrived = np.zeros(self.count, np.bool_)
        self.at = 0

    def register(self, operand: Operand) -> Register:
        """Return a register by its name."""
        if not isinstance(operand, str) or operand not in self.registers:
            raise Unsupported(f"{operand!r} where a register must be")
        return self.registers[operand]

    def source(self, operand: Operand, name: str, wide: bool = False) -> Source:
        """Return an operand as values of PTX's type `name`, halves as float32.

        wide: it may be a wider register, of which the low bits are meant.
        """
        register = self.registers.get(operand) if isinstance(operand, str) else None
        if register is not None:
            values = register.low(name) if wide else register.typed(name)
        elif isinstance(operand, int):
            dtype = np.dtype(numpy_type(name))
            if name == "pred":
                values = np.array([operand != 0])
            else:
                bits = operand & (1 << 8 * (dtype.itemsize << name.endswith("x2"))) - 1
                values = np.array(bits, BITS[dtype.itemsize << name.endswith("x2")]).reshape(1).view(dtype)
        elif operand in self.program.variables:
            values = np.zeros(1, numpy_type(name))
        elif isinstance(operand, str) and operand in self.special:
            values = self.special[operand].astype(numpy_type(name))
        elif isinstance(operand, str) and re.fullmatch(r"%n?ctaid\.[yz]", operand):
            raise Unsupported(f"the grid must have one dimension, {operand} is of another")
        else:
            raise Unsupported(f"operand {operand!r}")
        half = name.removesuffix("x2")
        if half in HALVES:
            return Source(lambda: widen(values, half), None, register)
        return Source(lambda: values, values, register)

    def lanes(self, mask: Mask) -> Lanes:
        """Return the lanes of a mask, as an index."""
        return slice(None) if mask is None else np.flatnonzero(mask)

    def each(self, source: Source, lanes: Lanes = slice(None)) -> Array:
        """Return the values of lanes, all of them by default."""
        return np.broadcast_to(source.get(), self.count)[lanes]

    def in_global(self, addresses: Array, width: int, lanes: Lanes) -> Array:
        """Return where `width` bytes at the lanes' addresses are in global memory."""
        at = self.memory.places(addresses, width)
        if self.traffic is not None and at.size:
            self._count(global_traffic(self.warp[lanes], at, width))
        return at

    def in_shared(self, addresses: Array, width: int, lanes: Lanes) -> Array:
        """Return where `width` bytes at the lanes' addresses are in their programs' shared memory."""
        if self.traffic is not None:
            self._count(shared_traffic(self.warp[lanes], self.lane[lanes], addresses, width))
        return self.shared.places(addresses, width, self.program_of[lanes])

    def _count(self, traffic: Traffic) -> None:
        """Count traffic for the instruction, of which a copy has both kinds."""
        assert self.traffic is not None
        key = self.at, traffic.space
        self.traffic[key] = self.traffic[key] + traffic if key in self.traffic else traffic

    def full(self, mask: Mask) -> Array:
        """Return a mask that may be None as an array."""
        return np.ones(self.count, np.bool_) if mask is None else mask

    def address(self, operand: Operand, size: int) -> Callable[[Mask], Array]:
        """Return what computes the addresses of lanes from the operand [base + offset], whose base has `size` bytes."""
        if not isinstance(operand, Address):
            raise Unsupported(f"{operand!r} where an address must be")
        base, offset = self.source(operand.base, f"u{8 * size}"), operand.offset
        registers = [base.register] if base.register else []
        everywhere = np.zeros(self.count, np.int64)

        def compute(mask: Mask) -> Array:
            require_written(registers, mask, "an address")
            addresses: Array = base.get().astype(np.int64) + offset
            if addresses.size == 1:
                addresses = everywhere + addresses
            return addresses if mask is None else addresses[mask]

        return compute

    def whole(self, mask: Mask, threads: int, name: str) -> None:
        """Raise a fault unless lanes are whole warps, or other groups of `threads`."""
        if mask is not None:
            groups = mask.reshape(-1, threads)
            if (groups.any(1) != groups.all(1)).any():
                raise Fault("barrier", f"only some of {threads} threads reach {name}")

    def wait(self, kind: str, at: int, lanes: Array) -> None:
        """Let lanes wait, to go on at an instruction when they are woken."""
        waiting = self.waiting[kind]
        waiting[at] = waiting[at] | lanes if at in waiting else lanes

    def wake(self, kind: str, lanes: Array) -> None:
        """Let those of the lanes go on that wait."""
        for at, waiting in list(self.waiting[kind].items()):
            self.merge(at, waiting & lanes)
            self.waiting[kind][at] = waiting & ~lanes
        self.waiting[kind] = {at: lanes for at, lanes in self.waiting[kind].items() if lanes.any()}

    def barrier(self, mask: Mask) -> Mask:
        """Let lanes arrive at the barrier of their program, and return those that wait for the others.

        Lanes that have ended count, though hardware takes them off: a program must not rely on that.
        """
        here = self.full(mask)
        self.arrived |= here
        complete = np.repeat(self.arrived.reshape(self.programs, -1).all(1), self.threads)
        self.arrived &= ~complete
        self.order.barrier(complete, whole=True)
        self.wake("barrier", complete & ~here)
        waiting = here & ~complete
        if not waiting.any():
            return None
        self.wait("barrier", self.at + 1, waiting)
        return waiting

    @np.errstate(all="ignore")
    def run(self, code: list[Code], limit: int) -> Run:
        """Execute code until every lane has ended, at most `limit` instructions.

        Lanes that diverged meet again as those at the lowest instruction go first. All programs begin at once, and one
        that spins until another writes has no end here.

        Raises:
            Fault: from the check that fired.
        """
        steps, issued, ready = 0, np.zeros(len(code), np.int64), self.ready
        ready[0] = np.ones(self.count, np.bool_)
        while ready:
            self.at = at = min(ready)
            lanes = ready.pop(at)
            mask: Mask = None if lanes.all() else lanes
            warps = np.count_nonzero(lanes.reshape(-1, 32).any(1))
            going = True
            while going and (not ready or at < min(ready)):
                self.at = at
                self.order.advance(at)
                steps += 1
                issued[at] += warps
                if steps > limit:
                    raise Fault("deadlock", f"no end after {limit} instructions")
                run, _, _, target = code[at]
                active = self.active(code[at], mask)
                at += 1
                if active is not None and not active.any():
                    continue
                if target >= 0:
                    going, at = self._branch(active, mask, at, target)
                elif (leaving := run(active)) is not None:
                    self.merge(at, self.full(mask) & ~leaving)
                    going = False
            if going:
                self.merge(at, lanes)
        self._require_end()
        return Run(self.program, steps, tuple(issued[:-1].tolist()), self.operations, self.traffic or {})

    def active(self, code: Code, mask: Mask) -> Mask:
        """Return the lanes of the mask in which an instruction's predicate holds."""
        predicate = code.predicate
        if predicate is None:
            return mask
        if predicate.flags is not None:
            require_written([predicate], mask, "the predicate")
        active = predicate.bits ^ code.negated
        if mask is not None:
            active &= mask
        return None if active.all() else active

    def _branch(self, taken: Mask, mask: Mask, at: int, target: int) -> tuple[bool, int]:
        """Return whether all lanes of the mask go on together, and where; else both parts wait their turn."""
        rest = self.full(mask) & ~self.full(taken)
        if not rest.any():
            return True, target
        self.merge(target, self.full(taken))
        self.merge(at, rest)
        return False, at

    def merge(self, at: int, lanes: Array) -> None:
        """Let lanes, if any, go on at an instruction, with those that are there."""
        if lanes.any():
            self.ready[at] = self.ready[at] | lanes if at in self.ready else lanes

    def _require_end(self) -> None:
        """Raise a fault if lanes wait that nothing can wake."""
        for kind, waiting in self.waiting.items():
            for at, lanes in waiting.items():
                self.at = at - (kind == "barrier")
                count = np.count_nonzero(lanes)
                if kind == "barrier" and not any(self.waiting["mbarrier"]):
                    raise Fault("barrier", f"{count} threads wait for others that have ended, or wait elsewhere")
                raise Fault("deadlock", f"{count} threads wait for ever")
        if self.tensor is not None and self.tensor.columns.any():
            raise Fault("tensor memory", "it is not given back, and the next program waits for ever")
