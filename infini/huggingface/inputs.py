"""The arguments of a forward pass, checked: its cache, the columns that hold tokens, and packed sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from .cache import InfiniCache
from .rows import Rows, TokenColumns
from .settings import Conversion
from .static_cache import StaticInfiniCache


def is_on(inputs: dict[str, Any], config: Any, name: str) -> bool:
    """Return whether a flag is set by the arguments, or else by the configuration."""
    value = inputs.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def cache_of(
    trunk: nn.Module, conversion: Conversion, inputs: dict[str, Any], batch: int
) -> InfiniCache | StaticInfiniCache | None:
    """Return the cache to go on from, a new one where caching is on and none is passed, or None.

    Raises:
        ValueError: `past_key_values` is of another kind, model or batch size, or has rows that ended with padding.
    """
    cache = inputs.get("past_key_values")
    if cache is None:
        # in training the configuration alone does not turn caching on
        wanted = inputs.get("use_cache") if trunk.training else is_on(inputs, trunk.config, "use_cache")
        inputs["use_cache"] = bool(wanted)
        return InfiniCache(trunk) if wanted else None
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        return InfiniCache(trunk)
    if not isinstance(cache, (InfiniCache, StaticInfiniCache)):
        length = f" of {cache.get_seq_length()} tokens" if isinstance(cache, Cache) else ""
        raise ValueError(
            f"past_key_values must be a segattn.InfiniCache, or None to begin anew, got a {type(cache).__name__}"
            f"{length}: instead of a cache_implementation pass past_key_values=segattn.StaticInfiniCache(model, "
            "batch_size)"
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


def token_columns(mask: object, rows: Rows, time: int) -> TokenColumns | None:
    """Return which of `time` new columns hold tokens, by the attention mask; None: all of them.

    Args:
        mask: [B, T] of the new columns, or of all columns read and new; None: no padding.
        rows: the rows before the pass.
        time: number of new columns.

    Raises:
        ValueError: the mask has another shape, contradicts what was read, or has padding between tokens.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be [B, T] of ones and zeros for a converted model, got {shape}")
    batch, width = mask.shape
    if batch != len(rows.lengths) or width not in (time, rows.columns + time):
        wanted = f"[{len(rows.lengths)}, {rows.columns + time}]"
        raise ValueError(f"attention_mask must have shape {wanted}, all columns read and new, got {list(mask.shape)}")
    tokens = TokenColumns.of(mask[:, -time:])
    if width > time and (ones := tuple(mask[:, :-time].sum(1).tolist())) != rows.lengths:
        raise ValueError(f"attention_mask must have its ones where the cache has tokens, {rows.lengths}, got {ones}")
    for row, (length, first) in enumerate(zip(rows.lengths, () if tokens is None else tokens.firsts, strict=False)):
        if length and first:
            raise ValueError(
                f"attention_mask must go on without padding where a row has begun: row {row} has {first} columns of it "
                f"after {length} tokens"
            )
    return tokens


def packed_sequences(inputs: dict[str, Any], tokens: TokenColumns | None, batch: int, time: int) -> Tensor | None:
    """Return the bounds of packed sequences in rows laid end to end, int32 [N + 1]; None where nothing is packed.

    They are `cu_seq_lens_q` or, without a mask, the places where `position_ids` start again from 0.

    Raises:
        ValueError: there is padding beside `cu_seq_lens_q`, or `position_ids` do not count from 0 by ones.
    """
    bounds, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if bounds is not None:
        if tokens is not None:
            raise ValueError("attention_mask must have no zeros beside cu_seq_lens_q: packed sequences have no padding")
        return bounds.to(torch.int32)
    if positions is None or inputs.get("attention_mask") is not None:
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


def positions_in_sequences(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Return the position of each column in its packed sequence, int64 [B, T]."""
    columns = torch.arange(batch * time, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, columns, right=True) - 1
    return (columns - cu_seqlens[sequence]).long().view(batch, time)
