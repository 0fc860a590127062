"""The settings of a run of the demo."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ...runs.device import usable_device
from ...runs.errors import SettingError
from ...runs.settings import absolute, check_least

UPDATES = ("delta", "linear")
LEAST = {"steps": 1, "segment_len": 1, "segments": 1, "seed": 0, "reach": 1, "samples": 1}
# may change between a run and its continuation: a checkpoint's weights do not depend on them, and its text is compared
FREE = ("text", "reach", "samples", "device")


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
    reach: Annotated[int, "Length of the longest text tested, in trained lengths."] = 64
    samples: Annotated[int, "Texts tested per length and depth."] = 40
    device: Annotated[str, "Where to run, such as cpu or cuda; so small a model needs no GPU."] = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", absolute(self.text))
        check_least(self, LEAST)
        if self.update not in UPDATES:
            raise SettingError("update", f"must be one of {', '.join(map(repr, UPDATES))}, got {self.update!r}")
        usable_device(self.device)

    def lengths(self) -> list[int]:
        """Return the lengths of the evaluation: the trained length, doubled as often as `reach` allows."""
        trained = self.segments * self.segment_len
        return [trained * 2**i for i in range(self.reach.bit_length())]
