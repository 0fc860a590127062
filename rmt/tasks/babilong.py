"""BABILong's samples as texts (arXiv 2406.10149): a story's facts between the sentences of a book, and its question."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from random import Random

from ...runs.text import generate_text, text_sha256
from .facts import Question, babi_file, generate_questions, read_questions
from .filler import split_sentences
from .make import read_book


class Stories:
    """Stories of bAbI's test, and the sentences of the held-out end of a book to hide their facts in.

    Args:
        forms: of the questions: qa1, qa2, qa4.
        babi: folder with bAbI's files; None: generated stories.
        book: text file in UTF-8; None: generated sentences of made-up words.

    Attributes:
        questions: those that are drawn from, by form.
        settings: what the samples are made from, with hashes of the contents.

    Raises:
        ValueError: an unknown form, or a file cannot be read.
    """

    def __init__(self, forms: Sequence[str], babi: str | Path | None = None, book: str | Path | None = None) -> None:
        self.questions = {form: _questions(form, babi) for form in forms}
        text = generate_text(100_000, seed=0) if book is None else read_book(book)
        self._sentences = split_sentences(text)["test"]
        self.settings = {
            "babi": None if babi is None else str(babi),
            "book": None if book is None else str(book),
            "babi_sha256": text_sha256(repr(self.questions)),
            "book_sha256": text_sha256(text),
        }

    def documents(
        self, form: str, count: Callable[[str], int], length: int, samples: int, seed: int
    ) -> list[dict[str, str]]:
        """Make samples, which depend on the arguments alone: the text is `input`, then `question` and `target`.

        Args:
            form: of the questions.
            count: returns the tokens of a text.
            length: tokens of an input, at most, as the sum over its sentences.
            samples: number of samples.
            seed: of the random numbers.

        Raises:
            ValueError: a length that does not hold a story.
        """
        # as they stand in the text, behind a blank
        counts = [count(f" {sentence}") for sentence in self._sentences]
        random = Random(f"{seed} {form} {length}")
        drawn = [random.choice(self.questions[form]) for _ in range(samples)]
        return [self._document(question, random, counts, count, length) for question in drawn]

    def _document(
        self, question: Question, random: Random, counts: Sequence[int], count: Callable[[str], int], length: int
    ) -> dict[str, str]:
        room = length - sum(count(f" {fact}") for fact in question.facts)
        if room < 0:
            raise ValueError(f"length must be at least {length - room} to hold a story, got {length}")
        first = random.randrange(len(counts))
        rounds = room // sum(counts) + 1
        turned = [*range(first, len(counts)), *range(first)] * rounds
        ends = list(accumulate(counts[i] for i in turned))
        text = [self._sentences[i] for i in turned[: bisect_right(ends, room)]]
        places = sorted(random.randrange(len(text) + 1) for _ in question.facts)
        for place, fact in reversed(list(zip(places, question.facts, strict=True))):
            text.insert(place, fact)
        return {"input": " ".join(text), "question": question.text, "target": question.answer}


def _questions(form: str, babi: str | Path | None) -> list[Question]:
    return generate_questions(form, "test") if babi is None else read_questions(babi_file(babi, form, "test"))
