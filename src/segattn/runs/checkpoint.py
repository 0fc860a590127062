"""What long runs share: errors that name a setting, checkpoints, files written whole, and Ctrl-C between two steps."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


class SettingError(ValueError):
    """A setting that cannot be: its name, what it must be, and what it was."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


@contextmanager
def named(**options: str) -> Iterator[None]:
    """Turn a `ValueError` that begins with an argument's name into a `SettingError` of the option: argument=option."""
    try:
        yield
    except SettingError:
        raise
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        if name not in options:
            raise
        raise SettingError(options[name], problem) from None


class InterruptedRunError(Exception):
    """A run that Ctrl-C stopped, once its checkpoint is written."""


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Yield a list that Ctrl-C appends to, instead of breaking into a step; a second one breaks in all the same."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    with handled(signal.SIGINT, handle):
        yield caught


@contextmanager
def handled(number: int, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handle` receive a signal. Outside the main thread, to which signals belong, nothing changes."""
    try:
        previous = signal.signal(number, handle)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(number, previous)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file beside `path` to write, which then takes its place: a process that dies before leaves the old one.

    Each process writes a file of its own. Who may read it is what the umask says, as of other files.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.unlink(missing_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        # safetensors makes its files for their owner alone
        temporary.chmod(mode)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a checkpoint whole, or leave the one before."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def whole(x: Tensor) -> Tensor:
    """Put together a tensor that `fully_shard` has cut into parts, which every process must call; return others."""
    # slow to import, and of no use to one process alone
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights as safetensors, shared ones once; whole, or leave the file before."""
    from safetensors.torch import save_model

    with replacing(path) as temporary:
        save_model(module, str(temporary))


def load_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint to the CPU; tensors and plain types only, so that no file can run code.

    Args:
        mapped: leave tensors on the disk until they are read.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return content


def read_checkpoint(
    path: Path, command: str, parts: Collection[str], settings: Collection[str], *, mapped: bool = False
) -> dict[str, Any]:
    """Read the checkpoint that a command resumes.

    Args:
        path: of the checkpoint.
        command: whose checkpoint it must be, for messages.
        parts: the entries that it must hold, besides "settings".
        settings: the names of all settings.
        mapped: leave tensors on the disk until they are read.

    Raises:
        SettingError: of `resume`: there is no file, or it is another one, damaged, or of another version.
    """
    if not path.is_file():
        raise SettingError("resume", f"needs a checkpoint in the output folder, and there is no {str(path)!r}")
    damaged = SettingError("resume", f"needs a checkpoint of {command}; {str(path)!r} is another file, or damaged")
    try:
        content = load_checkpoint(path, mapped=mapped)
    except (RuntimeError, EOFError, KeyError, OSError, ValueError, UnpicklingError):
        raise damaged from None
    if not isinstance(content, dict) or not {"settings", *parts} <= content.keys():
        raise damaged
    if content["settings"].keys() != set(settings):
        raise SettingError("resume", f"needs a checkpoint of this version, and {str(path)!r} has other settings")
    return content
