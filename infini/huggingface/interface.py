"""Segment attention as transformers calls attention, and the mask that goes with it: both registered under one name."""

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
from ..rotary import unrotate
from .cache import InfiniLayer, LayerState
from .families import FAMILIES
from .forward import Call
from .settings import ENTRY, GATE, IMPLEMENTATION
from .static_cache import StaticInfiniCache


class NativeMask(NamedTuple):
    """The mask that layers left as they were ask for, made only where one does."""

    arguments: dict[str, Any]

    def made(self, implementation: str) -> Any:
        """As that implementation wants it."""
        return ALL_MASK_ATTENTION_FUNCTIONS[implementation](**self.arguments)


def segment_mask(*args: Any, **kwargs: Any) -> Any:
    """The new columns' padding mask [B, T], or None: converted layers get their bounds with the call.

    `generate` makes masks ahead of a compiled step, whose inputs must keep their shape.
    """
    if kwargs["config"].__dict__[ENTRY]["native"]:
        return NativeMask(kwargs)
    mask = kwargs.get("attention_mask")
    # before transformers 5, the new columns' positions
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
    cache: Any = None,
    segattn_call: Call | None = None,
    segattn_rotary: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """query [B, H, T, K], key and value [B, G, T, ·] → [B, T, H, V]."""
    if segattn_call is None:
        raise RuntimeError(
            f"{type(module).__name__} was not told of the call: the model does not pass arguments on to its attention"
        )
    if cache is not None:
        raise ValueError(
            "cache must be None: a paged cache (continuous batching) cannot hold a memory; use InfiniCache"
        )
    if not hasattr(module, GATE):
        implementation = segattn_call.conversion.original
        mask = attention_mask.made(implementation) if isinstance(attention_mask, NativeMask) else attention_mask
        rest = {"scaling": scaling, "dropout": dropout, **kwargs} | ({} if softcap is None else {"softcap": softcap})
        return _native(module, implementation)(module, query, key, value, mask, **rest)
    if dropout:
        raise ValueError(
            f"attention dropout must be 0 in training, got {dropout}: set it to 0 in the configuration before loading "
            "(attention_dropout, or attn_pdrop of GPT-2)"
        )
    out = _attend(module, query, key, value, scaling, softcap, segattn_call, segattn_rotary)
    return out.transpose(1, 2), None


def _native(module: nn.Module, implementation: str) -> Callable[..., Any]:
    if implementation == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[implementation]


def _attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    softcap: float | None,
    call: Call,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    settings, layer = call.conversion.settings, module.layer_idx
    family = FAMILIES[module.config.model_type]
    memory_q = q / module.scaling if family.scaled_queries else q
    memory_k = k
    if family.rotary:
        if rotary is None:
            raise RuntimeError(f"{type(module).__name__} was given no position_embeddings by name")
        memory_q, memory_k = unrotate(memory_q, *rotary), unrotate(memory_k, *rotary)
    if isinstance(call.cache, StaticInfiniCache) and call.step:
        return call.cache.layers[layer].step(module, q, k, v, memory_q, memory_k, scale, softcap)
    state = call.states[layer]
    if state is not None:
        _check_state(state, k)
        k, memory_k, v = _joined(call.cache, layer, state, (k, memory_k, v))
    packed = call.cu_seqlens is not None
    if packed:
        batch = q.shape[0]
        q, k, v, memory_q, memory_k = (_end_to_end(x) for x in (q, k, v, memory_q, memory_k))
    attend: Callable[..., SegmentOutput] = segment_attention
    if call.ranks is not None:
        attend = partial(sequence_parallel_attention, group=call.ranks, want_state=False, check_ranks=False)
    out, memory = attend(
        q,
        k,
        v,
        segment_len=settings.segment_len,
        gate=getattr(module, GATE)(),
        update=settings.update,
        memory_q=memory_q,
        memory_k=memory_k,
        state=None if state is None else state.memory,
        cu_seqlens=call.cu_seqlens,
        spans=None if call.spans is None else call.spans.to(q.device),
        empty_memory=settings.empty_memory,
        scale=scale,
        softcap=softcap,
        backend=settings.backend,
    )
    if packed:
        return out.unflatten(2, (batch, -1)).squeeze(0).transpose(0, 1)
    if call.cache is not None:
        if call.cache.recording:
            memory = _folded(call, None if state is None else state.memory, memory_k, v)
        call.left[layer] = _left(memory, k, memory_k, v, max(call.after.tails), state is not None)
    return out


def _joined(cache: Any, layer: int, state: LayerState, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Keys, plain keys and values of the tail, and the new ones behind them."""
    holder = cache.layers[layer]
    if isinstance(holder, InfiniLayer):
        return holder.joined(state, new)
    return tuple(torch.cat(pair, dim=2) for pair in zip(state[1:], new, strict=True))


def _check_state(state: LayerState, k: Tensor) -> None:
    held = state.keys.shape
    if (held[1], held[3]) != (k.shape[1], k.shape[3]):
        raise ValueError(
            f"past_key_values must hold {k.shape[1]} key heads of width {k.shape[3]}, got {held[1]} of {held[3]}: it "
            "is of another model"
        )


def _end_to_end(x: Tensor) -> Tensor:
    """Rows [B, heads, T, ·] as one of [1, heads, B · T, ·]."""
    return x.transpose(0, 1).flatten(1, 2).unsqueeze(0)


def _left(memory: MemoryState | None, k: Tensor, memory_k: Tensor, v: Tensor, tail: int, joined: bool) -> LayerState:
    if memory is None:
        raise RuntimeError("attention with a gate must return a memory")
    parts = (x[:, :, x.shape[2] - tail :] for x in (k, memory_k, v))
    # cloned, so that the rest of a long piece is not kept alive; a step's tail was put together just now
    return LayerState(memory, *(x if joined and x.shape[2] == k.shape[2] else x.clone() for x in parts))


def _folded(call: Call, memory: MemoryState | None, memory_k: Tensor, v: Tensor) -> MemoryState:
    """The memory with only those segments written that are folded after this call."""
    length, update = call.conversion.settings.segment_len, call.conversion.settings.update
    if memory is None:
        batch, groups, _, width = memory_k.shape
        memory = MemoryState.zeros(batch, groups, width, v.shape[3], device=v.device)
    segments = {(after - before) // length for before, after in zip(call.rows.folded, call.after.folded, strict=True)}
    if len(segments) > 1:
        raise ValueError("assisted decoding must be of rows of one length, got padded ones: generate each by itself")
    for segment in range(segments.pop()):
        here = slice(segment * length, (segment + 1) * length)
        memory = memory_write(memory_k[:, :, here], v[:, :, here], memory, update=update)
    return memory


def register() -> None:
    """Make both known to transformers under one name."""
    AttentionInterface.register(IMPLEMENTATION, segment_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, segment_mask)
