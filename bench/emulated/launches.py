"""Run the package's launches on a CPU: each is compiled for a GPU that is not here, and its PTX executed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels.triton.configs import TARGETS, Target
from ...kernels.triton.launch import Launch, constants, redirecting
from ...kernels.triton.tiles import Tokens
from ..compiled.ahead_of_time import build, signature
from ..compiled.rules import ATTENTION
from .counts import Counts, count
from .executor import Executable, execute
from .kept import Kept, copies
from .ptx import Program, parse

# of the targets that kernels are compiled for: those whose code is PTX
EMULATED = tuple(name for name in TARGETS if name.startswith("sm_"))
# arguments that kernels write whole, unless their memory held zeros or a part of the sum before
OUTPUTS = ("out", "after", "dq", "dk", "dv", "memory_delta")


@dataclass(frozen=True)
class Launched:
    """A launch that was executed; kernel and programs alone of one that was not to its end."""

    kernel: str
    programs: int
    compiling: float = 0.0  # seconds, near 0 where Triton's cache had the code
    executing: float = 0.0  # seconds
    counts: Counts | None = None  # where they were asked for


@contextmanager
def emulating(
    target: Target,
    *,
    counting: bool = False,
    kept: Path | None = None,
    before: Callable[[Executable], None] | None = None,
) -> Iterator[list[Launched]]:
    """Execute the launches inside, which take tensors on the CPU, as they would run on `target`; list them.

    New tensors begin as NaN, so that what a kernel forgets to write shows.

    Args:
        target: a GPU whose code is PTX.
        counting: whether what each launch does is counted.
        kept: a folder, as `Kept` says, of launches that need not be executed again; those that are counted are.
        before: is called with each launch before it is executed.

    Raises:
        CompileError, Unsupported: of a launch that cannot be compiled, or not be executed; from the `with` block.
        Fault: of a launch that does what it must not; from the `with` block.
    """
    launches: list[Launched] = []
    store = None if kept is None or counting else Kept(kept)

    def take(launch: Launch) -> None:
        launches.append(Launched(launch.kernel.__name__, launch.programs))
        launches[-1] = _execute(launch, target, counting, store, before)

    with _poisoned(), redirecting(target, take):
        yield launches


def _execute(
    launch: Launch, target: Target, counting: bool, kept: Kept | None, before: Callable[[Executable], None] | None
) -> Launched:
    """Compile one launch, and execute it unless it is kept."""
    begin = time.perf_counter()
    made = compiled(launch, target)
    if before is not None:
        before(made)
    built = time.perf_counter()
    place = None if kept is None else kept.place(made)
    if kept is not None and place is not None and (seconds := kept.take(place, made)) is not None:
        return Launched(made.kernel, made.programs, built - begin, seconds)
    old = [] if kept is None else copies(made)
    run = execute(made.program, made.programs, made.arguments, made.shared, outputs=made.outputs, counting=counting)
    seconds = time.perf_counter() - built
    if kept is not None and place is not None:
        kept.add(place, made, old, seconds)
    pairs = launch.tile.BLOCK_M * launch.tile.BLOCK_N if made.kernel in ATTENTION else None
    counts = count(run, made.programs, made.arguments, pairs) if counting else None
    return Launched(made.kernel, made.programs, built - begin, seconds, counts)


def compiled(launch: Launch, target: Target) -> Executable:
    """Compile a launch, or take the result from Triton's cache."""
    made = build(launch, target)
    name, program, shared = launch.kernel.__name__, _parsed(made.asm["ptx"]), made.metadata.shared
    return Executable(name, program, launch.programs, arguments_of(launch), shared, outputs_of(launch))


@cache
def _parsed(text: str) -> Program:
    """Parse the PTX of a kernel, once for each process."""
    return parse(text)


def arguments_of(launch: Launch) -> list[Tensor | int | float]:
    """Return the arguments that are not compiled in, those in tuples one by one: what the code's parameters are."""
    values = constants(launch.kernel, launch.tile) | launch.arguments
    types = signature(launch).types
    return [leaf for name in launch.kernel.arg_names for leaf in _leaves(types[name], values[name])]


def outputs_of(launch: Launch) -> list[Tensor]:
    """Return the tensors of which the kernel must write every element: `OUTPUTS` that hold nothing yet."""
    values = (launch.arguments.get(name) for name in OUTPUTS)
    tensors = (value.pointer if isinstance(value, Tokens) else value for value in values)
    return [x for x in tensors if x is not None and x.numel() and bool(x.isnan().all())]


def _leaves(kind: Any, value: Any) -> Iterator[Tensor | int | float]:
    """Yield the parts of a value whose type is not a constant's."""
    if isinstance(kind, tuple):
        for inner, part in zip(kind, value, strict=True):
            yield from _leaves(inner, part)
    elif kind != "constexpr":
        yield value


@contextmanager
def _poisoned() -> Iterator[None]:
    """Let PyTorch fill new memory with NaN, as it does under deterministic algorithms."""
    memory: Any = torch.utils.deterministic
    filled, strict = memory.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn_only)
        memory.fill_uninitialized_memory = filled
