"""The results of a call, put together from its segments: one loss, and logits at the places of their tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.text import check_labels
from ..segments import IGNORED, Segment, next_tokens


def targets_of(labels: Tensor, kind: str, rows: list[tuple[int, int]], time: int) -> Tensor:
    """Return what the logits at each place are to predict, in the shape of the labels.

    Args:
        labels: [B, T], one for each token; or [B], classes of an encoder's rows.
        kind: "decoder", whose logits predict the next token, or "encoder", whose logits predict the token itself.
        rows: where each row's tokens begin and end.
        time: T.

    Raises:
        TypeError, ValueError: labels of another dtype or shape.
    """
    if kind == "encoder" and isinstance(labels, Tensor) and labels.ndim == 1:
        return check_labels("labels", labels, "[B]", (len(rows),))
    labels = check_labels("labels", labels, "[B, T]", (len(rows), time))
    if kind == "decoder":
        return next_tokens(labels, rows)
    at = torch.arange(time, device=labels.device)
    begin, end = torch.tensor(rows, device=labels.device)[..., None].unbind(1)
    return labels.masked_fill((at < begin) | (at >= end), IGNORED)


def summed_loss(logits: Tensor, targets: Tensor, segment: Segment, last_only: bool) -> tuple[Tensor, Tensor]:
    """Return the sum of the cross-entropy over a segment's targets, in float32 at least, and their number.

    Args:
        logits: [b, n, C] of the segment's tokens, or [b, C] of its rows.
        targets: [B, T] or [B]; IGNORED ones do not count.
        last_only: whether only segments that are their row's last count.

    Raises:
        ValueError: labels that do not have the shape of the logits, or logits of a single class.
    """
    if logits.shape[-1] < 2:
        raise ValueError(
            f"model must have logits of at least 2 classes where there are labels, got {logits.shape[-1]}: load it "
            "with num_labels=2 or more or pass head=, or make a loss of your own from the logits, without labels"
        )
    if logits.ndim != targets.ndim + 1:
        shapes = {2: "[B], since the model classifies rows", 3: "[B, T], since the model has logits for every token"}
        raise ValueError(f"labels must have shape {shapes[logits.ndim]}, got {list(targets.shape)}")
    own = segment.of(targets) if targets.ndim == 2 else segment.rows_of(targets)
    lengths = segment.lengths(own.device) if targets.ndim == 2 else None
    if lengths is not None:
        own = own.masked_fill(torch.arange(own.shape[1], device=own.device) >= lengths[:, None], IGNORED)
    if last_only and max(segment.left) > 1:
        earlier = torch.tensor([left > 1 for left in segment.left], device=own.device)
        own = own.masked_fill(earlier.view(-1, *[1] * (own.ndim - 1)), IGNORED)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.cross_entropy(logits.flatten(0, -2), own.flatten(), ignore_index=IGNORED, reduction="sum")
    return loss, (own != IGNORED).sum()


def gather(pieces: list[tuple[Segment, Tensor]], batch: int, time: int) -> Tensor | None:
    """Return the logits of all segments as [B, T, C], 0 at padding; or [B, C], those of each row's last segment."""
    if not pieces:
        return None
    first = pieces[0][1]
    if first.ndim == 2:
        out = first.new_zeros(batch, first.shape[1])
        for segment, logits in pieces:
            last = [at for at, left in enumerate(segment.left) if left == 1]
            out = out.index_copy(0, _index([segment.rows[at] for at in last], out), logits[_index(last, out)])
        return out
    if all(segment.whole(batch) for segment, _ in pieces) and sum(x.shape[1] for _, x in pieces) == time:
        return torch.cat([logits for _, logits in pieces], 1)
    to: list[int] = []
    source: list[int] = []
    before = 0
    for segment, logits in pieces:
        for row, begin, end in zip(segment.rows, segment.begin, segment.end, strict=True):
            to += range(row * time + begin, row * time + end)
            source += range(before, before + end - begin)
            before += logits.shape[1]
    every = torch.cat([logits.flatten(0, 1) for _, logits in pieces])
    out = every.new_zeros(batch * time, every.shape[1]).index_copy(0, _index(to, every), every[_index(source, every)])
    return out.unflatten(0, (batch, time))


def _index(numbers: list[int], like: Tensor) -> Tensor:
    return torch.tensor(numbers, device=like.device, dtype=torch.long)
