"""Which models and layers can be converted, and for others why not."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ...kernels.validation import check_integer
from .settings import Settings, attentions_in, attentions_of, is_converted, layers_of
from .traits import Traits

# of attention that adds a bias by distance
_BIASES = ("alibi", "position_bias")


def checked_trunk(model: nn.Module) -> Any:
    """Return the module that runs the layers of a model that can be converted; its `config` is the model's.

    Raises:
        TypeError: the model is not a Hugging Face model.
        ValueError: it is converted already, has an encoder too, is not a text model, embeds its tokens elsewhere, has
            cross-attention or a bias by distance, or layers without attention that another function can take the place
            of.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers PreTrainedModel, got {type(model).__name__}: convert what it wraps "
            "(model.get_base_model() of PEFT's, model.module of DDP's)"
        )
    kind = type(model).__name__
    if is_converted(model):
        raise ValueError(f"model must not be converted yet, got a {kind} that is: segattn.revert it first")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"model must be a decoder, got {kind}, an encoder and a decoder, which attends to the encoder's text too: "
            "segattn.RecurrentMemory takes its encoder alone"
        )
    config = model.config.get_text_config(decoder=True)
    if config is not model.config:
        raise ValueError(
            f"model must be a text model, got the {kind} around one, which makes masks of its own: load the text model "
            "alone"
        )
    instead = "segattn.RecurrentMemory(mask='causal') leaves attention as it is"
    parameters = {name for module in model.modules() for name in inspect.signature(module.forward).parameters}
    if parameters.intersection(_BIASES) and getattr(config, "alibi", True):
        raise ValueError(
            f"model must know positions by rotary or learnt embedding, or not at all, got {kind}, which adds a bias by "
            f"distance (ALiBi) to its scores: {instead}"
        )
    trunks = [
        module for module in model.modules() if getattr(module, "config", None) is config and attentions_of(module)
    ]
    if len(trunks) != 1:
        raise ValueError(
            f"model must have one stack of layers with causal attention, got {len(trunks)} in {kind}: "
            "segattn.RecurrentMemory leaves attention as it is"
        )
    if crossing := sorted({type(module).__name__ for layer in layers_of(trunks[0]) for module in _crossing(layer)}):
        off = "load it with add_cross_attention=False" if getattr(config, "add_cross_attention", False) else instead
        raise ValueError(
            f"model must attend to its own text alone, got one with cross-attention: {off} (that of {kind} is "
            f"{', '.join(crossing)})"
        )
    if "inputs_embeds" not in inspect.signature(trunks[0].forward).parameters:
        raise ValueError(
            f"model must embed its tokens in the module that runs its layers, got {kind}, whose "
            f"{type(trunks[0]).__name__} takes no inputs_embeds: {instead}"
        )
    attentions = attentions_of(trunks[0])
    if without := [layer for layer, attention in enumerate(attentions) if attention is None]:
        raise ValueError(
            f"model must have attention in every layer, got {kind}, whose layers {without} have none: they keep a "
            "state of their own, which segattn's caches do not"
        )
    counts = [len(attentions_in(layer, config)) for layer in layers_of(trunks[0])]
    if several := [layer for layer, count in enumerate(counts) if count > 1]:
        raise ValueError(
            f"model must have one causal attention in each layer, got {kind}, whose layers {several} have "
            f"{max(counts)}: {instead}"
        )
    if not hasattr(sys.modules[type(attentions[0]).__module__], "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"model must let its attention be chosen among transformers' attention functions, got {kind}, whose "
            f"{type(attentions[0]).__name__} computes its own: {instead}"
        )
    return trunks[0]


def _crossing(layer: nn.Module) -> list[nn.Module]:
    """Return the cross-attention in a decoder's layer: attention that says of itself that it is, or not causal."""
    return [
        module
        for module in layer.modules()
        if getattr(module, "is_causal", None) is False or getattr(module, "is_cross_attention", None) is True
    ]


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
    indices = _counted("layers", range(depth) if layers is None else layers, depth)
    sliding = [] if convert_sliding else [layer for layer in indices if _slides(config, layer)]
    if sliding and (layers is not None or sliding == indices):
        raise ValueError(
            f"layers {sliding} have a sliding window of {_window(config)}: pass convert_sliding=True to give "
            "them segments instead"
        )
    return tuple(layer for layer in indices if layer not in sliding)


def checked_memory_layers(layers: Iterable[int] | None, depth: int, converted: tuple[int, ...]) -> tuple[int, ...]:
    """Return the layers that get a memory, sorted and counted from 0; None: all converted ones.

    Raises:
        TypeError, ValueError: `layers` holds no integers, is empty, or lies outside of the model.
    """
    return converted if layers is None else tuple(_counted("memory_layers", layers, depth))


def _counted(name: str, layers: Iterable[int], depth: int) -> list[int]:
    """Return layers sorted and counted from 0; at least one.

    Raises:
        TypeError, ValueError: they are no integers, or outside of the model, or there are none.
    """
    if not isinstance(layers, Iterable):
        raise TypeError(f"{name} must be a list of integers, got {layers!r}")
    indices = [check_integer(name, layer, -depth) for layer in layers]
    for layer in indices:
        if not -depth <= layer < depth:
            raise ValueError(f"{name} must lie in [{-depth}, {depth}), got {layer}")
    if not indices:
        raise ValueError(f"{name} must name at least one layer, got none")
    return sorted({layer % depth for layer in indices})


def _slides(config: Any, layer: int) -> bool:
    kinds = getattr(config, "layer_types", None)
    return _window(config) is not None and (kinds is None or kinds[layer] != "full_attention")


def _window(config: Any) -> int | None:
    """Return the tokens of a window or, as in Llama 4, of a chunk; None where a configuration has neither."""
    window: int | None = getattr(config, "sliding_window", None)
    return getattr(config, "attention_chunk_size", None) if window is None else window


def check_learnt_length(config: Any, settings: Settings) -> None:
    """Check that learnt positions suffice for a segment, beyond which nothing is seen.

    Raises:
        ValueError: they do not, or there is a lookback or a sink, which would have the positions of other tokens.
    """
    if settings.lookback or settings.sinks:
        raise ValueError(
            f"lookback and sinks must be 0 for a model with learnt positions, got {settings.lookback} and "
            f"{settings.sinks}, since these begin anew with each segment, and a token keeps its own when it is looked "
            "back at: choose lookback=0 and sinks=0 (--lookback 0 --sinks 0), and a longer segment_len where more is "
            "to be seen"
        )
    if settings.segment_len > (most := config.max_position_embeddings):
        raise ValueError(
            f"segment_len must be at most the {most} learnt positions of the model, which begin anew with each "
            f"segment, got {settings.segment_len}"
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


def check_rotary_length(config: Any, settings: Settings, restart: bool) -> None:
    """Check that rotary frequencies do not depend on a call's largest position as far as positions go.

    Args:
        config: of the model.
        settings: how it is to be converted.
        restart: whether positions start again, with each segment or with each pass.

    Raises:
        ValueError: they do.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    # newer transformers have one for each type of layer
    ropes = [rope, *(x for x in rope.values() if isinstance(x, Mapping))]
    kinds = [(rope, rope.get("rope_type", rope.get("type"))) for rope in ropes]
    rope, kind = next(((rope, kind) for rope, kind in kinds if kind in ("dynamic", "longrope")), (rope, None))
    if kind is None:
        return
    depends = f"the model's {kind!r} rotary embedding begins to depend on the length of a call"
    if settings.lookback or (settings.sinks and not restart):
        same = ", or set rope_type to 'default' in the model's configuration, the same up to its trained length"
        same = same if kind == "dynamic" else ""
        raise ValueError(
            f"lookback must be 0, and for sinks every layer converted, where {depends}, as positions then run on "
            f"through a call, got lookback={settings.lookback}, sinks={settings.sinks}: a text in pieces would not "
            f"equal the whole. Leave them out{same}"
        )
    most = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    most = most or config.max_position_embeddings
    if settings.segment_len + settings.sinks > most:
        sinks = f" and {settings.sinks} sinks" if settings.sinks else ""
        raise ValueError(
            f"segment_len must be at most {most}, where {depends}, got {settings.segment_len}{sinks}: a text in pieces "
            "would not equal the whole"
        )


def check_rotary_calls(layers: Mapping[int, Traits], settings: Settings) -> None:
    """Check that the model can be asked for the rotary embedding of other positions than those of its input.

    Raises:
        ValueError: it cannot, and with a lookback or sinks it would have to.
    """
    if not (settings.lookback or settings.sinks):
        return
    if others := [i for i, traits in layers.items() if traits.rotary is not None and traits.rotary.call is None]:
        raise ValueError(
            f"lookback and sinks must be 0 for a model whose layers {others} get a rotary embedding that no module of "
            f"the model makes of position_ids, got {settings.lookback} and {settings.sinks}"
        )
