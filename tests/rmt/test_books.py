"""Questions about a book: facts all over it, one reading, and each question as if it had been asked alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from segattn import AssociativeMemory, RecurrentMemory
from segattn.rmt.runs.models import Sizes, small_decoder
from segattn.rmt.tasks.answers import answer, answer_all
from segattn.rmt.tasks.batch import Batch
from segattn.rmt.tasks.books import Asked, Book, draw_book
from segattn.rmt.tasks.make import make_task
from segattn.rmt.tasks.texts import TextTask
from segattn.rmt.tasks.traits import PEOPLE, TRAITS, generate_traits
from segattn.rmt.tasks.vocabulary import GEN
from segattn.runs.text import tokenize

L = 31


@pytest.fixture(scope="module")
def task() -> TextTask:
    made = make_task("book", people=5, vocabulary_size=60)
    assert isinstance(made, TextTask)
    return made


def words(task: TextTask, tokens: Any) -> str:
    assert task.vocabulary is not None
    return task.vocabulary.decode(tokens)


def test_each_has_a_trait_of_another_kind_and_is_asked_for() -> None:
    questions = generate_traits("train", 3, stories=50)
    assert len(questions) == 150
    for first in range(0, 150, 3):
        story = questions[first : first + 3]
        assert {question.facts for question in story} == {story[0].facts}
        assert [question.support for question in story] == [(0,), (1,), (2,)]
        kinds = []
        for fact, question in zip(story[0].facts, story, strict=True):
            name = fact.split()[0]
            [kind] = [i for i, trait in enumerate(TRAITS) if trait.fact.format(name, question.answer) == fact]
            assert question.answer in TRAITS[kind].answers
            assert question.text == TRAITS[kind].question.format(name)
            kinds.append(kind)
        assert sorted(kinds) == [0, 1, 2]
        assert len({fact.split()[0] for fact in story[0].facts}) == 3
    assert {question.answer for question in questions} == {answer for trait in TRAITS[:3] for answer in trait.answers}
    assert generate_traits("test", 3, stories=50) != questions
    # no answer is of two kinds
    answers = [answer for trait in TRAITS for answer in trait.answers]
    assert len(set(answers)) == len(answers) == 48
    for people in (0, 9):
        with pytest.raises(ValueError, match=f"people must be from 1 to 8, got {people}"):
            generate_traits("train", people)


@pytest.mark.parametrize("length", [67, 400, 5003])
def test_facts_are_spread_over_the_book(task: TextTask, length: int) -> None:
    depths = []
    for index in range(8):
        book = draw_book(task, length, seed=3, index=index)
        assert np.array_equal(book.text, draw_book(task, length, seed=3, index=index).text)
        assert len(book.text) + 8 + 1 == length
        text = words(task, book.text)
        assert len(book.asked) == 5
        for asked in book.asked:
            question, told = words(task, asked.question), words(task, asked.answer)
            name = next(word for word in question.split() if word.title() in PEOPLE)
            [trait] = [trait for trait in TRAITS if told in trait.answers]
            assert question == f"{' '.join(tokenize(trait.question.format(name)))} [GEN]"
            before, *after = text.split(" ".join(tokenize(trait.fact.format(name, told))))
            assert len(after) == 1
            assert len(before.split()) == round(asked.depth * len(book.text))
        depths.append([asked.depth for asked in book.asked])
        assert depths[-1] == sorted(depths[-1])
    assert not np.array_equal(book.text, draw_book(task, length, seed=4, index=7).text)
    if length == 5003:
        # each in its fifth, but for the sentence that it stands behind
        for place, of_place in enumerate(zip(*depths, strict=True)):
            assert min(of_place) > place / 5 - 0.02
            assert max(of_place) < (place + 1) / 5 + 0.02
            assert max(of_place) - min(of_place) > 0.05


def test_a_book_and_samples_have_the_same_form(task: TextTask) -> None:
    """A question of a book stands where that of a training sample stands."""
    book = draw_book(task, 300, seed=0)
    rows, labels = book.endings(0)
    assert rows.shape == labels.shape == (5, 300)
    sample = task.batch(2, 300, seed=0, index=0)
    for batch in (Batch(rows, labels), sample):
        assert (batch.input_ids[:, -2] == GEN).all()
        assert (batch.labels[:, :-1] == -100).all()
        assert torch.equal(batch.labels[:, -1], batch.input_ids[:, -1])
    begin = book.endings(120)
    assert torch.equal(begin.input_ids, rows[:, 120:])
    assert torch.equal(begin.labels, labels[:, 120:])


@pytest.mark.parametrize("kind", ["recurrent", "associative"])
@pytest.mark.parametrize("length", [60, 31 * 40 + 5, 31 * 40 + 9])
def test_answers_are_those_of_each_question_alone(task: TextTask, kind: str, length: int) -> None:
    torch.manual_seed(0)
    model = small_decoder(task.vocab_size, L + 6, Sizes(2, 16, 2))
    memory = RecurrentMemory(model, 3, L) if kind == "recurrent" else AssociativeMemory(model, 3, L, d_mem=4)
    memory.eval()
    book = draw_book(task, length, seed=1)
    # so that some are right: what the model says to every other question is taken for the answer
    rows = book.endings(0)
    with torch.no_grad():
        said = memory(rows.input_ids).logits[:, -2].argmax(-1)
    asked = [x._replace(answer=said[i : i + 1].numpy()) if i % 2 else x for i, x in enumerate(book.asked)]
    book = book._replace(asked=asked)
    count: list[int] = []
    together = answer_all(memory, book, L, count.append)
    assert sum(count) == len(book.text) // L * L
    alone = [answer(memory, Batch(*(x[i : i + 1] for x in book.endings(0))), L) for i in range(5)]
    assert together.right.tolist() == [bool(x.right) for x in alone]
    assert together.right[1::2].all()
    if length > 2 * L:
        assert together.state_bytes == alone[0].state_bytes


def test_a_story_that_comes_twice_is_asked_once() -> None:
    made = make_task("book", people=1, vocabulary_size=20)
    assert isinstance(made, TextTask)
    assert [len(draw_book(made, 80, seed=0, index=index).asked) for index in range(5)] == [1] * 5


def test_bad_input(task: TextTask) -> None:
    with pytest.raises(ValueError, match=f"length must be at least {task.shortest} for the task book, got 20"):
        draw_book(task, 20, seed=0)
    with pytest.raises(ValueError, match="split must be one of train, test, got 'dev'"):
        draw_book(task, 100, seed=0, split="dev")
    ids = np.arange(3)
    uneven = Book(ids, [Asked(ids, ids[:1], 0.1), Asked(ids[:2], ids[:1], 0.5)])
    with pytest.raises(ValueError, match=r"must be as long as each other, got \[\(2, 1\), \(3, 1\)\] tokens"):
        uneven.endings(0)
    with pytest.raises(ValueError, match="babi must be left out for book, whose facts are generated, got 'folder'"):
        make_task("book", babi="folder")
    with pytest.raises(ValueError, match="people must be left out for qa1, got 3"):
        make_task("qa1", people=3)
