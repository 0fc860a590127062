"""The settings of a run of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...runs.device import usable_device
from ...runs.errors import SettingError
from ...runs.settings import absolute, check_least
from ..conversion_options import UPDATES

LEAST = {"steps": 1, "segment_len": 1, "segments": 1, "seed": 0, "samples": 1}
# may change between a run and its continuation: a checkpoint's weights do not depend on them, and its text is compared
FREE = ("text", "lengths", "samples", "device")
LENGTHS = (2**8, 2**10, 2**12, 2**14, 2**17, 2**20)


@dataclass(frozen=True)
class DemoSettings:
    """The settings of a run. The string beside a field is the help of its option.

    Raises:
        SettingError: naming the setting, what it must be, and what it was.
    """

    text: Annotated[str | None, "File of running text to hide passkeys in, UTF-8. Default: made-up words."] = None
    steps: Annotated[int, "Training steps."] = 1500
    segment_len: Annotated[int, "Tokens per segment."] = 32
    segments: Annotated[int, "Segments of the longest training text."] = 8
    update: Annotated[str, "Update rule of the memory: delta or linear."] = "delta"
    seed: Annotated[int, "Seed of weights, samples and made-up text."] = 0
    lengths: Annotated[tuple[int, ...], "Tokens of the texts tested. Default: 256,1K,4K,16K,128K,1M."] = LENGTHS
    samples: Annotated[int | None, "Texts tested per length and depth. Default: 40, of long texts fewer."] = None
    device: Annotated[str, "Where to run, such as cpu or cuda; so small a model needs no GPU."] = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", absolute(self.text))
        check_least(self, LEAST)
        if not self.lengths or min(self.lengths) < 1:
            raise SettingError("lengths", f"must be numbers from 1 on, at least one, got {list(self.lengths)}")
        if self.update not in UPDATES:
            raise SettingError("update", f"must be one of {', '.join(map(repr, UPDATES))}, got {self.update!r}")
        usable_device(self.device)

    def texts(self) -> list[int]:
        """Return the texts per depth of each length: `samples`, or 40 of at most 2**19 tokens in all, at least 2."""
        return [self.samples or max(2, min(40, 2**19 // length)) for length in self.lengths]


def doubled(trained: int, reach: int) -> tuple[int, ...]:
    """Return the trained length, doubled as often as `reach`, a multiple of it, allows.

    Raises:
        SettingError: of `reach`: it is below 1.
    """
    if reach < 1:
        raise SettingError("reach", f"must be at least 1, got {reach}")
    return tuple(trained * 2**i for i in range(reach.bit_length()))
