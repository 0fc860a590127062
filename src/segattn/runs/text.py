"""Running text: its words, and generated sentences where there is no book."""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch

TOKEN = re.compile(r"\d|[^\W\d_]+(?:['’][^\W\d_]+)*|[^\w\s]")


def tokenize(text: str) -> list[str]:
    """Split a text into words in lower case, punctuation marks, and single digits."""
    return TOKEN.findall(text.lower())


def text_sha256(text: str) -> str:
    """Return the SHA-256 of a text, by which a resumed run knows it."""
    return hashlib.sha256(text.encode()).hexdigest()


def generate_text(words: int, seed: int) -> str:
    """Generate sentences of made-up words, as unevenly frequent as in a language, and numbers of up to five digits."""
    generator = torch.Generator().manual_seed(seed)
    # the same words whatever the default dtype and device
    like: Any = {"dtype": torch.float32, "device": "cpu"}

    def draw(high: int, count: int) -> list[int]:
        return torch.randint(high, (count,), generator=generator, device="cpu").tolist()

    syllables = [c + v for c in "b d f g k l m n p r s t v z sh th st".split() for v in "a e i o u ai".split()]
    lexicon = ["".join(syllables[i] for i in draw(len(syllables), 1 + n % 3)) for n in range(1200)]
    frequency = 1 / torch.arange(10.0, 10 + len(lexicon), **like)
    chosen = torch.multinomial(frequency, words, replacement=True, generator=generator).tolist()
    numbers = torch.rand(words, generator=generator, **like).lt(0.03).tolist()
    pieces, left = [], 0
    for word, number in zip(chosen, numbers, strict=True):
        if left == 0:
            left = 4 + draw(11, 1)[0]
        left -= 1
        piece = "".join(map(str, draw(10, 1 + draw(5, 1)[0]))) if number else lexicon[word]
        pieces.append(piece + (".,;?"[draw(4, 1)[0]] if left == 0 else ""))
    return " ".join(pieces)
