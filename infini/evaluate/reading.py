"""Reading of a text of any length by a causal language model, piece after piece with one cache."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..huggingface.settings import conversion_of, is_converted
from .needed_layers import Needed, Rest, needed_layers, only_needed

# about so many tokens are a piece by default
PIECE_TOKENS = 4096
# rows of logits that are cast to float32 at once
LOSS_ROWS = 512


class Reading(NamedTuple):
    """Hold what a model returns at the end of a text.

    logits: [B, vocabulary], after the last token.
    cache: as the model returned it.
    """

    logits: Tensor
    cache: Any


class Losses(NamedTuple):
    """The losses of a text.

    nats: [B, T - 1] float32 on the CPU, of every token but the first.
    cache: after the last token but one.
    """

    nats: Tensor
    cache: Any


def segment_len_of(model: nn.Module) -> int | None:
    """Return the tokens per segment; None where the model is not converted."""
    return conversion_of(model).settings.segment_len if is_converted(model) else None


def piece_len(model: nn.Module, piece: int | None = None, rows: int = 1) -> int:
    """Return the number of tokens to read at once of each of `rows` texts.

    Args:
        piece: this number; None: whole segments, of about 4096 tokens in all rows together.

    Raises:
        ValueError: `piece` is below 1, or not a whole number of the model's segments.
    """
    segment = segment_len_of(model) or 1
    if piece is None:
        return max(1, PIECE_TOKENS // (segment * rows)) * segment
    if piece < 1 or piece % segment:
        multiple = "at least 1" if segment == 1 else f"a positive multiple of the model's segments of {segment} tokens"
        raise ValueError(f"piece must be {multiple}, got {piece}")
    return piece


def longest_text(model: nn.Module) -> int | None:
    """Return the number of tokens that a model has positions for; None where it has no bound, as after `convert`."""
    if is_converted(model):
        return None
    config: Any = model.config
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of a cache's tensors: of a converted model's with a whole segment, of a growing one as it is."""
    bound = getattr(cache, "max_bytes", None)
    if bound is not None:
        return int(bound)
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(x.numel() * x.element_size() for x in tensors if isinstance(x, Tensor))


@torch.no_grad()
def read(
    model: nn.Module,
    tokens: Tensor,
    *,
    after: Reading | None = None,
    piece: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> Reading:
    """Read tokens [B, T]; logits are computed for a piece's last token alone where a model can.

    Layers of a converted model that a piece does not need are not run for it (`needed_layers`). The model is changed
    for each pass: several threads may read, but must not call it otherwise meanwhile.

    Args:
        model: a causal language model that keeps a cache, converted or not; in evaluation mode.
        after: the text that they follow, in B rows or in one that all of them follow; its cache stays as it is, for
            others to go on from. None: they are the beginning.
        piece: tokens read at once, whole segments; None: about 4096 of all rows together.
        on_tokens: called after each piece with the number of its tokens.

    Raises:
        ValueError: `piece` is not whole segments, the text is empty, or the model keeps no cache.
    """
    _check_text(tokens, 1)
    device, keep, cache = _device(model), _last_only(model), None if after is None else _copied(after, len(tokens))
    end, rest = 0, Rest.of(tokens, alike=after is None or len(after.logits) == 1)
    for part in tokens.split(piece_len(model, piece, len(tokens)), dim=1):
        begin, end = end, end + part.shape[1]
        needed = needed_layers(model, rest, begin, end, cache)
        output = _advance(model, part.to(device), cache, keep, needed)
        cache = output.past_key_values
        on_tokens(part.numel())
    return Reading(output.logits[:, -1], cache)


@torch.no_grad()
def decode(model: nn.Module, reading: Reading, steps: int) -> Tensor:
    """Decode `steps` tokens greedily: int64 [B, steps] on the CPU. All but the last are read into the cache."""
    logits, cache = reading
    keep = _last_only(model)
    tokens = [logits.argmax(dim=-1, keepdim=True)]
    for _ in range(steps - 1):
        output = _advance(model, tokens[-1], cache, keep)
        cache = output.past_key_values
        tokens.append(output.logits[:, -1].argmax(dim=-1, keepdim=True))
    return torch.cat(tokens, dim=1).cpu()


@torch.no_grad()
def losses(
    model: nn.Module, tokens: Tensor, *, piece: int | None = None, on_tokens: Callable[[int], None] = lambda count: None
) -> Losses:
    """Return −log p of every token of [B, T], given those before it; only one piece's logits exist at a time.

    Arguments and errors as of `read`.
    """
    _check_text(tokens, 2)
    device, cache, nats = _device(model), None, []
    size = piece_len(model, piece, len(tokens))
    # the last token is a target, but never read
    for part, targets in zip(tokens[:, :-1].split(size, dim=1), tokens[:, 1:].split(size, dim=1), strict=True):
        output = _advance(model, part.to(device), cache, {})
        cache = output.past_key_values
        nats.append(_cross_entropy(output.logits, targets.to(device)).cpu())
        on_tokens(part.numel())
    return Losses(torch.cat(nats, dim=1), cache)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the loss, float32 [B, T], of logits [B, T, vocabulary] and targets [B, T]."""
    rows = zip(logits.flatten(0, 1).split(LOSS_ROWS), targets.flatten().split(LOSS_ROWS), strict=True)
    return torch.cat([F.cross_entropy(x.float(), y.long(), reduction="none") for x, y in rows]).view(targets.shape)


def _copied(reading: Reading, rows: int) -> Any:
    """Return a copy of a reading's cache, of as many rows."""
    cache = reading.cache.copy() if hasattr(reading.cache, "copy") else copy.deepcopy(reading.cache)
    if len(reading.logits) < rows:
        cache.batch_repeat_interleave(rows)
    return cache


def _advance(model: nn.Module, part: Tensor, cache: Any, keep: dict[str, int], needed: Needed | None = None) -> Any:
    with only_needed(model, cache, needed):
        output = model(part, past_key_values=cache, use_cache=True, **keep)
    if getattr(output, "past_key_values", None) is None:
        raise ValueError(f"model must return past_key_values, to go on from; {type(model).__name__} does not")
    return output


def _last_only(model: nn.Module) -> dict[str, int]:
    takes = "logits_to_keep" in inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if takes else {}


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _check_text(tokens: Tensor, least: int) -> None:
    if tokens.ndim != 2 or tokens.shape[1] < least:
        raise ValueError(f"tokens must be [B, T] with T at least {least}, got {list(tokens.shape)}")
