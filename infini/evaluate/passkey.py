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

    Lengths are met to the token by cutting the filler where the statement stands, so that the text begins and ends with
    whole sentences. A prompt's answer are the tokens of the key; a blank before it belongs to the question.

    Args:
        tokenizer: of the model.
        digits: of a passkey.

    Raises:
        ValueError: less than one digit.
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
        """Tokens of a prompt without filler; numbers of equal length may take more or fewer tokens."""
        parts = (self._parts(digit * self.digits) for digit in "0123456789")
        return len(self._before) + max(len(hidden) + len(question) for hidden, question, _ in parts)

    def prompt(self, length: int, depth: float, generator: torch.Generator) -> Prompt:
        """Of exactly `length` tokens, and a random key.

        Raises:
            ValueError: too short a length, or a depth outside 0 to 1.
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
        """Whether the key's tokens were said first, all of them."""
        return list(said[: len(prompt.answer)]) == prompt.answer

    def _parts(self, key: str) -> tuple[list[int], list[int], list[int]]:
        """Statement, question, answer."""
        encode, decode = self.tokenizer.encode, self.tokenizer.decode
        question = "\n" + QUESTION
        asked, answer = split_answer(
            encode(f"{question} {key}"), encode(question), lambda token: any(c.isdigit() for c in decode([token]))
        )
        return encode(f"\n{STATEMENT.format(key=key)}\n"), asked, answer

    def _sentences(self, room: int, depth: float) -> list[int]:
        """Filler of `room` tokens that is cut where the statement will stand."""
        while len(self._filler) < room:
            # tokenized as one text: how sentences join is the tokenizer's affair
            sentences = max(1, 2 * room // len(self.tokenizer.encode(FILLER)))
            self._filler = self.tokenizer.encode(" ".join([FILLER] * sentences))
        cut = round(depth * room)
        return self._filler[:cut] + self._filler[len(self._filler) - (room - cut) :]
