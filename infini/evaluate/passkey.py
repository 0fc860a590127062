"""The passkey prompt of the Infini-attention and Landmark attention papers (arXiv 2404.07143, 2305.16300)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .loading import Tokenizer
from .retrieval import Prompt, check_prompt, place, random_integer, split_answer

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
STATEMENT = "The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "What is the pass key? The pass key is"


class PasskeyText:
    """Prompts of one tokenizer: the task, the filler again and again with the passkey in it, and the question.

    The filler is cut where the statement stands, so that a prompt is exactly as long as asked and begins and ends with
    whole sentences. Its answer is the tokens of the key; a blank before the key belongs to the question.

    Args:
        tokenizer: of the model.
        digits: number of digits of a passkey.

    Raises:
        ValueError: digits is below 1.
    """

    extra = 0

    def __init__(self, tokenizer: Tokenizer, digits: int = 5) -> None:
        if digits < 1:
            raise ValueError(f"digits must be at least 1, got {digits}")
        self.tokenizer, self.digits = tokenizer, digits
        self._before = [*tokenizer.prefix, *tokenizer.encode(TASK + "\n")]
        self._filler: list[int] = []

    @property
    def shortest(self) -> int:
        """The number of tokens of a prompt without filler, for the passkey that takes most."""
        parts = (self._parts(digit * self.digits) for digit in "0123456789")
        return len(self._before) + max(len(hidden) + len(question) for hidden, question, _ in parts)

    def prompt(self, length: int, depth: float, generator: torch.Generator) -> Prompt:
        """Make a prompt of exactly `length` tokens, with a random key.

        Raises:
            ValueError: length is too short, or depth is not within 0 to 1.
        """
        check_prompt(length, depth, self.shortest)
        low = 10 ** (self.digits - 1)
        key = str(random_integer(low if self.digits > 1 else 0, 10 * low, generator))
        hidden, question, answer = self._parts(key)
        room = length - len(self._before) - len(hidden) - len(question)
        check_prompt(length, depth, length - room)
        tokens, start = place(self._before, self._sentences(room, depth), hidden, question, depth)
        return Prompt(tokens, answer, start)

    def right(self, prompt: Prompt, said: Sequence[int]) -> bool:
        """Say whether the tokens `said` begin with all of the key's."""
        return list(said[: len(prompt.answer)]) == prompt.answer

    def _parts(self, key: str) -> tuple[list[int], list[int], list[int]]:
        """Return the tokens of statement, question and answer."""
        encode, decode = self.tokenizer.encode, self.tokenizer.decode
        question = "\n" + QUESTION
        asked, answer = split_answer(
            encode(f"{question} {key}"), encode(question), lambda token: any(c.isdigit() for c in decode([token]))
        )
        return encode(f"\n{STATEMENT.format(key=key)}\n"), asked, answer

    def _sentences(self, room: int, depth: float) -> list[int]:
        """Return filler of `room` tokens, cut where the statement will stand."""
        while len(self._filler) < room:
            # tokenized as one text, since a tokenizer may join the end of a sentence to the next
            sentences = max(1, 2 * room // len(self.tokenizer.encode(FILLER)))
            self._filler = self.tokenizer.encode(" ".join([FILLER] * sentences))
        cut = round(depth * room)
        return self._filler[:cut] + self._filler[len(self._filler) - (room - cut) :]
