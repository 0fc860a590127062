"""A batch of texts over the ranks of a group, and the loss of the whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels import validation as check
from ..kernels.exchange import Ranks, agree, quick_device, raise_on_all_ranks

IGNORED = -100
GRADIENTS = ("averaged", "summed")


def runs_of(time: int, size: int, segment_len: int) -> tuple[int, ...]:
    """Tokens of each of `size` ranks: whole segments, as even as they come, the unfinished one last.

    Raises:
        ValueError: fewer segments than ranks.
    """
    segments = -(-time // segment_len)
    if segments < size:
        raise ValueError(
            f"a text must have a segment for every rank, got {segments} of {segment_len} tokens for {size} ranks: use "
            "fewer ranks, shorter segments or longer texts"
        )
    each, more = divmod(segments, size)
    ends = [min(time, segment_len * (rank * each + min(rank, more))) for rank in range(size + 1)]
    return tuple(end - begin for begin, end in pairwise(ends))


def shard_batch(
    batch: Mapping[str, Tensor], group: Any, segment_len: int, *, check_ranks: bool = True
) -> dict[str, Tensor]:
    """This rank's part of a batch that every rank of the group holds whole: a run of whole segments of each text.

    All ranks call it together.

    Args:
        batch: "input_ids" int64 [B, T]; and perhaps "labels" [B, T], as transformers has them: not shifted, -100 where
            none is to be predicted, default the text without its padding; "attention_mask" [B, T], zeros after a text's
            end. The texts stand in the batch from their first token on.
        group: a `ProcessGroup`, or one dimension of a `DeviceMesh`, whose ranks take the runs in their order.
        segment_len: tokens per segment, that of the model.
        check_ranks: let the ranks agree that they hold the same batch, by a digest of it (some hundredths of a second
            per million tokens) and one collective of 24 bytes per rank. False where they are known to.

    Returns:
        "input_ids" [B, t], "position_ids" [B, t], counted from each text's first token, "shift_labels" [B, t], what
        each token is to predict, the last one the next rank's first, and "attention_mask" where the batch has one.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was; fewer segments than ranks;
            batches that differ. On every rank, if the ranks are checked.
    """
    ranks = Ranks.of(group)
    problem: Exception | None = None
    shard: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    try:
        check.check_integer("segment_len", segment_len, 1)
        batch = {name: x for name, x in batch.items() if x is not None}
        _check_batch(batch)
        shard = _shard(batch, ranks, segment_len)
        if check_ranks:
            settings = {"segment_len": segment_len, **{f"batch[{name!r}]": _digest(x) for name, x in batch.items()}}
    except (TypeError, ValueError) as error:
        problem = error
    if check_ranks:
        agree(ranks, settings, problem)
    elif problem is not None:
        raise problem
    return shard


def _check_batch(batch: Mapping[str, Tensor]) -> None:
    if unknown := sorted(set(batch) - {"input_ids", "labels", "attention_mask"}):
        raise ValueError(f"batch may hold input_ids, labels and attention_mask, got {', '.join(unknown)} too")
    ids, mask = batch.get("input_ids"), batch.get("attention_mask")
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batch['input_ids'] must be integers [B, T], got {got}")
    for name, x in batch.items():
        if not isinstance(x, Tensor):
            raise TypeError(f"batch[{name!r}] must be a tensor, got {type(x).__name__}")
        if x.shape != ids.shape:
            raise ValueError(
                f"batch[{name!r}] must be of the shape of input_ids, {list(ids.shape)}, got {list(x.shape)}"
            )
    if mask is not None and bool((mask.bool()[:, 1:] & ~mask.bool()[:, :-1]).any()):
        raise ValueError("batch['attention_mask'] must have its zeros after each text's end: pad on the right")


def _shard(batch: Mapping[str, Tensor], ranks: Ranks, segment_len: int) -> dict[str, Tensor]:
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(~mask.bool(), IGNORED)
    runs = runs_of(ids.shape[1], ranks.size, segment_len)
    first = sum(runs[: ranks.rank])
    mine = slice(first, first + runs[ranks.rank])
    shard = {
        "input_ids": ids[:, mine],
        "position_ids": torch.arange(mine.start, mine.stop, device=ids.device).expand(len(ids), -1),
        "shift_labels": F.pad(labels[:, 1:], (0, 1), value=IGNORED)[:, mine],
    }
    return shard if mask is None else {**shard, "attention_mask": mask[:, mine]}


def _digest(x: Tensor) -> str:
    """What a tensor holds, in few words."""
    digest = hashlib.blake2b(x.detach().long().contiguous().cpu().numpy().tobytes(), digest_size=8).hexdigest()
    return f"{list(x.shape)} of digest {digest}"


def mean_loss(logits: Tensor, shift_labels: Tensor, group: Any, *, gradients: str = "averaged") -> Tensor:
    """Mean cross-entropy [] over the tokens of all ranks, in nats per token, the same number on each.

    Args:
        logits: [B, t, vocabulary] of this rank's run.
        shift_labels: integers [B, t], what each token is to predict; -100: nothing. From `shard_batch`.
        group: of all ranks whose tokens count: those that share a sequence, or all of a mesh with other dimensions too.
        gradients: what is done with parameters' gradients over this group, after which they are those of one process:
            "averaged", as DDP and FSDP do, or "summed".

    Returns:
        float32, or float64 of such logits. Each rank goes backward through its own tokens.

    Raises:
        TypeError, ValueError: on every rank: unknown `gradients`, shapes that do not fit, labels outside the
            vocabulary, or no token to predict on any rank.
    """
    ranks = Ranks.of(group)
    problem: Exception | None = None
    total, count = torch.zeros(()), 0
    try:
        check.check_choice("gradients", gradients, GRADIENTS)
        total, count = _total(logits, shift_labels)
    except (TypeError, ValueError) as error:
        problem = error
    summed = gradients == "summed"
    mine = torch.tensor([total.item(), count, summed, problem is not None], dtype=torch.float64)
    sums = mine.to(quick_device(ranks))
    dist.all_reduce(sums, group=ranks.group)
    nats, tokens, summing, problems = sums.tolist()
    if problems or summing not in (0, ranks.size):
        raise_on_all_ranks(ranks, {"gradients": gradients}, problem)
    if not tokens:
        raise ValueError(f"shift_labels must hold a token to predict on some rank, got none but {IGNORED}")
    own = total * ((1 if summed else ranks.size) / tokens)
    # the value of all, with the gradient of one's own
    return own + (nats / tokens - own.detach())


def _total(logits: Tensor, shift_labels: Tensor) -> tuple[Tensor, int]:
    """Cross-entropy [] added up, and over how many tokens."""
    check.check_floating("logits", logits)
    check.check_device("shift_labels", check.check_ids("shift_labels", shift_labels), "logits", logits)
    if logits.ndim != 3 or shift_labels.shape != logits.shape[:2]:
        raise ValueError(
            f"shift_labels must be [B, t] as logits [B, t, vocabulary], got {list(shift_labels.shape)} and "
            f"{list(logits.shape)}"
        )
    labels = shift_labels.flatten().long()
    predicted = labels[labels != IGNORED]
    if bool(((predicted < 0) | (predicted >= logits.shape[2])).any()):
        raise ValueError(
            f"shift_labels must be -100 or below the vocabulary of {logits.shape[2]}, got {predicted.min()} to "
            f"{predicted.max()}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum"), predicted.numel()
