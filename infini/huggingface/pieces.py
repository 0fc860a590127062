"""Training on texts of any length, piece by piece: the loss of the whole text, and its gradient, exact or truncated.

The state is a value: each piece goes on from a copy of the cache that the piece before left. So the graph runs through
all pieces, and is cut only where `detach_every` or `truncate` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import validation as check
from ...runs.untrained import warn_untrained
from ..loss import IGNORED, cross_entropy_sum, shifted
from .cache import InfiniCache
from .settings import conversion_of, trunk_of


class Piece(NamedTuple):
    """One piece of a text, as the model has read it.

    loss_sum: cross-entropy [] in nats, summed over the tokens that the piece predicts, the last of which is the first
        token of the next piece; float32, or float64 for logits of that dtype.
    tokens: number of these tokens.
    logits: [B, T, vocabulary] with `keep_logits`, else None.
    cache: everything read so far, in the graph.
    """

    loss_sum: Tensor
    tokens: int
    logits: Tensor | None
    cache: InfiniCache


class Backward(NamedTuple):
    """The result of `backward_in_pieces`.

    loss: mean cross-entropy [] of the whole text, float32, in nats per token, without a graph.
    tokens: number of tokens predicted.
    cache: everything read, without a graph.
    """

    loss: Tensor
    tokens: int
    cache: InfiniCache


def read_in_pieces(
    model: nn.Module,
    input_ids: Tensor,
    piece_len: int,
    *,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: InfiniCache | None = None,
    detach_every: int | None = None,
    keep_logits: bool = False,
) -> Iterator[Piece]:
    """Read a text in pieces, lazily: each piece when the iterator reaches it.

    Args:
        model: a converted causal language model.
        input_ids: int64 [B, T].
        piece_len: tokens per piece, any number, preferably a multiple of the segment length; the last piece may be
            shorter.
        labels: int64 [B, T], not shifted, -100 where there is none. Default: the text without its padding.
        attention_mask: [B, T], with zeros only before a text; with a cache, [B, columns of the cache + T].
        cache: what was read before the text; it is not changed. Default: nothing.
        detach_every: cut the graph after every so many pieces. Default: never.
        keep_logits: return the logits with each piece; they are large.

    Returns:
        Iterator over the pieces in order.

    Raises:
        TypeError, ValueError: an argument is not as above, the model is not converted or returns no logits, or its
            gradient checkpointing would lose the gradient of the state.

    Warns:
        UntrainedMemoryWarning: once, in training: no text is longer than a segment.
    """
    check.check_integer("piece_len", piece_len, 1)
    if detach_every is not None:
        check.check_integer("detach_every", detach_every, 1)
    before = 0 if cache is None or cache.is_empty() else cache.rows.columns
    _check_tensors(input_ids, labels, attention_mask, before)
    check_checkpointing(model)
    limit = conversion_of(model).settings.without_memory
    warn_untrained(trunk_of(model), limit, lambda: _longest_text(input_ids, attention_mask, cache), how="convert")
    targets = _targets(input_ids, labels, attention_mask).split(piece_len, dim=1)
    counts = torch.stack([(target != IGNORED).sum() for target in targets]).tolist()
    parts = list(zip(input_ids.split(piece_len, dim=1), targets, counts, strict=True))

    def read() -> Iterator[Piece]:
        state = InfiniCache(model) if cache is None else cache
        end = before
        for index, (tokens, target, count) in enumerate(parts):
            if detach_every is not None and index and index % detach_every == 0:
                state = state.detach()
            state, end = state.copy(), end + tokens.shape[1]
            logits = _logits(model, tokens, None if attention_mask is None else attention_mask[:, :end], state)
            loss_sum = cross_entropy_sum(logits, target.to(logits.device))
            piece = Piece(loss_sum, count, logits if keep_logits else None, state)
            # else they would be kept while the next piece is read
            del logits
            yield piece

    return read()


def loss_in_pieces(model: nn.Module, input_ids: Tensor, piece_len: int, **options: Any) -> Tensor:
    """Return the mean cross-entropy [] of a text read in pieces, in nats per token, with the graph of all pieces.

    Args:
        model, input_ids, piece_len: as in `read_in_pieces`.
        options: `labels`, `attention_mask`, `cache` and `detach_every` of `read_in_pieces`.

    Returns:
        float32, or float64 for logits of that dtype.

    Raises:
        TypeError, ValueError: as `read_in_pieces`; or there is no token to predict.
    """
    pieces = [piece[:2] for piece in read_in_pieces(model, input_ids, piece_len, **options)]
    tokens = _counted(sum(tokens for _, tokens in pieces))
    return torch.stack([loss for loss, _ in pieces]).sum() / tokens


def backward_in_pieces(
    model: nn.Module,
    input_ids: Tensor,
    piece_len: int,
    *,
    truncate: int | None = None,
    scale: float = 1.0,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    cache: InfiniCache | None = None,
) -> Backward:
    """Read a text in pieces, and add the gradient of its mean loss to the parameters' gradients.

    Args:
        model, input_ids, piece_len, labels, attention_mask, cache: as in `read_in_pieces`.
        truncate: pieces per window. The backward pass of a window runs as soon as it is read, and the state enters the
            next window as a constant, so that only the activations of one window are kept. Default: one window, the
            whole text, whose gradient is exact.
        scale: factor of the gradient, such as 1 / the number of texts whose gradients are accumulated.

    Returns:
        Backward(loss, tokens, cache); the loss is not scaled.

    Raises:
        TypeError, ValueError: as `read_in_pieces`; or there is no token to predict.
    """
    if truncate is not None:
        check.check_integer("truncate", truncate, 1)
    pieces = read_in_pieces(
        model,
        input_ids,
        piece_len,
        labels=labels,
        attention_mask=attention_mask,
        cache=cache,
        detach_every=truncate,
    )
    tokens = _counted(int((_targets(input_ids, labels, attention_mask) != IGNORED).sum()))
    total = torch.zeros((), device=input_ids.device, dtype=torch.float32)
    window: list[Tensor] = []
    for index, piece in enumerate(pieces):
        window.append(piece.loss_sum)
        left = piece.cache
        if truncate is not None and (index + 1) % truncate == 0:
            total += _backward(window, scale / tokens)
            left = left.detach()
    total += _backward(window, scale / tokens)
    return Backward(total / tokens, tokens, left.detach())


def _backward(window: list[Tensor], scale: float) -> Tensor:
    """Run the backward pass of a window, empty the list of its losses, and return their sum."""
    if not window:
        return torch.zeros((), device="cpu", dtype=torch.float32)
    loss = torch.stack(window).sum()
    window.clear()
    if loss.requires_grad:
        (loss * scale).backward()
    return loss.detach()


def _logits(model: nn.Module, tokens: Tensor, mask: Tensor | None, cache: InfiniCache) -> Tensor:
    output = model(input_ids=tokens, attention_mask=mask, past_key_values=cache, use_cache=True)
    if getattr(output, "logits", None) is None:
        raise TypeError(f"model must return logits, got {type(output).__name__}: pass the one with its head")
    logits: Tensor = output.logits
    return logits


def _targets(input_ids: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """Return the target of each token, int64 [B, T]."""
    if labels is None:
        labels = input_ids
        if mask is not None:
            real = mask[:, -input_ids.shape[1] :].bool().to(labels.device)
            # padding does not predict the first token of a row either
            labels = labels.masked_fill(~(real & F.pad(real, (1, 0), value=True)[:, :-1]), IGNORED)
    return shifted(labels)


def _longest_text(input_ids: Tensor, mask: Tensor | None, cache: InfiniCache | None) -> int:
    """Return the number of tokens of the longest text, with what a cache holds of it."""
    if mask is not None:
        return int(mask.sum(1).max())
    return input_ids.shape[1] + (0 if cache is None else max(cache.rows.lengths, default=0))


def _counted(tokens: int) -> int:
    if not tokens:
        raise ValueError(f"labels must hold a token to predict, got none but {IGNORED} after the first of each row")
    return tokens


def _check_tensors(input_ids: Tensor, labels: Tensor | None, mask: Tensor | None, before: int) -> None:
    for name, x in (("input_ids", input_ids), ("attention_mask", input_ids if mask is None else mask)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a tensor of integers [B, T], got {type(x).__name__}")
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "input_ids must be integers [B, T], int32 or int64, of at least one token, got "
            f"{input_ids.dtype} {list(input_ids.shape)}"
        )
    batch, time = input_ids.shape
    if labels is not None and check.check_ids("labels", labels).shape != input_ids.shape:
        raise ValueError(f"labels must be of the shape of input_ids, {[batch, time]}, got {list(labels.shape)}")
    if mask is not None and mask.shape != (batch, before + time):
        raise ValueError(f"attention_mask must be {[batch, before + time]}, got {list(mask.shape)}")


def check_checkpointing(model: nn.Module) -> None:
    """Refuse gradient checkpointing that would drop keys and values between the pieces of a text.

    Raises:
        ValueError: the model is in training, checkpoints gradients, and has layers that were not converted.
    """
    native = conversion_of(model).native
    if not native or not (model.training and torch.is_grad_enabled()):
        return
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            f"model must not checkpoint gradients while layers {list(native)} are not converted, whose keys and values "
            "transformers then drops between pieces: convert with convert_sliding=True, or call "
            "gradient_checkpointing_disable()"
        )
