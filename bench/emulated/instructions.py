"""The instruction table: each name with what makes an instruction of it ready to run.

Here are memory, exchange within a warp, and control; the rest is in `arithmetic.py` and `matrix.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from . import arithmetic, matrix, tensor
from .asynchronous import Copy
from .faults import Unsupported
from .formats import BITS, SIGNED, numpy_type
from .machine import Code, Machine, Step
from .ptx import Address, Instruction, Operand
from .races import Array
from .registers import NEVER_WRITTEN, Mask, Register, flags_of, require_written


def elements(operand: Operand) -> Sequence[Operand]:
    """Return the operands of a vector, or the one."""
    return operand if isinstance(operand, tuple) and not isinstance(operand, Address) else (operand,)


# what does not change a result here: caches, scopes, orders
_HINTS = {
    "cg",
    "ca",
    "cs",
    "lu",
    "wb",
    "wt",
    "gpu",
    "cta",
    "sys",
    "acq_rel",
    "acquire",
    "release",
    "relaxed",
    "weak",
    "volatile",
    "nc",
}


def _access(instruction: Instruction) -> tuple[str, str, int]:
    """Return the space, the type and the number of elements of a load, a store or an atomic instruction."""
    _, *words, kind = instruction.words
    vector = next((int(w[1:]) for w in words if w in ("v2", "v4", "v8")), 1)
    spaces = [w for w in words if w.partition("::")[0] in ("global", "shared", "param")]
    rest = {w for w in words if w not in ("v2", "v4", "v8", *spaces) and not w.startswith(("L1::", "L2::"))}
    if len(spaces) != 1 or (rest - _HINTS and instruction.words[0] in ("ld", "st")):
        raise Unsupported(instruction.opcode)
    return spaces[0].partition("::")[0], kind, vector


def load(machine: Machine, instruction: Instruction) -> Step:
    """Bind ld: of parameters, of global memory, of shared memory; of vectors."""
    space, kind, vector = _access(instruction)
    target, place = instruction.operands
    registers = [machine.register(t) for t in elements(target)]
    dtype = np.dtype(numpy_type(kind))
    width = dtype.itemsize * vector
    if len(registers) != vector:
        raise Unsupported(f"{instruction.opcode} to {len(registers)} registers")
    if space == "param":
        return _load_parameter(machine, registers[0], place, dtype)
    address = machine.address(place, 8 if space == "global" else 4)

    def run(mask: Mask) -> Mask:
        lanes, addresses = machine.lanes(mask), address(mask)
        if space == "global":
            data, never = machine.memory.load(machine.memory.places(addresses, width), width), None
        else:
            at = machine.shared.places(addresses, width, machine.program_of[lanes])
            data, never = machine.shared.load(at, width, lanes)
        flags = _spread(machine, lanes, never)
        values = data.view(dtype)
        for i, register in enumerate(registers):
            register.settle(mask, flags)
            register.bits[lanes] = _fit(values[:, i], register)
        return None

    return run


def _spread(machine: Machine, lanes: Any, never: Array | None) -> Array | None:
    """Return the flags of all lanes where some of `lanes` read what was never written."""
    if never is None:
        return None
    flags = np.zeros(machine.count, np.uint8)
    flags[lanes] = never * NEVER_WRITTEN
    return flags


def _fit(values: Array, register: Register) -> Array:
    """Return values as bits of the register's size, signed ones with their sign."""
    size = register.bits.itemsize
    if values.itemsize == size:
        return values.view(register.bits.dtype)
    return values.astype(SIGNED[size] if values.dtype.kind == "i" else BITS[size]).view(register.bits.dtype)


def _load_parameter(machine: Machine, register: Register, place: Operand, dtype: np.dtype[Any]) -> Step:
    if not isinstance(place, Address) or place.base not in machine.parameters:
        raise Unsupported(f"parameter {place!r}")
    value = _fit(np.frombuffer(machine.parameters[place.base], dtype, 1, place.offset), register)

    def run(mask: Mask) -> Mask:
        register.write(value, mask, None)
        return None

    return run


def store(machine: Machine, instruction: Instruction) -> Step:
    """Bind st: to global or shared memory, of vectors."""
    space, kind, vector = _access(instruction)
    place, value = instruction.operands
    size = np.dtype(numpy_type(kind)).itemsize
    sources = [machine.source(v, f"b{8 * size}", wide=True) for v in elements(value)]
    registers = [s.register for s in sources if s.register]
    if len(sources) != vector or space == "param":
        raise Unsupported(instruction.opcode)
    address = machine.address(place, 8 if space == "global" else 4)

    def run(mask: Mask) -> Mask:
        lanes, addresses = machine.lanes(mask), address(mask)
        data = np.empty((addresses.size, vector), BITS[size])
        for i, source in enumerate(sources):
            values = source.get()
            data[:, i] = values[lanes] if values.size > 1 else values
        program = machine.program_of[lanes]
        rows = data.view(np.uint8)
        if space == "global":
            require_written(registers, mask, "a value stored to global memory")
            machine.memory.store(machine.memory.places(addresses, size * vector), rows, program)
        else:
            flags = flags_of(registers, mask)
            at = machine.shared.places(addresses, size * vector, program)
            machine.shared.store(at, rows, lanes, None if flags is None else flags[lanes] > 0)
        return None

    return run


_ATOMICS: dict[str, Callable[..., Any]] = {
    "add": lambda old, x: old + x,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "exch": lambda old, x: x,
    "max": max,
    "min": min,
    "cas": lambda old, x, y: y if old == x else old,
}


def atomic(machine: Machine, instruction: Instruction) -> Step:
    """Bind atom and red on global memory: lane after lane."""
    space, kind, _ = _access(instruction)
    words = instruction.words
    names = [w for w in words if w in _ATOMICS]
    operands = instruction.operands if words[0] == "atom" else ("_", *instruction.operands)
    if space != "global" or len(names) != 1 or set(words[1:-1]) - _HINTS - {"global", *names}:
        raise Unsupported(instruction.opcode)
    function, dtype = _ATOMICS[names[0]], np.dtype(numpy_type(kind))
    address = machine.address(operands[1], 8)
    sources = [machine.source(o, kind) for o in operands[2:]]
    registers = [s.register for s in sources if s.register]
    target = None if operands[0] == "_" else machine.register(operands[0])

    def run(mask: Mask) -> Mask:
        require_written(registers, mask, "an atomic operand")
        lanes = np.flatnonzero(machine.full(mask))
        places = machine.memory.places(address(mask), dtype.itemsize) // dtype.itemsize
        cells = machine.memory.cells(dtype)
        values = [np.broadcast_to(s.get(), machine.count)[lanes] for s in sources]
        old = np.empty(lanes.size, dtype)
        for i, place in enumerate(places):
            old[i] = cells[place]
            cells[place] = function(old[i], *(v[i] for v in values))
        machine.memory.mark(places * dtype.itemsize, dtype.itemsize, machine.program_of[lanes])
        if target is not None:
            target.settle(mask, None)
            target.bits[lanes] = old.view(target.bits.dtype)
        return None

    return run


def shuffle(machine: Machine, instruction: Instruction) -> Step:
    """Bind shfl.sync: the value of another lane of the warp, and a predicate for whether it is in range."""
    mode = instruction.words[2]
    target, *operands = instruction.operands
    first, *second = elements(target)
    register, within = machine.register(first), [machine.register(p) for p in second]
    value, by, clamp = (machine.source(o, "b32") for o in operands[:3])
    sources = [s.register for s in (value, by, clamp) if s.register]
    if mode not in ("up", "down", "bfly", "idx"):
        raise Unsupported(instruction.opcode)
    lane = machine.lane

    def run(mask: Mask) -> Mask:
        machine.whole(mask, 32, instruction.opcode)
        flags = flags_of(sources, mask)
        step, limits = by.get().astype(np.int64), clamp.get().astype(np.int64)
        segment = limits >> 8 & 31
        low, high = lane & segment, (lane & segment) | (limits & 31 & ~segment)
        other = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": low | (step & 31 & ~segment)}[mode]
        inside = other >= high if mode == "up" else other <= high
        origin = np.where(inside, other, lane) + machine.warp * 32
        result = np.broadcast_to(value.get(), machine.count)[origin]
        register.write(result, mask, None if flags is None else flags[origin])
        for predicate in within:
            predicate.write(inside, mask, None)
        return None

    return run


def _over_warp(machine: Machine, instruction: Instruction, kind: str, reduce: Callable[[Array], Array]) -> Step:
    """Return what gives every lane of a warp the result of a reduction over [warps, 32]."""
    register = machine.register(instruction.operands[0])
    source = machine.source(instruction.operands[1], kind)
    sources = [source.register] if source.register else []

    def run(mask: Mask) -> Mask:
        machine.whole(mask, 32, instruction.opcode)
        flags = flags_of(sources, mask)
        if flags is not None:
            flags = np.repeat(flags.reshape(-1, 32).max(1), 32)
        result = np.repeat(reduce(np.broadcast_to(source.get(), machine.count).reshape(-1, 32)), 32)
        register.write(result.view(register.bits.dtype), mask, flags)
        return None

    return run


_VOTES: dict[str, Callable[[Array], Array]] = {
    "any": lambda p: p.any(1),
    "all": lambda p: p.all(1),
    "ballot": lambda p: np.packbits(p, axis=1, bitorder="little").view(np.uint32)[:, 0],
}


def vote(machine: Machine, instruction: Instruction) -> Step:
    """Bind vote.sync: whether a predicate holds in any lane or in all, or in which."""
    if instruction.words[2] not in _VOTES:
        raise Unsupported(instruction.opcode)
    return _over_warp(machine, instruction, "pred", _VOTES[instruction.words[2]])


_REDUCTIONS: dict[str, Any] = {
    "max": np.maximum,
    "min": np.minimum,
    "add": np.add,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
}


def reduce(machine: Machine, instruction: Instruction) -> Step:
    """Bind redux.sync: a reduction over the lanes of a warp; of floats, NaN counts only with .NaN."""
    _, _, name, *modifiers, kind = instruction.words
    if name not in _REDUCTIONS or set(modifiers) - {"NaN"}:
        raise Unsupported(instruction.opcode)
    function = _REDUCTIONS[name]
    if kind == "f32" and "NaN" not in modifiers:
        function = np.fmax if name == "max" else np.fmin
    return _over_warp(machine, instruction, kind, lambda x: np.asarray(function.reduce(x, axis=1, dtype=x.dtype)))


def elect(machine: Machine, instruction: Instruction) -> Step:
    """Bind elect.sync: the first lane of every warp."""
    index, predicate = elements(instruction.operands[0])
    outs = [(machine.register(predicate), machine.lane == 0)]
    if index != "_":
        outs.append((machine.register(index), np.zeros(1, np.uint32)))

    def run(mask: Mask) -> Mask:
        machine.whole(mask, 32, instruction.opcode)
        for register, value in outs:
            register.write(value, mask, None)
        return None

    return run


def barrier(machine: Machine, instruction: Instruction) -> Step:
    """Bind bar.sync 0, which all threads of a program reach, and bar.warp.sync."""
    words, operands = instruction.words, instruction.operands
    if words[1] == "warp":

        def run(mask: Mask) -> Mask:
            machine.whole(mask, 32, instruction.opcode)
            machine.order.barrier(machine.lanes(mask), whole=False)
            return None

        return run
    if operands != (0,) or words[1:] not in (["sync"], ["sync", "aligned"]):
        raise Unsupported(f"{instruction.opcode} {operands}")

    def arrive(mask: Mask) -> Mask:
        machine.whole(mask, 32, instruction.opcode)
        return machine.barrier(mask)

    return arrive


def leave(machine: Machine, instruction: Instruction) -> Step:
    """Bind ret and exit."""
    return machine.leave


def nothing(machine: Machine, instruction: Instruction) -> Step:
    """Bind what changes nothing here."""
    return lambda mask: None


def copy(machine: Machine, instruction: Instruction) -> Step:
    """Bind cp.async: copies to shared memory, which end with zeros where their source is shorter; groups and waits."""
    words, operands = instruction.words, instruction.operands
    copies = machine.copies
    if words[1:] == ["async", "commit_group"]:

        def commit(mask: Mask) -> Mask:
            copies.committed[machine.lanes(mask)] += 1
            return None

        return commit
    if words[1:] in (["async", "wait_group"], ["async", "wait_all"]):
        later = operands[0] if operands else 0

        def wait(mask: Mask) -> Mask:
            if words[2] == "wait_all":
                copies.committed[machine.lanes(mask)] += 1
            copies.land(machine.full(mask), int(later))  # type: ignore[arg-type]
            return None

        return wait
    if words[1] != "async" or words[2] not in ("ca", "cg") or words[3:] != ["shared", "global"]:
        raise Unsupported(instruction.opcode)
    target, origin = machine.address(operands[0], 4), machine.address(operands[1], 8)
    width = int(operands[2])  # type: ignore[arg-type]
    size = machine.source(operands[3] if len(operands) > 3 else width, "u32")

    def start(mask: Mask) -> Mask:
        lanes = np.flatnonzero(machine.full(mask))
        sizes = np.broadcast_to(size.get(), machine.count)[lanes]
        used = sizes > 0
        if ((sizes != width) & used).any():
            raise Unsupported(f"{instruction.opcode} of part of its bytes")
        data = np.zeros((lanes.size, width), np.uint8)
        data[used] = machine.memory.load(machine.memory.places(origin(mask)[used], width), width)
        at = machine.shared.places(target(mask), width, machine.program_of[lanes])
        machine.shared.announce(at, width, lanes)
        copies.pending.append(Copy(lanes, copies.committed[lanes], at, data))
        return None

    return start


def fence(machine: Machine, instruction: Instruction) -> Step:
    """Bind fence.proxy.async, which the asynchronous proxy's reads of shared memory need; other fences do nothing."""

    def run(mask: Mask) -> Mask:
        if instruction.words[1] == "proxy":
            machine.order.fenced[machine.lanes(mask)] = machine.order.now
        return None

    return run


Binder = Callable[[Machine, Instruction], Step]
TABLE: dict[str, Binder] = {
    **dict.fromkeys((name.partition(".")[0] for name in arithmetic.FUNCTIONS), arithmetic.compute),
    "mov": arithmetic.move,
    "cvt": arithmetic.convert,
    "setp": arithmetic.compare,
    "selp": arithmetic.select,
    "ld": load,
    "st": store,
    "atom": atomic,
    "red": atomic,
    "shfl": shuffle,
    "vote": vote,
    "redux": reduce,
    "elect": elect,
    "bar": barrier,
    "barrier": barrier,
    "bra": nothing,
    "ret": leave,
    "exit": leave,
    "cp": copy,
    "fence": fence,
    "membar": nothing,
    "mma": matrix.multiply,
    "ldmatrix": matrix.load,
    "stmatrix": matrix.store,
    "wgmma": matrix.warpgroup,
    "mbarrier": tensor.mbarrier,
    "tcgen05": tensor.tensor,
}


def bind(machine: Machine) -> list[Code]:
    """Make the instructions of the machine's program ready.

    Raises:
        Unsupported: an instruction, or a form of it, that is not known, by its name and line.
    """
    code = []
    for instruction in machine.program.instructions:
        try:
            predicate = machine.register(instruction.predicate) if instruction.predicate else None
            run = TABLE[instruction.words[0]](machine, instruction)
        except (Unsupported, KeyError, IndexError, ValueError) as error:
            raise Unsupported(
                f"{machine.program.name}, line {instruction.line} of its PTX ({instruction.source}): "
                f"{instruction.opcode} is not supported: {error}"
            ) from error
        target = machine.program.labels[str(instruction.operands[0])] if instruction.words[0] == "bra" else -1
        code.append(Code(run, predicate, instruction.negated, target))
    return code
