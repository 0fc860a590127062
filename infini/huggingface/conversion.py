"""Put segment attention with a memory into a Hugging Face model, on the instance, and take it out again."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from ...kernels.validation import check_bool, check_integer
from ..gate import Gate
from ..rotary import unrotate
from . import forward, interface
from .cache import InfiniCache
from .families import FAMILIES, Family
from .settings import (
    ENTRY,
    GATE,
    IMPLEMENTATION,
    Conversion,
    Settings,
    attach,
    attention_in,
    attentions_of,
    conversion_of,
    detach,
    is_converted,
    trunk_of,
)

Model = TypeVar("Model", bound=nn.Module)
_PREPARE_CACHE = "_prepare_cache_for_generation"


def convert(
    model: Model,
    segment_len: int = 2048,
    update: str = "delta",
    gate_init: float = 0.0,
    layers: Iterable[int] | None = None,
    *,
    convert_sliding: bool = False,
    empty_memory: str = "local",
    backend: str | None = None,
    quiet: bool = False,
) -> Model:
    """Give a pretrained decoder's layers attention inside segments and a memory across them (arXiv 2404.07143).

    Works on this instance, which it returns. Texts of up to one segment give exactly what they gave before; of longer
    ones the model makes little before training has taught it to use its memory. Positions begin anew with each segment
    where every layer is converted or positions are learnt, counted from each row's first token. Each converted layer
    gets a gate, one number per head. The model's configuration becomes its own, if it was shared.

    Args:
        model: a Hugging Face causal language model, or its decoder, with weights; of a type in `segattn.FAMILIES`.
        segment_len: tokens per segment, L, at least 2; at most the number of learnt positions of GPT-2 and OPT.
        update: "delta" or "linear".
        gate_init: β at the start; sigmoid(β) is the share of the memory.
        layers: which to convert, negative ones from the end; default all.
        convert_sliding: also convert layers whose attention has a sliding window, which stay as they are otherwise.
        empty_memory, backend: as in `segment_attention`.
        quiet: say nothing of what was converted.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was; the model is then as before.
    """
    check_bool("convert_sliding", convert_sliding)
    config, trunk = _checked(model)
    family = FAMILIES[config.model_type]
    attentions = attentions_of(trunk)
    chosen = _chosen(layers, attentions, config, convert_sliding)
    settings = Settings(segment_len, update, gate_init, tuple(chosen), empty_memory, backend)
    for layer in chosen:
        _check_attention(attentions[layer], config, family, segment_len)
    # with learnt positions there are no others; turned ones must go on where layers that were left look further back
    restart = not family.rotary or len(chosen) == len(attentions)
    if restart:
        _check_rotary_length(config, segment_len)
    inputs = tuple(inspect.signature(trunk.forward).parameters)
    conversion = Conversion(settings, len(attentions), config._attn_implementation, restart, inputs)

    interface.register()
    config = _own_config(model, config)
    setattr(config, ENTRY, settings.as_entry() | {"native": list(conversion.native)})
    config._attn_implementation = IMPLEMENTATION
    attach(trunk, conversion)
    keep = conversion.handles.append
    keep(trunk.register_forward_pre_hook(forward.begin, with_kwargs=True))
    keep(trunk.register_forward_hook(forward.finish, with_kwargs=True))
    for layer, attention in enumerate(attentions):
        keep(attention.register_forward_pre_hook(forward.bring_rotary, with_kwargs=True))
        if layer in chosen:
            setattr(attention, GATE, _gate(attention, config.num_attention_heads, gate_init))
    if hasattr(model, _PREPARE_CACHE):
        setattr(model, _PREPARE_CACHE, partial(_prepare_cache, model))
    if not quiet:
        print(f"converted {len(chosen)}/{len(attentions)} attention layers of {type(model).__name__}", file=sys.stderr)  # noqa: T201
    return model


def revert(model: Model) -> Model:
    """Undo `convert`: the model is what it was, to the bit, and its gates are gone.

    Returns:
        The model.

    Raises:
        ValueError: it is not converted.
    """
    conversion, trunk = conversion_of(model), trunk_of(model)
    for handle in conversion.handles:
        handle.remove()
    for attention in attentions_of(trunk):
        if hasattr(attention, GATE):
            delattr(attention, GATE)
    trunk.config._attn_implementation = conversion.original
    delattr(trunk.config, ENTRY)
    for module in model.modules():
        module.__dict__.pop(_PREPARE_CACHE, None)
    detach(trunk)
    return model


def _gate(attention: nn.Module, heads: int, init: float) -> Gate:
    # a parameter made in inference mode could never be trained
    with torch.inference_mode(False):
        return Gate(heads, init).to(next(attention.parameters()).device)


def _own_config(model: nn.Module, shared: Any) -> Any:
    """A configuration of this model alone: others may have been made of the same one."""
    config = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    return config


def _checked(model: nn.Module) -> tuple[Any, Any]:
    """The text configuration, and the module that runs the layers."""
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
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and attention_in(module[0], config) is not None
    ]
    if len(lists) != 1:
        raise ValueError(f"model must have one stack of attention layers, got {len(lists)} in {type(model).__name__}")
    name = lists[0][0]
    return config, model.get_submodule(name.rpartition(".")[0])


def _chosen(layers: Iterable[int] | None, attentions: list[Any], config: Any, convert_sliding: bool) -> list[int]:
    depth = len(attentions)
    if layers is not None and not isinstance(layers, Iterable):
        raise TypeError(f"layers must be a list of integers, got {layers!r}")
    asked = range(depth) if layers is None else [check_integer("layers", layer, -depth) for layer in layers]
    for layer in asked:
        if not -depth <= layer < depth:
            raise ValueError(f"layers must lie in [{-depth}, {depth}), got {layer}")
    asked = sorted({layer % depth for layer in asked})
    if not asked:
        raise ValueError("layers must name at least one layer, got none")
    kept = [layer for layer in asked if convert_sliding or not _slides(config, layer)]
    if not kept or (layers is not None and kept != asked):
        left = sorted(set(asked) - set(kept))
        raise ValueError(
            f"layers {left} have a sliding window of {config.sliding_window}: pass convert_sliding=True to give them "
            "segments instead"
        )
    return kept


def _slides(config: Any, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return kinds[layer] != "full_attention"
    return getattr(config, "sliding_window", None) is not None


def _check_attention(attention: Any, config: Any, family: Family, segment_len: int) -> None:
    if any(parameter.is_meta for parameter in attention.parameters()):
        raise ValueError("model must have its weights, got layers on the meta device: load them, then convert")
    if family.positions is not None and segment_len > getattr(config, family.positions):
        raise ValueError(
            f"segment_len must be at most the {getattr(config, family.positions)} learnt positions of the model "
            f"({family.positions}), which begin anew with each segment, got {segment_len}"
        )
    if family.rotary and not _turns_in_halves(attention):
        raise ValueError(
            f"the rotary embedding of {type(attention).__name__} is not the one in halves that can be undone: the "
            "memory must be free of positions"
        )


def _check_rotary_length(config: Any, segment_len: int) -> None:
    """Frequencies that depend on a call's largest position must not do so inside a segment."""
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


def _turns_in_halves(attention: nn.Module) -> bool:
    """Whether the model's own rotary embedding is what `unrotate` undoes."""
    turn = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if turn is None:
        return False
    x = torch.linspace(-1, 1, 2 * 3 * 8).view(1, 2, 3, 8)
    angle = torch.linspace(0, 5, 3 * 4).view(1, 3, 4).repeat(1, 1, 2)
    turned, _ = turn(x, x, angle.cos(), angle.sin())
    return torch.allclose(unrotate(turned, angle.cos(), angle.sin()), x, atol=1e-5)


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """`generate` makes its cache here: ours where it would have made one that grows."""
    getattr(type(model), _PREPARE_CACHE)(model, generation_config, model_kwargs, *args, **kwargs)
    if type(model_kwargs.get("past_key_values")) is DynamicCache:
        cache = InfiniCache(model)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs["past_key_values"] = cache
