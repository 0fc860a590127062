"""The gates in safetensors files: where they are, and whether they are complete and fit the model."""

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

from .settings import GATE, Settings

# a gate's key ends with the layer's index, at most one name, and the gate
_KEY = re.compile(rf"(?:.*\.)?(\d+)(?:\.[^.]+)?\.{GATE}\.bias")


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
    """Return the gates in a safetensors file by their keys, whatever else it holds."""
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


def gate_keys(keys: Iterable[str], settings: Settings, where: str) -> dict[int, str]:
    """Return the keys of the gates among all keys of a state dict, by layer.

    Raises:
        ValueError: a converted layer has no gate, or more than one, or another layer has one.
    """
    by_layer: dict[int, str] = {}
    extra = []
    for key in filter(_is_gate, keys):
        match = _KEY.fullmatch(key)
        layer = int(match[1]) if match else None
        if layer is None or layer not in settings.layers or layer in by_layer:
            extra.append(key)
        else:
            by_layer[layer] = key
    missing = [layer for layer in settings.layers if layer not in by_layer]
    if missing or extra:
        raise ValueError(
            f"{where} must hold one gate for each of the layers {list(settings.layers)}, and no other: it lacks "
            f"those of {missing}, and {extra} should not be there. A converted model saved again by transformers "
            "alone has none: load it with transformers and convert it anew"
        )
    return by_layer


def checked_gates(
    tensors: dict[str, Tensor], settings: Settings, depth: int, config: Any, where: str
) -> dict[int, Tensor]:
    """Return the gates [H] by layer, if they are those of a model of this configuration.

    Args:
        tensors: gates by key.
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
        for key in keys.values():
            check_gate(key, tensors[key], config.num_attention_heads, where)
    return {layer: tensors[key] for layer, key in keys.items()}


def check_gate(key: str, gate: Tensor, heads: int, where: str) -> None:
    """Check that a gate is floating-point, [H], and finite.

    Raises:
        ValueError: it is not.
    """
    if gate.shape != (heads,) or not gate.is_floating_point():
        raise ValueError(
            f"{where}: {key} must be of shape [{heads}], a number for each of the model's query heads, got "
            f"{list(gate.shape)} of {gate.dtype}"
        )
    if not bool(gate.isfinite().all()):
        raise ValueError(f"{where}: {key} must hold finite numbers, got {gate.tolist()}")


def _is_gate(key: str) -> bool:
    return GATE in key.split(".")
