"""The instruction table: each name with what makes an instruction of it ready to run.

Here are memory, exchange within a warp, and control; the rest is in `arithmetic.py`, `matrix.py`, `tensor.py` and
`mbarriers.py`. Exchanges are of whole warps: a member mask of fewer lanes is refused, but one in a register not read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from . import arithmetic, matrix, mbarriers, tensor
from .asynchronous import Copy
from .faults import Unsupported
from .formats import numpy_type
from .machine import Code, Machine, Step
from .ptx import Address, Instruction, elements, number
from .registers import Mask, flags_of, require_written

_ORDERS = {"relaxed", "acquire", "release", "acq_rel"}  # of atomics
# what one family of GPUs alone has
_TARGETS = {"wgmma": "sm_90a", "tcgen05": "sm_100a"}


def _access(instruction: Instruction) -> tuple[str, np.dtype[Any], int]:
    """Return the space, the type and the number of elements of a load or store."""
    _, *words, kind = instruction.words
    vector = next((w for w in words if w in ("v2", "v4")), "")
    spaces = [w for w in words if w in ("global", "shared", "shared::cta", "param")]
    if len(spaces) != 1 or set(words) - {vector, "cg", *spaces}:
        raise Unsupported(instruction.opcode)
    return spaces[0].partition("::")[0], np.dtype(numpy_type(kind)), int(vector[1:] or "1")


def load(machine: Machine, instruction: Instruction) -> Step:
    """Bind ld: of parameters, of global memory, of shared memory; of vectors."""
    space, dtype, vector = _access(instruction)
    target, place = instruction.operands
    registers = [machine.register(t) for t in elements(target)]
    width = dtype.itemsize * vector
    if len(registers) != vector:
        raise Unsupported(f"{instruction.opcode} to {len(registers)} registers")
    if space == "param":
        if not isinstance(place, Address) or place.base not in machine.parameters or vector > 1:
            raise Unsupported(f"parameter {place!r}")
        value = np.frombuffer(machine.parameters[place.base], dtype, 1, place.offset)
        return lambda mask: registers[0].write(registers[0].fit(value), mask, None)
    address = machine.address(place, 8 if space == "global" else 4)

    def run(mask: Mask) -> None:
        lanes, addresses = machine.lanes(mask), address(mask)
        if space == "global":
            data, never = machine.memory.load(machine.in_global(addresses, width, lanes), width, lanes), None
        else:
            data, never = machine.shared.load(machine.in_shared(addresses, width, lanes), width, lanes)
        values = data.view(dtype)
        for i, register in enumerate(registers):
            register.fill(values[:, i], lanes, mask, never)

    return run


def store(machine: Machine, instruction: Instruction) -> Step:
    """Bind st: to global or shared memory, of vectors."""
    space, dtype, vector = _access(instruction)
    place, value = instruction.operands
    sources = [machine.source(v, f"b{8 * dtype.itemsize}", wide=True) for v in elements(value)]
    registers = [s.register for s in sources if s.register]
    width = dtype.itemsize * vector
    if len(sources) != vector or space == "param":
        raise Unsupported(instruction.opcode)
    address = machine.address(place, 8 if space == "global" else 4)

    def run(mask: Mask) -> None:
        lanes, addresses = machine.lanes(mask), address(mask)
        data = np.stack([machine.each(source, lanes) for source in sources], 1).view(np.uint8)
        if space == "global":
            require_written(registers, mask, "a value stored to global memory")
            machine.memory.store(machine.in_global(addresses, width, lanes), data, lanes)
        else:
            flags = flags_of(registers, mask)
            never = None if flags is None else flags[lanes] > 0
            machine.shared.store(machine.in_shared(addresses, width, lanes), data, lanes, never)

    return run


def atomic(machine: Machine, instruction: Instruction) -> Step:
    """Bind atom.add on global memory: lane after lane. Only .release, .acquire and .acq_rel order programs."""
    _, *words, kind = instruction.words
    acquires, releases = (bool({order, "acq_rel"} & set(words)) for order in ("acquire", "release"))
    if set(words) - _ORDERS - {"gpu"} != {"global", "add"}:
        raise Unsupported(instruction.opcode)
    target, place, operand = instruction.operands
    dtype, address, source = np.dtype(numpy_type(kind)), machine.address(place, 8), machine.source(operand, kind)
    registers, result = [source.register] if source.register else [], machine.register(target)

    def run(mask: Mask) -> None:
        require_written(registers, mask, "an atomic operand")
        lanes = machine.lanes(mask)
        at = machine.in_global(address(mask), dtype.itemsize, lanes)
        cells = machine.memory.cells(dtype)
        machine.memory.mark(at, dtype.itemsize, lanes)
        machine.order.meet(at, lanes, acquires, releases)
        old = np.empty(at.size, dtype)
        for i, (cell, more) in enumerate(zip(at // dtype.itemsize, machine.each(source, lanes), strict=True)):
            old[i] = cells[cell]
            cells[cell] += more
        result.fill(old, lanes, mask, None)

    return run


def _require_whole_warp(instruction: Instruction) -> None:
    """Refuse a member mask, the last operand, that leaves out lanes of a warp."""
    mask = instruction.operands[-1]
    if isinstance(mask, int) and mask & 0xFFFF_FFFF != 0xFFFF_FFFF:
        raise Unsupported(f"{instruction.opcode} of the lanes {mask:#x} alone")


def shuffle(machine: Machine, instruction: Instruction) -> Step:
    """Bind shfl.sync: the value of another lane of the warp, and a predicate for whether it is in range."""
    _require_whole_warp(instruction)
    mode, target = instruction.words[2], instruction.operands[0]
    register, *within = (machine.register(t) for t in elements(target))
    value, by, clamp = (machine.source(o, "b32") for o in instruction.operands[1:4])
    sources = [s.register for s in (value, by, clamp) if s.register]
    if mode not in ("up", "down", "bfly", "idx"):
        raise Unsupported(instruction.opcode)
    lane = machine.lane

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        flags = flags_of(sources, mask)
        step, limits = by.get().astype(np.int64) & 31, clamp.get().astype(np.int64)
        segment = limits >> 8 & 31
        low, high = lane & segment, (lane & segment) | (limits & 31 & ~segment)
        other = {"up": lane - step, "down": lane + step, "bfly": lane ^ step, "idx": low | (step & 31 & ~segment)}[mode]
        inside = other >= high if mode == "up" else other <= high
        origin = np.where(inside, other, lane) + machine.warp * 32
        register.write(machine.each(value)[origin], mask, None if flags is None else flags[origin])
        for predicate in within:
            predicate.write(inside, mask, None)

    return run


def reduce(machine: Machine, instruction: Instruction) -> Step:
    """Bind redux.sync.max.f32: the largest number of the lanes of a warp, NaN where all are."""
    if instruction.words[2:] != ["max", "f32"]:
        raise Unsupported(instruction.opcode)
    _require_whole_warp(instruction)
    register, source = machine.register(instruction.operands[0]), machine.source(instruction.operands[1], "f32")
    sources = [source.register] if source.register else []

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        flags = matrix.over_warps(flags_of(sources, mask))
        largest = np.fmax.reduce(machine.each(source).reshape(-1, 32), axis=1)
        register.write(np.repeat(largest, 32).view(register.bits.dtype), mask, flags)

    return run


def elect(machine: Machine, instruction: Instruction) -> Step:
    """Bind elect.sync: the first lane of every warp."""
    _require_whole_warp(instruction)
    index, predicate = elements(instruction.operands[0])
    outs = [(machine.register(predicate), machine.lane == 0)]
    if index != "_":
        outs.append((machine.register(index), np.zeros(1, np.uint32)))

    def run(mask: Mask) -> None:
        machine.whole(mask, 32, instruction.opcode)
        for register, value in outs:
            register.write(value, mask, None)

    return run


def barrier(machine: Machine, instruction: Instruction) -> Step:
    """Bind bar.sync 0, which all threads of a program reach, and bar.warp.sync."""
    words, operands = instruction.words[1:], instruction.operands
    warp = words == ["warp", "sync"]
    if not warp and (operands != (0,) or words not in (["sync"], ["sync", "aligned"])):
        raise Unsupported(f"{instruction.opcode} {operands}")
    if warp:
        _require_whole_warp(instruction)

    def run(mask: Mask) -> Mask:
        machine.whole(mask, 32, instruction.opcode)
        if not warp:
            return machine.barrier(mask)
        machine.order.barrier(machine.lanes(mask), whole=False)
        return None

    return run


def copy(machine: Machine, instruction: Instruction) -> Step:
    """Bind cp.async: copies to shared memory, which end with zeros where their source is shorter; groups and waits."""
    words, operands, copies = instruction.words[1:], instruction.operands, machine.copies
    if words == ["async", "commit_group"]:
        return lambda mask: copies.commit(machine.lanes(mask))
    if words == ["async", "wait_group"]:
        return lambda mask: copies.land(machine.full(mask), number(operands[0]))
    if words[:2] not in (["async", "ca"], ["async", "cg"]) or words[2:] != ["shared", "global"]:
        raise Unsupported(instruction.opcode)
    target, origin = machine.address(operands[0], 4), machine.address(operands[1], 8)
    width = number(operands[2])
    if width not in ((16,) if words[1] == "cg" else (4, 8, 16)):
        raise Unsupported(f"{instruction.opcode} of {width} bytes")
    size = machine.source(operands[3] if len(operands) > 3 else width, "u32")
    sources = [size.register] if size.register else []

    def run(mask: Mask) -> None:
        require_written(sources, mask, "the size of a copy")
        lanes = np.flatnonzero(machine.full(mask))
        sizes = machine.each(size, lanes)
        used = sizes > 0
        if (sizes[used] != width).any():
            raise Unsupported(f"{instruction.opcode} of part of its bytes")
        data = np.zeros((lanes.size, width), np.uint8)
        places = machine.in_global(origin(mask)[used], width, lanes[used])
        data[used] = machine.memory.load(places, width, lanes[used])
        at = machine.in_shared(target(mask), width, lanes)
        machine.shared.announce(at, data, lanes)
        copies.pending.append(Copy(lanes, copies.committed[lanes], at, data))

    return run


def fence(machine: Machine, instruction: Instruction) -> Step:
    """Bind fence.proxy.async, which reads by the asynchronous proxy need."""
    if instruction.words[1:] not in (["proxy", "async"], ["proxy", "async", "shared::cta"]):
        raise Unsupported(instruction.opcode)

    def run(mask: Mask) -> None:
        machine.order.fenced[machine.lanes(mask)] = machine.order.now

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
    "shfl": shuffle,
    "redux": reduce,
    "elect": elect,
    "bar": barrier,
    "bra": lambda machine, instruction: lambda mask: None,
    "ret": lambda machine, instruction: machine.full,
    "cp": copy,
    "fence": fence,
    "mma": matrix.multiply,
    "ldmatrix": matrix.load,
    "stmatrix": matrix.store,
    "wgmma": matrix.warpgroup,
    "mbarrier": mbarriers.mbarrier,
    "tcgen05": tensor.tensor,
}


def bind(machine: Machine, instruction: Instruction) -> Code:
    """Make an instruction ready.

    Raises:
        Unsupported: the instruction, or its form, is not known, by its name and line.
    """
    try:
        if _TARGETS.get(instruction.words[0], machine.program.target) != machine.program.target:
            raise Unsupported(f"the program is for {machine.program.target}")
        predicate = machine.register(instruction.predicate) if instruction.predicate else None
        if predicate and predicate.bits.dtype != np.bool_:
            raise Unsupported(f"{instruction.predicate} is not a predicate")
        run = TABLE[instruction.words[0]](machine, instruction)
    except (Unsupported, KeyError, IndexError, ValueError) as error:
        refusal = Unsupported(f"{instruction.opcode} is not supported: {error}")
        refusal.kernel, refusal.line, refusal.source = machine.program.name, instruction.line, instruction.source
        raise refusal from error
    target = machine.program.labels[str(instruction.operands[0])] if instruction.words[0] == "bra" else -1
    return Code(run, predicate, instruction.negated, target)


def bind_all(machine: Machine) -> list[Code]:
    """Make the instructions of the machine's program ready, and the end behind them."""
    code = [bind(machine, instruction) for instruction in machine.program.instructions]
    return [*code, Code(machine.full, None, False, -1)]
