"""How a model was converted, and where that is written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...kernels import validation as check
from ...kernels.backends import check_backend

# the entry in a model's configuration, and the name of attention there
ENTRY = "segment_attention"
IMPLEMENTATION = "segattn"
GATE = "segattn_gate"
# of what the entry holds
VERSION = 1
_ON_MODEL = "segattn_conversion"


@dataclass(frozen=True)
class Settings:
    """The arguments of `convert`, checked; `layers` are those converted."""

    segment_len: int
    update: str = "delta"
    gate_init: float = 0.0
    layers: tuple[int, ...] = ()
    empty_memory: str = "local"
    backend: str | None = None

    def __post_init__(self) -> None:
        check.check_integer("segment_len", self.segment_len, 2)
        check.check_choice("update", self.update, check.UPDATES)
        check.check_choice("empty_memory", self.empty_memory, check.EMPTY_MEMORY)
        check_backend(self.backend)
        if isinstance(self.gate_init, bool) or not isinstance(self.gate_init, (int, float)):
            raise TypeError(f"gate_init must be a number, got {type(self.gate_init).__name__}")
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init must be finite, got {self.gate_init}")

    def as_entry(self) -> dict[str, Any]:
        """For a configuration: what is needed to convert the same way again."""
        kept = asdict(self)
        # where it runs is not a property of the weights
        del kept["backend"]
        return {"version": VERSION, "load_with": "segattn.from_pretrained", **kept, "layers": list(self.layers)}

    @classmethod
    def of_entry(cls, entry: object, where: str) -> Settings:
        """Of a configuration's entry.

        Raises:
            ValueError: there is none, it is of another version, or it lacks something.
        """
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} must have an entry {ENTRY!r}, as models saved after convert do; it has none")
        if entry.get("version") != VERSION:
            raise ValueError(f"{where}: {ENTRY} must be of version {VERSION}, got {entry.get('version')!r}")
        names = {field.name for field in fields(cls)} - {"backend"}
        if missing := sorted(names - set(entry)):
            raise ValueError(f"{where}: {ENTRY} must hold {', '.join(missing)}, which it lacks")
        return cls(**{name: entry[name] for name in names - {"layers"}}, layers=tuple(entry["layers"]))


@dataclass
class Conversion:
    """What was done to a model, and what undoes it.

    depth: layers of the model.
    original: the attention implementation before.
    restart: whether positions begin anew with each segment.
    inputs: names of the arguments of the module that runs the layers, in order.
    """

    settings: Settings
    depth: int
    original: str
    restart: bool
    inputs: tuple[str, ...]
    handles: list[RemovableHandle] = field(default_factory=list)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        # a model that was pickled finds its attention by name, also in a new process
        import_module(".interface", __package__).register()

    @property
    def native(self) -> tuple[int, ...]:
        """Layers left as they were."""
        return tuple(layer for layer in range(self.depth) if layer not in self.settings.layers)


def is_converted(model: nn.Module) -> bool:
    """Whether `model`, or the model that it wraps, has converted layers."""
    return any(_ON_MODEL in module.__dict__ for module in model.modules())


def trunk_of(model: nn.Module) -> Any:
    """The module inside `model`, or inside what wraps it, that runs the converted layers.

    Raises:
        ValueError: it was not converted.
    """
    for module in model.modules():
        if _ON_MODEL in module.__dict__:
            return module
    raise ValueError(f"model must be converted, got a {type(model).__name__} that is not: call segattn.convert first")


def conversion_of(model: nn.Module) -> Conversion:
    """How `model`, or the model that it wraps, was converted.

    Raises:
        ValueError: it was not.
    """
    return trunk_of(model).__dict__[_ON_MODEL]


def attach(trunk: nn.Module, conversion: Conversion) -> None:
    """Write it down on the module that runs the layers."""
    trunk.__dict__[_ON_MODEL] = conversion


def detach(trunk: nn.Module) -> None:
    """Forget it."""
    del trunk.__dict__[_ON_MODEL]


def attention_in(layer: nn.Module, config: Any) -> Any:
    """The causal self-attention of a layer: what knows its index, and that it is causal; None where there is none."""
    for module in layer.modules():
        causal = getattr(module, "is_causal", False) and hasattr(module, "layer_idx")
        if causal and getattr(module, "config", None) is config:
            return module
    return None


def attentions_of(trunk: Any) -> list[Any]:
    """Of every layer that the trunk runs, in order."""
    for module in trunk.children():
        if isinstance(module, nn.ModuleList) and len(module) and attention_in(module[0], trunk.config) is not None:
            return [attention_in(layer, trunk.config) for layer in module]
    return []
