"""A memory on disk: its own parameters in one safetensors file, its settings in the file's metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed import get_rank
from torch.distributed.tensor import DTensor, distribute_tensor

from ..runs.checkpoint import replacing, whole
from .backbone import OFFLOAD_THE_MODEL, check_not_offloaded

# key in the file's metadata
ENTRY = "segattn"
# of settings that a file may lack, since they are younger
_BEFORE = {"epsilon": 0.0}
# settings that may differ from those that the weights were trained with
_FREE = ("segment_len", "bptt", "alignment", "loss", "attention", "schedule")


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a memory that are not its model's, by name."""
    memory = _unwrapped(module)
    of_model = {id(parameter) for parameter in memory.model.parameters()}
    return {name: x for name, x in memory.named_parameters() if id(x) not in of_model}


def save_memory(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters that a memory has besides its model's; save the model by its own `save_pretrained`.

    A process that dies while writing leaves the earlier file. Where `fully_shard` has sharded the memory, every process
    must call this, and the first one writes; of replicas (DDP) only one may call it.

    Args:
        module: a `RecurrentMemory` or `AssociativeMemory`, which may be compiled or wrapped for data parallelism.
        path: of a file, commonly ending in .safetensors.

    Raises:
        ValueError: the file's folder does not exist, or accelerate has offloaded the memory's parameters.
    """
    if not Path(path).parent.is_dir():
        raise ValueError(f"path must be in a folder that is there, got {str(path)!r}")
    own = _present(module)
    tensors = {name: whole(x.detach()).cpu().contiguous() for name, x in own.items()}
    if any(isinstance(x, DTensor) for x in own.values()) and get_rank() > 0:
        return
    entry = _entry(module)
    with replacing(Path(path)) as beside:
        save_file(tensors, beside, metadata={ENTRY: json.dumps(entry)})


def read_settings(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the settings of the memory in a file, and its `class`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is not of `save_memory`, or damaged.
    """
    return _read(path)[0]


def load_memory(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file of `save_memory` into a memory that was made with the same settings.

    Settings may differ that the weights do not depend on: `segment_len`, `bptt`, `alignment`, `loss`, `attention` and
    `schedule`.

    Raises:
        FileNotFoundError: there is no file.
        ValueError: the file is not of `save_memory`, or damaged; or the memory in it is of another class, or of another
            size, mask or special tokens: the name and both values; or accelerate has offloaded its parameters.
    """
    settings, tensors = _read(path)
    _check(settings, _entry(module), str(path))
    own = _present(module)
    if missing := sorted(own.keys() ^ tensors.keys()):
        raise ValueError(f"{str(path)!r} must hold the parameters {sorted(own)}, and differs in {missing}")
    for name, parameter in own.items():
        if parameter.shape != tensors[name].shape:
            raise ValueError(
                f"{name} must have shape {list(parameter.shape)} as this model's, got {list(tensors[name].shape)} in "
                f"{str(path)!r}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            value = tensors[name]
            if isinstance(parameter, DTensor):
                value = distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
            parameter.copy_(value)


def _present(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a memory that are not its model's.

    Raises:
        ValueError: accelerate has offloaded them.
    """
    own = own_parameters(module)
    check_not_offloaded("memory", _unwrapped(module), own.values(), OFFLOAD_THE_MODEL)
    return own


def _unwrapped(module: Any) -> Any:
    """Return the memory inside a compiled or wrapped one."""
    while (inner := module._modules.get("_orig_mod", module._modules.get("module"))) is not None:
        module = inner
    return module


def _entry(module: nn.Module) -> dict[str, Any]:
    """Return what the file says of a memory."""
    memory = _unwrapped(module)
    # fully_shard makes a class of its own, with this in front
    return {"class": type(memory).__name__.removeprefix("FSDP"), **asdict(memory.settings)}


def _check(saved: Mapping[str, Any], own: Mapping[str, Any], path: str) -> None:
    """Check that a memory's settings are those in a file, apart from those that are free.

    Raises:
        ValueError: naming one that differs.
    """
    for name, value in own.items():
        before = saved.get(name, _BEFORE.get(name))
        value = list(value) if isinstance(value, tuple) else value
        if name not in _FREE and before != value:
            raise ValueError(
                f"{name} must be that of the memory in {path!r}, {before!r}, got {value!r}: make the module with it"
            )


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the settings and the parameters in a file."""
    if Path(path).is_dir():
        raise ValueError(f"path must be a file that save_memory wrote, got the folder {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            entry = json.loads((file.metadata() or {})[ENTRY])
            return dict(entry), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"path must be a file that save_memory wrote, got {str(path)!r}: {error}") from None
