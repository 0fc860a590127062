"""Packed sequences: several texts in rows laid end to end, by their bounds or by positions that begin anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...kernels.validation import check_ids
from .rows import Rows, TokenColumns
from .settings import Conversion


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
        TypeError: bounds or positions are no integer tensors.
        ValueError: the bounds are not of sequences that fill the rows; there is padding beside packed sequences, or a
            cache that has been read into; or `position_ids` have another shape, do not count by ones, or not from 0
            where a text begins.
    """
    batch = len(rows.lengths)
    if inputs.get("cu_seq_lens_q") is not None:
        if columns is not None:
            raise ValueError("attention_mask must have no zeros beside cu_seq_lens_q: packed sequences have no padding")
        if rows.columns:
            raise ValueError(
                f"past_key_values must be None beside cu_seq_lens_q, as packed sequences begin anew, got one of "
                f"{rows.columns} tokens"
            )
    if (bounds := _bounds(inputs, batch, time, device)) is not None:
        _check_agreement(bounds, _positions(inputs, batch, time, device))
        return bounds
    # one token behind others always counts on
    if (rows.columns and time == 1) or (positions := _positions(inputs, batch, time, device)) is None:
        return None
    if torch.compiler.is_compiling():
        raise ValueError("position_ids must be left out under torch.compile: pass cu_seq_lens_q for packed sequences")
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


def _bounds(inputs: dict[str, Any], batch: int, time: int, device: torch.device) -> Tensor | None:
    """Return `cu_seq_lens_q` of a pass, checked, int32 [N + 1]; None where there is none.

    In a graph the operation looks at the values, when it runs.
    """
    bounds, keys = inputs.get("cu_seq_lens_q"), inputs.get("cu_seq_lens_k")
    if bounds is None:
        if keys is not None:
            raise ValueError("cu_seq_lens_q must be passed with cu_seq_lens_k, got the latter alone")
        return None
    for name, x in (("cu_seq_lens_q", bounds), ("cu_seq_lens_k", bounds if keys is None else keys)):
        if check_ids(name, x).ndim != 1 or len(x) < 2:
            raise ValueError(f"{name} must be [N + 1], the bounds of N sequences, got {list(x.shape)}")
    if torch.compiler.is_compiling():
        return bounds.to(device, torch.int32)
    values = bounds.tolist()
    if values != sorted(values) or values[0] or values[-1] != batch * time:
        raise ValueError(f"cu_seq_lens_q must rise from 0 to B · T = {batch * time} without decreasing, got {values}")
    if not {*range(0, batch * time, time)} <= {*values}:
        raise ValueError(
            f"cu_seq_lens_q must begin a sequence with each row of {time} columns, got {values}: lay rows whose "
            "sequences run on into the next one end to end, [1, B · T]"
        )
    if keys is not None and (got := keys.tolist()) != values:
        raise ValueError(
            f"cu_seq_lens_k must equal cu_seq_lens_q, {values}, as each sequence attends to itself, got {got}"
        )
    return bounds.to(device, torch.int32)


def _positions(inputs: dict[str, Any], batch: int, time: int, device: torch.device) -> Tensor | None:
    """Return `position_ids` of a pass as [B, T], with their shape checked; None where there are none."""
    positions = inputs.get("position_ids")
    if positions is None:
        return None
    check_ids("position_ids", positions)
    if positions.ndim != 2 or positions.shape[0] not in (1, batch) or positions.shape[1] != time:
        raise ValueError(f"position_ids must be [1 or {batch}, {time}], got {list(positions.shape)}")
    return positions.to(device).expand(batch, time)


def _check_agreement(bounds: Tensor, positions: Tensor | None) -> None:
    """Check that positions [B, T] beside bounds count from 0 in each sequence; a graph does not look at them."""
    if positions is None or torch.compiler.is_compiling():
        return
    if not torch.equal(positions.long(), positions_in_sequences(bounds, *positions.shape)):
        raise ValueError(
            "position_ids must count from 0 in each sequence of cu_seq_lens_q, got others: leave one of them out"
        )


def _inside(columns: TokenColumns | None, batch: int, time: int, device: torch.device) -> Tensor:
    """Return which columns hold a token that follows another, bool [B, T]."""
    firsts, ends = ((0,) * batch, (time,) * batch) if columns is None else (columns.firsts, columns.ends)
    first, end = torch.tensor([firsts, ends], device=device)[..., None]
    at = torch.arange(time, device=device)
    return (at > first) & (at < end)


def check_native(conversion: Conversion) -> None:
    """Check that layers that were not converted can tell packed sequences apart.

    Raises:
        ValueError: they cannot, as their positions restart with each segment.
    """
    native = list(conversion.native)
    if native and conversion.restart:
        raise ValueError(
            f"position_ids and cu_seq_lens_q must not pack sequences while layers {native} of a model with learnt "
            "positions are not converted, since the positions restart with each segment: convert every layer, or read "
            "each sequence by itself"
        )


def positions_in_sequences(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Return the position of each column in its packed sequence, int64 [B, T]."""
    columns = torch.arange(batch * time, device=cu_seqlens.device, dtype=cu_seqlens.dtype).view(batch, time)
    return (columns - cu_seqlens[sequence_of_columns(cu_seqlens, batch, time)]).long()


def sequence_of_columns(cu_seqlens: Tensor, batch: int, time: int) -> Tensor:
    """Return which packed sequence each column is of, int64 [B, T]."""
    columns = torch.arange(batch * time, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.searchsorted(cu_seqlens, columns, right=True) - 1).view(batch, time)
