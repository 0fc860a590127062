"""Execute a kernel's PTX on a CPU, every thread of every program, and check what it does."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .faults import Fault, Unsupported
from .instructions import bind_all
from .machine import Machine, Run
from .memory import Global
from .ptx import Program

# a kernel that ends executes fewer instructions than these
LIMIT = 20_000_000


class Executable(NamedTuple):
    """A launch, compiled: its kernel's name, and what `execute` takes."""

    kernel: str
    program: Program
    programs: int
    arguments: Sequence[Tensor | int | float]
    shared: int
    outputs: Sequence[Tensor]


def execute(
    program: Program,
    programs: int,
    arguments: Sequence[Tensor | int | float],
    shared: int,
    *,
    outputs: Sequence[Tensor] = (),
    limit: int = LIMIT,
    counting: bool = False,
) -> Run:
    """Run a kernel of `programs` programs in one dimension, and return what it did. Tensors are written in place.

    arguments: in the kernel's order; pointers that are left at the end are null.
    shared: bytes of shared memory of a program.
    outputs: those tensors of which the kernel must write every element; they are poisoned before it.
    counting: also count what loads and stores move.
    limit: instructions after which a kernel is said never to end.

    Raises:
        Unsupported: the kernel or the call has something that the executor does not know. It is raised before anything
            runs, but for what only running shows, such as a matrix descriptor; the tensors are as they were.
        Fault: a check fired.
    """
    machine = load(program, programs, arguments, shared, outputs, counting)
    code = bind_all(machine)
    try:
        run = machine.run(code, limit)
        machine.memory.require_outputs()
        machine.memory.write_back()
    except (Fault, Unsupported) as error:
        instruction = program.instructions[min(machine.at, len(program.instructions) - 1)]
        error.kernel, error.line, error.source = program.name, instruction.line, instruction.source
        raise
    return run


def load(
    program: Program,
    programs: int,
    arguments: Sequence[Tensor | int | float],
    shared: int,
    outputs: Sequence[Tensor] = (),
    counting: bool = False,
) -> Machine:
    """Return a machine that has not begun; arguments as `execute` takes them. Its memory is a copy of the tensors."""
    if not isinstance(programs, int) or programs < 1:
        raise Unsupported(f"{program.name} must be started as programs in one dimension, got {programs!r}")
    memory = Global([a for a in arguments if isinstance(a, Tensor)], outputs)
    return Machine(program, programs, _parameters(program, arguments, memory), memory, shared, counting)


def _parameters(program: Program, arguments: Sequence[Tensor | int | float], memory: Global) -> dict[str, bytes]:
    """Return the bytes of the kernel's parameters."""
    missing = len(program.parameters) - len(arguments)
    sizes = list(program.parameters.values())
    if missing < 0 or any(size != 8 for size in sizes[len(arguments) :]):
        raise Unsupported(f"{program.name} takes {len(program.parameters)} parameters, got {len(arguments)} arguments")
    named = zip(program.parameters.items(), arguments, strict=False)
    values = [_encode(argument, name, size, memory) for (name, size), argument in named] + [bytes(8)] * missing
    return dict(zip(program.parameters, values, strict=True))


def _encode(argument: Tensor | int | float, name: str, size: int, memory: Global) -> bytes:
    """Return an argument as the bytes of the parameter `name`, of `size` bytes."""
    if size not in (1, 2, 4, 8):
        raise Unsupported(f"the parameter {name} of {size} bytes")
    if isinstance(argument, Tensor) and size == 8:
        return struct.pack("<Q", memory.address(argument))
    if isinstance(argument, float) and size == 4:
        return struct.pack("<f", argument)
    if isinstance(argument, int) and -(1 << 8 * size - 1) <= argument < 1 << 8 * size:
        return (argument % (1 << 8 * size)).to_bytes(size, "little")
    what = "a tensor" if isinstance(argument, Tensor) else repr(argument)
    raise Unsupported(f"{name}, of {size} bytes, cannot hold {what}")
