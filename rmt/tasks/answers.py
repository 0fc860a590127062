"""What a memory answers to a task's samples, read piece by piece: nothing but the tokens grows with their length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .batch import IGNORE, Batch
from .facts import PLACES
from .make import Task
from .symbols import CopyTask, RetrievalTask

# segments read at once; what it changes is how often a progress bar moves
PIECE = 16
# samples read at once where nobody says otherwise
BATCH = 25


class Memory(Protocol):
    """What `RecurrentMemory` and `AssociativeMemory` have in common."""

    def __call__(self, input_ids: Tensor, **options: Any) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Answers(NamedTuple):
    """right: bool [B]. state_bytes: of one row's state."""

    right: Tensor
    state_bytes: int


def fewest_segments(task: Task, segment_len: int) -> int:
    """Segments that hold every sample of a task."""
    return -(-task.shortest // segment_len)


def length_of(task: Task, tokens: int) -> int:
    """The greatest length of a sample of at most so many tokens."""
    if not isinstance(task, (CopyTask, RetrievalTask)):
        return tokens
    least = task.length(0)
    return task.length((tokens - least) // (task.length(1) - least))


def chance(task: Task) -> float:
    """Share of right answers by guessing one of those that there are."""
    if isinstance(task, RetrievalTask):
        return 1 / task.symbols
    if isinstance(task, CopyTask):
        return 0.0
    # bAbI's questions of these kinds ask for places
    return 1 / len(task.classes or PLACES)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Which rows are answered right, bool [B].

    Args:
        logits, labels: of classes, [B, C] and [B]; or of tokens, [B, T, C] and [B, T], each label predicted by the
            logits before it: all of a row's labels must be met.
    """
    if labels.ndim == 1:
        return logits.argmax(-1) == labels
    target = labels[:, 1:]
    return ((logits[:, :-1].argmax(-1) == target) | (target == IGNORE)).all(1)


@torch.inference_mode()
def answer(memory: Memory, batch: Batch, segment_len: int, on_read: Callable[[int], None] | None = None) -> Answers:
    """Read samples and answer them.

    Args:
        batch: samples, on any device; those of classes are whole segments long.
        on_read: called after each piece with the tokens it had, of all rows.
    """
    ids, labels = batch
    device = next(memory.parameters()).device
    rows, time = ids.shape
    tokens = labels.ndim == 2
    asked = int((labels != IGNORE).any(0).nonzero()[0]) - 1 if tokens else time - 1
    last = asked // segment_len * segment_len
    state, logits = None, torch.empty(0)
    for begin, end in pairwise([*range(0, last, PIECE * segment_len), last, time]):
        # an encoder's logits of a row's last segment are always there
        out = memory(ids[:, begin:end].to(device), state=state, output_logits=tokens and end == time)
        state, logits = out.state, out.logits
        if on_read is not None:
            on_read(rows * (end - begin))
    return Answers(right(logits, (labels[:, last:] if tokens else labels).to(device)), _bytes(state) // rows)


def samples_of(task: Task, first: int, last: int, length: int, seed: int) -> Batch:
    """Samples of the test by number: they are the same in whatever batches they are drawn."""
    drawn = [task.batch(1, length, seed=seed, index=index, split="test") for index in range(first, last)]
    return Batch(*(torch.cat(column) for column in zip(*drawn, strict=True)))


def count_right(memory: Memory, task: Task, length: int, segment_len: int, samples: int, seed: int) -> int:
    """Of so many samples of the test, those that are answered right."""
    hits = 0
    for first in range(0, samples, BATCH):
        batch = samples_of(task, first, min(first + BATCH, samples), length, seed)
        hits += int(answer(memory, batch, segment_len).right.sum())
    return hits


def interval(hits: int, samples: int) -> tuple[float, float]:
    """95 % confidence interval of a share, by Wilson's score."""
    z = 1.959963984540054
    share, weight = hits / samples, z * z / samples
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / samples + weight / (4 * samples))
    # rounding shall not leave the share outside
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _bytes(state: Any) -> int:
    """Of all tensors in nested tuples."""
    return state.numel() * state.element_size() if isinstance(state, Tensor) else sum(map(_bytes, state))
