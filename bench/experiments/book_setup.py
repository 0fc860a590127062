"""What an experiment on a book is of: sizes and recipe, its text, its command, and the runs that it goes on with."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ...runs.checkpoint import SettingError
from ..speed.machine import commit, device_facts

AnySetup = TypeVar("AnySetup", bound="Setup")


@dataclass(frozen=True)
class Setup:
    """Sizes and recipe, the same for every run.

    row: bytes of a training row; `reach` times as many are read in the second evaluation.
    held_out: share of the book, its end, that is evaluated on and never trained on.
    warm_up, floor: steps of linear warm-up; the share of the rates that the cosine ends at.

    Raises:
        SettingError: naming what cannot be.
    """

    MAY_BE_ZERO: ClassVar[tuple[str, ...]] = ()

    segment_len: int = 16
    row: int = 512
    batch: int = 4
    steps: int = 1800
    seeds: int = 5
    width: int = 64
    layers: int = 2
    heads: int = 2
    hidden: int = 176
    lr: float = 1e-2
    gate_lr: float = 1e-2
    weight_decay: float = 0.1
    warm_up: int = 50
    floor: float = 0.1
    clip: float = 1.0
    held_out: float = 0.1
    reach: int = 4

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in self.MAY_BE_ZERO and isinstance(field.default, int) and value < 1:
                raise SettingError(field.name, f"must be at least 1, got {value}")
            if not 0 <= value < math.inf:
                raise SettingError(field.name, f"must not be negative, and finite, got {value}")
        for name in ("lr", "gate_lr", "clip"):
            if getattr(self, name) == 0:
                raise SettingError(name, f"must be positive, got {getattr(self, name)}")
        if self.floor > 1:
            raise SettingError("floor", f"must be at most 1, got {self.floor}")
        if not 0 < self.held_out < 1:
            raise SettingError("held_out", f"must be between 0 and 1, got {self.held_out}")
        if self.row % self.segment_len:
            raise SettingError("row", f"must be a multiple of segment_len, {self.segment_len}, got {self.row}")
        # half of a head's width is rotated with the other
        if self.width % (2 * self.heads):
            raise SettingError("width", f"must be a multiple of {2 * self.heads}, twice the heads, got {self.width}")

    def check(self, text: Tensor) -> None:
        """
        Raises:
            SettingError: of `text`, which is too short for a row to train on, or to evaluate on.
        """
        cut = self.cut(text)
        for part, held, least in (
            ("training", cut, self.row + 1),
            ("evaluation", len(text) - cut, self.row * self.reach + 1),
        ):
            if held < least:
                raise SettingError("text", f"must have at least {least} bytes for {part}, got {held} of {len(text)}")

    def cut(self, text: Tensor) -> int:
        """Bytes that are trained on."""
        return round(len(text) * (1 - self.held_out))

    def rate(self, step: int) -> float:
        """Share of the learning rates."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min((step + 1) / self.warm_up, self.floor + (1 - self.floor) * cosine)


def made_by() -> dict[str, Any]:
    """The commit, whether files differ from it, and the processor; earlier runs may lack it."""
    capability = torch.backends.cpu.get_cpu_capability()
    return commit() | device_facts(torch.device("cpu")) | {"processor": processor(), "capability": capability}


def processor() -> str | None:
    """Its maker's name for it; None where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), None)


def text_of(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """A file's bytes, uint8, and what tells it from others."""
    content = path.read_bytes()
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return torch.frombuffer(bytearray(content), dtype=torch.uint8), about


def earlier(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """The figures to go on with; there may be more seeds than before.

    Raises:
        SettingError: naming what differs, or of `out` where they are of something else.
    """
    if not path.is_file():
        return about | {"runs": []}
    try:
        figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        before, text, _ = figures["setup"], figures["text"], figures["runs"]
        before["seeds"] = about["setup"]["seeds"]
    except (ValueError, KeyError, TypeError):
        raise SettingError("out", f"must hold figures of this command or none; {path} is damaged, or other's") from None
    if before.keys() != about["setup"].keys():
        raise SettingError("out", f"must be another folder: {path} is of another version, with other settings")
    for name, value in about["setup"].items():
        if before[name] != value:
            raise SettingError(name, f"must be {before[name]} as in {path}, got {value}: or choose another folder")
    if text != about["text"]:
        raise SettingError("text", f"must be the one of {path}, which is another: or choose another folder")
    return figures


def command(
    setup_type: type[AnySetup],
    experiment: Callable[[AnySetup, Path, Path], object],
    name: str,
    about: str,
    arguments: Sequence[str] | None,
) -> int:
    """An experiment as a command whose options are the setup's fields.

    Returns:
        The exit status: 2 where a setting cannot be, or the folder holds another experiment; 130 where interrupted.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--text", type=Path, required=True, help="a book, any encoding: it is read as bytes")
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures and the picture")
    for field in fields(setup_type):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    given = vars(parser.parse_args(arguments))
    path, out = given.pop("text"), given.pop("out")
    try:
        experiment(setup_type(**given), path, out)
    except SettingError as error:
        sys.stderr.write(f"{name}: --{error.name.replace('_', '-')} {error.problem}\n")
        return 2
    except (OSError, ValueError) as error:
        sys.stderr.write(f"{name}: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped; the same command goes on after the last whole run\n")
        return 130
    return 0
