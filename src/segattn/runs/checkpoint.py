"""Files written whole or not at all, checkpoints and weights among them, and checkpoints read again."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SettingError

# what `torch.load` raises for files that are none of its own
DAMAGED = (
    *(RuntimeError, EOFError, LookupError, OSError, TypeError, ValueError),
    *(UnpicklingError, struct.error),
)


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
    except DAMAGED:
        raise damaged from None
    if not isinstance(content, dict) or not {"settings", *parts} <= content.keys():
        raise damaged
    if content["settings"].keys() != set(settings):
        raise SettingError("resume", f"needs a checkpoint of this version, and {str(path)!r} has other settings")
    return content
