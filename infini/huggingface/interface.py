"""The attention and mask functions of a converted model, registered with transformers under one name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...kernels.attention import segment_attention
from ...kernels.memory import memory_write
from ...kernels.sequence_parallel import sequence_parallel_attention
from ...kernels.state import MemoryState, SegmentOutput
from ...kernels.validation import state_dtype
from .cache_layer import LayerState
from .forward_pass import Carried, ForwardPass
from .inputs import check_arguments
from .packing import sequence_of_columns
from .settings import ENTRY, GATE, MAP_K, MAP_Q, Settings
from .watching import AttentionCall

# the name of attention in a converted model's configuration
IMPLEMENTATION = "segattn"
NOT_CONVERTED = (
    f"a model whose configuration has the attention {IMPLEMENTATION!r} must be converted, got one that is not, such as "
    "one made from a converted model's configuration: call segattn.convert, or make a plain model from "
    "type(config).from_dict(config.to_dict())"
)


class NativeMask(NamedTuple):
    """The arguments of a mask for layers that were not converted, built only where such a layer asks for it."""

    arguments: dict[str, Any]

    def build(self, implementation: str, bounds: Tensor | None) -> Any:
        """Return the mask in the form that this implementation of attention takes.

        Args:
            implementation: its name.
            bounds: of packed sequences, int32 [N + 1], of which some models (GPT-OSS) say nothing when they ask for a
                mask; None: nothing is packed.
        """
        changes = {} if bounds is None else _apart(self.arguments, bounds)
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**(self.arguments | changes))


def _apart(arguments: dict[str, Any], bounds: Tensor) -> dict[str, Any]:
    """Return those arguments of a mask that keep packed sequences apart, whose columns are those of the mask."""
    batch, time = arguments["batch_size"], arguments["kv_length"]
    sequences, visible = sequence_of_columns(bounds, batch, time), arguments["mask_function"]

    def within(row: Any, head: Any, query: Any, key: Any) -> Any:
        same = sequences[row, query] == sequences[row, key]
        return visible(row, head, query, key) & same

    # without a mask, attention would be causal across them
    return {"mask_function": within, "allow_is_causal_skip": False}


def segment_mask(*args: Any, **kwargs: Any) -> Any:
    """Return the padding mask [B, T] of the new columns, or None; converted layers get their bounds with the pass.

    `generate` makes masks ahead of a compiled step, whose inputs must keep their shape.

    Raises:
        RuntimeError: the model was not converted.
    """
    entry = getattr(kwargs["config"], ENTRY, None)
    if entry is None:
        raise RuntimeError(NOT_CONVERTED)
    if entry["native"]:
        return NativeMask(kwargs)
    mask = kwargs.get("attention_mask")
    # transformers before version 5 passes the positions of the new columns
    time = kwargs["q_length"] if "q_length" in kwargs else len(kwargs["cache_position"])
    return None if mask is None else mask[:, -time:]


def segment_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    cache: Any = None,
    segattn_pass: ForwardPass | None = None,
    segattn_rotary: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Run the attention of one layer, converted or not, as transformers calls it.

    Args:
        module: the layer's attention.
        query: [B, H, T, K], after rotary embedding.
        key, value: [B, G, T, K] and [B, G, T, V].
        attention_mask: what `segment_mask` returned, and with it the pass and the rotary embedding, where other
            arguments do not get here.
        scaling, dropout, softcap: of the local scores.
        s_aux: [H], learnt sink logits, as `sink_logits` in `segment_attention`.
        cache: transformers' paged cache, which is refused.
        segattn_pass: the forward pass.
        segattn_rotary: the rotary embedding: cosine and sine, or one complex tensor of both.
        kwargs: for the attention of layers that were not converted; converted ones take those without effect.

    Returns:
        The output [B, T, H, V], and attention weights, which are None for a converted layer.

    Raises:
        RuntimeError: the model was not converted.
        ValueError: there is a paged cache, dropout in training, or an argument that a converted layer does not take.
    """
    if isinstance(attention_mask, Carried):
        attention_mask, segattn_pass, segattn_rotary = attention_mask
    if segattn_pass is None:
        raise RuntimeError(NOT_CONVERTED)
    if cache is not None:
        raise ValueError(
            "cache must be None: a paged cache (continuous batching) cannot hold a memory; use InfiniCache"
        )
    # looked up in dictionaries and attributes, since torch.compile may take an index in a tuple for one that is not
    if module.layer_idx not in segattn_pass.conversion.traits:
        implementation = segattn_pass.conversion.original
        native = isinstance(attention_mask, NativeMask)
        mask = attention_mask.build(implementation, segattn_pass.cu_seqlens) if native else attention_mask
        optional = {"softcap": softcap, "s_aux": s_aux}
        options = {"scaling": scaling, "dropout": dropout, **kwargs}
        options |= {name: x for name, x in optional.items() if x is not None}
        return _native(module, implementation)(module, query, key, value, mask, **options)
    check_arguments(kwargs, f"its {type(module).__name__}")
    if dropout:
        raise ValueError(
            f"attention dropout must be 0 in training, got {dropout}: set it to 0 in the configuration before loading "
            "(attention_dropout, or attn_pdrop of GPT-2)"
        )
    scores = scaling, softcap, s_aux
    watcher, run = segattn_pass.conversion.watcher, partial(_run_converted, module, *scores, segattn_pass)
    if watcher is None:
        out = run(query, key, value, segattn_rotary)
    else:
        out = watcher(AttentionCall(module, query, key, value, *scores, run, segattn_rotary))
    # as all of transformers' attention functions return it
    return out.transpose(1, 2).contiguous(), None


def _native(module: nn.Module, implementation: str) -> Callable[..., Any]:
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _run_converted(
    module: Any,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
    forward: ForwardPass,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotary: Any,
) -> Tensor:
    """Return the output [B, H, T, V] of a converted layer, and leave its state with the pass."""
    settings, layer, window = forward.conversion.settings, module.layer_idx, forward.window
    gate = getattr(module, GATE)() if hasattr(module, GATE) else None
    traits = forward.conversion.traits[layer]
    if traits.rotary is not None and rotary is None:
        raise RuntimeError(f"{type(module).__name__} must be called with position_embeddings by name, got none")
    memory_q, memory_k = traits.without_positions(q, k, rotary)
    if forward.static is not None:
        mapped_q = getattr(module, MAP_Q)(memory_q).detach() if hasattr(module, MAP_Q) else memory_q
        return forward.static.layers[layer].step(gate, q, k, v, mapped_q, memory_k, scale, softcap, sink_logits)
    state = forward.states[layer]
    if state is not None and forward.cache is not None:
        _check_state(state, k)
        k, memory_k, v = forward.cache.layers[layer].joined(state, (k, memory_k, v))
    packed, batch = forward.cu_seqlens is not None, q.shape[0]
    if packed:
        q, k, v, memory_q, memory_k = (_end_to_end(x) for x in (q, k, v, memory_q, memory_k))
    sinks = None if window is None else window.sinks(state, memory_k, v, forward.bounds)
    mapped_q, mapped_k = _mapped(module, settings, memory_q, memory_k)
    out, memory = _operation(forward, gate, q.device)(
        q,
        k,
        v,
        gate=gate,
        memory_q=mapped_q,
        memory_k=mapped_k,
        state=None if state is None else state.memory,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        **({} if window is None else window.arguments(traits, sinks, k, v)),
    )
    if packed:
        return out.unflatten(2, (batch, -1)).squeeze(0).transpose(0, 1)
    if forward.cache is not None:
        if forward.cache.recording and memory is not None:
            memory = _folded(forward, state, mapped_k, v)
        left = _left(memory, k, memory_k, v, max(forward.after.tails), state is not None)
        forward.left[layer] = left if window is None else window.left(traits, left, sinks)
    return out


def _operation(forward: ForwardPass, gate: Tensor | None, device: torch.device) -> Callable[..., SegmentOutput]:
    """Return `segment_attention` with those of its arguments that all layers share; over ranks, where they exchange."""
    settings = forward.conversion.settings
    operation: Callable[..., SegmentOutput] = segment_attention
    # without a memory there is nothing to exchange
    if forward.ranks is not None and gate is not None:
        operation = partial(sequence_parallel_attention, group=forward.ranks, want_state=False, check_ranks=False)
    return partial(
        operation,
        segment_len=settings.segment_len,
        update=settings.update,
        cu_seqlens=None if forward.cu_seqlens is None else forward.cu_seqlens.to(device),
        spans=None if forward.spans is None else forward.spans.to(device),
        empty_memory=settings.empty_memory,
        backend=settings.backend,
    )


def _mapped(module: Any, settings: Settings, memory_q: Tensor, memory_k: Tensor) -> tuple[Tensor, Tensor]:
    """Return what a layer's memory is read and written by: queries and keys after its maps, where it has any."""
    if not hasattr(module, MAP_K):
        return memory_q, memory_k
    writes = memory_k.shape[2] // settings.segment_len > settings.lookback
    # a call without a whole segment to write does not look at the keys, of which decoding would map all at each step
    mapped_k = getattr(module, MAP_K)(memory_k) if writes or torch.is_grad_enabled() else memory_k
    return getattr(module, MAP_Q)(memory_q), mapped_k


def _check_state(state: LayerState, k: Tensor) -> None:
    heads, width = state.keys.shape[1], state.keys.shape[3]
    if (heads, width) != (k.shape[1], k.shape[3]):
        raise ValueError(
            f"past_key_values must hold {k.shape[1]} key heads of width {k.shape[3]}, got {heads} of {width}: it "
            "is of another model"
        )


def _end_to_end(x: Tensor) -> Tensor:
    """Lay the rows of x [B, heads, T, ·] end to end, [1, heads, B · T, ·]."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _left(memory: MemoryState | None, k: Tensor, memory_k: Tensor, v: Tensor, tail: int, joined: bool) -> LayerState:
    """Return the state after a pass: the memory, and the last `tail` columns."""
    whole = LayerState(memory, k, memory_k, v)
    if joined and k.shape[2] == tail:
        # new tensors already
        return whole
    parts = (x[:, :, x.shape[2] - tail :] for x in whole.tail)
    # cloned, so that the rest of a long piece is not kept alive
    keys, memory_keys, values = (x.clone() for x in parts)
    return LayerState(memory, keys, memory_keys, values)


def _folded(forward: ForwardPass, state: LayerState | None, memory_k: Tensor, v: Tensor) -> MemoryState:
    """Return the memory with only those segments written that the pass folds: not the last completed one."""
    settings = forward.conversion.settings
    length, update, backend = settings.segment_len, settings.update, settings.backend
    if state is None or state.memory is None:
        batch, groups, _, width = memory_k.shape
        memory = MemoryState.zeros(batch, groups, width, v.shape[3], device=v.device, dtype=state_dtype(v))
    else:
        memory = state.memory
    before, after = forward.rows.folded, forward.after.folded
    segments = {(end - begin) // length for begin, end in zip(before, after, strict=True)}
    if len(segments) > 1:
        raise ValueError("assisted decoding must be of rows of one length, got padded ones: generate each by itself")
    for segment in range(segments.pop()):
        columns = slice(segment * length, (segment + 1) * length)
        memory = memory_write(memory_k[:, :, columns], v[:, :, columns], memory, update=update, backend=backend)
    return memory


# at import, so that a pickled model, whose hooks import this module, finds both functions in a new process
AttentionInterface.register(IMPLEMENTATION, segment_attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, segment_mask)
