"""A batch of texts, cut into runs of whole segments for the ranks of a group."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..kernels import validation as check
from ..kernels.exchange import Ranks, agree
from .loss import IGNORED, shifted


def runs_of(time: int, size: int, segment_len: int) -> tuple[int, ...]:
    """Return the number of tokens of each of `size` ranks: whole segments, as even as possible, a partial one last.

    Raises:
        ValueError: there are fewer segments than ranks.
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
    """Return this rank's run of whole segments of each text in a batch that all ranks of the group hold.

    All ranks call it together. Rank r takes the r-th run; `sequence_parallel` reads it, and `mean_loss` gives the loss.

    Args:
        batch: "input_ids", integers [B, T]; optionally "labels" [B, T], not shifted, -100 where there is none, by
            default the text without its padding; optionally "attention_mask" [B, T], with zeros only after a text's
            end. Every text starts in the first column.
        group: `ProcessGroup`, or one dimension of a `DeviceMesh`, in whose order the ranks take the runs.
        segment_len: tokens per segment, L, of the model.
        check_ranks: check that all ranks hold the same batch, by a digest (some hundredths of a second per million
            tokens) and one collective of 24 bytes per rank. False skips the check.

    Returns:
        "input_ids" [B, t]; "position_ids" [B, t], counted from the first column; "shift_labels" [B, t], the target of
        each token, that of the last one being the first token of the next rank; and "attention_mask" [B, t] if the
        batch has one.

    Raises:
        TypeError, ValueError: an argument is not as above, there are fewer segments than ranks, or the batches differ.
            On every rank, if `check_ranks` is True.
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


def resumes_after_padding(mask: Tensor) -> bool:
    """Return whether a row of an attention mask [B, T] has a one behind a zero."""
    real = mask.bool()
    return bool((real[:, 1:] & ~real[:, :-1]).any())


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
    if mask is not None and resumes_after_padding(mask):
        raise ValueError("batch['attention_mask'] must have its zeros after each text's end: pad on the right")


def _shard(batch: Mapping[str, Tensor], ranks: Ranks, segment_len: int) -> dict[str, Tensor]:
    ids, labels, mask = batch["input_ids"], batch.get("labels"), batch.get("attention_mask")
    if labels is None:
        labels = ids if mask is None else ids.masked_fill(~mask.bool(), IGNORED)
    runs = runs_of(ids.shape[1], ranks.size, segment_len)
    first = sum(runs[: ranks.rank])
    columns = slice(first, first + runs[ranks.rank])
    shard = {
        "input_ids": ids[:, columns],
        "position_ids": torch.arange(columns.start, columns.stop, device=ids.device).expand(len(ids), -1),
        "shift_labels": shifted(labels)[:, columns],
    }
    return shard if mask is None else {**shard, "attention_mask": mask[:, columns]}


def _digest(x: Tensor) -> str:
    """Return the shape and a hash of the contents, equal for equal integer tensors."""
    digest = hashlib.blake2b(x.detach().long().contiguous().cpu().numpy().tobytes(), digest_size=8).hexdigest()
    return f"{list(x.shape)} of digest {digest}"
