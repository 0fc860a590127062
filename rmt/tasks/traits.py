"""Stories of people of whom one thing each is told, of another kind than of the others, and a question about each."""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from .batch import split_index
from .facts import PLACES, Question

PEOPLE = ("Daniel", "John", "Mary", "Sandra", "Bill", "Fred", "Jeff", "Julie")


class Trait(NamedTuple):
    """One kind of thing that may be told of a person.

    fact: a sentence, of a name and an answer.
    question: of a name, up to the answer.
    answers: words that few books have.
    """

    fact: str
    question: str
    answers: tuple[str, ...]


TRAITS = (
    Trait("{} went to the {}.", "Where did {} go? To the", PLACES),
    Trait(
        "{} plays the {}.",
        "Which instrument does {} play? The",
        ("accordion", "cello", "clarinet", "guitar", "piano", "saxophone"),
    ),
    Trait(
        "{} keeps a pet {}.", "Which pet does {} keep? A", ("canary", "gerbil", "hamster", "kitten", "lizard", "puppy")
    ),
    Trait(
        "{} travels by {}.",
        "How does {} usually travel? By",
        ("airplane", "bicycle", "scooter", "subway", "taxi", "tram"),
    ),
    Trait(
        "{} studies {}.",
        "What does {} study? It is",
        ("algebra", "biology", "chemistry", "economics", "physics", "statistics"),
    ),
    Trait(
        "{} wears a {}.", "Which garment does {} wear? A", ("blouse", "cardigan", "kimono", "sari", "sweater", "tuxedo")
    ),
    Trait("{} eats a {}.", "Which food does {} eat? A", ("banana", "burger", "mango", "muffin", "pizza", "taco")),
    Trait(
        "{} prefers to play {}.",
        "Which sport does {} prefer? Mostly",
        ("badminton", "football", "golf", "hockey", "rugby", "tennis"),
    ),
)


def generate_traits(split: str, people: int, stories: int = 2000) -> list[Question]:
    """Generate stories, and for each the questions about its people, in the order of their facts.

    Args:
        split: "train" or "test", with another seed each.
        people: from 1 to 8; so many of the traits are told, the first ones.

    Raises:
        ValueError: an unknown split, or too few or too many people.
    """
    if not 1 <= people <= len(PEOPLE):
        raise ValueError(f"people must be from 1 to {len(PEOPLE)}, got {people}")
    random = Random(split_index(split))
    return [question for _ in range(stories) for question in _story(random, people)]


def _story(random: Random, people: int) -> list[Question]:
    names, traits = random.sample(PEOPLE, people), random.sample(TRAITS[:people], people)
    answers = [random.choice(trait.answers) for trait in traits]
    told = list(zip(names, traits, answers, strict=True))
    facts = tuple(trait.fact.format(name, answer) for name, trait, answer in told)
    return [Question(facts, trait.question.format(name), answer, (i,)) for i, (name, trait, answer) in enumerate(told)]
