"""How a model was converted, and where that is recorded: its configuration, and the module that runs its layers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from ...kernels import validation as check
from ...kernels.backends import check_backend
from ...runs.untrained import without_memory
from .traits import Traits

# name of the entry in a model's configuration, and the version of its contents
ENTRY = "segment_attention"
VERSION = 2
# what an entry of version 1 lacks; its layers with a memory are all that were converted
_SINCE_2 = {"lookback": 0, "sinks": 0, "memory_maps": False}
# names of what the attention of a converted layer gets: the gate, and the maps of the memory's queries and keys
GATE = "segattn_gate"
MAP_Q = "segattn_memory_q"
MAP_K = "segattn_memory_k"
MEMORY = (GATE, MAP_Q, MAP_K)
# the name of the argument that takes a cache, which newer transformers call otherwise
PAST = "past_key_values"
_ON_TRUNK = "segattn_conversion"


@dataclass(frozen=True)
class Settings:
    """The arguments of `convert`, checked; `layers` are the converted ones, counted from 0, as are `memory_layers`."""

    segment_len: int
    update: str = "delta"
    gate_init: float = 0.0
    layers: tuple[int, ...] = ()
    empty_memory: str = "local"
    backend: str | None = None
    lookback: int = 0
    sinks: int = 0
    memory_maps: bool = False
    memory_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check.check_integer("segment_len", self.segment_len, 2)
        check.check_choice("update", self.update, check.UPDATES)
        check.check_choice("empty_memory", self.empty_memory, check.EMPTY_MEMORY)
        check.check_lookback(self.lookback, self.sinks, self.segment_len, False)
        check.check_bool("memory_maps", self.memory_maps)
        if others := sorted({*self.memory_layers} - {*self.layers}):
            raise ValueError(f"memory_layers must be among the converted layers {list(self.layers)}, got {others}")
        check_backend(self.backend)
        if isinstance(self.gate_init, bool) or not isinstance(self.gate_init, (int, float)):
            raise TypeError(f"gate_init must be a number, got {type(self.gate_init).__name__}")
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init must be finite, got {self.gate_init}")

    def as_entry(self) -> dict[str, Any]:
        """Return the settings as a configuration holds them, in types of JSON."""
        entry = asdict(self)
        # where the operation runs is not a property of the weights
        del entry["backend"]
        lists = {"layers": list(self.layers), "memory_layers": list(self.memory_layers)}
        return {"version": VERSION, "load_with": "segattn.from_pretrained", **entry, **lists}

    @property
    def window(self) -> int:
        """The number of tokens that local attention sees at most, without the sinks."""
        return (1 + self.lookback) * self.segment_len

    @property
    def without_memory(self) -> tuple[str, int]:
        """Return how many of a text's first tokens see no memory: what that number is called, and the number."""
        return without_memory(self.segment_len, self.lookback)


@dataclass
class Conversion:
    """Hold what `convert` did to a model, and what `revert` needs to undo it.

    settings: the arguments of `convert`.
    depth: number of layers of the model.
    traits: what is particular to the attention of each converted layer, by its index.
    original: name of the attention implementation before.
    restart: whether rotary or learnt positions start again: from 0 with each segment or, with a lookback, with each
        pass from the first token that is not in the memory. Else they count over the whole text.
    inputs: argument names of the module that runs the layers, in order; that of its cache is `past_key_values`.
    handles: the hooks on the model.
    watcher: runs the attention of converted layers in their place, while a model is `watched`.
    """

    settings: Settings
    depth: int
    traits: dict[int, Traits]
    original: str
    restart: bool
    inputs: tuple[str, ...]
    handles: list[RemovableHandle] = field(default_factory=list)
    watcher: Callable[..., Any] | None = None

    @property
    def period(self) -> int | None:
        """Tokens after which positions start again within a pass, or None."""
        return self.settings.segment_len if self.restart and not self.settings.lookback else None

    @property
    def native(self) -> tuple[int, ...]:
        """The layers that were not converted."""
        return tuple(layer for layer in range(self.depth) if layer not in self.settings.layers)

    def as_entry(self) -> dict[str, Any]:
        """Return the configuration entry from which a model is converted the same way again."""
        return self.settings.as_entry() | {"native": list(self.native)}


def read_entry(entry: object, where: str) -> tuple[Settings, int]:
    """Return the settings in a configuration entry, and the number of layers of its model.

    Args:
        entry: the entry.
        where: the file that it was read from.

    Raises:
        ValueError: the entry is missing, of another version, incomplete or damaged.
    """
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} must have an entry {ENTRY!r}, as models saved after convert do; it has none")
    if (version := entry.get("version")) not in (1, VERSION):
        raise ValueError(f"{where}: {ENTRY} must be of version 1 or {VERSION}, got {version!r}")
    if version == 1:
        entry = {**_SINCE_2, "memory_layers": entry.get("layers"), **entry}
    names = {field.name for field in fields(Settings)} - {"backend"}
    if missing := sorted({*names, "native"} - set(entry)):
        raise ValueError(f"{where}: {ENTRY} must hold {', '.join(missing)}, which it lacks")
    try:
        lists = {name: tuple(entry[name]) for name in ("layers", "memory_layers")}
        layers = sorted([*lists["layers"], *entry["native"]])
        if layers == list(range(len(layers))):
            return Settings(**{name: entry[name] for name in names} | lists), len(layers)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {ENTRY} is damaged ({error}): save the model or its gates again") from error
    raise ValueError(f"{where}: {ENTRY} must name every layer once, as one of layers or of native, got {layers}")


def is_converted(model: nn.Module) -> bool:
    """Return whether `model`, or a model that it wraps, has converted layers.

    Raises:
        TypeError: the model is not a module.
    """
    return _find_trunk(model) is not None


def trunk_of(model: nn.Module) -> Any:
    """Return the module inside `model`, or inside a model that it wraps, that runs the converted layers.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model is not converted.
    """
    if (trunk := _find_trunk(model)) is not None:
        return trunk
    got = f"model must be converted, got a {type(model).__name__} that is not"
    if hasattr(getattr(model, "config", None), ENTRY):
        raise ValueError(
            f"{got}, though its configuration has the settings of one that is: transformers makes plain models of such "
            "a configuration or checkpoint. Load the checkpoint with segattn.from_pretrained, or call segattn.convert; "
            "to have a plain one, which needs no revert, make it from type(config).from_dict(config.to_dict())"
        )
    raise ValueError(f"{got}: call segattn.convert first")


def _find_trunk(model: nn.Module) -> Any:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    return next((module for module in model.modules() if _ON_TRUNK in module.__dict__), None)


def conversion_of(model: nn.Module) -> Conversion:
    """Return how `model`, or a model that it wraps, was converted.

    Raises:
        TypeError: the model is not a module.
        ValueError: the model is not converted.
    """
    return trunk_of(model).__dict__[_ON_TRUNK]


def record(trunk: nn.Module, conversion: Conversion) -> None:
    """Record the conversion on the module that runs the layers."""
    trunk.__dict__[_ON_TRUNK] = conversion


def forget(trunk: nn.Module) -> None:
    """Remove the record of the conversion."""
    del trunk.__dict__[_ON_TRUNK]


def attentions_in(layer: nn.Module, config: Any) -> list[Any]:
    """Return the causal self-attentions of a layer, one in most models: modules with a layer index that are causal."""
    return [
        module
        for module in layer.modules()
        if getattr(module, "is_causal", False)
        and hasattr(module, "layer_idx")
        and getattr(module, "config", None) is config
    ]


def attention_in(layer: nn.Module, config: Any) -> Any:
    """Return the first causal self-attention of a layer, or None."""
    return next(iter(attentions_in(layer, config)), None)


def cache_name(trunk: Any) -> str:
    """Return the name of the trunk's argument that takes a cache: since transformers 5.24 it is `cache`."""
    return "cache" if "cache" in inspect.signature(trunk.forward).parameters else PAST


def stack_of(trunk: Any) -> tuple[str, nn.ModuleList]:
    """Return the trunk's first list of layers that has attention, which it runs, and its name; none: an empty one."""
    for name, child in trunk.named_children():
        if isinstance(child, nn.ModuleList) and any(attention_in(layer, trunk.config) is not None for layer in child):
            return name, child
    return "", nn.ModuleList()


def layers_of(trunk: Any) -> list[nn.Module]:
    """Return the layers that the trunk runs, in order."""
    return list(stack_of(trunk)[1])


def attentions_of(trunk: Any) -> list[Any]:
    """Return the attention of every layer that the trunk runs, in order; None for a layer without one."""
    return [attention_in(layer, trunk.config) for layer in layers_of(trunk)]
