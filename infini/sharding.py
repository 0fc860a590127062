"""A batch of texts over the ranks of a group, and the loss of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..kernels import validation as check
from ..kernels.exchange import Ranks

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


def shard_batch(batch: Mapping[str, Tensor], group: Any, segment_len: int) -> dict[str, Tensor]:
    """This rank's part of a batch that every rank of the group holds whole: a run of whole segments of each text.

    Args:
        batch: "input_ids" int64 [B, T]; and perhaps "labels" [B, T], as transformers has them: not shifted, -100 where
            none is to be predicted, default the text without its padding; "attention_mask" [B, T], zeros after a text's
            end. The texts stand in the batch from their first token on.
        group: a `ProcessGroup`, or one dimension of a `DeviceMesh`, whose ranks take the runs in their order.
        segment_len: tokens per segment, that of the model.

    Returns:
        "input_ids" [B, t], "position_ids" [B, t], counted from each text's first token, "shift_labels" [B, t], what
        each token is to predict, the last one the next rank's first, and "attention_mask" where the batch has one.

    Raises:
        TypeError, ValueError: naming the argument, what it must be, and what it was; fewer segments than ranks.
    """
    ranks = Ranks.of(group)
    check.check_integer("segment_len", segment_len, 1)
    if unknown := sorted(set(batch) - {"input_ids", "labels", "attention_mask"}):
        raise ValueError(f"batch may hold input_ids, labels and attention_mask, got {', '.join(unknown)} too")
    ids, labels, mask = (batch.get(name) for name in ("input_ids", "labels", "attention_mask"))
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"batch['input_ids'] must be integers [B, T], got {got}")
    for name, x in (("labels", labels), ("attention_mask", mask)):
        if x is not None and x.shape != ids.shape:
            raise ValueError(
                f"batch[{name!r}] must be of the shape of input_ids, {list(ids.shape)}, got {list(x.shape)}"
            )
    if mask is not None and bool((mask.bool()[:, 1:] & ~mask.bool()[:, :-1]).any()):
        raise ValueError("batch['attention_mask'] must have its zeros after each text's end: pad on the right")
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


def mean_loss(logits: Tensor, shift_labels: Tensor, group: Any, *, gradients: str = "averaged") -> Tensor:
    """Mean cross-entropy [] over the tokens of all ranks, in nats per token, the same number on each.

    Args:
        logits: [B, t, vocabulary] of this rank's run.
        shift_labels: int64 [B, t], what each token is to predict; -100: nothing. From `shard_batch`.
        group: of all ranks whose tokens count: those that share a sequence, or all of a mesh with other dimensions too.
        gradients: what is done with parameters' gradients over this group, after which they are those of one process:
            "averaged", as DDP and FSDP do, or "summed".

    Returns:
        float32, or float64 of such logits. Each rank goes backward through its own tokens.

    Raises:
        ValueError: unknown `gradients`, shapes that do not fit, or no token to predict on any rank.
    """
    ranks = Ranks.of(group)
    check.check_choice("gradients", gradients, GRADIENTS)
    check.check_floating("logits", logits)
    if logits.ndim != 3 or shift_labels.shape != logits.shape[:2]:
        raise ValueError(
            f"shift_labels must be [B, t] as logits [B, t, vocabulary], got {list(shift_labels.shape)} and "
            f"{list(logits.shape)}"
        )
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    total = F.cross_entropy(wide, shift_labels.flatten(), ignore_index=IGNORED, reduction="sum")
    sums = torch.stack([total.detach().double(), (shift_labels != IGNORED).sum().double()])
    dist.all_reduce(sums, group=ranks.group)
    if not sums[1] > 0:
        raise ValueError(f"shift_labels must hold a token to predict on some rank, got none but {IGNORED}")
    mine = total * ((ranks.size if gradients == "averaged" else 1) / sums[1]).to(total.dtype)
    # the value of all, with the gradient of one's own
    return mine + ((sums[0] / sums[1]).to(mine.dtype) - mine.detach())
