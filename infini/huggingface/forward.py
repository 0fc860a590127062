"""The hooks of a converted model: before a forward pass they hand it to every layer, after it they write the cache."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...runs.untrained import warn_untrained
from .cache import InfiniCache
from .forward_pass import ARGUMENT, ROTARY, Carried, ForwardPass
from .inputs import cache_of, check_arguments, check_tokens, is_on, set_positions, token_columns
from .interface import IMPLEMENTATION
from .packing import packed_sequences
from .parallel import begin_on_ranks, ranks_of, refuse_other_schemes
from .rows import Rows
from .settings import Conversion, conversion_of
from .static_cache import StaticInfiniCache
from .window import window_of

# the argument of layers and of their attention that gets to every attention function
MASK = "attention_mask"


def begin(trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Begin a forward pass: the pre-hook of the module that runs the layers.

    Raises:
        ValueError, RuntimeError: an argument cannot go with a converted model, or another implementation of attention
            or another scheme of splitting texts is on.

    Warns:
        UntrainedMemoryWarning: once, in training: no text of the pass is longer than a segment.
    """
    conversion = conversion_of(trunk)
    inputs = dict(zip(conversion.inputs, args, strict=False)) | kwargs
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    if tokens is None:
        return args, kwargs
    if is_on(inputs, trunk.config, "output_attentions"):
        raise ValueError(
            "output_attentions must be False: segment attention never has the weights; segattn.revert first"
        )
    if trunk.config._attn_implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"the model's attention must be {IMPLEMENTATION!r}, got {trunk.config._attn_implementation!r}, which was "
            f"set after convert: call segattn.revert first, or set_attn_implementation({IMPLEMENTATION!r}) to go on"
        )
    check_arguments({name: x for name, x in inputs.items() if name not in conversion.inputs}, "the call")
    if inputs.get("is_causal") is False:
        raise ValueError("is_causal must be True for a converted model, whose memory holds what came before, got False")
    refuse_other_schemes()
    limit = conversion.settings.without_memory
    if (ranks := ranks_of(trunk)) is not None:
        time = begin_on_ranks(trunk, conversion, ranks, inputs, tokens)
        inputs[ARGUMENT] = ForwardPass(conversion, ranks=ranks)
        warn_untrained(trunk, limit, lambda: time, how="convert")
        return (), inputs
    check_tokens(trunk, inputs)
    # with a cache that the call asks for, a later piece may bring a row its first token
    begins = bool(inputs.get("use_cache")) or inputs.get("past_key_values") is not None
    cache = cache_of(trunk, conversion, inputs, tokens.shape[0])
    if isinstance(cache, StaticInfiniCache) and tokens.shape[1] == 1 and inputs.get("cu_seq_lens_q") is None:
        inputs["position_ids"] = cache.positions()
        inputs[ARGUMENT] = ForwardPass(conversion, static=cache)
    else:
        inputs[ARGUMENT] = forward = _begin_columns(trunk, conversion, cache, inputs, tokens, begins)
        if forward.cache is None:
            warn_untrained(trunk, limit, partial(_longest_text, forward, inputs), how="convert")
    return (), inputs


def rename(
    name: str, to: str, trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Call an argument by another name: a pre-hook of the module that runs the layers."""
    return args, {to if key == name else key: x for key, x in kwargs.items()}


def _begin_columns(
    trunk: nn.Module,
    conversion: Conversion,
    cache: InfiniCache | StaticInfiniCache | None,
    inputs: dict[str, Any],
    tokens: Tensor,
    begins: bool,
) -> ForwardPass:
    """Return the pass over new columns [B, T], and set its positions and cache among the inputs.

    begins: whether more columns may follow, so that a row may have no token yet.
    """
    (batch, time), settings = tokens.shape[:2], conversion.settings
    rows = Rows.fresh(batch) if cache is None or cache.is_empty() else cache.rows
    columns = token_columns(inputs.get("attention_mask"), rows, time, begins)
    packed = packed_sequences(inputs, rows, columns, time, tokens.device)
    if packed is not None and cache is not None:
        if inputs.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values must be None for packed sequences, which end at different places of a segment"
            )
        cache, inputs["use_cache"] = None, False
    # a segment more is kept where tokens may be taken back
    keep = settings.lookback + (cache is not None and cache.recording)
    after = rows.after(columns, time, settings.segment_len, keep=keep)
    if isinstance(cache, StaticInfiniCache) and not after.open:
        raise ValueError("attention_mask must end with ones for a static cache, got padding on the right")
    width = max(rows.tails, default=0) + time if packed is None else batch * time
    inputs["past_key_values"] = cache
    set_positions(inputs, conversion, rows, columns, packed, tokens)
    return ForwardPass(
        conversion,
        cache=cache,
        rows=rows,
        after=after,
        spans=None if packed is not None else rows.spans(columns, time, tokens.device),
        cu_seqlens=packed,
        window=window_of(trunk, conversion, rows, after, width, packed is not None, tokens.device),
        states=None if cache is None else cache.states,
    )


def _longest_text(forward: ForwardPass, inputs: dict[str, Any]) -> int:
    """Return the number of tokens of the longest text of a pass."""
    if forward.cu_seqlens is None:
        return max(forward.after.lengths)
    if (longest := inputs.get("max_length_q")) is not None:
        return int(longest)
    return int(forward.cu_seqlens.diff().max())


def finish(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Write what the layers have left into the cache: the forward hook of the same module.

    Raises:
        RuntimeError: a converted layer did not run, or another one has not written into the cache.
    """
    forward = kwargs.get(ARGUMENT)
    if forward is None:
        return
    if forward.static is not None:
        forward.static.advance()
    elif forward.cache is not None:
        if missing := sorted(set(forward.states) - set(forward.left)):
            raise RuntimeError(f"layers {missing} did not run, so the cache cannot go on: turn layer dropping off")
        layers = forward.cache.layers
        if short := [i for i in forward.conversion.native if layers[i].get_seq_length() != forward.after.columns]:
            raise RuntimeError(
                f"layers {short}, which are not converted, left no keys and values in past_key_values, so it cannot go "
                "on: turn gradient checkpointing off, with which transformers keeps none, or convert these layers too"
            )
        forward.cache.commit(forward.after, forward.left)


def begin_layer(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Begin a layer that hands nothing but its mask on to attention, which carries the pass: its pre-hook."""
    forward = kwargs.get(ARGUMENT)
    return args, kwargs if forward is None else {**kwargs, MASK: Carried(kwargs.get(MASK), forward)}


def begin_attention(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Begin a layer's attention: its pre-hook.

    Raises:
        ValueError: the layer runs without gradients inside a pass with them, whose state would lose its own.
    """
    carried = kwargs.get(MASK)
    forward = carried.forward if isinstance(carried, Carried) else kwargs.get(ARGUMENT)
    if forward is not None and forward.in_graph and not torch.is_grad_enabled():
        raise ValueError(
            "model must checkpoint gradients with use_reentrant=False where past_key_values is kept, as the other way "
            "loses the state's gradient: call gradient_checkpointing_enable(gradient_checkpointing_kwargs="
            "{'use_reentrant': False}), wrap layers with CheckpointImpl.NO_REENTRANT, or pass use_cache=False"
        )
    if isinstance(carried, Carried):
        return args, {**kwargs, MASK: carried._replace(rotary=kwargs.get("position_embeddings"))}
    return bring_rotary(attention, args, kwargs)


def bring_rotary(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Pass the rotary angles on to a layer's attention function: a pre-hook of its attention, which would not."""
    return args, {**kwargs, ROTARY: kwargs.get("position_embeddings")}
