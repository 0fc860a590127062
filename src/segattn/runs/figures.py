"""The JSON of an evaluation: written whole or not at all, and gone on with when it is of the same run."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from .checkpoint import SettingError


def versions() -> dict[str, Any]:
    """Of what the figures come from."""
    names = ("segattn", "torch", "transformers")
    own = {name: importlib.metadata.version(name) for name in names}
    return own | {"python": platform.python_version(), "threads": torch.get_num_threads()}


def spoken(tokens: int) -> str:
    """A length as it is spoken of: 32K, 1M."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{letter}"
    return f"{tokens:,}"


def write_figures(path: Path, figures: Mapping[str, Any]) -> None:
    """Replace the file by the new figures; what was there stays if this is cut short."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    beside.replace(path)


def make_folder(folder: Path) -> None:
    """Make it, and see that it can be written.

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


def prepare(path: Path, resume: bool) -> None:
    """Make the folder of the file, see that it can be written, and that earlier figures are not lost.

    Raises:
        SettingError: of `out`.
    """
    make_folder(path.parent)
    if path.exists() and not resume:
        raise SettingError(
            "out",
            f"must not hold figures of an earlier run, got {str(path.parent)!r} with {path.name}: go on with them by "
            "--resume, choose another folder, or delete them",
        )


def earlier(
    path: Path, resume: bool, settings: Mapping[str, Any], model: Mapping[str, Any], free: Sequence[str]
) -> dict[str, Any]:
    """The figures to go on with; without `resume`, or where there are none yet, nothing.

    Args:
        settings, model: of this run; the same as of the earlier one, but for the settings that are `free`.

    Raises:
        SettingError: naming what differs.
    """
    if not resume or not path.is_file():
        return {}
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before, its_model = figures["settings"], figures["model"]
        before.keys()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise SettingError(
            "resume", f"needs figures of this command; {str(path)!r} is another file, or damaged"
        ) from None
    for name, value in settings.items():
        if name not in free and before.get(name) != value:
            option = name.removesuffix("_sha256")
            raise SettingError(option, f"must be the earlier run's with --resume, {before.get(name)!r}, got {value!r}")
    for name in ("conversion", "dtype", "fingerprint"):
        if its_model.get(name) != model[name]:
            raise SettingError(
                "model",
                f"must be the earlier run's with --resume, of {name} {its_model.get(name)}, got one of {model[name]}",
            )
    return figures


def read_text(path: str | Path) -> str:
    """A file of running text.

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
