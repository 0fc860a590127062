"""Sizes of a decoder by its configuration: transformers makes the model without its weights, whose shapes are read."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ...runs.errors import SettingError, first_line

# a stack of more is no model's
MOST_LAYERS = 10_000


class LayerSizes(NamedTuple):
    """The sizes of a layer, as in `Shape`."""

    heads: int
    kv_heads: int
    head_width: int
    ff: int
    gated: bool
    rotary: bool


def sizes_of(path: Path) -> dict[str, Any]:
    """Return the sizes in a model's folder or `config.json`, by the names of `Shape`.

    What the configuration leaves out is what its class takes for it.

    Raises:
        SettingError: of `shape`: no configuration of a causal decoder, or layers other than attention and one
            feed-forward network, alike in all layers.
        ImportError: transformers is not installed.
    """
    file = path / "config.json" if path.is_dir() else path
    model = _without_weights(file, path)
    config = model.config
    stacks = (x for x in model.modules() if isinstance(x, nn.ModuleList) and len(x) == config.num_hidden_layers)
    sizes = {_layer_sizes(layer, config) for layer in next(stacks, ())}
    layer = sizes.pop() if len(sizes) == 1 else None
    if layer is None:
        wanted = "a configuration of layers that are alike, each of q, k, v and output projections and one feed-forward"
        raise _error(f"{wanted} network, or numbers", f"{file} of {type(model).__name__}")
    vocabulary, embedding_width = model.get_input_embeddings().weight.shape
    return layer._asdict() | {
        "name": file.resolve().parent.name,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "vocabulary": vocabulary,
        "embedding_width": 0 if embedding_width == config.hidden_size else embedding_width,
    }


def _layer_sizes(layer: nn.Module, config: Any) -> LayerSizes | None:
    """Return the sizes of a layer; None where its matrices are not those of attention and one feed-forward network."""
    # which keeps keys and values in a cache, by the layer's index
    attention = next((x for x in layer.modules() if x is not layer and hasattr(x, "layer_idx")), None)
    if attention is None:
        return None
    width, heads = config.hidden_size, config.num_attention_heads
    head_width = getattr(config, "head_dim", None) or width // heads
    inside = set(attention.modules())
    projections = _matrices(inside)
    network = _matrices(module for module in layer.modules() if module not in inside)
    # what the projections of queries and of the output leave for those of keys and values
    left = sum(map(torch.numel, projections)) - 2 * width * heads * head_width
    kv_heads, rest = divmod(left, 2 * width * head_width)
    if rest or kv_heads < 1 or heads % kv_heads or not network or any(x.ndim > 2 for x in layer.parameters()):
        return None
    # the last one leads back
    ff = network[-1].numel() // width
    into, rest = divmod(sum(map(torch.numel, network)), ff * width)
    if rest or into not in (2, 3):
        return None
    rotary = "position_embeddings" in inspect.signature(attention.forward).parameters
    return LayerSizes(heads, kv_heads, head_width, ff, into == 3, rotary)


def _matrices(modules: Iterable[nn.Module]) -> list[torch.Tensor]:
    """Return the matrices that rows are multiplied by."""
    from transformers.pytorch_utils import Conv1D

    return [module.weight for module in modules if isinstance(module, (nn.Linear, Conv1D))]


def _without_weights(file: Path, path: Path) -> Any:
    """Return the causal language model of a configuration on the meta device; of several modalities, that of text.

    Args:
        file: the configuration.
        path: what the user named it by.

    Raises:
        SettingError: of `shape`: there is none.
    """
    try:
        model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except OSError as error:
        raise _error(
            f"a model's folder, with a config.json that can be read ({error.strerror})", repr(str(path))
        ) from None
    except (ValueError, KeyError, TypeError):
        raise _error("a model's config.json, with its model_type", str(file)) from None
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(str(file), trust_remote_code=False).get_text_config(decoder=True)
        if not config.num_attention_heads or not 0 < config.num_hidden_layers <= MOST_LAYERS:
            got = f"got {config.num_hidden_layers}, and {config.num_attention_heads} heads"
            raise ValueError(f"it must have 1 to {MOST_LAYERS} layers, {got}")
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ZeroDivisionError,
        StrictDataclassError,
    ) as error:
        wanted = "a configuration of a causal language model that transformers knows, or numbers"
        raise _error(wanted, f"{file} of {model_type}: {first_line(error)}") from None


def _error(wanted: str, got: str) -> SettingError:
    return SettingError("shape", f"must be {wanted}; got {got}")
