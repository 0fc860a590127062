"""Questions about a book that is read once: each of them goes on from what the model kept of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from .loading import Loaded
from .needle import plain_words
from .reading import cache_bytes, decode, read
from .retrieval import RetrievalCell

# tokens that are decoded beyond an answer's, in which it may stand too
EXTRA = 8


class Asked(Protocol):
    """A question about a book, and its answer, in tokens."""

    @property
    def question(self) -> Collection[int]: ...

    @property
    def answer(self) -> Collection[int]: ...


class Book(Protocol):
    """A book in tokens, and questions about it, in the order of the facts that answer them."""

    @property
    def text(self) -> Collection[int]: ...

    @property
    def asked(self) -> Sequence[Asked]: ...


# from a length in tokens, and a number, to a book
Draw = Callable[[int, int], Book]


def check_book(book: Book) -> None:
    """Check that there is something to read before the questions.

    Raises:
        ValueError: there is not.
    """
    if not len(book.text):
        raise ValueError("length must leave a text before the questions, got one of no tokens")


def measure_books(
    loaded: Loaded,
    draw: Draw,
    length: int,
    *,
    books: int,
    piece: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[RetrievalCell]:
    """Read books of one length, ask every question about each, and return a cell for each depth, first to last.

    An answer is right where the model says it at once or in a few words more, whatever the case and the blanks.

    Args:
        draw: makes the books, each with as many questions, whose facts are spread evenly over it.
        piece: tokens read at once, whole segments; None: about 4096.
    """
    begin = time.perf_counter()
    model, tokenizer, _ = loaded
    hits: list[list[tuple[bool, float]]] = []
    held = 0
    for index in range(books):
        book = draw(length, index)
        reading = read(model, torch.tensor([list(book.text)]), piece=piece, on_tokens=on_tokens)
        held = max(held, cache_bytes(reading.cache))
        hits.append([])
        for asked in book.asked:
            answer = list(asked.answer)
            asking = read(model, torch.tensor([list(asked.question)]), after=reading)
            said = decode(model, asking, len(answer) + EXTRA)[0].tolist()
            right = plain_words(tokenizer.decode(answer)) in plain_words(tokenizer.decode(said))
            hits[-1].append((right, sum(a == b for a, b in zip(answer, said, strict=False)) / len(answer)))
    seconds = round((time.perf_counter() - begin) / len(hits[0]), 3)
    cells = []
    for place, of_place in enumerate(zip(*hits, strict=True)):
        exact, tokens = (sum(values) / books for values in zip(*of_place, strict=True))
        depth = round((place + 0.5) / len(hits[0]), 4)
        cells.append(RetrievalCell(length, depth, books, exact, tokens, held, seconds))
    return cells
