"""The settings of an adaptation. Each field's string is the help of its option."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from ...runs.errors import SettingError
from ...runs.settings import check_least
from ..conversion_options import layers_named


@dataclass(frozen=True)
class Adaptation:
    """Hold the settings by which a plain model is converted and fitted to its own full attention.

    Raises:
        SettingError: naming the option.
    """

    text: Annotated[str, "File of the text to fit to, UTF-8."]
    eval_text: Annotated[str | None, "File of another text to measure on. Default: the first tokens of --text."] = None
    segment_len: Annotated[int, "Tokens per segment."] = 256
    lookback: Annotated[int, "Whole segments that local attention sees before its own, 0 or 1."] = 1
    sinks: Annotated[int, "First tokens of a text that all others see."] = 4
    update: Annotated[str, "Update rule of the memory: delta or linear."] = "delta"
    maps: Annotated[bool, "Fit maps of the memory's queries and keys too, not its gates alone."] = True
    length: Annotated[int, "Tokens of each stretch of text that is fitted to; without --prompts."] = 4096
    rows: Annotated[int, "Stretches to fit to, and one more that is held out; without --prompts."] = 8
    steps: Annotated[int, "Steps of the optimizer for each layer, each on one stretch; without --prompts."] = 64
    gate_lr: Annotated[float, "Learning rate of the gates, which falls to 0 as a cosine."] = 5e-2
    map_lr: Annotated[float, "Learning rate of the maps, which falls in the same way."] = 3e-3
    own: Annotated[bool, "Fit each layer on what the fitted layers below it put out, not on the plain model's."] = True
    eval_tokens: Annotated[int, "Tokens to measure perplexity on; the model's positions must suffice for them."] = 4096
    skip: Annotated[int, "Tokens of each text to skip first, as those of a book's front matter."] = 0
    seed: Annotated[int, "Seed of the order of stretches, and of the prompts and their order."] = 0

    def __post_init__(self) -> None:
        check_least(
            self,
            {"segment_len": 2, "length": 2, "rows": 1, "steps": 0, "eval_tokens": 16, "seed": 0, "sinks": 0, "skip": 0},
        )
        for name in ("gate_lr", "map_lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingError(name, f"must be 0 or more, got {getattr(self, name)}")
        if self.length <= self.window:
            problem = f"must be more than the {self.window} tokens that local attention sees, got {self.length}"
            raise SettingError("length", problem)

    @property
    def window(self) -> int:
        """The number of tokens that local attention sees at most, without the sinks."""
        return (1 + self.lookback) * self.segment_len


@dataclass(frozen=True)
class Passkeys:
    """Hold the settings of the stage that fits to passkey prompts.

    Raises:
        SettingError: naming the option.
    """

    prompts: Annotated[int, "Passkey prompts to fit to in place of --text, which is then measured on alone."] = 0
    prompt_tokens: Annotated[int, "Tokens of each prompt."] = 640
    prompt_steps: Annotated[int, "Steps of the optimizer for each layer, each on a few prompts."] = 600
    stretch: Annotated[float, "Count the filler of a prompt up to so many times, as a longer prompt holds it."] = 2048.0
    attended: Annotated[float, "Fit the heads whose full attention is so much on passkeys."] = 0.3
    prompt_layers: Annotated[
        str | None, "Layers that get a memory, such as 10-20 or 0,5,-1. Default: all those of such heads."
    ] = None
    rounds: Annotated[int, "Rounds of training end to end after the fit, each on 64 new prompts; with a lookback."] = 0
    round_lr: Annotated[float, "Learning rate of the maps in these rounds, which falls to 0 as a cosine."] = 2e-3

    def __post_init__(self) -> None:
        check_least(self, {"prompts": 0, "prompt_tokens": 2, "prompt_steps": 0, "rounds": 0})
        if self.rounds and not self.prompts:
            raise SettingError("rounds", f"must be 0 without --prompts, got {self.rounds}")
        if not (math.isfinite(self.round_lr) and self.round_lr >= 0):
            raise SettingError("round_lr", f"must be 0 or more, got {self.round_lr}")
        if self.prompts == 1:
            raise SettingError("prompts", "must be 0 or at least 2, one of them held out, got 1")
        if not (math.isfinite(self.stretch) and self.stretch >= 1):
            raise SettingError("stretch", f"must be 1 or more, got {self.stretch}")
        if not 0 < self.attended <= 1:
            raise SettingError("attended", f"must be more than 0 and at most 1, got {self.attended}")
        if self.prompt_layers is not None:
            layers_named(self.prompt_layers, "prompt_layers")
