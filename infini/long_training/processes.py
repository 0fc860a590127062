"""The processes of a run: how they meet, the mesh that they form, and what they decide together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ...runs.checkpoint import SettingError, deferred_interrupt, handled

Result = TypeVar("Result")
# what torchrun sets
MEETING = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@contextmanager
def joined(device: str | None, timeout: float) -> Iterator[torch.device]:
    """The default process group: that of torchrun, or this process alone; yields the device of this one.

    Args:
        device: "cpu", "cuda", or None: GPUs where there are any.
        timeout: seconds after which a process that does not answer is given up.

    Raises:
        SettingError: of `device` or `timeout`.
    """
    if not timeout > 0:
        raise SettingError("timeout", f"must be more than 0 seconds, got {timeout}")
    place = _device(device)
    backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
    patience = timedelta(seconds=timeout)
    if all(name in os.environ for name in MEETING):
        dist.init_process_group(backend, timeout=patience)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=patience)
    try:
        yield place
    finally:
        # of others that have ended there is no leave to take
        if dist.get_world_size() == 1 or not isinstance(sys.exc_info()[1], RuntimeError):
            dist.destroy_process_group()


def _device(device: str | None) -> torch.device:
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise SettingError("device", f"must be cpu or cuda, got {device!r}")
    if kind == "cpu":
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise SettingError(
            "device", f"must have a GPU for every process of this machine, got {count} GPUs: start fewer"
        )
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def is_first() -> bool:
    """Whether this process is the one that reads, writes and speaks."""
    return dist.get_rank() == 0


def mesh_of(device: torch.device, sequence_ranks: int | None) -> DeviceMesh:
    """All processes, ("dp", "sp"): rows of ranks that share texts.

    Raises:
        SettingError: of `sequence_ranks`.
    """
    world = dist.get_world_size()
    size = sequence_ranks or world
    if world % size:
        raise SettingError("sequence_ranks", f"must divide the number of processes, {world}, got {size}")
    return init_device_mesh(device.type, (world // size, size), mesh_dim_names=("dp", "sp"))


def agreed(call: Callable[[], Result]) -> Result:
    """What `call` returns, unless it fails on some rank.

    Raises:
        SettingError: on every rank, that of the first one which raised it.
    """
    problem = result = None
    try:
        result = call()
    except SettingError as error:
        problem = error.name, error.problem
    problems: list[tuple[str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in problems:
        if found is not None:
            raise SettingError(*found)
    return result  # type: ignore[return-value]


def largest(*numbers: float) -> tuple[float, ...]:
    """Each number's largest over all ranks."""
    told = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return tuple(told.tolist())


@contextmanager
def deferred_stop() -> Iterator[list[int]]:
    """Ctrl-C and SIGTERM append to the list instead of breaking into a step; a second Ctrl-C breaks in."""
    with deferred_interrupt() as caught, handled(signal.SIGTERM, lambda number, _: caught.append(number)):
        yield caught
