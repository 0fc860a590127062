"""Training on texts of any length, piece by piece: the loss of the whole, and its gradient, exact or truncated.

The state is a value: each piece reads a copy of the cache that the one before left, so that the graph runs through all
of them, and ends only where `detach_every` or `truncate` says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import validation as check
from .cache import InfiniCache
from .settings import conversion_of

IGNORED = -100


class Piece(NamedTuple):
    """What reading a piece gives.

    loss_sum: [] float32, or float64 of such logits, in nats, of the tokens that the piece predicts: its last one
        predicts the first of the next.
    tokens: how many they are.
    logits: [B, T, vocabulary] where asked for.
    cache: everything read so far, in the graph.
    """

    loss_sum: Tensor
    tokens: int
    logits: Tensor | None
    cache: InfiniCache


class Backward(NamedTuple):
    """What `backward_in_pieces` gives.

    loss: [] float32, in nats per token, of the whole text, without a graph.
    tokens: how many were predicted.
    cache: of the whole text, without a graph.
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
    """Read a text in pieces; each is read when it is asked for.

    Args:
        model: a converted causal language model.
        input_ids: int64 [B, T].
        piece_len: tokens per piece, any number; the last may be shorter. Best a multiple of the segment length.
        labels: int64 [B, T], as transformers has them: not shifted, -100 where none is to be predicted. Default: the
            text itself, without padding.
        attention_mask: [B, T], zeros at padding on the left; with a cache, [B, columns of the cache + T].
        cache: what was read before; it is left as it is.
        detach_every: cut the graph after every so many pieces. Default: nowhere.
        keep_logits: give the logits too, which are large.

    Returns:
        Its pieces, in order.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was; the model is not converted, or its
            gradient checkpointing would lose the gradient of the state.
    """
    check.check_integer("piece_len", piece_len, 1)
    if detach_every is not None:
        check.check_integer("detach_every", detach_every, 1)
    before = 0 if cache is None or cache.is_empty() else cache.rows.columns
    _check_tensors(input_ids, labels, attention_mask, before)
    check_checkpointing(model)
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
            piece = Piece(_loss_sum(logits, target), count, logits if keep_logits else None, state)
            # which would live until the next piece's are there
            del logits
            yield piece

    return read()


def loss_in_pieces(model: nn.Module, input_ids: Tensor, piece_len: int, **options: Any) -> Tensor:
    """Mean loss [] float32 of a whole text read in pieces, in nats per token, with the graph of all of them.

    Args:
        model, input_ids, piece_len: as in `read_in_pieces`.
        options: its `labels`, `attention_mask`, `cache` and `detach_every`.

    Raises:
        ValueError: as there; or nothing is to be predicted.
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
    """Add the gradient of a text's mean loss to the parameters, reading it in pieces.

    Args:
        model, input_ids, piece_len, labels, attention_mask, cache: as in `read_in_pieces`.
        truncate: pieces per window. Each window goes backward as soon as it is read, and the state enters the next as
            a constant, so that the activations of one window are held. Default: the whole text is one, whose gradient
            is exact.
        scale: factor of the gradient, such as one over the number of texts that are accumulated.

    Returns:
        The loss, without the scale, and the state.

    Raises:
        ValueError: as there; or nothing is to be predicted.
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
    total = torch.zeros((), device=input_ids.device)
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
    """The sum of the losses, which are taken from the list."""
    if not window:
        return torch.zeros(())
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


def _loss_sum(logits: Tensor, targets: Tensor) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(wide, targets.to(wide.device).flatten(), ignore_index=IGNORED, reduction="sum")


def _targets(input_ids: Tensor, labels: Tensor | None, mask: Tensor | None) -> Tensor:
    """[B, T]: what each token is to predict."""
    if labels is None:
        labels = input_ids
        if mask is not None:
            real = mask[:, -input_ids.shape[1] :].bool().to(labels.device)
            # nor does padding predict a row's first token
            labels = labels.masked_fill(~(real & F.pad(real, (1, 0), value=True)[:, :-1]), IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def _counted(tokens: int) -> int:
    if not tokens:
        raise ValueError(f"labels must hold a token to predict, got none but {IGNORED} after the first of each row")
    return tokens


def _check_tensors(input_ids: Tensor, labels: Tensor | None, mask: Tensor | None, before: int) -> None:
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be integers [B, T], of at least one token, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    batch, time = input_ids.shape
    if labels is not None and labels.shape != input_ids.shape:
        raise ValueError(f"labels must be of the shape of input_ids, {[batch, time]}, got {list(labels.shape)}")
    if mask is not None and mask.shape != (batch, before + time):
        raise ValueError(f"attention_mask must be {[batch, before + time]}, got {list(mask.shape)}")


def check_checkpointing(model: nn.Module) -> None:
    """Refuse what would give wrong gradients in silence.

    Raises:
        ValueError: a model in training checkpoints gradients with `use_reentrant`, or while layers are not converted.
    """
    native = conversion_of(model).native
    if not (model.training and torch.is_grad_enabled()):
        return
    functions = [
        module._gradient_checkpointing_func
        for module in model.modules()
        if getattr(module, "gradient_checkpointing", False) and hasattr(module, "_gradient_checkpointing_func")
    ]
    if functions and native:
        raise ValueError(
            f"model must not checkpoint gradients while layers {list(native)} are not converted, whose keys and values "
            "transformers then drops between pieces: convert with convert_sliding=True, or call "
            "gradient_checkpointing_disable()"
        )
    if any(getattr(function, "keywords", {}).get("use_reentrant", True) for function in functions):
        raise ValueError(
            "model must checkpoint gradients with use_reentrant=False, as the other way loses the state's gradient: "
            "call gradient_checkpointing_enable(gradient_checkpointing_kwargs={'use_reentrant': False})"
        )
