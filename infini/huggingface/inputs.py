"""The arguments of a forward pass, checked: its cache, the columns that hold tokens, and packed sequences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...kernels import validation as check
from ...kernels.attention_arguments import with_effect
from .cache import InfiniCache
from .rows import Rows, TokenColumns
from .settings import Conversion
from .static_cache import StaticInfiniCache

# what a call or a layer may pass on to attention, and converted layers make nothing of: their positions and bounds of
# packed sequences come with the pass, segments stand in for a window, and the others are for a loss or other layers
HARMLESS = frozenset(
    (
        *("position_ids", "sliding_window", "is_causal"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "token_type_ids"),
        *("ignore_index", "shift_labels"),
    )
)


def check_arguments(arguments: Mapping[str, Any], source: str) -> None:
    """Check that arguments on their way to attention change nothing in a converted layer.

    Args:
        arguments: by their names; None and False count as left out.
        source: what passes them, for the error.

    Raises:
        ValueError: one of them would change the attention of a plain model, or may, such as attention sinks (`s_aux`).
    """
    if others := [name for name in with_effect(arguments, HARMLESS) if not name.startswith("output_")]:
        raise ValueError(
            f"{', '.join(others)} must be left out for a converted model, whose attention has no such thing, got from "
            f"{source}"
        )


def is_on(inputs: dict[str, Any], config: Any, name: str) -> bool:
    """Return whether a flag is set by the arguments, or else by the configuration."""
    value = inputs.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def check_tokens(inputs: dict[str, Any]) -> None:
    """Check that a pass reads `input_ids` [B, T], or `inputs_embeds` [B, T, width], of at least one token.

    Raises:
        TypeError, ValueError: it reads something else.
    """
    name, x, shape = "input_ids", inputs.get("input_ids"), "[B, T]"
    if x is not None:
        check.check_ids(name, x)
    else:
        name, x, shape = "inputs_embeds", inputs["inputs_embeds"], "[B, T, width]"
        check.check_floating(name, x)
    if x.ndim != shape.count(",") + 1 or x.shape[1] < 1:
        raise ValueError(f"{name} must be {shape} of at least one token, got {list(x.shape)}")


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
    if not isinstance(cache, (InfiniCache, StaticInfiniCache)):
        length = f" of {cache.get_seq_length()} tokens" if isinstance(cache, Cache) else ""
        raise ValueError(
            f"past_key_values must be a segattn.InfiniCache, or None to begin anew, got a {type(cache).__name__}"
            f"{length}: pass segattn.InfiniCache(model), of which generate makes its own, or "
            "segattn.StaticInfiniCache(model, batch_size)"
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
        mask: [B, T] of the new columns, or of all columns read and new; or one for each type of layer, which are equal,
            as `generate` makes them for a static cache. None: no padding.
        rows: the rows before the pass.
        time: number of new columns.

    Raises:
        ValueError: the mask has another shape, contradicts what was read, or has padding between tokens; or it is in a
            graph.
    """
    if isinstance(mask, dict):
        mask = next(iter(mask.values()))
    if mask is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError(
            "attention_mask must be left out under torch.compile(fullgraph=True) and torch.export, since the bounds of "
            "the rows are looked up in it: pass cu_seq_lens_q for packed sequences, or leave fullgraph out"
        )
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


def packed_sequences(
    inputs: dict[str, Any], rows: Rows, columns: TokenColumns | None, time: int, device: torch.device
) -> Tensor | None:
    """Return the bounds of packed sequences in rows laid end to end, int32 [N + 1]; None where nothing is packed.

    They are `cu_seq_lens_q` or the places where `position_ids` start again from 0.

    Args:
        inputs: the arguments of the pass.
        rows: the rows before the pass.
        columns: those of the new columns that hold tokens; None: all of them.
        time: number of new columns.
        device: where the bounds are to be.

    Raises:
        ValueError: there is padding beside packed sequences, or a cache that has been read into; or `position_ids` have
            another shape, do not count by ones, or not from 0 where a text begins.
    """
    bounds, positions, batch = inputs.get("cu_seq_lens_q"), inputs.get("position_ids"), len(rows.lengths)
    if bounds is not None:
        if columns is not None:
            raise ValueError("attention_mask must have no zeros beside cu_seq_lens_q: packed sequences have no padding")
        if rows.columns:
            raise ValueError(
                f"past_key_values must be None beside cu_seq_lens_q, as packed sequences begin anew, got one of "
                f"{rows.columns} tokens"
            )
        return bounds.to(device, torch.int32)
    # one token behind others always counts on
    if positions is None or (rows.columns and time == 1):
        return None
    if torch.compiler.is_compiling():
        raise ValueError("position_ids must be left out under torch.compile: pass cu_seq_lens_q for packed sequences")
    if positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != time:
        raise ValueError(f"position_ids must be [1 or {batch}, {time}], got {list(positions.shape)}")
    positions = positions.to(device).expand(batch, time)
    begins = torch.cat([positions.new_ones(batch, 1, dtype=torch.bool), positions.diff(dim=1) != 1], dim=1)
    if columns is not None or rows.columns:
        if bool((begins & _inside(columns, batch, time, device)).any()):
            raise ValueError(
                "position_ids must count by ones in each row beside padding or a cache: packed sequences have no "
                "padding, and begin anew"
            )
        return None
    if bool(positions[begins].any()):
        raise ValueError(
            "position_ids must count from 0 by ones, and begin anew at 0 with each packed sequence; a later "
            "run of a text, as segattn.shard_batch cuts it, is read within segattn.sequence_parallel"
        )
    starts = begins.flatten().nonzero().flatten()
    if len(starts) == batch:
        return None
    return torch.cat([starts, starts.new_tensor([batch * time])]).to(torch.int32)


def _inside(columns: TokenColumns | None, batch: int, time: int, device: torch.device) -> Tensor:
    """Return which columns hold a token that follows another, bool [B, T]."""
    firsts, ends = ((0,) * batch, (time,) * batch) if columns is None else (columns.firsts, columns.ends)
    first, end = torch.tensor([firsts, ends], device=device)[..., None]
    at = torch.arange(time, device=device)
    return (at > first) & (at < end)


def set_positions(
    inputs: dict[str, Any],
    conversion: Conversion,
    rows: Rows,
    columns: TokenColumns | None,
    packed: Tensor | None,
    tokens: Tensor,
) -> None:
    """Set the positions of the new columns among the inputs, and what layers that were not converted need beside them.

    transformers makes the mask of those layers of `attention_mask` or, without it and a cache, of `position_ids`: each
    place where these do not count on then begins a packed sequence.

    Args:
        inputs: the arguments of the pass, which are changed.
        conversion: how the model was converted.
        rows: the rows before the pass.
        columns: those of the new columns that hold tokens; None: all of them.
        packed: bounds of packed sequences, int32 [N + 1], or None.
        tokens: [B, T] or [B, T, width], the new columns.

    Raises:
        ValueError: layers that were not converted cannot tell the packed sequences apart.
    """
    (batch, time), period = tokens.shape[:2], conversion.period
    if packed is not None:
        positions = positions_in_sequences(packed, batch, time)
        _check_native(conversion, positions)
        inputs["attention_mask"] = None
        inputs["position_ids"] = positions if period is None else positions % period
    elif conversion.restart or conversion.settings.sinks:
        positions = rows.positions(columns, time, tokens.device, in_text=not conversion.restart).expand(batch, -1)
        inputs["position_ids"] = positions if period is None else positions % period
        if conversion.native and period is not None and columns is None and inputs.get("past_key_values") is None:
            # else every segment would be taken for a sequence
            inputs["attention_mask"] = tokens.new_ones(batch, time, dtype=torch.long)


def _check_native(conversion: Conversion, positions: Tensor) -> None:
    """Check that the positions in packed sequences [B, T] tell these apart in layers that were not converted.

    Raises:
        ValueError: they do not, as they restart with each segment, or a sequence runs on from row to row.
    """
    native = list(conversion.native)
    if native and conversion.restart:
        raise ValueError(
            f"position_ids and cu_seq_lens_q must not pack sequences while layers {native} of a model with learnt "
            "positions are not converted, since the positions restart with each segment: convert every layer, or read "
            "each sequence by itself"
        )
    if native and len(positions) > 1 and bool(positions[:, 0].any()):
        raise ValueError(
            f"cu_seq_lens_q must begin a sequence with each row while layers {native} are not converted, got one that "
            "runs on into the next row: lay the rows end to end, [1, B · T]"
        )


def positions_in_sequences(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Return the position of each column in its packed sequence, int64 [B, T]."""
    columns = torch.arange(batch * time, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, columns, right=True) - 1
    return (columns - cu_seqlens[sequence]).long().view(batch, time)
