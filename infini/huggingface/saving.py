"""Save and load converted models: in a checkpoint that transformers can read too, or their gates alone. No pickles.

With the gates go the memory maps, where a model has them.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ...runs.checkpoint import replacing, whole
from ...runs.errors import first_line
from .conversion import convert, revert
from .convertible import check_weights
from .gate_files import Place, check_gate, checked_gates, files_with_gates, gate_keys, opened, places, read_gates
from .settings import (
    ENTRY,
    GATE,
    MAP_K,
    MEMORY,
    Settings,
    attentions_of,
    conversion_of,
    is_converted,
    read_entry,
    trunk_of,
)
from .traits import Traits

Model = TypeVar("Model", bound=nn.Module)
# the arguments of transformers' from_pretrained that say where the files are
_PLACE = "cache_dir force_download local_files_only proxies revision subfolder token".split()


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], **kwargs: Any) -> None:
    """Write a converted model with its gates and settings into a folder, from which `from_pretrained` loads it.

    The gates, and memory maps where it has them, are in the model's safetensors files, float32 whatever the other
    weights are. The settings are in its `config.json`, entry "segment_attention", which also names the function that
    loads them. transformers alone reports the gates as unexpected keys, and loads the model without memory.

    Args:
        model: a converted Hugging Face model; merge adapters first.
        path: folder to write; it is made if it does not exist.
        kwargs: arguments of the model's `save_pretrained`.

    Raises:
        TypeError: the model is not a Hugging Face model, or has adapters.
        ValueError: the model is not converted, or is offloaded (accelerate); `path` is a file, `safe_serialization` is
            False, or a `state_dict` lacks gates.
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
        gate_keys(kwargs["state_dict"], settings, "state_dict")
    elif len(set(getattr(model, "hf_device_map", {}).values())) < 2:
        # of a map with several places transformers brings the offloaded weights itself
        check_weights(model.parameters())
    model.save_pretrained(path, **kwargs)


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    backend: str | None = None,
    model_class: Any = AutoModelForCausalLM,
    quiet: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a model that `save_pretrained` wrote, and convert it with the settings and gates that it was saved with.

    Args:
        path: folder, or name on the hub.
        backend, quiet: as in `convert`.
        model_class: class whose `from_pretrained` loads the weights; default `transformers.AutoModelForCausalLM`.
        kwargs: arguments of that `from_pretrained`, such as `dtype`, which does not apply to the float32 gates.

    Returns:
        The model, in evaluation mode; its gates hold the bits that were saved.

    Raises:
        ValueError: the checkpoint is not of a converted model, its settings or gates are damaged, or an argument is one
            of `convert`'s others, or asks for pickled weights or for loading info.
        OSError: there is no such checkpoint.
    """
    if fixed := sorted(set(kwargs) & set(inspect.signature(convert).parameters)):
        raise ValueError(
            f"{', '.join(fixed)} must be left out: the model is converted as it was when it was saved. To change that, "
            "segattn.revert the loaded model and convert it anew"
        )
    if kwargs.get("output_loading_info") or not kwargs.setdefault("use_safetensors", True):
        raise ValueError(
            "output_loading_info must be False, as the model alone is returned, and use_safetensors True, as pickled "
            "weights are not read"
        )
    place = {name: kwargs[name] for name in _PLACE if name in kwargs}
    config = _config(path, place)
    if getattr(config, ENTRY, None) is None:
        raise ValueError(
            f"{path} must be of a converted model, got a plain checkpoint, without {ENTRY!r} in its config.json: load "
            "it with transformers and call segattn.convert"
        )
    settings, depth = read_entry(getattr(config, ENTRY), f"{path}/config.json")
    settings = replace(settings, backend=backend)
    # the gates before the weights, which may take long
    files = files_with_gates(path, kwargs.get("variant"), place)
    tensors = {key: gate for file in files for key, gate in read_gates(file).items()}
    gates = checked_gates(tensors, settings, depth, config, str(path))
    with _gates_not_reported(), _unknown_argument_named(model_class):
        model = model_class.from_pretrained(path, **kwargs)
    # the layers that were converted, with a sliding window or not
    convert(model, **vars(settings), convert_sliding=True, quiet=quiet)
    _fill(model, gates, str(path))
    return model


def _config(path: str | os.PathLike[str], place: dict[str, Any]) -> Any:
    """Return the text model's configuration in a checkpoint.

    Raises:
        OSError: there is no checkpoint, neither a folder nor one of the hub.
    """
    wanted = "path must be a folder that segattn.save_pretrained wrote, or a name on the hub"
    folder = Path(path, place.get("subfolder", ""))
    if Path(path).exists() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{wanted}, got {str(path)!r}, where there is no {folder / 'config.json'}")
    try:
        return AutoConfig.from_pretrained(path, **place).get_text_config(decoder=True)
    except OSError as error:
        raise OSError(f"{wanted}, got {str(path)!r}, which is neither: {first_line(error)}") from error


@contextmanager
def _unknown_argument_named(model_class: Any) -> Iterator[None]:
    """Name an argument that no model takes, which transformers hands down to the model's constructor.

    Raises:
        TypeError: there is one.
    """
    try:
        yield
    except TypeError as error:
        if (unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error))) is None:
            raise
        raise TypeError(
            f"{unknown[1]} must be an argument of {model_class.__name__}.from_pretrained or an entry of the model's "
            "configuration, which it is not: leave it out. The settings of convert are those that the model was saved "
            "with"
        ) from error


def save_gates(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the gates and settings of a converted model into one small safetensors file, for `load_gates`.

    Memory maps, where the model has them, are written with the gates.

    For models that are too large to save again, or whose other weights did not change. Of a model that PEFT wraps, the
    gates of the active adapter are written. Where `fully_shard` (FSDP2) has spread the gates, every process calls this
    and the first one writes; of replicas (DDP) one process is to call it.

    Args:
        model: a converted model, or a model that wraps one.
        path: file to write; an existing one is replaced only once the new one is whole.

    Raises:
        ValueError: the model is not converted, or its gates are partitioned (DeepSpeed), offloaded (accelerate) or not
            finite.
    """
    conversion, tensors = conversion_of(model), {}
    parameters = _parameters(model)
    for (layer, name), parameter in parameters.items():
        x, key = whole(parameter).detach(), f"{layer}.{name}"
        check_gate(key, x, _shape(conversion.traits[layer], name), type(model).__name__)
        tensors[key] = x.float().cpu().contiguous()
    if any(isinstance(parameter, DTensor) for parameter in parameters.values()) and get_rank() > 0:
        return
    entry = conversion.as_entry() | {"load_with": "segattn.load_gates"}
    with replacing(Path(path)) as beside:
        beside.write_bytes(save(tensors, metadata={"format": "pt", ENTRY: json.dumps(entry)}))


def load_gates(model: Model, path: str | os.PathLike[str], *, quiet: bool = False) -> Model:
    """Load the gates that `save_gates` wrote into a model, which is first converted with their settings if it is not.

    Args:
        model: a Hugging Face model with the weights that the gates were trained with, changed in place. If it is
            converted, then with the settings of the file; `gate_init` and `backend`, on which the gates do not depend,
            may differ.
        path: the file.
        quiet: as in `convert`.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: the file is damaged or not of `save_gates`, or does not fit the model, or the model is
            sharded or offloaded; it is left unchanged.
        OSError: there is no such file.
    """
    where = str(path)
    with opened(where) as file:
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
    settings, depth = read_entry(entry, where)
    gates = checked_gates(read_gates(where), settings, depth, _text_config(model), where)
    fresh = not is_converted(model)
    if fresh:
        convert(model, **vars(settings), convert_sliding=True, quiet=quiet)
    else:
        _check_same(conversion_of(model).settings, settings, where)
    try:
        _fill(model, gates, where)
    except ValueError:
        if fresh:
            revert(model)
        raise
    return model


def _parameters(model: nn.Module) -> dict[Place, Any]:
    """Return the parameters of gates and maps; where PEFT wraps these, those of the active adapter."""
    attentions, found = attentions_of(trunk_of(model)), {}
    for layer, name in places(conversion_of(model).settings):
        module, _, part = name.partition(".")
        found[layer, name] = getattr(getattr(attentions[layer], module), part)
    check_weights(found.values())
    return found


def _shape(traits: Traits, name: str) -> tuple[int, ...]:
    """Return the shape of a parameter of a gate or a map."""
    heads, width = traits.groups if MAP_K in name else traits.heads, traits.key_width
    if GATE in name:
        return (heads,)
    return (heads, width, width) if name.endswith("weight") else (heads * width,)


def _fill(model: nn.Module, gates: dict[Place, Tensor], where: str) -> None:
    traits, parameters = conversion_of(model).traits, _parameters(model)
    for (layer, name), x in gates.items():
        shape, parameter = _shape(traits[layer], name), parameters[layer, name]
        check_gate(f"{layer}.{name}", x, shape, where)
        if isinstance(parameter, DTensor) or parameter.shape != shape:
            raise ValueError("model must not be sharded or partitioned yet, got gates that are: load them first")
    with torch.no_grad():
        for place, parameter in parameters.items():
            parameter.copy_(gates[place])


def _text_config(model: nn.Module) -> Any:
    """Return the configuration of the text model, or None of a module that is not a Hugging Face model."""
    if is_converted(model):
        return trunk_of(model).config
    return model.config.get_text_config(decoder=True) if isinstance(model, PreTrainedModel) else None


def _check_same(wanted: Settings, got: Settings, where: str) -> None:
    depending = ("segment_len", "update", "layers", "empty_memory", "lookback", "sinks", "memory_maps", "memory_layers")
    for name in depending:
        if getattr(wanted, name) != getattr(got, name):
            raise ValueError(
                f"{where} must be of a model converted with {name}={getattr(wanted, name)!r}, as this one is, got "
                f"{getattr(got, name)!r}: segattn.revert the model, and load_gates converts it as the file says"
            )


@contextmanager
def _gates_not_reported() -> Iterator[None]:
    """Keep transformers 5 from logging its report on loading, if all in it are gates that it did not expect."""

    def keep(record: logging.LogRecord) -> bool:
        rows = [line for line in record.getMessage().splitlines() if "|" in line][1:]
        ours = (any(name in row for name in MEMORY) and "UNEXPECTED" in row for row in rows)
        return not rows or not all(ours)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
