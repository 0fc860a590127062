"""Passkey retrieval: a number stated somewhere in running text, and asked for at its end (arXiv 2305.16300)."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor

from ...runs.text import tokenize

UNKNOWN = "<unk>"
DIGITS = tuple("0123456789")
MARKER = "passkey"
BEFORE = f"the {MARKER} is".split()
BETWEEN = ". remember it .".split()
AFTER = f"is the {MARKER} .".split()
QUESTION = f"what is the {MARKER} ? the {MARKER} is".split()


class Samples(NamedTuple):
    """A batch of samples.

    tokens: [B, T], ending with the question and its answer.
    key: [B, digits], token ids of the passkeys.
    start: [B], position at which each statement begins.
    """

    tokens: Tensor
    key: Tensor
    start: Tensor


class PasskeyTask:
    """Samples of the task over one running text.

    "the passkey is 7 1 9 3 4 . remember it . 7 1 9 3 4 is the passkey ." stands once in the text, anywhere, across a
    segment's boundary too; the sample ends "what is the passkey ? the passkey is 7 1 9 3 4". The word `passkey` occurs
    nowhere else; digits may.

    Args:
        text: running text, read round and round.
        vocabulary_size: number of the most frequent words that are kept, besides those of the task; all others are one
            unknown word.
        digits: number of digits of a passkey.
        held_out: share of the text, at its end, that only `sample(..., held_out=True)` reads.

    Raises:
        ValueError: the text is too short to sample from, or a size is out of range.
    """

    def __init__(self, text: str, *, vocabulary_size: int = 1000, digits: int = 5, held_out: float = 0.2) -> None:
        if digits < 1:
            raise ValueError(f"digits must be at least 1, got {digits}")
        if vocabulary_size < 1:
            raise ValueError(f"vocabulary_size must be at least 1, got {vocabulary_size}")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
        tokens = tokenize(text)
        if len(tokens) < 1000:
            raise ValueError(f"text must hold at least 1000 words and marks, got {len(tokens)}")
        of_task = [UNKNOWN, *DIGITS, *dict.fromkeys(BEFORE + BETWEEN + AFTER + QUESTION)]
        common = [word for word, _ in Counter(tokens).most_common(vocabulary_size + len(of_task))]
        self.words = [*of_task, *[word for word in common if word not in of_task][:vocabulary_size]]
        self.ids = {word: i for i, word in enumerate(self.words)}
        self.digits = digits
        ids = self.encode([UNKNOWN if word == MARKER else word for word in tokens])
        split = round(len(ids) * (1 - held_out))
        self._text = {False: ids[:split], True: ids[split:]}
        blank = [UNKNOWN] * digits
        self._statement = self.encode([*BEFORE, *blank, *BETWEEN, *blank, *AFTER])
        self._question = self.encode([*QUESTION, *blank])
        self.shortest = len(self._statement) + len(self._question)

    def encode(self, words: list[str]) -> Tensor:
        """Return the token ids [len(words)] of words; 0 for unknown ones."""
        return torch.tensor([self.ids.get(word, 0) for word in words], dtype=torch.long, device="cpu")

    def decode(self, tokens: Tensor) -> str:
        """Return the words of tokens [T], with blanks between them."""
        return " ".join(self.words[i] for i in tokens.tolist())

    def sample(
        self,
        batch: int,
        length: int,
        generator: torch.Generator,
        *,
        depth: float | None = None,
        jitter: int = 0,
        held_out: bool = False,
    ) -> Samples:
        """Draw `batch` samples of exactly `length` tokens.

        Args:
            depth: place of the statement, 0 at the beginning, 1 just before the question; None: anywhere, evenly.
            jitter: tokens that the statement is moved by at most, either way, to meet every place in a segment.
            held_out: read the part of the text that training does not.

        Raises:
            ValueError: length is too short for statement and question, depth is not within 0 to 1, or batch is below 1.
        """
        if batch < 1:
            raise ValueError(f"batch must be at least 1, got {batch}")
        if length < self.shortest:
            raise ValueError(
                f"length must be at least {self.shortest}, for the statement and the question, got {length}"
            )
        if depth is not None and not 0 <= depth <= 1:
            raise ValueError(f"depth must be between 0 and 1, got {depth}")
        room = length - self.shortest
        if depth is None:
            start = _integers(0, room + 1, (batch,), generator)
        else:
            shift = _integers(-jitter, jitter + 1, (batch,), generator)
            start = (round(depth * room) + shift).clamp(0, room)
        key = _integers(0, 10, (batch, self.digits), generator) + self.ids["0"]
        tokens = self.filler(batch, length, generator, held_out=held_out)
        statement = self._statement.expand(batch, -1).clone()
        again = len(BEFORE) + self.digits + len(BETWEEN)
        statement[:, len(BEFORE) : len(BEFORE) + self.digits] = key
        statement[:, again : again + self.digits] = key
        tokens.scatter_(1, start[:, None] + torch.arange(statement.shape[1], device="cpu"), statement)
        tokens[:, -len(self._question) :] = self._question
        tokens[:, -self.digits :] = key
        return Samples(tokens, key, start)

    def filler(self, batch: int, length: int, generator: torch.Generator, *, held_out: bool = False) -> Tensor:
        """Return running text alone, tokens [batch, length], from random places."""
        text = self._text[held_out]
        offset = _integers(0, len(text), (batch, 1), generator)
        return text[(offset + torch.arange(length, device="cpu")) % len(text)]


def _integers(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw integers evenly from [low, high) on the CPU, where the generator is."""
    return torch.randint(low, high, shape, generator=generator, device="cpu")
