"""A book with facts all over it, read once, and a question about each of them, which all go on from what was kept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..segments import IGNORED
from .batch import Batch, generator_of
from .filler import Ids
from .texts import TextTask


class Asked(NamedTuple):
    """A question about a book.

    question: int64 [n], up to the answer.
    answer: int64 [m].
    depth: share of the book's text before the fact that answers it, from 0 to 1.
    """

    question: Ids
    answer: Ids
    depth: float


class Book(NamedTuple):
    """A book and its questions.

    text: int64 [T].
    """

    text: Ids
    asked: list[Asked]

    def endings(self, begin: int) -> Batch:
        """Return a row for each question: the text from `begin` on, the question and its answer; a token task's batch.

        Raises:
            ValueError: questions and answers are not all as long as each other.
        """
        tails = [np.concatenate([asked.question, asked.answer]) for asked in self.asked]
        shapes = {(len(asked.question), len(asked.answer)) for asked in self.asked}
        if len(shapes) > 1:
            raise ValueError(f"questions and answers must be as long as each other, got {sorted(shapes)} tokens")
        rows = torch.from_numpy(np.stack([np.concatenate([self.text[begin:], tail]) for tail in tails]))
        labels: Tensor = torch.full_like(rows, IGNORED)
        answer = len(self.asked[0].answer)
        labels[:, -answer:] = rows[:, -answer:]
        return Batch(rows, labels)


def draw_book(task: TextTask, length: int, *, seed: int, index: int = 0, split: str = "test") -> Book:
    """Draw a book of `length` tokens, with its longest question and answer; the same arguments give the same book.

    Args:
        task: of tokens, such as `make_task("book", book="book.txt")`.

    Raises:
        ValueError: a length below the task's shortest, a negative seed or index, an unknown split.
    """
    generator = generator_of(1, seed=seed, index=index, split=split)
    if length < task.shortest:
        raise ValueError(f"length must be at least {task.shortest} for the task {task.name}, got {length}")
    questions = task.questions(split)
    drawn = questions[generator.integers(len(questions))]
    # the same story may come again
    about = list({question.text: question for question in questions if question.facts == drawn.facts}.values())
    endings = [task.ending(question) for question in about]
    room = length - max(len(asked) + len(answer) for asked, answer in endings)
    text, places = task.text(drawn, room, generator, split)
    depths = [places[question.support[0]] / room for question in about]
    return Book(text, [Asked(*ending, float(depth)) for ending, depth in zip(endings, depths, strict=True)])
