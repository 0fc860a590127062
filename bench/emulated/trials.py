"""Execute a launch with one instruction changed: which check notices, and if none does, why.

A mutant is noticed if a check fires, or if what the kernel writes is further from what it should be than any gate of
its dtype allows. Of others it is computed why nobody notices: by what the instruction changes where it runs, and for
barriers by a second, plainer search for races.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...kernels.check.gates import relative_error
from .executor import LIMIT, Executable, load
from .faults import Fault, Unsupported
from .instructions import bind, bind_all
from .machine import Code, Machine
from .memory import Shared
from .mutants import Mutant
from .races import COMMITTED, Array, Ledger
from .registers import Mask

NOTICED, REDUNDANT, UNREACHED, HOLE = "noticed", "redundant", "unreached", "hole"
# a mutant's code may take longer by so many times before it is said never to end
PATIENCE = 4
# why a mutant is not noticed, of kinds whose every use is held against what it needs
_NEEDLESS = {
    "fence": "every read is behind another fence",
    "wait": "what it ends is ended by another before its use, or is not used",
}
MATRIX = 63  # the bit of what reads shared memory for a matrix instruction


class Verdict(NamedTuple):
    """Say what became of a mutant: noticed, by which check; or why not. `HOLE` where nothing says why."""

    what: str
    why: str


class Trial:
    """A launch, executed again and again from the same memory."""

    def __init__(self, launch: Executable, gate: float) -> None:
        self.launch, self.gate, self.limit = launch, gate, LIMIT
        machine = self.machine()
        run = machine.run(bind_all(machine), LIMIT)
        self.right, self.issued, self.limit = machine.memory.bytes, run.issued, PATIENCE * run.steps

    def machine(self) -> Machine:
        """Return a machine that has not begun."""
        launch = self.launch
        return load(launch.program, launch.programs, launch.arguments, launch.shared, launch.outputs)

    def judge(self, mutant: Mutant) -> Verdict:
        """Execute a mutant, and say what came of it."""
        if not self.issued[mutant.at]:
            return Verdict(UNREACHED, "no call gets there")
        machine = self.machine()
        races = Races(machine) if mutant.kind == "barrier" else None
        try:
            self.execute(machine, mutant, _changed(machine, mutant))
        except Fault as fault:
            return Verdict(NOTICED, fault.kind)
        except Unsupported:
            return Verdict(NOTICED, "refused")
        error = self.error(machine)
        if error > self.gate:
            return Verdict(NOTICED, "result")
        if error:
            return Verdict(HOLE, "below the gate")
        if races is not None:
            return Verdict(HOLE, "warps meet") if races.found else Verdict(REDUNDANT, "no two warps meet across it")
        if mutant.kind in _NEEDLESS:
            return Verdict(REDUNDANT, _NEEDLESS[mutant.kind])
        return self.explain(mutant)

    def explain(self, mutant: Mutant) -> Verdict:
        """Say why a mutant that computes something else, if it does, has the same results to the bit."""
        differs, _ = self.compare(mutant, spoil=False)
        if not differs:
            return Verdict(REDUNDANT, "it does the same wherever it runs")
        _, reaches = self.compare(mutant, spoil=True)
        if not reaches:
            return Verdict(REDUNDANT, "nothing that it changes reaches a result")
        return Verdict(HOLE, "same result by chance")

    def compare(self, mutant: Mutant, spoil: bool) -> tuple[bool, bool]:
        """Execute an instruction both ways, side by side: whether it ever differs, and whether the result does.

        spoil: change what differs once more.
        """
        machine = self.machine()
        twin = _Twin(machine, mutant, spoil)
        try:
            self.execute(machine, mutant, twin.code)
        except (Fault, Unsupported):
            return twin.differs, True
        return twin.differs, self.error(machine) > 0

    def execute(self, machine: Machine, mutant: Mutant, changed: Code) -> None:
        """Execute the launch's code with one instruction changed."""
        code = bind_all(machine)
        code[mutant.at] = changed
        machine.run(code, self.limit)
        machine.memory.require_outputs()

    def error(self, machine: Machine) -> float:
        """Return the largest relative error of a tensor."""
        if np.array_equal(machine.memory.bytes, self.right):
            return 0.0
        tensors = [x for x in self.launch.arguments if isinstance(x, Tensor)]
        return max(_error(machine.memory.values(x), machine.memory.values(x, self.right)) for x in tensors)


def _error(found: Tensor, right: Tensor) -> float:
    """Return the relative error; infinite where one alone is not finite."""
    if torch.equal(found.isfinite(), right.isfinite()):
        keep = right.isfinite()
        error = relative_error(found[keep], right[keep].double())
        return error if error == error else float(not torch.equal(found[keep], right[keep]))
    return float("inf")


def _changed(machine: Machine, mutant: Mutant) -> Code:
    """Make a mutant's instruction ready."""
    changed = Code(lambda mask: None, None, False, -1)
    if mutant.instruction is not None:
        changed = bind(machine, mutant.instruction)
    if not mutant.kept:
        return changed
    right, first = bind(machine, machine.program.instructions[mutant.at]), machine.warp_of < mutant.kept // 32

    def run(mask: Mask) -> Mask:
        """Let some threads run the one, the others the other, and return those that wait."""
        waiting = np.zeros(machine.count, np.bool_)
        for code, lanes in ((right, machine.full(mask) & first), (changed, machine.full(mask) & ~first)):
            if lanes.any() and (they := code.run(lanes)) is not None:
                waiting |= they
        return waiting if waiting.any() else None

    return Code(run, None, False, -1)


class _Twin:
    """An instruction that runs as it should, and then from the same registers and memory as its mutant does."""

    def __init__(self, machine: Machine, mutant: Mutant, spoil: bool) -> None:
        instruction = machine.program.instructions[mutant.at]
        self.machine, self.spoil, self.differs = machine, spoil, False
        self.right, self.wrong = bind(machine, instruction), _changed(machine, mutant)
        names = [n for o in instruction.operands for n in (o if isinstance(o, tuple) else (o,))]
        self.states = [machine.registers[n].bits for n in dict.fromkeys(names) if n in machine.registers]
        if instruction.words[0] in ("st", "stmatrix", "cp", "mbarrier", "tcgen05"):
            self.states += [machine.shared.bytes, machine.memory.bytes]
        self.code = Code(self.run, None, False, -1)

    def run(self, mask: Mask) -> None:
        """Run both, compare what they leave, and go on from the mutant's."""
        before = [x.copy() for x in self.states]
        self.step(self.right, mask)
        right = [x.copy() for x in self.states]
        for x, old in zip(self.states, before, strict=True):
            x[...] = old
        self.step(self.wrong, mask)
        for x, wanted in zip(self.states, right, strict=True):
            changed = x != wanted
            self.differs |= bool(changed.any())
            if self.spoil:
                x[changed] = ~x[changed] if x.dtype == np.bool_ else x[changed] ^ x.dtype.type(0x11)

    def step(self, code: Code, mask: Mask) -> None:
        """Run one of the two in the lanes where its predicate holds."""
        active = self.machine.active(code, mask)
        if active is None or active.any():
            code.run(active)


class Races:
    """A second search for races: which warps wrote and read each granule since their program's last barrier."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.found = machine, False
        self.watch(machine.shared.ledger, machine.shared.land, machine.shared)
        if any(x.words[0] == "tcgen05" for x in machine.program.instructions):
            bind_all(machine)  # makes tensor memory
            self.watch(machine.tensor.ledger)

    def watch(self, ledger: Ledger, land: Callable[..., None] | None = None, shared: Shared | None = None) -> None:
        """Follow the accesses of one kind of memory."""
        size, order = ledger.written.size, ledger.order
        wrote, read, when = (np.zeros(size, np.uint64), np.zeros(size, np.uint64), np.zeros(size, np.int64))
        each = size // self.machine.programs
        one = np.uint64(1)

        def bits(lanes: Any) -> Array:
            return one << (self.machine.warp[lanes] % (self.machine.threads // 32)).astype(np.uint64)

        def note(rows: Array, width: int, mine: Array, writes: bool) -> None:
            places = rows[:, None] * width + np.arange(width)
            mine = np.broadcast_to(np.asarray(mine).reshape(-1, 1), places.shape)
            others = wrote[places] & ~mine
            self.found |= bool(((others != 0) & (when[places] != order.now)).any())
            if writes:
                self.found |= bool((read[places] & ~mine).any())
                when[places] = order.now
            np.bitwise_or.at(wrote if writes else read, places, mine)

        def end(stamp: int, ended: int, _do: Any = ledger.end_matrix_reads) -> None:
            if not ended & COMMITTED:
                for chunks in ledger.flights.get(stamp, []):
                    note(chunks.reshape(-1), 8, np.array(one << np.uint64(MATRIX)), False)
            _do(stamp, ended)

        def barrier(lanes: Any, whole: bool, _do: Any = order.barrier) -> None:
            if whole:
                for program in np.flatnonzero(lanes[:: self.machine.threads]).tolist():
                    wrote[program * each : (program + 1) * each] = read[program * each : (program + 1) * each] = 0
            _do(lanes, whole)

        def reads(rows: Array, width: int, lanes: Any, _do: Any = ledger.note_read) -> Array:
            note(rows, width, bits(lanes), False)
            return _do(rows, width, lanes)

        def writes(rows: Array, width: int, lanes: Any, *more: Any, _do: Any = ledger.note_write, **named: Any) -> None:
            note(rows, width, bits(lanes), True)
            _do(rows, width, lanes, *more, **named)

        def lands(at: Array, data: Array, lanes: Any) -> None:
            note(at // data.shape[1], data.shape[1] // 2, bits(lanes), True)
            assert land is not None
            land(at, data, lanes)

        ledger.note_read, ledger.note_write, ledger.end_matrix_reads = reads, writes, end  # type: ignore[method-assign]
        order.barrier = barrier  # type: ignore[method-assign]
        if shared is not None:
            shared.land = lands  # type: ignore[method-assign]
