"""What commands that run long share: errors that name a setting, checkpoints, and Ctrl-C between two steps."""

from __future__ import annotations

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
    """What is wrong with an argument of these names is wrong with the option."""
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
    """Training was stopped by Ctrl-C, and its checkpoint is written."""


@contextmanager
def deferred_interrupt() -> Iterator[list[int]]:
    """Ctrl-C appends to the list instead of breaking into a step; a second one breaks in all the same."""
    caught: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    with handled(signal.SIGINT, handle):
        yield caught


@contextmanager
def handled(number: int, handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Let `handle` have a signal; in another thread than the main one, to which signals belong, nothing changes."""
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
    """A file to write beside `path`, which takes its place once whole: a process that dies before leaves the old one.

    Who may read it is what the umask says, as of other files.
    """
    temporary = path.with_name(path.name + ".tmp")
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
    """Write whole or not at all: a process that dies while writing leaves the checkpoint before."""
    with replacing(path) as temporary:
        torch.save(content, temporary)


def whole(x: Tensor) -> Tensor:
    """What `fully_shard` has cut into parts, put together: every process must call this. Others as they are."""
    # slow to import, and of no use to one process alone
    from torch.distributed.tensor import DTensor

    return x.full_tensor() if isinstance(x, DTensor) else x


def save_weights(module: nn.Module, path: Path) -> None:
    """Write a module's weights, shared ones once, as safetensors: whole or not at all, as a checkpoint."""
    from safetensors.torch import save_model

    with replacing(path) as temporary:
        save_model(module, str(temporary))


def load_checkpoint(path: Path, *, mapped: bool = False) -> dict[str, Any]:
    """A checkpoint's content, on the CPU; tensors and plain types only, so that no file can run code.

    Args:
        mapped: leave tensors on the disk until they are read.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    return content


def read_checkpoint(
    path: Path, command: str, parts: Collection[str], settings: Collection[str], *, mapped: bool = False
) -> dict[str, Any]:
    """The checkpoint that a command goes on from.

    Args:
        parts: what it must hold, besides "settings".
        settings: their names, all of them.

    Raises:
        SettingError: of `resume`: there is none, it is another file, damaged, or of another version.
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
