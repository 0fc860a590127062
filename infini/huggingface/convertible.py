"""Which models and layers can be converted, and for others why not."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...kernels.validation import check_integer
from ..rotary import unrotate
from .families import FAMILIES
from .settings import attention_in, is_converted


def checked_trunk(model: nn.Module) -> Any:
    """Return the module that runs the layers of a model that can be converted; its `config` is the model's.

    Raises:
        TypeError: the model is not a Hugging Face model.
        ValueError: it is converted already, of another type, not a text model, or has cross-attention.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}: convert what it wraps "
            "(model.get_base_model() of PEFT's, model.module of DDP's)"
        )
    if is_converted(model):
        raise ValueError(
            f"model must not be converted yet, got a {type(model).__name__} that is: segattn.revert it first"
        )
    config = model.config.get_text_config(decoder=True)
    if config is not model.config:
        raise ValueError(
            f"model must be a text model, got the {type(model).__name__} around one, which makes masks of its own: "
            "load the text model alone"
        )
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ValueError(f"model must be of a type that can be converted ({known}), got {config.model_type!r}")
    if getattr(config, "add_cross_attention", False):
        raise ValueError(
            "model must attend to its own text alone, got one with cross-attention: load it with "
            "add_cross_attention=False"
        )
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and attention_in(module[0], config) is not None
    ]
    if len(lists) != 1:
        raise ValueError(f"model must have one stack of attention layers, got {len(lists)} in {type(model).__name__}")
    return model.get_submodule(lists[0][0].rpartition(".")[0])


def checked_layers(layers: Iterable[int] | None, depth: int, config: Any, convert_sliding: bool) -> tuple[int, ...]:
    """Return the layers to convert, sorted and counted from 0.

    Args:
        layers: layers to convert, negative ones counted from the end; None: all that can be.
        depth: number of layers of the model.
        config: its configuration, which says what layers have a sliding window.
        convert_sliding: whether those layers are converted too.

    Raises:
        TypeError, ValueError: `layers` holds no integers, is empty, lies outside of the model, or names layers with a
            sliding window though `convert_sliding` is False.
    """
    if layers is not None and not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of integers, got {layers!r}")
    indices = range(depth) if layers is None else [check_integer("layers", layer, -depth) for layer in layers]
    for layer in indices:
        if not -depth <= layer < depth:
            raise ValueError(f"layers must lie in [{-depth}, {depth}), got {layer}")
    indices = sorted({layer % depth for layer in indices})
    if not indices:
        raise ValueError("layers must name at least one layer, got none")
    sliding = [] if convert_sliding else [layer for layer in indices if _slides(config, layer)]
    if sliding and (layers is not None or sliding == indices):
        raise ValueError(
            f"layers {sliding} have a sliding window of {config.sliding_window}: pass convert_sliding=True to give "
            "them segments instead"
        )
    return tuple(layer for layer in indices if layer not in sliding)


def _slides(config: Any, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] != "full_attention"
    return getattr(config, "sliding_window", None) is not None


def check_attention(attention: Any, config: Any, segment_len: int) -> None:
    """Check that the attention of a layer can be converted to segments of this length.

    Raises:
        ValueError: it has no weights, fewer learnt positions than a segment, or a rotary embedding that cannot be
            undone.
    """
    family = FAMILIES[config.model_type]
    check_weights(attention.parameters())
    if family.positions is not None and segment_len > getattr(config, family.positions):
        raise ValueError(
            f"segment_len must be at most the {getattr(config, family.positions)} learnt positions of the model "
            f"({family.positions}), which begin anew with each segment, got {segment_len}"
        )
    if family.rotary and not _rotates_in_halves(attention):
        raise ValueError(
            f"the rotary embedding of {type(attention).__name__} is not the one in halves that can be undone: the "
            "memory must be free of positions"
        )


def check_weights(parameters: Iterable[Tensor]) -> None:
    """Check that parameters have values.

    Raises:
        ValueError: one is on the meta device, as before it is loaded, or while it is offloaded.
    """
    if any(parameter.is_meta for parameter in parameters):
        raise ValueError(
            "model must have its weights, got layers on the meta device: load them, or, of a model that accelerate "
            "offloads, call accelerate.hooks.remove_hook_from_submodules(model) first and offload it again after"
        )


def check_rotary_length(config: Any, segment_len: int) -> None:
    """Check that rotary frequencies do not depend on a call's largest position as long as that is inside a segment.

    Raises:
        ValueError: they do.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind not in ("dynamic", "longrope"):
        return
    most = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    most = most or config.max_position_embeddings
    if segment_len > most:
        raise ValueError(
            f"segment_len must be at most {most}, where the model's {kind!r} rotary embedding begins to depend on the "
            f"length of a call, got {segment_len}: a text in pieces would not equal the whole"
        )


def _rotates_in_halves(attention: nn.Module) -> bool:
    """Return whether `unrotate` undoes the rotary embedding of the model."""
    rotate = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if rotate is None:
        return False
    # whatever the default device and dtype are
    line = partial(torch.linspace, device="cpu", dtype=torch.float32)
    x = line(-1, 1, 2 * 3 * 8).view(1, 2, 3, 8)
    angle = line(0, 5, 3 * 4).view(1, 3, 4).repeat(1, 1, 2)
    rotated, _ = rotate(x, x, angle.cos(), angle.sin())
    return torch.allclose(unrotate(rotated, angle.cos(), angle.sin()), x, atol=1e-5)
