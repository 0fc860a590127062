"""Questions about small stories, read from bAbI's files (arXiv 1502.05698) or generated in the same three forms."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import NamedTuple

from .batch import split_index

FORMS = ("qa1", "qa2", "qa4")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
THINGS = ("apple", "football", "milk")
MOVES = ("went to", "went back to", "moved to", "journeyed to", "travelled to")
TAKES = ("took", "got", "grabbed", "picked up")
DROPS = ("dropped", "left", "discarded", "put down")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
WORDS = (*PEOPLE, *PLACES, *THINGS, *MOVES, *TAKES, *DROPS, *OPPOSITE, "the is of there Where What . ?")


class Question(NamedTuple):
    """A question and the story before it.

    facts: all sentences of the story up to the question, in order.
    text: the question.
    answer: one word.
    support: indices of the facts that bAbI names as sufficient for the answer.
    """

    facts: tuple[str, ...]
    text: str
    answer: str
    support: tuple[int, ...]


def babi_file(folder: str | Path, form: str, split: str) -> Path:
    """Find the file of a form of questions in bAbI's unpacked folder, such as `qa1_single-supporting-fact_train.txt`.

    Raises:
        ValueError: no such file, or several; an unknown form or split.
    """
    _check(form)
    split_index(split)
    pattern = f"{form}_*_{split}.txt"
    files = sorted(Path(folder).glob(pattern))
    if len(files) != 1:
        count = f"{len(files)} of them" if files else "none"
        raise ValueError(f"babi must be a folder that holds one file {pattern}, got {str(folder)!r} with {count}")
    return files[0]


def read_questions(path: str | Path) -> list[Question]:
    """Read all questions of one of bAbI's files, in the file's order.

    A line is "ID sentence" or "ID question<TAB>answer<TAB>IDs of supporting facts"; ID 1 begins a story.

    Raises:
        ValueError: another file, naming the path and the line.
    """
    questions: list[Question] = []
    facts: list[str] = []
    index: dict[int, int] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"path must be a text file of bAbI, got {str(path)!r}: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            first, _, sentence = line.partition(" ")
            if int(first) == 1:
                facts, index = [], {}
            if "\t" in sentence:
                text, answer, support = sentence.split("\t")
                places = tuple(index[int(i)] for i in support.split())
                questions.append(Question(tuple(facts), text.strip(), answer.strip(), places))
            else:
                index[int(first)] = len(facts)
                facts.append(sentence.strip())
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"path must be a file of bAbI, with lines 'ID sentence' or 'ID question<TAB>answer<TAB>IDs', "
                f"got {line!r} at {path}:{number}"
            ) from error
    if not questions:
        raise ValueError(f"path must be a file of bAbI, got {str(path)!r}, which holds no question")
    return questions


def generate_questions(form: str, split: str, stories: int = 2000) -> list[Question]:
    """Generate questions in the form of bAbI's, with another seed for each split.

    qa1: people move, "Where is Mary?". qa2: they carry things, "Where is the milk?". qa4: two places lie in two
    directions of a third, "What is the kitchen north of?". A story has five questions in qa1 and qa2, one in qa4. So
    few questions of qa4 are possible that some of the test's are in the training's too; in bAbI's own files 74 % are.

    Raises:
        ValueError: an unknown form or split, or less than one story.
    """
    _check(form)
    if stories < 1:
        raise ValueError(f"stories must be at least 1, got {stories}")
    random = Random(split_index(split))
    if form == "qa4":
        return [_directions(random) for _ in range(stories)]
    return [question for _ in range(stories) for question in (_moves(random) if form == "qa1" else _carries(random))]


def _check(form: str) -> None:
    """Check that a form of questions exists.

    Raises:
        ValueError: it does not.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}, got {form!r}")


def _moves(random: Random) -> list[Question]:
    """Return the five questions of a story of qa1."""
    facts: list[str] = []
    where: dict[str, str] = {}
    last: dict[str, int] = {}
    questions: list[Question] = []
    for _ in range(5):
        for _ in range(2):
            person = _move(random, facts, where)
            last[person] = len(facts) - 1
        asked = random.choice(sorted(last))
        questions.append(Question(tuple(facts), f"Where is {asked}?", where[asked], (last[asked],)))
    return questions


def _move(random: Random, facts: list[str], where: dict[str, str]) -> str:
    """Move a random person to a random other place, and return the person."""
    person = random.choice(PEOPLE)
    where[person] = random.choice([place for place in PLACES if place != where.get(person)])
    facts.append(f"{person} {random.choice(MOVES)} the {where[person]}.")
    return person


def _carries(random: Random) -> list[Question]:
    """Return the five questions of a story of qa2."""
    facts: list[str] = []
    where: dict[str, str] = {}
    moved: dict[str, int] = {}
    holder: dict[str, str] = {}
    place: dict[str, tuple[str, tuple[int, ...]]] = {}
    grabbed: dict[str, int] = {}
    questions: list[Question] = []
    while len(questions) < 5:
        for _ in range(3):
            person = _move(random, facts, where)
            moved[person] = len(facts) - 1
            for thing, holds in holder.items():
                if holds == person:
                    place[thing] = (where[person], (grabbed[thing], moved[person]))
        thing = random.choice(THINGS)
        if thing in holder:
            # what is dropped stays where its holder is
            facts.append(f"{holder.pop(thing)} {random.choice(DROPS)} the {thing}.")
        else:
            near = [who for who in where if thing not in place or where[who] == place[thing][0]]
            if near:
                person = holder[thing] = random.choice(near)
                facts.append(f"{person} {random.choice(TAKES)} the {thing} there.")
                grabbed[thing] = len(facts) - 1
                place[thing] = (where[person], (moved[person], grabbed[thing]))
        if place:
            asked = random.choice(sorted(place))
            answer, support = place[asked]
            questions.append(Question(tuple(facts), f"Where is the {asked}?", answer, support))
    return questions


def _directions(random: Random) -> Question:
    """Return the question of a story of qa4."""
    middle, *others = random.sample(PLACES, 3)
    facts, forms = [], []
    for other, direction in zip(others, random.sample(sorted(OPPOSITE), 2), strict=True):
        back = OPPOSITE[direction]
        facts.append(
            random.choice([f"The {other} is {direction} of the {middle}.", f"The {middle} is {back} of the {other}."])
        )
        forms.append(
            [
                (f"What is {direction} of the {middle}?", other),
                (f"What is the {middle} {back} of?", other),
                (f"What is {back} of the {other}?", middle),
                (f"What is the {other} {direction} of?", middle),
            ]
        )
    asked = random.randrange(2)
    text, answer = random.choice(forms[asked])
    return Question(tuple(facts), text, answer, (asked,))
