"""Cross-entropy of the next token: summed over a batch, and averaged over the tokens of several ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels import validation as check
from ..kernels.exchange import Ranks, quick_device, raise_on_all_ranks

# the label of a token without a target, as transformers and PyTorch have it
IGNORED = -100
GRADIENTS = ("averaged", "summed")


def shifted(labels: Tensor) -> Tensor:
    """Return labels [B, T] moved to the tokens that predict them; the last token of a row predicts nothing."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def cross_entropy_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy [] in nats, summed over the targets that are not -100.

    Args:
        logits: [B, T, vocabulary]; computed in float32 or wider.
        targets: int32 or int64 [B, T].
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(wide, targets.flatten().long(), ignore_index=IGNORED, reduction="sum")


def mean_loss(logits: Tensor, shift_labels: Tensor, group: Any, *, gradients: str = "averaged") -> Tensor:
    """Return the mean cross-entropy [] over the tokens of all ranks, in nats per token, the same number on each.

    All ranks of the group call it together. Each rank's backward pass goes through its own tokens.

    Args:
        logits: [B, t, vocabulary] of this rank's part of the texts.
        shift_labels: int32 or int64 [B, t], the target of each token, -100 for none, as `shard_batch` returns them.
        group: process group, or one-dimensional device mesh, of all ranks whose tokens count: those that share a
            sequence, or all ranks of a mesh with data parallelism too.
        gradients: how the training loop combines the parameters' gradients over this group, which makes them those of
            one process: "averaged", as DDP and FSDP do, or "summed".

    Returns:
        float32, or float64 for logits of that dtype.

    Raises:
        TypeError, ValueError: on every rank, if on any rank `gradients` is unknown, the shapes do not fit, or labels
            lie outside the vocabulary; or if there is no target on any rank.
    """
    ranks = Ranks.of(group)
    problem: Exception | None = None
    total, count = torch.zeros((), device="cpu", dtype=torch.float32), 0
    try:
        check.check_choice("gradients", gradients, GRADIENTS)
        total, count = _checked_sum(logits, shift_labels)
    except (TypeError, ValueError) as error:
        problem = error
    summed = gradients == "summed"
    numbers = [total.item(), count, summed, problem is not None]
    sums = torch.tensor(numbers, dtype=torch.float64, device=quick_device(ranks))
    dist.all_reduce(sums, group=ranks.group)
    nats, tokens, summing, problems = sums.tolist()
    if problems or summing not in (0, ranks.size):
        raise_on_all_ranks(ranks, {"gradients": gradients}, problem)
    if not tokens:
        raise ValueError(f"shift_labels must hold a token to predict on some rank, got none but {IGNORED}")
    share = total * ((1 if summed else ranks.size) / tokens)
    # the value over all ranks, with the gradient of this one
    return share + (nats / tokens - share.detach())


def _checked_sum(logits: Tensor, shift_labels: Tensor) -> tuple[Tensor, int]:
    """Return the summed cross-entropy [], and the number of its targets."""
    check.check_floating("logits", logits)
    check.check_device("shift_labels", check.check_ids("shift_labels", shift_labels), "logits", logits)
    if logits.ndim != 3 or shift_labels.shape != logits.shape[:2]:
        raise ValueError(
            f"shift_labels must be [B, t] as logits [B, t, vocabulary], got {list(shift_labels.shape)} and "
            f"{list(logits.shape)}"
        )
    predicted = shift_labels[shift_labels != IGNORED]
    if bool(((predicted < 0) | (predicted >= logits.shape[2])).any()):
        raise ValueError(
            f"shift_labels must be {IGNORED} or below the vocabulary of {logits.shape[2]}, got {predicted.min()} to "
            f"{predicted.max()}"
        )
    return cross_entropy_sum(logits, shift_labels), predicted.numel()
