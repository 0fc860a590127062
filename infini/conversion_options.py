"""The options by which commands convert a plain model. Each field's string is the help of its option."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar

from ..runs.errors import SettingError

# those of `kernels.validation`, without PyTorch
UPDATES = ("delta", "linear")
_LAYERS = re.compile(r"(-?\d+)(?:-(-?\d+))?")


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Hold arguments of `segattn.convert`, under their names; what is None is left to its default.

    Settings of commands that convert inherit from it, so that all have the same options.

    Raises:
        SettingError: `memory_layers` are no layers.
    """

    # where the options stand together in a command's help
    PANEL: ClassVar[str] = "Conversion of a plain model"

    segment_len: Annotated[int | None, "Tokens per segment. Default: 2048."] = None
    update: Annotated[str | None, "Update rule of the memory: delta or linear. Default: delta."] = None
    gate_init: Annotated[
        float | None, "Gates at first; sigmoid(gate) is the memory's share. Default: -4, from scratch 0."
    ] = None
    lookback: Annotated[int | None, "Whole segments that a token sees before its own: 0 or 1. Default: 0."] = None
    sinks: Annotated[int | None, "First tokens of a text that all later ones see. Default: 0."] = None
    memory_maps: Annotated[bool | None, "Give the memory learnt maps of its queries and keys."] = None
    memory_layers: Annotated[
        str | None,
        "Layers with a memory, such as 10-20 or 0,5,-1; the others see segment, lookback and sinks. Default: all.",
    ] = None

    def __post_init__(self) -> None:
        self.convert_arguments()

    def convert_arguments(self) -> dict[str, Any]:
        """Return the arguments of `segattn.convert` that are not None.

        Raises:
            SettingError: `memory_layers` are no layers.
        """
        given = {name: getattr(self, name) for name in NAMES if getattr(self, name) is not None}
        if self.memory_layers is not None:
            given["memory_layers"] = layers_named(self.memory_layers, "memory_layers")
        return given


NAMES = tuple(field.name for field in fields(ConversionOptions))


def layers_named(text: str, option: str) -> list[int]:
    """Return the layers that a text such as "10-20" or "0,5,-1" names, the last of a range included.

    Raises:
        SettingError: of `option`, where the text names none.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = _LAYERS.fullmatch(part.strip())
        first, last = (0, -1) if match is None else (int(match[1]), int(match[2] or match[1]))
        if last < first:
            problem = f"must be numbers of layers and ranges of them with commas, such as 10-20 or 0,5,-1, got {text!r}"
            raise SettingError(option, problem)
        layers += range(first, last + 1)
    return layers
