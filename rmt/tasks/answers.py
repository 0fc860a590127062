"""The answers of a memory to a task's samples, read piece by piece: only their tokens grow with their length."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..segments import IGNORED
from .batch import Batch
from .books import Book
from .facts import PLACES
from .make import Task
from .symbols import CopyTask, RetrievalTask

# segments read at once, after each of which a progress bar moves
PIECE = 16
# samples read at once in a test after a stage
BATCH = 25


class Memory(Protocol):
    """Name the methods of a `RecurrentMemory` or `AssociativeMemory` that answers need."""

    def __call__(self, input_ids: Tensor, **options: Any) -> Any: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class Answers(NamedTuple):
    """The outcome of a batch.

    right: bool [B], whether each sample was answered right.
    state_bytes: size of one row's state.
    """

    right: Tensor
    state_bytes: int


def fewest_segments(task: Task, segment_len: int) -> int:
    """Return the least number of segments that hold any sample of a task."""
    return -(-task.shortest // segment_len)


def length_of(task: Task, tokens: int) -> int:
    """Return the greatest length of a task's samples that is at most `tokens`."""
    if not isinstance(task, (CopyTask, RetrievalTask)):
        return tokens
    least = task.length(0)
    return task.length((tokens - least) // (task.length(1) - least))


def chance(task: Task) -> float:
    """Return the share of right answers when one of the possible answers is guessed."""
    if isinstance(task, RetrievalTask):
        return 1 / task.symbols
    if isinstance(task, CopyTask):
        return 0.0
    # bAbI's questions of these kinds ask for places
    return 1 / len(task.classes or PLACES)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return which rows are answered right, bool [B].

    Args:
        logits, labels: of classes, [B, C] and [B]; or of tokens, [B, T, C] and [B, T], each label predicted by the
            logits before it: a row is right where all of its labels are.
    """
    if labels.ndim == 1:
        return logits.argmax(-1) == labels
    target = labels[:, 1:]
    return ((logits[:, :-1].argmax(-1) == target) | (target == IGNORED)).all(1)


@torch.inference_mode()
def answer(memory: Memory, batch: Batch, segment_len: int, on_read: Callable[[int], None] | None = None) -> Answers:
    """Read samples and answer them.

    Args:
        memory: in evaluation mode.
        batch: samples, on any device; those of classes are whole segments long.
        segment_len: L.
        on_read: called after each piece with the number of its tokens, of all rows.
    """
    ids, labels = batch
    device = next(memory.parameters()).device
    rows, time = ids.shape
    tokens = labels.ndim == 2
    # the logits of the first answer, and the beginning of their segment
    first = int((labels != IGNORED).any(0).nonzero()[0]) - 1 if tokens else time - 1
    last = first // segment_len * segment_len
    state, logits = None, torch.empty(0, device=device)
    for begin, end in pairwise([*range(0, last, PIECE * segment_len), last, time]):
        # an encoder's logits of a row's last segment are always returned
        out = memory(ids[:, begin:end].to(device), state=state, output_logits=tokens and end == time)
        state, logits = out.state, out.logits
        if on_read is not None:
            on_read(rows * (end - begin))
    return Answers(right(logits, (labels[:, last:] if tokens else labels).to(device)), _bytes(state) // rows)


@torch.inference_mode()
def answer_all(memory: Memory, book: Book, segment_len: int, on_read: Callable[[int], None] | None = None) -> Answers:
    """Read a book once, up to its last whole segment, and answer all of its questions from there.

    Arguments as of `answer`; the result has a row for each question.

    Raises:
        ValueError: questions or answers are of unlike lengths.
    """
    device = next(memory.parameters()).device
    last = len(book.text) // segment_len * segment_len
    ids, labels = (x.to(device) for x in book.endings(last))
    state = None
    for begin, end in pairwise([*range(0, last, PIECE * segment_len), last]):
        piece = torch.from_numpy(book.text[begin:end])[None].to(device)
        state = memory(piece, state=state, output_logits=False).state
        if on_read is not None:
            on_read(end - begin)
    size = 0 if state is None else _bytes(state)
    if state is not None:
        state = state.select(torch.zeros(len(ids), dtype=torch.long, device=device))
    out = memory(ids, state=state, output_logits=True)
    return Answers(right(out.logits, labels), size)


def samples_of(task: Task, first: int, last: int, length: int, seed: int) -> Batch:
    """Draw test samples from number `first` to below `last`: each is the same in whatever batch it is drawn."""
    drawn = [task.batch(1, length, seed=seed, index=index, split="test") for index in range(first, last)]
    return Batch(*(torch.cat(column) for column in zip(*drawn, strict=True)))


def count_right(memory: Memory, task: Task, length: int, segment_len: int, samples: int, seed: int) -> int:
    """Return how many of the first `samples` test samples a memory answers right."""
    hits = 0
    for first in range(0, samples, BATCH):
        batch = samples_of(task, first, min(first + BATCH, samples), length, seed)
        hits += int(answer(memory, batch, segment_len).right.sum())
    return hits


def interval(hits: int, samples: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of the share `hits` / `samples`, by Wilson's score."""
    z = 1.959963984540054
    share, weight = hits / samples, z * z / samples
    middle = (share + weight / 2) / (1 + weight)
    half = z / (1 + weight) * math.sqrt(share * (1 - share) / samples + weight / (4 * samples))
    # rounding must not leave the share outside
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def _bytes(state: Any) -> int:
    """Return the bytes of all tensors in nested tuples."""
    return state.numel() * state.element_size() if isinstance(state, Tensor) else sum(map(_bytes, state))
