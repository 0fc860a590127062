"""The memory tasks by name: `make_task("detect", babi="tasks_1-20_v1-2/en-10k", book="book.txt").batch(...)`.

Facts in running text, 6-way classification of the answer, the question at the end (arXiv 2304.11062, section 4):

- memorize: one fact at the very beginning.
- detect: one fact anywhere.
- reasoning: two facts anywhere, of two places and their directions from a third; the question picks one by a direction.

All facts of a story scattered in running text, the answer's tokens to be generated (BABILong, arXiv 2406.10149):

- qa1, qa2, qa4: as bAbI's tasks of these numbers.

Facts spread evenly over running text, any of which is asked for:

- book: one trait of each of some people; `books.draw_book` asks for all of them.

Symbols alone, tokens to be generated:

- retrieval: key and value pairs, one a segment (ARMT, arXiv 2407.04841).
- copy, reverse: of random symbols (arXiv 2207.06881, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...runs.text import generate_text
from .batch import SPLITS, Batch
from .facts import WORDS, Question, babi_file, generate_questions, read_questions
from .filler import Encode, Filler, split_sentences
from .symbols import CopyTask, RetrievalTask
from .texts import Kind, TextTask
from .traits import generate_traits
from .vocabulary import GEN, Vocabulary


class Task(Protocol):
    """A memory task, as training uses it.

    name: one of `TASKS`.
    classes: the answers of a class task; empty for a token task.
    vocab_size: number of token ids.
    shortest: least length that holds every sample, in tokens.
    """

    name: str
    classes: tuple[str, ...]
    vocab_size: int
    shortest: int

    @property
    def vocabulary(self) -> Vocabulary | None:
        """The words of the token ids; None where the caller passed `encode`."""

    def batch(self, batch_size: int, length: int, *, seed: int, index: int, split: str = "train") -> Batch:
        """Return samples of exactly `length` tokens, a pure function of the arguments."""


class _Form(NamedTuple):
    """The form of a task of facts in text.

    questions: the form of its questions, in `facts.FORMS`; None: generated traits.
    kind: what the labels are, as in `TextTask`.
    support_only: put only the supporting facts into the text.
    at_beginning: put them in front of all text.
    """

    questions: str | None
    kind: Kind
    support_only: bool = False
    at_beginning: bool = False
    spread: bool = False


FORMS = {
    "memorize": _Form("qa1", "class", support_only=True, at_beginning=True),
    "detect": _Form("qa1", "class", support_only=True),
    # both facts: bAbI names one as support, and the other is what makes the direction matter
    "reasoning": _Form("qa4", "class"),
    "qa1": _Form("qa1", "token"),
    "qa2": _Form("qa2", "token"),
    "qa4": _Form("qa4", "token"),
    "book": _Form(None, "token", spread=True),
}
PEOPLE = 4


def text_task(
    name: str,
    *,
    babi: str | Path | None = None,
    book: str | Path | None = None,
    kind: Kind | None = None,
    max_facts: int | None = None,
    people: int | None = None,
    decoys: float = 0.0,
    vocabulary: Vocabulary | None = None,
    vocabulary_size: int = 4000,
    encode: Encode | None = None,
    vocab_size: int | None = None,
    gen_token: int | None = None,
) -> TextTask:
    """Make a task of facts in running text.

    Args:
        name: memorize, detect, reasoning, qa1, qa2, qa4 or book.
        babi: folder with bAbI's files; None: generated facts, as the task book always has them.
        book: text file, in UTF-8; its first 80 % of sentences are for training, the others for the test. None:
            generated sentences of made-up words.
        kind: "class" or "token"; None: "class" for the first three, "token" for the others.
        max_facts: leave out questions with more facts in front of them; None: leave out none. The longest stories of
            qa2 have 88, of 552 words.
        people: number of people in the task book, from 1 to 8; None: 4.
        decoys: share of the training filler's tokens that are replaced by single ones out of facts, as in `TextTask`.
        vocabulary: that of another task; None: built from the text's training part.
        vocabulary_size: words of the text in a vocabulary built here, besides those of the facts.
        encode: returns the token ids of a sentence, without special tokens, in place of a vocabulary, as in `TextTask`.
        vocab_size: number of token ids of `encode`.
        gen_token: token between question and answer of a token task with `encode`; None: there is none. With a
            vocabulary it is [GEN].

    Raises:
        ValueError: an unknown name, files that do not exist or cannot be read, options that do not go together or are
            out of range.
    """
    if name not in FORMS:
        raise ValueError(f"name must be one of {', '.join(FORMS)}, got {name!r}")
    form = FORMS[name]
    kind = form.kind if kind is None else kind
    if people is not None and form.questions is not None:
        raise ValueError(f"people must be left out for {name}, got {people}")
    if babi is not None and form.questions is None:
        raise ValueError(f"babi must be left out for {name}, whose facts are generated, got {str(babi)!r}")
    questions = {split: _questions(form, split, babi, max_facts, people or PEOPLE) for split in SPLITS}
    text = generate_text(100_000, seed=0) if book is None else read_book(book)
    if encode is None:
        if vocab_size is not None or gen_token is not None:
            raise ValueError("vocab_size and gen_token must come with encode, got one of them without")
        if vocabulary is None:
            required = {sentence for question in questions["train"] for sentence in (*question.facts, question.text)}
            vocabulary = Vocabulary.build(split_sentences(text)["train"], vocabulary_size, required=[*WORDS, *required])
        encode, vocab_size, gen_token = vocabulary.encode, len(vocabulary), GEN
    elif vocabulary is not None:
        raise ValueError("vocabulary must be left out where encode is given, got both")
    elif vocab_size is None:
        raise ValueError("vocab_size must come with encode, got None: pass the number of its token ids")
    return TextTask(
        name,
        questions,
        Filler(text, encode),
        encode,
        vocab_size=vocab_size,
        kind=kind,
        gen_token=gen_token,
        at_beginning=form.at_beginning,
        spread=form.spread,
        decoys=decoys,
        vocabulary=vocabulary,
    )


TASKS: dict[str, Callable[..., Task]] = {
    **{name: partial(text_task, name) for name in FORMS},
    "retrieval": RetrievalTask,
    "copy": partial(CopyTask, reverse=False),
    "reverse": partial(CopyTask, reverse=True),
}


def make_task(name: str, **options: Any) -> Task:
    """Make a task by its name; the options are those of `text_task`, `RetrievalTask` or `CopyTask`.

    Raises:
        ValueError: an unknown name, or options out of range.
        TypeError: an option that the task does not have.
    """
    if name not in TASKS:
        raise ValueError(f"name must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name](**options)


def _questions(form: _Form, split: str, babi: str | Path | None, max_facts: int | None, people: int) -> list[Question]:
    """Return the questions of a form, with the facts that are put into the text."""
    if form.questions is None:
        questions = generate_traits(split, people)
    elif babi is None:
        questions = generate_questions(form.questions, split)
    else:
        questions = read_questions(babi_file(babi, form.questions, split))
    if form.support_only:
        questions = [
            question._replace(facts=tuple(question.facts[i] for i in question.support)) for question in questions
        ]
    if max_facts is not None:
        fewest = min(len(question.facts) for question in questions)
        questions = [question for question in questions if len(question.facts) <= max_facts]
        if not questions:
            raise ValueError(f"max_facts must be at least {fewest}, got {max_facts}")
    return questions


def read_book(book: str | Path) -> str:
    """Read a book.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        return Path(book).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"book must be a text file in UTF-8, got {str(book)!r}: {error}") from error
