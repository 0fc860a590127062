"""The processes of a run: how they meet, the mesh that they form, and what they decide together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...runs.device import usable_device
from ...runs.errors import SettingError
from ...runs.interrupts import deferred_interrupt, handled

Result = TypeVar("Result")
# environment variables that torchrun sets
MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(device: str | None, timeout: float) -> Iterator[torch.device]:
    """Join the default process group, that of torchrun or of this process alone; yield the device of this process.

    Args:
        device: in a single process any that PyTorch can use here, otherwise "cpu" or "cuda"; None: GPUs where there
            are any.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        SettingError: of `device` or `timeout`.
    """
    if not timeout > 0:
        raise SettingError("timeout", f"must be more than 0 seconds, got {timeout}")
    patience = timedelta(seconds=timeout)
    if all(name in os.environ for name in MEETING):
        place = _device(device, several=int(os.environ["WORLD_SIZE"]) > 1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo", timeout=patience)
    else:
        place, alone = _device(device, several=False), dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=alone, rank=0, world_size=1, timeout=patience)
    try:
        yield place
    finally:
        # processes that have ended do not answer
        if dist.get_world_size() == 1 or not isinstance(sys.exc_info()[1], RuntimeError):
            dist.destroy_process_group()


def _device(device: str | None, several: bool) -> torch.device:
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if several and kind not in ("cpu", "cuda"):
        raise SettingError("device", f"must be cpu or cuda for several processes, got {kind!r}")
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    usable_device(kind)
    if kind.startswith("cuda"):
        torch.cuda.set_device(kind)
    return torch.device(kind)


def is_first() -> bool:
    """Return whether this process is the one that reads, writes and speaks."""
    return dist.get_rank() == 0


def mesh_of(device: torch.device, sequence_ranks: int | None) -> DeviceMesh:
    """Return a mesh of all processes, ("dp", "sp"): rows of ranks that share texts.

    Raises:
        SettingError: of `sequence_ranks`.
    """
    world = dist.get_world_size()
    size = sequence_ranks or world
    if world % size:
        raise SettingError("sequence_ranks", f"must divide the number of processes, {world}, got {size}")
    kind = device.type if world > 1 else "cpu"
    return init_device_mesh(kind, (world // size, size), mesh_dim_names=("dp", "sp"))


def agreed(call: Callable[[], Result]) -> Result:
    """Return what `call` returns, unless it fails on some rank.

    Raises:
        SettingError: on every rank, that of the first one which raised it.
    """
    result, own_problem = _tried(call)
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, own_problem)
    for problem in problems:
        if problem is not None:
            raise SettingError(*problem)
    return result  # type: ignore[return-value]


def shared(read: Callable[[], Result]) -> Result:
    """Return on every rank what `read` returns on the first, where alone it is called.

    Raises:
        SettingError: on every rank, where it fails on the first.
    """
    answer: list[Any] = [*_tried(read)] if is_first() else [None, None]
    dist.broadcast_object_list(answer)
    result, problem = answer
    if problem is not None:
        raise SettingError(*problem)
    return result


def _tried(call: Callable[[], Result]) -> tuple[Result | None, tuple[str, str] | None]:
    """Return the result of a call, or the name and the problem of the setting that it refuses."""
    try:
        return call(), None
    except SettingError as error:
        return None, (error.name, error.problem)


def largest(*numbers: float) -> tuple[float, ...]:
    """Return the largest of each number over all ranks."""
    reduced = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    dist.all_reduce(reduced, dist.ReduceOp.MAX)
    return tuple(reduced.tolist())


@contextmanager
def deferred_stop() -> Iterator[list[int]]:
    """Let Ctrl-C and SIGTERM append to a list instead of breaking into a step; a second Ctrl-C breaks in."""
    with deferred_interrupt() as caught, handled(signal.SIGTERM, lambda number, _: caught.append(number)):
        yield caught
