"""One forward pass of a converted model: hooks tell its attention where the tokens stand, and keep what it leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from ...kernels.exchange import Ranks
from .cache import InfiniCache, LayerState
from .parallel import begin_on_ranks, ranks_of, refuse_other_schemes
from .rows import Real, Rows
from .settings import IMPLEMENTATION, Conversion, conversion_of
from .static_cache import StaticInfiniCache

# the argument that carries a call to the attention of every layer
ARGUMENT = "segattn_call"
ROTARY = "segattn_rotary"
EMPTY = Rows.fresh(0)


@dataclass(eq=False)
class Call:
    """What attention needs to know of one pass, and where it leaves what follows.

    cache: what the pass goes on from and leaves things in.
    step: one token in each row of a static cache, which knows the rest itself.
    rows, after: how far each row had been read before, and will have been.
    spans, cu_seqlens: as in `segment_attention`, over the tails and the new columns; of packed rows, laid end to end.
    states: by layer, None where nothing has been read.
    left: by layer, filled as the layers run.
    ranks: the processes that share the texts, which have been checked to agree.
    """

    conversion: Conversion
    cache: InfiniCache | StaticInfiniCache | None = None
    step: bool = False
    rows: Rows = EMPTY
    after: Rows = EMPTY
    spans: Tensor | None = None
    cu_seqlens: Tensor | None = None
    states: dict[int, LayerState | None] = field(default_factory=dict)
    left: dict[int, LayerState] = field(default_factory=dict)
    ranks: Ranks | None = None


def begin(trunk: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of the module that runs the layers."""
    conversion = conversion_of(trunk)
    given = dict(zip(conversion.inputs, args, strict=False)) | kwargs
    config = trunk.config
    tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
    if tokens is None:
        return args, kwargs
    if _wanted(given, config, "output_attentions"):
        raise ValueError(
            "output_attentions must be False: segment attention never has the weights; segattn.revert first"
        )
    if config._attn_implementation != IMPLEMENTATION:
        raise RuntimeError(
            f"the model's attention must be {IMPLEMENTATION!r}, got {config._attn_implementation!r}, which was set "
            "after convert: call segattn.revert first"
        )
    refuse_other_schemes()
    if (ranks := ranks_of(trunk)) is not None:
        begin_on_ranks(trunk, conversion, ranks, given, tokens)
        given[ARGUMENT] = Call(conversion, states=dict.fromkeys(conversion.settings.layers), ranks=ranks)
        return (), given
    batch, time = tokens.shape[:2]
    cache = _cache(trunk, conversion, given, config, batch)
    if isinstance(cache, StaticInfiniCache) and time == 1:
        given["position_ids"] = cache.lengths[:, None] % conversion.settings.segment_len
        given[ARGUMENT] = Call(conversion, cache=cache, step=True)
        return (), given
    rows = Rows.fresh(batch) if cache is None or cache.is_empty() else cache.rows
    real = _real(given, rows, time)
    packed = None if rows.columns else _packed(given, real, batch, time)
    if packed is not None and cache is not None:
        if given.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values must be None for packed sequences, which end at different places of a segment"
            )
        cache, given["use_cache"] = None, False
    segment_len = conversion.settings.segment_len
    after = rows.read(real, time, segment_len, keep_last=cache is not None and cache.recording)
    if conversion.restart:
        if packed is None:
            positions = rows.positions(real, time, segment_len, tokens.device)
        else:
            positions = _positions_of_packed(packed, batch, time) % segment_len
        given["position_ids"] = positions.expand(batch, -1)
    spans = None if packed is not None else rows.spans(real, time, tokens.device)
    states = dict.fromkeys(conversion.settings.layers) if cache is None else cache.states
    given["past_key_values"] = cache
    given[ARGUMENT] = Call(conversion, cache, False, rows, after, spans, packed, states)
    return (), given


def finish(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the same module: all layers have run, so the cache takes what they left."""
    call = kwargs.get(ARGUMENT)
    if call is None or call.cache is None:
        return
    if call.step:
        call.cache.advance()
        return
    if missing := sorted(set(call.states) - set(call.left)):
        raise RuntimeError(f"layers {missing} did not run, so the cache cannot go on: turn layer dropping off")
    call.cache.commit(call.after, call.left)


def bring_rotary(
    attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook of a layer's attention, which keeps its positions to itself."""
    return args, {**kwargs, ROTARY: kwargs.get("position_embeddings")}


def _wanted(given: dict[str, Any], config: Any, name: str) -> bool:
    value = given.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def _cache(
    trunk: nn.Module, conversion: Conversion, given: dict[str, Any], config: Any, batch: int
) -> InfiniCache | StaticInfiniCache | None:
    """The cache to go on from: the caller's, or a new one where one is wanted."""
    cache = given.get("past_key_values")
    if cache is None:
        # in training a cache is kept only where it is asked for by name
        wanted = given.get("use_cache") if trunk.training else _wanted(given, config, "use_cache")
        given["use_cache"] = bool(wanted)
        return InfiniCache(trunk) if wanted else None
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        return InfiniCache(trunk)
    if not isinstance(cache, (InfiniCache, StaticInfiniCache)):
        held = (
            f"{type(cache).__name__} of {cache.get_seq_length()} tokens"
            if isinstance(cache, Cache)
            else type(cache).__name__
        )
        raise ValueError(
            f"past_key_values must be a segattn.InfiniCache, or None to begin anew, got a {held}: instead of a "
            "cache_implementation pass past_key_values=segattn.StaticInfiniCache(model, batch_size)"
        )
    if len(cache.layers) != conversion.depth or cache.settings != conversion.settings:
        raise ValueError(
            f"past_key_values must be of this model ({conversion.depth} layers, {conversion.settings}), got one of "
            f"{len(cache.layers)} layers, {cache.settings}"
        )
    if cache.batch not in (None, batch):
        raise ValueError(f"past_key_values must be of batch size {batch}, as the input is, got {cache.batch}")
    if not cache.is_open:
        raise ValueError("past_key_values must end with tokens, got rows that ended with padding: pad on the left")
    return cache


def _real(given: dict[str, Any], rows: Rows, time: int) -> Real | None:
    """The tokens among the new columns; None: all of them."""
    mask = given.get("attention_mask")
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be [B, T] of ones and zeros for a converted model, got {shape}")
    batch, width = mask.shape
    if batch != len(rows.lengths) or width not in (time, rows.columns + time):
        wanted = f"[{len(rows.lengths)}, {rows.columns + time}]"
        raise ValueError(f"attention_mask must have shape {wanted}, all columns read and new, got {list(mask.shape)}")
    real = Real.of(mask[:, -time:])
    if width > time and (held := tuple(mask[:, :-time].sum(1).tolist())) != rows.lengths:
        raise ValueError(f"attention_mask must have its ones where the cache has tokens, {rows.lengths}, got {held}")
    for row, (length, first) in enumerate(zip(rows.lengths, () if real is None else real.firsts, strict=False)):
        if length and first:
            raise ValueError(
                f"attention_mask must go on without padding where a row has begun: row {row} has {first} columns of it "
                f"after {length} tokens"
            )
    return real


def _packed(given: dict[str, Any], real: Real | None, batch: int, time: int) -> Tensor | None:
    """int32 [N + 1], where sequences begin in rows laid end to end: as told, or where positions begin anew."""
    told, positions = given.get("cu_seq_lens_q"), given.get("position_ids")
    if told is not None:
        if real is not None:
            raise ValueError("attention_mask must have no zeros beside cu_seq_lens_q: packed sequences have no padding")
        return told.to(torch.int32)
    if positions is None or given.get("attention_mask") is not None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError("position_ids must be left out under torch.compile: pass cu_seq_lens_q for packed sequences")
    positions = positions.expand(batch, time)
    begins = torch.cat([positions.new_ones(batch, 1, dtype=torch.bool), positions.diff(dim=1) != 1], dim=1)
    if bool(positions[begins].any()):
        raise ValueError(
            "position_ids must count from 0 by ones, and begin anew at 0 with each packed sequence; a later "
            "run of a text, as segattn.shard_batch cuts it, is read within segattn.sequence_parallel"
        )
    starts = begins.flatten().nonzero().flatten()
    if len(starts) == batch:
        return None
    return torch.cat([starts, starts.new_tensor([batch * time])]).to(torch.int32)


def _positions_of_packed(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """[B, T]: of each column in its own sequence."""
    columns = torch.arange(batch * time, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, columns, right=True) - 1
    return (columns - cu_seqlens[sequence]).long().view(batch, time)
