"""A needle in a haystack: one sentence is hidden in running text, and asked for at its end."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch

from .loading import Tokenizer
from .retrieval import Prompt, check_prompt, place, random_integer, split_answer
from .settings import NEEDLE

SCORES = ("substring", "tokens")


class NeedleText:
    """Prompts over one running text, which is read round and round from a random place.

    Args:
        tokenizer: of the model.
        text: the haystack.
        needle: the sentence that is hidden, in a paragraph of its own.
        question: the end of the prompt, which the answer continues.
        answer: the right continuation.
        score: "substring": a model's words hold the answer anywhere, whatever the case and the blanks; "tokens": its
            first tokens are those of the answer.
        extra: tokens decoded beyond the answer's, for "substring".

    Raises:
        ValueError: text, needle, question or answer is empty, or the score is unknown.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        text: str,
        *,
        needle: str = NEEDLE["needle"],
        question: str = NEEDLE["question"],
        answer: str = NEEDLE["answer"],
        score: str = "substring",
        extra: int = 16,
    ) -> None:
        texts = {"text": text, "needle": needle, "question": question, "answer": answer}
        for name, value in texts.items():
            if not value.strip():
                raise ValueError(f"{name} must not be empty, got {value!r}")
        if score not in SCORES:
            raise ValueError(f"score must be one of {', '.join(map(repr, SCORES))}, got {score!r}")
        if extra < 0:
            raise ValueError(f"extra must be at least 0, got {extra}")
        self.tokenizer, self.answer, self.score = tokenizer, answer, score
        self.extra = extra if score == "substring" else 0
        self.haystack = tokenizer.encode(text)
        self._hidden = tokenizer.encode(f"\n\n{needle}\n\n")
        end = f"\n\n{question}"
        self._question, self._answer = split_answer(
            tokenizer.encode(f"{end} {answer}"),
            tokenizer.encode(end),
            lambda token: not tokenizer.decode([token]).isspace(),
        )

    @property
    def shortest(self) -> int:
        """The number of tokens of a prompt without running text."""
        return len(self.tokenizer.prefix) + len(self._hidden) + len(self._question)

    def prompt(self, length: int, depth: float, generator: torch.Generator) -> Prompt:
        """Make a prompt of exactly `length` tokens.

        Raises:
            ValueError: length is too short, or depth is not within 0 to 1.
        """
        check_prompt(length, depth, self.shortest)
        room = length - self.shortest
        begin = random_integer(0, len(self.haystack), generator)
        rounds = -(-(begin + room) // len(self.haystack))
        filler = (self.haystack * rounds)[begin : begin + room]
        tokens, start = place(self.tokenizer.prefix, filler, self._hidden, self._question, depth)
        return Prompt(tokens, self._answer, start)

    def right(self, prompt: Prompt, said: Sequence[int]) -> bool:
        """Say whether the tokens `said` are right by the score."""
        if self.score == "tokens":
            return list(said[: len(prompt.answer)]) == prompt.answer
        return plain_words(self.answer) in plain_words(self.tokenizer.decode(said))


def plain_words(text: str) -> str:
    """Return a text in lower case, with single blanks for white space."""
    return re.sub(r"\s+", " ", text).strip().casefold()
