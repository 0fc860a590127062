"""Run the package's launches on a CPU: each is compiled for a GPU that is not here, and its PTX executed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ...kernels.triton.configs import TARGETS, Target
from ...kernels.triton.launch import Launch, constants, redirecting
from ..compiled.ahead_of_time import build, signature
from .machine import Run, execute
from .ptx import Program, parse

# of the targets that kernels are compiled for: those whose code is PTX
EMULATED = tuple(name for name in TARGETS if name.startswith("sm_"))


@dataclass(frozen=True)
class Executed:
    """A launch that has run on the CPU."""

    kernel: str
    programs: int
    compiling: float  # seconds, near 0 where Triton's cache had the code
    executing: float  # seconds
    run: Run


@contextmanager
def emulating(target: Target) -> Iterator[list[Executed]]:
    """Execute the launches inside, which take tensors on the CPU, as they would run on `target`; list them.

    New tensors begin as NaN, so that what a kernel forgets to write shows.

    Raises:
        CompileError, Unsupported: of a launch that cannot be compiled, or not be executed.
        Fault: of a launch that does what it must not; from the `with` block.
    """
    executed: list[Executed] = []
    with _poisoned(), redirecting(target, lambda launch: executed.append(_execute(launch, target))):
        yield executed


def _execute(launch: Launch, target: Target) -> Executed:
    """Compile and execute one launch."""
    begin = time.perf_counter()
    compiled = build(launch, target)
    program = _parsed(compiled.asm["ptx"])
    built = time.perf_counter()
    run = execute(program, launch.programs, arguments_of(launch), compiled.metadata.shared)
    return Executed(launch.kernel.__name__, launch.programs, built - begin, time.perf_counter() - built, run)


@cache
def _parsed(text: str) -> Program:
    """Parse the PTX of a kernel, once for each process."""
    return parse(text)


def arguments_of(launch: Launch) -> list[Tensor | int | float]:
    """Return the arguments that are not compiled in, those in tuples one by one: what the code's parameters are."""
    values = constants(launch.kernel, launch.tile) | launch.arguments
    types = signature(launch).types
    return [leaf for name in launch.kernel.arg_names for leaf in _leaves(types[name], values[name])]


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
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = before[1]
