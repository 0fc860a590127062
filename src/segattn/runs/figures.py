"""The figures of a run: a JSON that is written whole or not at all, and resumed where it is of the same run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from .checkpoint import replacing
from .errors import SettingError


def versions() -> dict[str, Any]:
    """Return the versions of the software that figures come from, and the number of CPU threads."""
    names = ("segattn", "torch", "transformers")
    installed = {name: importlib.metadata.version(name) for name in names if find_spec(name)}
    return installed | {"python": platform.python_version(), "threads": torch.get_num_threads()}


def format_length(tokens: int) -> str:
    """Write a length as short as it can be exactly: 32K for 32 · 1024, 1M for 1024², otherwise 1,500."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Replace the file by new figures; what was there stays if this is cut short."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def make_folder(folder: Path) -> None:
    """Make a folder, and check that it can be written.

    Raises:
        SettingError: of `out`.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise SettingError(
            "out", f"must be a folder that can be written, got {str(folder)!r} ({error.strerror})"
        ) from None


def prepare(*paths: Path, resume: bool) -> None:
    """Make the folder of files, and check that it can be written and that no earlier run would be lost.

    Raises:
        SettingError: of `out`.
    """
    folder, kept = paths[0].parent, [path.name for path in paths if path.exists()]
    make_folder(folder)
    if kept and not resume:
        raise SettingError(
            "out",
            f"must not hold figures of an earlier run, got {str(folder)!r} with {kept[0]}: go on with them by "
            "--resume, choose another folder, or delete them",
        )


@contextmanager
def earlier_figures(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the figures to go on with, to be taken apart in the block.

    Raises:
        SettingError: of `resume`: the file is none, or has other parts than the block expects.
    """
    try:
        yield json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        problem = f"needs figures of this command; {str(path)!r} is another file, or damaged"
        raise SettingError("resume", problem) from None


def read_text(path: str | Path) -> str:
    """Read a file of running text.

    Raises:
        SettingError: of `text`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingError("text", f"must be a file that can be read, got {str(path)!r} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise SettingError("text", f"must be a file of UTF-8 text, got {str(path)!r}") from None
    if not text.strip():
        raise SettingError("text", f"must be a file of running text, got {str(path)!r}, which is empty")
    return text
