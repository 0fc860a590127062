"""Gates and memory maps in safetensors files: where they are, and whether they are complete and fit the model."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .settings import GATE, MAP_K, MAP_Q, MEMORY, Settings

# the parameters of a layer's memory: a number for each query head, and what each head's map multiplies by and adds
BETA = f"{GATE}.bias"
_MAPS = tuple(f"{name}.{part}" for name in (MAP_Q, MAP_K) for part in ("weight", "bias"))
# a key ends with the layer's index, at most one name, and the parameter
_KEY = re.compile(rf"(?:.*\.)?(\d+)(?:\.[^.]+)?\.({'|'.join(map(re.escape, (BETA, *_MAPS)))})")

# a layer's index and the name of a parameter inside its attention
Place = tuple[int, str]


def places(settings: Settings) -> list[Place]:
    """Return where the gates and maps of a converted model are."""
    names = (BETA, *_MAPS) if settings.memory_maps else (BETA,)
    return [(layer, name) for layer in settings.memory_layers for name in names]


@contextmanager
def opened(file: str) -> Iterator[Any]:
    """Open a safetensors file for reading.

    Raises:
        ValueError: it is a folder, or not a whole safetensors file.
        OSError: there is no such file.
    """
    if Path(file).is_dir():
        raise ValueError(f"{file} must be a file that segattn.save_gates wrote, got a folder")
    try:
        with safe_open(file, framework="pt") as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(
            f"{file} must be a safetensors file, got a damaged or other one ({error}): copy or save it again"
        ) from error


def read_gates(file: str) -> dict[str, Tensor]:
    """Return the gates and maps in a safetensors file by their keys, whatever else it holds."""
    with opened(file) as handle:
        return {key: handle.get_tensor(key) for key in filter(_is_gate, handle.keys())}


def files_with_gates(path: str | os.PathLike[str], variant: str | None, place: dict[str, Any]) -> list[str]:
    """Return the weight files of a checkpoint that hold gates.

    Args:
        path: folder, or name on the hub.
        variant: as in transformers' `from_pretrained`.
        place: other arguments that say where the files are.

    Raises:
        OSError: the checkpoint has no safetensors files.
    """

    def find(name: str) -> str:
        return str(cached_file(path, name, **place))

    def with_variant(name: str) -> str:
        stem, _, ending = name.rpartition(".")
        return name if variant is None else f"{stem}.{variant}.{ending}"

    try:
        return [find(with_variant(SAFE_WEIGHTS_NAME))]
    except OSError:
        index = find(with_variant(SAFE_WEIGHTS_INDEX_NAME))
    shards = json.loads(Path(index).read_text())["weight_map"]
    return [find(name) for name in sorted({shard for key, shard in shards.items() if _is_gate(key)})]


def gate_keys(keys: Iterable[str], settings: Settings, where: str) -> dict[Place, str]:
    """Return the keys of gates and maps among all keys of a state dict.

    Raises:
        ValueError: a layer with a memory lacks one, or has more than one, or another layer has one.
    """
    found: dict[Place, str] = {}
    wanted, extra = places(settings), []
    for key in filter(_is_gate, keys):
        match = _KEY.fullmatch(key)
        place = (int(match[1]), match[2]) if match else None
        if place is None or place not in wanted or place in found:
            extra.append(key)
        else:
            found[place] = key
    missing = [place for place in wanted if place not in found]
    if missing or extra:
        each = "one gate and two memory maps" if settings.memory_maps else "one gate"
        raise ValueError(
            f"{where} must hold {each} for each of the layers {list(settings.memory_layers)}, and no other: it lacks "
            f"those of {sorted({layer for layer, _ in missing})}, and {extra} should not be there. A converted model "
            "saved again by transformers alone has none: load it with transformers and convert it anew"
        )
    return found


def checked_gates(
    tensors: dict[str, Tensor], settings: Settings, depth: int, config: Any, where: str
) -> dict[Place, Tensor]:
    """Return the gates [H] and maps, if they are those of a model of this configuration.

    The shapes of maps, which a configuration does not say in one way, are left to who loads them.

    Args:
        tensors: gates and maps by key.
        settings: how the model was converted.
        depth: number of layers of the model that the gates come from.
        config: configuration of the model that they go to; None: `convert` is to refuse it.
        where: the file or folder that they were read from.

    Raises:
        ValueError: gates are missing, superfluous, of another shape or not finite, or the model has another depth.
    """
    keys = gate_keys(tensors, settings, where)
    if hasattr(config, "num_hidden_layers"):
        if depth != config.num_hidden_layers:
            raise ValueError(f"{where} must be of a model of {config.num_hidden_layers} layers, got one of {depth}")
        for (_, name), key in keys.items():
            check_gate(key, tensors[key], (config.num_attention_heads,) if name == BETA else None, where)
    return {place: tensors[key] for place, key in keys.items()}


def check_gate(key: str, x: Tensor, shape: tuple[int, ...] | None, where: str) -> None:
    """Check that a gate, [H], or a part of a map is floating-point, of this shape, and finite.

    Args:
        key: its key.
        x: the gate, or part of a map.
        shape: of the model; None: not known.
        where: the file or model that it is in.

    Raises:
        ValueError: it is not.
    """
    if (shape is not None and x.shape != shape) or not x.is_floating_point():
        wanted = f"of shape {list(x.shape if shape is None else shape)}"
        which = ", a number for each of the model's query heads" if key.endswith(BETA) else ", as in the model"
        raise ValueError(f"{where}: {key} must be {wanted}{which}, got {list(x.shape)} of {x.dtype}")
    if not bool(x.isfinite().all()):
        got = x.tolist() if x.ndim == 1 else f"{int((~x.isfinite()).sum())} that are not"
        raise ValueError(f"{where}: {key} must hold finite numbers, got {got}")


def _is_gate(key: str) -> bool:
    return not set(MEMORY).isdisjoint(key.split("."))
