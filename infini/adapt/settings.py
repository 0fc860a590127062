"""The settings of an adaptation. Each field's string is the help of its option."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real
from typing import Annotated

from ...runs.errors import SettingError
from ...runs.settings import check_least, check_several
from ..conversion_options import ConversionOptions

# what one of the two fits reads alone: that to running text, and that to prompts
OF_TEXT: tuple[str, ...] = ("length", "rows", "steps")
OF_PROMPTS: tuple[str, ...] = (
    "prompt_tokens",
    "prompt_steps",
    "stretch",
    "attended",
    "ask",
    "ask_depths",
    "ask_samples",
)
# what is None → its value in the fit to text, and in that to prompts: as each was measured
OF_FIT = {"segment_len": (256, 128), "gate_lr": (5e-2, 1e-2)}


@dataclass(frozen=True)
class Adaptation(ConversionOptions):
    """Hold the settings by which a plain model is converted and fitted to its own full attention.

    Raises:
        SettingError: naming the option.
    """

    text: Annotated[str, "File of the text to fit to, UTF-8."]
    eval_text: Annotated[str | None, "File of another text to measure on. Default: the first tokens of --text."] = None
    prompts: Annotated[
        int, "Passkey prompts to fit to, such as 48, in place of --text, which is then measured on alone."
    ] = 0
    length: Annotated[int, "Tokens of each stretch of text that is fitted to; without --prompts."] = 4096
    rows: Annotated[int, "Stretches to fit to, and one more that is held out; without --prompts."] = 8
    steps: Annotated[int, "Steps of the optimizer for each layer, each on one stretch; without --prompts."] = 64
    gate_lr: Annotated[
        float,
        "Learning rate of the gates in the fit, which falls to 0 as a cosine; not of --rounds. Default: 0.05, with "
        "--prompts 0.01.",
    ] = None  # type: ignore[assignment]
    map_lr: Annotated[float, "Learning rate of the maps in the fit, which falls in the same way; not of --rounds."] = (
        3e-3
    )
    own: Annotated[bool, "Fit each layer on what the fitted layers below it put out, not on the plain model's."] = True
    rounds: Annotated[
        int,
        "Rounds of training end to end after the fit: each on 10 new stretches of --text, by what full attention "
        "predicts, or with --prompts, and a lookback, on 64 new prompts by their answers.",
    ] = 0
    round_lr: Annotated[
        float,
        "Learning rate of the maps' matrices in these rounds, of biases three times and of gates ten times it; it "
        "rises over the first round, and falls to 0 as a cosine.",
    ] = 2e-3
    eval_tokens: Annotated[int, "Tokens to measure perplexity on; the model's positions must suffice for them."] = 4096
    skip: Annotated[int, "Tokens of each text to skip first, as those of a book's front matter."] = 0
    seed: Annotated[int, "Seed of the order of stretches, and of the prompts and their order."] = 0
    _: KW_ONLY
    # options of conversion that have defaults of their own here
    segment_len: Annotated[int, "Tokens per segment. Default: 256, with --prompts 128."] = None  # type: ignore[assignment]
    lookback: Annotated[int, "Whole segments that a token sees before its own: 0 or 1."] = 1
    sinks: Annotated[int, "First tokens of a text that all later ones see."] = 4
    gate_init: Annotated[
        float | None, "Gates of the untrained model that is measured too; the fit sets its own. Default: -4."
    ] = None
    memory_maps: Annotated[bool, "Give the memory learnt maps of its queries and keys.", "--maps/--no-maps"] = True
    memory_layers: Annotated[
        str | None,
        "Layers with a memory, such as 10-20 or 0,5,-1; the others see segment, lookback and sinks. Default: all; with "
        "--prompts those of heads that look passkeys up.",
        "--prompt-layers",
    ] = None

    def __post_init__(self) -> None:
        for name, defaults in OF_FIT.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, defaults[bool(self.prompts)])
        super().__post_init__()
        least = {"segment_len": 2, "length": 2, "rows": 1, "steps": 0, "eval_tokens": 16, "seed": 0, "skip": 0}
        check_least(self, least | {"prompts": 0, "rounds": 0})
        _check_rates(self, "gate_lr", "map_lr", "round_lr")
        if self.prompts == 1:
            raise SettingError("prompts", "must be 0 or at least 2, one of them held out, got 1")
        if self.lookback not in (0, 1):
            raise SettingError("lookback", f"must be 0 or 1, got {self.lookback!r}")

    @property
    def window(self) -> int:
        """The number of tokens that local attention sees at most, without the sinks."""
        return (1 + self.lookback) * self.segment_len


@dataclass(frozen=True)
class Passkeys:
    """Hold the settings of a fit to passkey prompts, and of the passkeys that are asked at last.

    Raises:
        SettingError: naming the option.
    """

    prompt_tokens: Annotated[int, "Tokens of each prompt."] = 640
    prompt_steps: Annotated[int, "Steps of the optimizer for each layer, each on a few prompts."] = 600
    stretch: Annotated[float, "Count the filler of a prompt up to so many times, as a longer prompt holds it."] = 2048.0
    attended: Annotated[float, "Fit the heads whose full attention is so much on passkeys."] = 0.15
    ask: Annotated[
        tuple[int, ...],
        "Tokens of passkey prompts that are asked with --prompts, such as 1500,32K, or none: of full attention as far "
        "as the model's positions go, the window without a memory, and the adapted model.",
    ] = (1500, 6000)
    ask_depths: Annotated[
        tuple[float, ...], "Places of the passkeys that are asked: start, middle, end, or shares from 0 to 1."
    ] = (0.1, 0.5, 0.9)
    ask_samples: Annotated[int, "Prompts asked per length and place."] = 5

    def __post_init__(self) -> None:
        check_least(self, {"prompt_tokens": 2, "prompt_steps": 0, "ask_samples": 1})
        check_several(self, {"ask_depths": Real} | ({"ask": Integral} if self.ask else {}))
        if not (_is_finite(self.stretch) and self.stretch >= 1):
            raise SettingError("stretch", f"must be 1 or more, got {self.stretch!r}")
        if not (_is_finite(self.attended) and 0 < self.attended <= 1):
            raise SettingError("attended", f"must be more than 0 and at most 1, got {self.attended!r}")


def check_together(adaptation: Adaptation, passkeys: Passkeys) -> None:
    """Check that no setting is changed that only the other of the two fits reads, and what takes both to check.

    Raises:
        SettingError: naming the option.
    """
    ignored: Adaptation | Passkeys = adaptation if adaptation.prompts else passkeys
    if adaptation.prompts:
        names, goes, remedy = OF_TEXT, "goes without --prompts", "leave one of the two out"
    else:
        names, goes, remedy = OF_PROMPTS, "goes with --prompts", "give both, or leave it out"
    for name in names:
        value = getattr(ignored, name)
        if value != getattr(type(ignored), name):
            got = (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else repr(value)
            raise SettingError(name, f"{goes}, got {got}: {remedy}")
    for name in () if adaptation.prompts else ("length", "eval_tokens"):
        if (value := getattr(adaptation, name)) <= adaptation.window:
            problem = f"must be more than the {adaptation.window} tokens that local attention sees, got {value}"
            raise SettingError(name, problem)
    if adaptation.prompts and adaptation.rounds and not adaptation.lookback:
        raise SettingError(
            "rounds", f"must be 0 with --prompts and --lookback 0, got {adaptation.rounds}: give a lookback"
        )


def _check_rates(settings: object, *names: str) -> None:
    """Check that learning rates are finite, and 0 or more."""
    for name in names:
        value = getattr(settings, name)
        if not (_is_finite(value) and value >= 0):
            raise SettingError(name, f"must be 0 or more, got {value!r}")


def _is_finite(value: object) -> bool:
    """Say whether a value is a number, and a finite one."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
