"""Converted models on disk: in a checkpoint that transformers can read too, or their gates alone. Never pickled."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ...runs.checkpoint import replacing, whole
from .conversion import convert
from .families import FAMILIES
from .settings import ENTRY, GATE, Settings, attentions_of, conversion_of, is_converted, trunk_of

Model = TypeVar("Model", bound=nn.Module)
# of from_pretrained's arguments, those that say where the files are
_PLACE = "cache_dir force_download local_files_only proxies revision subfolder token".split()
# the layer's number, at most one name, the gate
_KEY = re.compile(rf"(?:.*\.)?(\d+)(?:\.[^.]+)?\.{GATE}\.bias")


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write a converted model with its gates and settings, to be read by `from_pretrained`.

    The gates are in the model's safetensors files, the settings in its `config.json`, entry "segment_attention", which
    also says what loads them. transformers alone reports the gates as unexpected, and loads the model without memory.

    Args:
        model: a converted model; adapters have to be merged first.
        path: a folder.
        kwargs: for the model's own `save_pretrained`.

    Raises:
        TypeError, ValueError: the model is not converted, or has adapters; weights were to be pickled; `path` is a
            file, or a `state_dict` given lacks gates.
    """
    settings = conversion_of(model).settings
    if not isinstance(model, PreTrainedModel) or getattr(model, "_hf_peft_config_loaded", False):
        raise TypeError(
            f"model must be a transformers PreTrainedModel without adapters, got {type(model).__name__}: merge them "
            "first (merge_and_unload), or save the adapters by themselves and the gates with segattn.save_gates"
        )
    if not kwargs.pop("safe_serialization", True):
        raise ValueError("safe_serialization must be True: weights are never pickled")
    # transformers would only log this
    if Path(path).is_file():
        raise ValueError(f"path must be a folder, got the file {path}")
    if kwargs.get("state_dict") is not None:
        _by_layer(kwargs["state_dict"], settings, "state_dict")
    model.save_pretrained(path, **kwargs)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    model_class: Any = AutoModelForCausalLM,
    quiet: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model that `save_pretrained` wrote: converted as it was, its gates equal to the bit.

    Args:
        path: a folder, or a name on the hub.
        backend, quiet: as in `convert`.
        model_class: whose `from_pretrained` loads the weights; default `transformers.AutoModelForCausalLM`.
        kwargs: for that `from_pretrained`. The gates are float32 whatever `dtype` is.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: the checkpoint is not of a converted model, or its settings or gates are damaged.
        OSError: there are no such files.
    """
    if kwargs.get("output_loading_info") or not kwargs.setdefault("use_safetensors", True):
        raise ValueError(
            "output_loading_info must be False, as the model alone is returned, and use_safetensors True, as pickled "
            "weights are not read"
        )
    place = {name: kwargs[name] for name in _PLACE if name in kwargs}
    config = AutoConfig.from_pretrained(path, **place).get_text_config(decoder=True)
    if getattr(config, ENTRY, None) is None:
        raise ValueError(
            f"{path} must be of a converted model, got a plain checkpoint, without {ENTRY!r} in its config.json: load "
            "it with transformers and call segattn.convert"
        )
    settings, depth = _settings(getattr(config, ENTRY), f"{path}/config.json")
    settings = replace(settings, backend=backend)
    # all this before the weights, which may take long
    held = {
        key: gate for file in _weight_files(path, kwargs.get("variant"), place) for key, gate in _read(file).items()
    }
    gates = _checked(held, settings, depth, config, str(path))
    with _gates_not_reported():
        model = model_class.from_pretrained(path, **kwargs)
    # the layers are those that were converted, whether or not they slide
    convert(model, **vars(settings), convert_sliding=True, quiet=quiet)
    _fill(model, gates)
    return model


def save_gates(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the gates and settings alone, into one small safetensors file, to be read by `load_gates`.

    For models that are too large to save again, or whose other weights are as they were. Of a model that PEFT wraps,
    the active adapter's gates. Of a sharded model (FSDP2) every process must call it; all write the same.

    Args:
        model: a converted model.
        path: the file; one that is there is replaced, once the new one is whole.

    Raises:
        ValueError: the model is not converted, or its gates are partitioned (DeepSpeed).
    """
    conversion, config = conversion_of(model), _text_config(model)
    tensors = {}
    for layer, bias in _biases(model).items():
        gate = whole(bias).detach()
        key = f"{layer}.{GATE}.bias"
        _check_gate(key, gate, config.num_attention_heads, type(model).__name__)
        tensors[key] = gate.float().cpu().contiguous()
    entry = conversion.settings.as_entry() | {"native": list(conversion.native), "load_with": "segattn.load_gates"}
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(save(tensors, metadata={"format": "pt", ENTRY: json.dumps(entry)}))


def load_gates(model: Model, path: str | os.PathLike[str], *, quiet: bool = False) -> Model:
    """Give a model the gates that `save_gates` wrote; convert it with their settings if it is not converted yet.

    Args:
        model: a Hugging Face model with the weights that the gates were trained with. If it is converted, then with the
            settings of the file; `gate_init` and `backend`, on which the loaded gates do not depend, may differ.
        path: the file.
        quiet: as in `convert`.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming what is wrong with the file, or with the model for this file; the model is then as
            before.
        OSError: there is no such file.
    """
    where = str(path)
    with _opened(where) as file:
        metadata = file.metadata() or {}
    if ENTRY not in metadata:
        raise ValueError(
            f"{where} must be a file that segattn.save_gates wrote, got one without its settings: a whole model is "
            "loaded with segattn.from_pretrained, from its folder"
        )
    try:
        entry = json.loads(metadata[ENTRY])
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {ENTRY} is damaged ({error}): save the gates again") from error
    settings, depth = _settings(entry, where)
    gates = _checked(_read(where), settings, depth, _text_config(model), where)
    if is_converted(model):
        _check_same(conversion_of(model).settings, settings, where)
    else:
        convert(model, **vars(settings), convert_sliding=True, quiet=quiet)
    _fill(model, gates)
    return model


def _biases(model: nn.Module) -> dict[int, Any]:
    """By layer. What PEFT wraps a gate in to train it passes on the active adapter's `bias`."""
    attentions = attentions_of(trunk_of(model))
    return {layer: getattr(attentions[layer], GATE).bias for layer in conversion_of(model).settings.layers}


def _fill(model: nn.Module, gates: dict[int, Tensor]) -> None:
    biases = _biases(model)
    for layer, bias in biases.items():
        if isinstance(bias, DTensor) or bias.shape != gates[layer].shape:
            raise ValueError("model must not be sharded or partitioned yet, got gates that are: load them first")
    with torch.no_grad():
        for layer, bias in biases.items():
            bias.copy_(gates[layer])


def _text_config(model: nn.Module) -> Any:
    """None of what is no Hugging Face model."""
    if is_converted(model):
        return trunk_of(model).config
    return model.config.get_text_config(decoder=True) if isinstance(model, PreTrainedModel) else None


def _settings(entry: Any, where: str) -> tuple[Settings, int]:
    """And the number of layers of the model, converted or not."""
    try:
        settings = Settings.of_entry(entry, where)
        layers = sorted([*settings.layers, *entry["native"]])
    except (KeyError, TypeError, ValueError) as error:
        if str(error).startswith(where):
            raise
        raise ValueError(f"{where}: {ENTRY} is damaged ({error}): save the model or its gates again") from error
    if layers != list(range(len(layers))):
        raise ValueError(f"{where}: {ENTRY} must name every layer once, as one of layers or of native, got {layers}")
    return settings, len(layers)


def _check_same(wanted: Settings, got: Settings, where: str) -> None:
    for name in ("segment_len", "update", "layers", "empty_memory"):
        if getattr(wanted, name) != getattr(got, name):
            raise ValueError(
                f"{where} must be of a model converted with {name}={getattr(wanted, name)!r}, as this one is, got "
                f"{getattr(got, name)!r}: segattn.revert the model, and load_gates converts it as the file says"
            )


def _checked(held: dict[str, Tensor], settings: Settings, depth: int, config: Any, where: str) -> dict[int, Tensor]:
    """Gates by layer, all of them, and of the shape that a model of this configuration has."""
    keys = _by_layer(held, settings, where)
    # `convert` refuses other models, and says why
    if getattr(config, "model_type", None) in FAMILIES:
        if depth != config.num_hidden_layers:
            raise ValueError(f"{where} must be of a model of {config.num_hidden_layers} layers, got one of {depth}")
        for key in keys.values():
            _check_gate(key, held[key], config.num_attention_heads, where)
    return {layer: held[key] for layer, key in keys.items()}


def _check_gate(key: str, gate: Tensor, heads: int, where: str) -> None:
    if gate.shape != (heads,) or not gate.is_floating_point():
        raise ValueError(
            f"{where}: {key} must be of shape [{heads}], a number for each of the model's query heads, got "
            f"{list(gate.shape)} of {gate.dtype}"
        )
    if not bool(gate.isfinite().all()):
        raise ValueError(f"{where}: {key} must hold finite numbers, got {gate.tolist()}")


def _is_gate(key: str) -> bool:
    return GATE in key.split(".")


def _by_layer(keys: Iterable[str], settings: Settings, where: str) -> dict[int, str]:
    """Of any tensors' keys, those of the gates."""
    found: dict[int, str] = {}
    extra = []
    for key in filter(_is_gate, keys):
        match = _KEY.fullmatch(key)
        layer = int(match[1]) if match else None
        if layer is None or layer not in settings.layers or layer in found:
            extra.append(key)
        else:
            found[layer] = key
    missing = [layer for layer in settings.layers if layer not in found]
    if missing or extra:
        raise ValueError(
            f"{where} must hold one gate for each of the layers {list(settings.layers)}, and no other: it lacks "
            f"those of {missing}, and {extra} should not be there. A converted model saved again by transformers "
            "alone has none: load it with transformers and convert it anew"
        )
    return found


@contextmanager
def _opened(file: str) -> Iterator[Any]:
    if Path(file).is_dir():
        raise ValueError(f"{file} must be a file that segattn.save_gates wrote, got a folder")
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(
            f"{file} must be a safetensors file, got a damaged or other one ({error}): copy or save it again"
        ) from error


def _read(file: str) -> dict[str, Tensor]:
    """The gates by their keys."""
    with _opened(file) as opened:
        return {key: opened.get_tensor(key) for key in filter(_is_gate, opened.keys())}


def _weight_files(path: str | os.PathLike[str], variant: str | None, place: dict[str, Any]) -> list[str]:
    """Those of a checkpoint that hold gates, found as transformers finds them."""

    def find(name: str) -> str:
        return str(cached_file(path, name, **place))

    def variety(name: str) -> str:
        stem, _, ending = name.rpartition(".")
        return name if variant is None else f"{stem}.{variant}.{ending}"

    try:
        return [find(variety(SAFE_WEIGHTS_NAME))]
    except OSError:
        index = find(variety(SAFE_WEIGHTS_INDEX_NAME))
    shards = json.loads(Path(index).read_text())["weight_map"]
    return [find(name) for name in sorted({shard for key, shard in shards.items() if _is_gate(key)})]


@contextmanager
def _gates_not_reported() -> Iterator[None]:
    """Without the report on loading of transformers 5, if all that it reports are gates that it did not expect."""

    def keep(record: logging.LogRecord) -> bool:
        rows = [line for line in record.getMessage().splitlines() if "|" in line][1:]
        return not rows or not all(GATE in row and "UNEXPECTED" in row for row in rows)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
