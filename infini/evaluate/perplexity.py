"""Perplexity by position: in the document, where a memory shows, and inside the segment, where local context grows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .reading import cache_bytes, losses, segment_len_of
from .retrieval import check_positions

SEGMENT_BUCKETS = 16


class Bucket(NamedTuple):
    """The predicted tokens at positions [begin, end), and their mean loss.

    nats: mean of −log p.
    perplexity: exponential of nats.
    """

    begin: int
    end: int
    tokens: int
    nats: float
    perplexity: float


class Widths(NamedTuple):
    """Positions per bucket, in the document and inside a segment; None without segments."""

    document: int
    segment: int | None
    segment_len: int | None


class Document(NamedTuple):
    """The sums of one document, by bucket.

    number: of the document in the text, from 0 on.
    tokens: of the document; all but the first are predicted.
    nats, counts: by position in the document.
    segment_nats, segment_counts: by position inside the segment, empty without segments.
    cache_bytes: at the document's end.
    """

    number: int
    tokens: int
    nats: list[float]
    counts: list[int]
    segment_nats: list[float]
    segment_counts: list[int]
    cache_bytes: int
    seconds: float


def widths(model: nn.Module, length: int, buckets: int) -> Widths:
    """Return widths for about `buckets` buckets of documents of `length` tokens.

    Those in the document are whole segments, so that the position inside the segment averages out, unless one segment
    holds all of it.
    """
    segment = segment_len_of(model)
    unit = 1 if segment is None or segment >= length else segment
    width = math.ceil(math.ceil(length / buckets) / unit) * unit
    return Widths(width, None if segment is None else math.ceil(segment / SEGMENT_BUCKETS), segment)


def documents_of(tokens: Sequence[int], prefix: Sequence[int], length: int | None) -> list[list[int]]:
    """Cut a text's tokens into documents of `length` tokens, each of which begins with `prefix`; None: one document.

    A last document of less than two tokens is left out.

    Raises:
        ValueError: length has no room beside the prefix, or the text has less than two tokens.
    """
    size = len(tokens) if length is None else length - len(prefix)
    if length is not None and (size < 1 or length < 2):
        raise ValueError(f"length must be at least {max(2, len(prefix) + 1)}, got {length}")
    parts = [[*prefix, *tokens[begin : begin + size]] for begin in range(0, len(tokens), max(1, size))]
    parts = [part for part in parts if len(part) >= 2]
    if not parts:
        raise ValueError("text must be of at least two tokens, to predict one")
    return parts


def measure_documents(
    model: nn.Module,
    documents: Sequence[Sequence[int]],
    widths: Widths,
    *,
    done: Iterable[Document] = (),
    on_documents: Callable[[list[Document]], None] = lambda documents: None,
    batch: int = 1,
    piece: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[Document]:
    """Read every document that is not among `done`, each from an empty memory.

    Args:
        on_documents: called with all that are measured, after each batch.
        batch: documents read at once.
        piece: tokens of each that are read at once; None: about 4096 of all together.
        on_tokens: called with the number of tokens of each piece.

    Raises:
        ValueError: the model has too few positions, or `piece` is not whole segments.
    """
    check_positions(model, max(map(len, documents)))
    measured = {document.number: document for document in done}
    left = [number for number in range(len(documents)) if number not in measured]
    for group in _groups(left, documents, batch):
        begin = time.perf_counter()
        tokens = torch.tensor([documents[number] for number in group], device="cpu")
        nats, cache = losses(model, tokens, piece=piece, on_tokens=on_tokens)
        held = cache_bytes(cache) // len(group)
        seconds = round((time.perf_counter() - begin) / len(group), 3)
        for number, row in zip(group, nats, strict=True):
            measured[number] = _document(number, row, widths, held, seconds)
        on_documents([measured[number] for number in sorted(measured)])
    return [measured[number] for number in sorted(measured)]


def by_position(documents: Sequence[Document], widths: Widths) -> list[Bucket]:
    """Return buckets over the positions in documents; position 0 is never predicted."""
    return _buckets([(d.nats, d.counts) for d in documents], widths.document, max(d.tokens for d in documents))


def by_segment_position(documents: Sequence[Document], widths: Widths) -> list[Bucket]:
    """Return buckets over the positions inside segments; none without segments."""
    if widths.segment is None or widths.segment_len is None:
        return []
    return _buckets([(d.segment_nats, d.segment_counts) for d in documents], widths.segment, widths.segment_len)


def whole(documents: Sequence[Document]) -> Bucket:
    """Return one bucket of all tokens."""
    nats, count = sum(sum(d.nats) for d in documents), sum(sum(d.counts) for d in documents)
    return _bucket(0, max(d.tokens for d in documents), nats, count)


def joined(buckets: Sequence[Bucket]) -> Bucket:
    """Return one bucket of neighbouring ones."""
    nats, tokens = sum(bucket.nats * bucket.tokens for bucket in buckets), sum(bucket.tokens for bucket in buckets)
    return _bucket(buckets[0].begin, buckets[-1].end, nats, tokens)


def _groups(left: Sequence[int], documents: Sequence[Sequence[int]], batch: int) -> Iterator[list[int]]:
    """Group neighbouring documents of equal length, at most `batch` together."""
    group: list[int] = []
    for number in left:
        if group and (len(group) == batch or len(documents[number]) != len(documents[group[0]])):
            yield group
            group = []
        group.append(number)
    if group:
        yield group


def _document(number: int, row: Tensor, widths: Widths, held: int, seconds: float) -> Document:
    # a loss belongs to the position of the token that was predicted
    positions = torch.arange(1, len(row) + 1, device="cpu")
    nats, counts = _sums(row, positions // widths.document)
    inside: tuple[list[float], list[int]] = ([], [])
    if widths.segment is not None and widths.segment_len is not None:
        inside = _sums(row, positions % widths.segment_len // widths.segment)
    return Document(number, len(row) + 1, nats, counts, *inside, held, seconds)


def _sums(row: Tensor, bucket: Tensor) -> tuple[list[float], list[int]]:
    sums = row.new_zeros(int(bucket.max()) + 1, dtype=torch.float64).index_add_(0, bucket, row.double())
    return sums.tolist(), torch.bincount(bucket, minlength=len(sums)).tolist()


def _buckets(sums: Sequence[tuple[list[float], list[int]]], width: int, last: int) -> list[Bucket]:
    buckets = []
    for i in range(max(len(nats) for nats, _ in sums)):
        nats = sum(x[i] for x, _ in sums if i < len(x))
        count = sum(x[i] for _, x in sums if i < len(x))
        if count:
            buckets.append(_bucket(i * width, min((i + 1) * width, last), nats, count))
    return buckets


def _bucket(begin: int, end: int, nats: float, count: int) -> Bucket:
    mean = nats / count
    return Bucket(begin, end, count, mean, math.exp(min(mean, 700.0)))
