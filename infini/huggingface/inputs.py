"""The arguments of a forward pass, checked: its tokens, its cache, and the columns that hold tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from ...kernels.attention_arguments import with_effect
from ...kernels.text import check_text
from .cache import InfiniCache
from .packing import check_native, positions_in_sequences
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
        ValueError: one of them would change the attention of a plain model, or may, such as a bias of the scores.
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


def check_tokens(trunk: Any, inputs: dict[str, Any]) -> Tensor:
    """Return what a pass reads, once it is checked: `input_ids` [B, T], or `inputs_embeds` as the model's own.

    Raises:
        TypeError, ValueError: it reads something else.
    """
    embedding = trunk.get_input_embeddings()
    weight = getattr(embedding, "weight", None)
    # quantized weights may be integers
    dtype = weight.dtype if isinstance(weight, Tensor) and weight.is_floating_point() else None
    return check_text(
        inputs.get("input_ids"), inputs.get("inputs_embeds"), getattr(embedding, "embedding_dim", None), dtype
    )


def cache_of(
    trunk: nn.Module, conversion: Conversion, inputs: dict[str, Any], batch: int
) -> InfiniCache | StaticInfiniCache | None:
    """Return the cache to go on from, a new one where caching is on and none is passed, or None.

    Raises:
        ValueError: `past_key_values` is of another kind, model or batch size, has rows that ended with padding, or is
            read anew in a backward pass.
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
    # the number of a running backward pass
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        raise ValueError(
            "past_key_values must be None inside torch.utils.checkpoint of the whole model, which reads the text again "
            "in the backward pass, after all that the cache has read: checkpoint the layers alone, by "
            "model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
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


def token_columns(mask: object, rows: Rows, time: int, begins: bool = True) -> TokenColumns | None:
    """Return which of `time` new columns hold tokens, by the attention mask; None: all of them.

    Args:
        mask: [B, T] of the new columns, or of all columns read and new; or one for each type of layer, which are equal,
            as `generate` makes them for a static cache. None: no padding.
        rows: the rows before the pass.
        time: number of new columns.
        begins: whether more columns may follow, so that a row may have no token yet.

    Raises:
        ValueError: the mask has another shape, contradicts what was read, has padding between tokens, or a row without
            a token; or it is in a graph.
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
    if tokens is None:
        return None
    for row, (length, first, count) in enumerate(zip(rows.lengths, tokens.firsts, tokens.counts, strict=True)):
        if not (begins or length or count):
            raise ValueError(
                f"attention_mask must have a token in every row, got row {row} without one: leave it out, or pass "
                "use_cache=True where a later piece of its text follows"
            )
        if length and first:
            raise ValueError(
                f"attention_mask must go on without padding where a row has begun: row {row} has {first} columns of it "
                f"after {length} tokens"
            )
    return tokens


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
        check_native(conversion)
        inputs["attention_mask"] = None
        inputs["position_ids"] = positions if period is None else positions % period
    elif conversion.restart or conversion.settings.sinks:
        positions = rows.positions(columns, time, tokens.device, in_text=not conversion.restart).expand(batch, -1)
        inputs["position_ids"] = positions if period is None else positions % period
        if conversion.native and period is not None and columns is None and inputs.get("past_key_values") is None:
            # else every segment would be taken for a sequence
            inputs["attention_mask"] = tokens.new_ones(batch, time, dtype=torch.long)
