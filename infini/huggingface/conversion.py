"""Put segment attention with a memory into a Hugging Face model instance, and take it out again."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from ...kernels.validation import check_bool
from ..gate import Gate
from ..memory_map import MemoryMap
from . import forward, generation, labels
from .convertible import (
    check_learnt_length,
    check_rotary_calls,
    check_rotary_length,
    check_weights,
    checked_layers,
    checked_memory_layers,
    checked_trunk,
)
from .interface import IMPLEMENTATION
from .probe import probe
from .settings import (
    ENTRY,
    GATE,
    MAP_K,
    MAP_Q,
    MEMORY,
    PAST,
    Conversion,
    Settings,
    attentions_of,
    cache_name,
    conversion_of,
    forget,
    layers_of,
    record,
    trunk_of,
)
from .traits import Traits

Model = TypeVar("Model", bound=nn.Module)


class LayerGate(Gate):
    """The gate of a converted layer, which shows the layer's settings in `print(model)`."""

    def __init__(self, heads: int, settings: Settings) -> None:
        super().__init__(heads, settings.gate_init)
        self.settings = settings

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        settings = self.settings
        window = (
            f", lookback={settings.lookback}, sinks={settings.sinks}" if settings.lookback or settings.sinks else ""
        )
        return f"{super().extra_repr()}, segment_len={settings.segment_len}, update={settings.update!r}{window}"


def convert(
    model: Model,
    segment_len: int = 2048,
    update: str = "delta",
    gate_init: float = -4.0,
    layers: Iterable[int] | None = None,
    *,
    convert_sliding: bool = False,
    lookback: int = 0,
    sinks: int = 0,
    memory_maps: bool = False,
    memory_layers: Iterable[int] | None = None,
    empty_memory: str = "local",
    backend: str | None = None,
    quiet: bool = False,
) -> Model:
    """Give a pretrained decoder attention inside segments and a memory across them.

    This is Infini-attention, arXiv 2404.07143, equations 6 to 10. The model is changed in place: each converted layer
    with a memory gets a gate β, one number per query head, float32 [H].

    On texts of up to one segment the model gives the logits that it gave before, up to rounding: the same bits where
    its attention was PyTorch's ("sdpa") and no row is padded on the left; otherwise they differ by up to 2e-7 where
    they are of order 1, in float32. Of longer texts it makes little before it is trained to use its memory.

    Positions are counted from the first token of each row. They start again from 0 with each segment where every layer
    is converted or positions are learnt. With a lookback a key is seen from two segments: where every layer is
    converted, a pass then begins at position 0 with the first token that is not in the memory, and positions run on
    through it; the keys that a cache keeps are rotated anew for the next one. Sinks stand just before the window. So
    rotary distances are those in a cache of sinks and window alone, at most (1 + lookback) · L + sinks: choose these
    within the length that the model was trained on.

    The model gets a copy of its configuration, which other models may share.

    As `past_key_values` the model then takes an `InfiniCache` or a `StaticInfiniCache`, and makes the former where it
    is passed none. It refuses any other cache, an empty one too, since it could not fill it. `generate` makes an
    `InfiniCache` where the model that it is called on is the one that was converted, not only the decoder inside.

    Args:
        model: a Hugging Face causal language model, or its decoder alone, with weights. Its attention must call
            transformers' attention functions, and know positions by rotary or learnt embedding, or not at all. It is
            run on a few rows to find that out.
        segment_len: tokens per segment, L, at least 2, and at most the number of learnt positions, where a model has
            them.
        update: how the memory is written, "delta" or "linear" (equations 9 and 8).
        gate_init: initial value of β; sigmoid(β) is the weight of the memory. At -4, 0.018, an untrained memory hardly
            disturbs a pretrained model; at 0, as for a model from scratch, it gives more than twice the perplexity.
        layers: layers to convert, negative ones counted from the end; default all, except those with a sliding window.
        convert_sliding: also convert layers that have a sliding window.
        lookback: 1 lets a token also see the whole segment before its own, which the memory then holds one segment
            later; 0 or 1. As in `segment_attention`.
        sinks: the number of a text's first tokens that all later ones see, at most L.
        memory_maps: give the memory of each layer a learnt map of its queries and of its keys, one for each head
            (`MemoryMap`), the identity at first; float32.
        memory_layers: converted layers that have a memory, negative ones counted from the end; the others see their
            segments, lookback and sinks alone, and have no gate. Default: all converted layers.
        empty_memory, backend: as in `segment_attention`.
        quiet: do not report on stderr how many layers were converted.

    Returns:
        The same model.

    Raises:
        TypeError, ValueError: the model or a layer cannot be converted, or an argument is out of its range; the model
            is left unchanged.
    """
    check_bool("convert_sliding", convert_sliding)
    trunk = checked_trunk(model)
    config, attentions = trunk.config, attentions_of(trunk)
    chosen = checked_layers(layers, len(attentions), config, convert_sliding)
    remembering = checked_memory_layers(memory_layers, len(attentions), chosen)
    settings = Settings(
        segment_len,
        update,
        gate_init,
        chosen,
        empty_memory,
        backend,
        lookback=lookback,
        sinks=sinks,
        memory_maps=memory_maps,
        memory_layers=remembering,
    )
    for module in (trunk.get_input_embeddings(), *(attentions[layer] for layer in chosen)):
        check_weights(module.parameters())
    traits, learnt = probe(trunk, attentions, chosen, None if lookback else settings.segment_len)
    # learnt positions end with a segment; rotary ones must go on where layers that were not converted look further back
    restart = learnt or len(chosen) == len(attentions)
    if learnt:
        check_learnt_length(config, settings)
    if restart or lookback or sinks:
        check_rotary_length(config, settings, restart)
    check_rotary_calls(traits, settings)
    past = cache_name(trunk)
    inputs = tuple(PAST if name == past else name for name in inspect.signature(trunk.forward).parameters)
    original = config._attn_implementation
    if original == IMPLEMENTATION:
        # the model was made from the configuration of a converted one
        original = trunk.get_correct_attn_implementation(None)
    conversion = Conversion(settings, len(attentions), traits, original, restart, inputs)

    config = _own_config(model, config)
    setattr(config, ENTRY, conversion.as_entry())
    config._attn_implementation = IMPLEMENTATION
    record(trunk, conversion)
    keep = conversion.handles.append
    for hook in (partial(forward.rename, past, PAST), forward.begin, partial(forward.rename, PAST, past)):
        if hook is forward.begin or past != PAST:
            keep(trunk.register_forward_pre_hook(hook, with_kwargs=True))
    keep(trunk.register_forward_hook(forward.finish, with_kwargs=True))
    for attention in attentions:
        keep(attention.register_forward_pre_hook(forward.begin_attention, with_kwargs=True))
    for layer in remembering:
        _add_memory(attentions[layer], traits[layer], settings)
    if not all(layer.hands_on for layer in traits.values()):
        for module in layers_of(trunk):
            keep(module.register_forward_pre_hook(forward.begin_layer, with_kwargs=True))
    if names := labels.arguments_with_labels(model):
        keep(model.register_forward_pre_hook(partial(labels.check, names, trunk), with_kwargs=True))
    generation.take_over(model)
    if not quiet:
        print(f"converted {len(chosen)}/{len(attentions)} attention layers of {type(model).__name__}", file=sys.stderr)  # noqa: T201
    return model


def revert(model: Model) -> Model:
    """Undo `convert`: remove the gates and all else that it added; the model again gives the same bits as before it.

    Args:
        model: a converted model; it is changed in place.

    Returns:
        The same model.

    Raises:
        ValueError: the model is not converted.
    """
    conversion, trunk = conversion_of(model), trunk_of(model)
    for handle in conversion.handles:
        handle.remove()
    for attention in attentions_of(trunk):
        for name in MEMORY:
            if hasattr(attention, name):
                delattr(attention, name)
    trunk.config._attn_implementation = conversion.original
    delattr(trunk.config, ENTRY)
    generation.give_back(model)
    forget(trunk)
    return model


def _add_memory(attention: nn.Module, traits: Traits, settings: Settings) -> None:
    """Give an attention its gate and, where they are asked for, its maps."""
    # a parameter made in inference mode could never be trained
    with torch.inference_mode(False), next(attention.parameters()).device:
        setattr(attention, GATE, LayerGate(traits.heads, settings))
        if settings.memory_maps:
            setattr(attention, MAP_Q, MemoryMap(traits.heads, traits.key_width))
            setattr(attention, MAP_K, MemoryMap(traits.groups, traits.key_width))


def _own_config(model: nn.Module, shared: Any) -> Any:
    """Give the model a copy of its configuration, of which other models may have been made, and return the copy."""
    config = copy.deepcopy(shared)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = config
    return config
