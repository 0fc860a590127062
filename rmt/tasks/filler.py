"""Running text to hide facts in: the sentences of a book, tokenised once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
Encode = Callable[[str], Sequence[int]]

HEADER = re.compile(r"\A.*^\*\*\* ?START OF [^\n]*PROJECT GUTENBERG[^\n]*$", re.DOTALL | re.IGNORECASE | re.MULTILINE)
FOOTER = re.compile(r"^(\*\*\* ?)?END OF [^\n]*PROJECT GUTENBERG.*\Z", re.DOTALL | re.IGNORECASE | re.MULTILINE)
# a sentence ends with its mark, or the quote after it, or its paragraph; the full stop of a title ends none
END = re.compile(
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bCapt\.)(?:(?<=[.!?])|(?<=[.!?][\"'”’)_]))\s+|\n\s*\n"
)


class Passage(NamedTuple):
    """Running text.

    tokens: int64 [T].
    gaps: int64 [G], the places before, between and after its sentences, from 0 to T.
    """

    tokens: Ids
    gaps: Ids


def strip_gutenberg(text: str) -> str:
    """Return a book without Project Gutenberg's header and footer, where it has them."""
    return FOOTER.sub("", HEADER.sub("", text, count=1), count=1).strip()


def split_sentences(text: str, *, held_out: float = 0.2) -> dict[str, list[str]]:
    """Cut a text into the sentences of its two parts, "train" and "test", with single blanks for white space.

    Args:
        text: read without Project Gutenberg's header and footer; headings and verses end with their paragraph.
        held_out: share of the sentences, at the text's end, that are the test's.

    Raises:
        ValueError: a text of fewer than 10 sentences, or a share that is not between 0 and 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out must be between 0 and 1, got {held_out}")
    sentences = [" ".join(part.split()) for part in END.split(strip_gutenberg(text)) if part.strip()]
    if len(sentences) < 10:
        raise ValueError(f"text must hold at least 10 sentences, got {len(sentences)}")
    cut = min(max(round(len(sentences) * (1 - held_out)), 1), len(sentences) - 1)
    return {"train": sentences[:cut], "test": sentences[cut:]}


class Filler:
    """A source of passages: sentences of a text in a row, from a random one on.

    Training and test read parts of the text that do not overlap.

    Args:
        text: running text, such as a book, which `split_sentences` cuts.
        encode: returns the token ids of one sentence, without special tokens; called once for each.
        held_out: share of the sentences, at the text's end, that only the split "test" reads.

    Raises:
        ValueError: a text too short, a share out of range, or a part for which `encode` returns no tokens.
    """

    def __init__(self, text: str, encode: Encode, *, held_out: float = 0.2) -> None:
        parts = split_sentences(text, held_out=held_out)
        self._parts = {split: _Part([token_ids(encode, part) for part in parts[split]]) for split in parts}
        for split, part in self._parts.items():
            if not len(part.tokens):
                raise ValueError(f"encode must give tokens for the text's {split} part, got none")

    def tokens(self, split: str) -> Ids:
        """Return all tokens of a part, "train" or "test", as int64 [N]."""
        return self._parts[split].tokens

    def draw(self, generator: np.random.Generator, length: int, split: str) -> Passage:
        """Draw exactly `length` tokens from a random sentence on; the part's beginning follows its end.

        Only the last sentence may be cut.
        """
        part = self._parts[split]
        offset = int(part.starts[generator.integers(len(part.starts))])
        total = len(part.tokens)
        rounds = np.arange((offset + length) // total + 1)[:, None] * total
        gaps = (rounds + part.starts).ravel() - offset
        gaps = gaps[(gaps >= 0) & (gaps < length)]
        tokens = part.tokens.take(np.arange(offset, offset + length), mode="wrap")
        return Passage(tokens, np.append(gaps, length))


class _Part:
    """The tokens of a part, and where its sentences start."""

    def __init__(self, ids: list[Ids]) -> None:
        self.tokens = np.concatenate(ids)
        # a sentence without tokens has no place of its own
        lengths = np.array([len(sentence) for sentence in ids])
        self.starts = (np.cumsum(lengths) - lengths)[lengths > 0]


def token_ids(encode: Encode, text: str) -> Ids:
    """Encode a text as int64 [T].

    Raises:
        ValueError: `encode` does not return a sequence of integers.
    """
    ids = np.asarray(encode(text))
    if ids.size == 0:
        return np.zeros(0, np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"encode must give a sequence of token ids, got {ids!r} for {text!r}")
    return ids.astype(np.int64)
