"""The sizes and the recipe of an experiment on a book, and its text."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ....runs.errors import SettingError


@dataclass(frozen=True)
class Setup:
    """Sizes and recipe, the same for every run.

    row: Bytes of a training row; `reach` times as many are read in the second evaluation.
    held_out: Share of the book, its end, that is evaluated on and never trained on.
    warm_up, floor: Steps of linear warm-up; the share of the rates that the cosine ends at.

    Raises:
        SettingError: Naming an impossible setting.
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
            if isinstance(value, tuple):
                continue
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
        """Check that the text is long enough.

        Raises:
            SettingError: Of `text`: it is too short for a row to train on, or to evaluate on.
        """
        cut = self.cut(text)
        for part, held, least in (
            ("training", cut, self.row + 1),
            ("evaluation", len(text) - cut, self.row * self.reach + 1),
        ):
            if held < least:
                raise SettingError("text", f"must have at least {least} bytes for {part}, got {held} of {len(text)}")

    def cut(self, text: Tensor) -> int:
        """Return the number of bytes that are trained on."""
        return round(len(text) * (1 - self.held_out))

    def rate(self, step: int) -> float:
        """Return the share of the learning rates at a step, from 0."""
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return min((step + 1) / self.warm_up, self.floor + (1 - self.floor) * cosine)


def text_of(path: Path) -> tuple[Tensor, dict[str, Any]]:
    """Return a file's bytes, uint8, and what tells it from others."""
    content = path.read_bytes()
    about = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    return torch.frombuffer(bytearray(content), dtype=torch.uint8), about
