"""A word-level vocabulary: words in lower case, punctuation marks and single digits are tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from ...runs.text import tokenize

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[GEN]")
PAD, UNK, CLS, SEP, GEN = range(len(SPECIAL))


class Vocabulary:
    """Words and their ids, the special tokens first; [GEN] stands before an answer.

    Args:
        words: all words in the order of their ids, as `Vocabulary.words` has them: a list to keep as JSON.

    Raises:
        ValueError: words that do not begin with the special tokens, or that repeat themselves.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = list(words)
        if tuple(self.words[: len(SPECIAL)]) != SPECIAL:
            raise ValueError(f"words must begin with {', '.join(SPECIAL)}, got {self.words[: len(SPECIAL)]}")
        repeated = [word for word, count in Counter(self.words).items() if count > 1]
        if repeated:
            raise ValueError(f"words must differ from each other, got {repeated[:5]} more than once")
        self.ids = {word: i for i, word in enumerate(self.words)}

    @classmethod
    def build(cls, texts: Iterable[str], size: int, *, required: Iterable[str] = ()) -> Vocabulary:
        """Build the vocabulary of some texts.

        Args:
            texts: where words are counted.
            size: number of the most frequent words to take, besides the required ones; at least 0.
            required: words, or texts of them, that must be in the vocabulary.

        Raises:
            ValueError: a negative size.
        """
        if size < 0:
            raise ValueError(f"size must be at least 0, got {size}")
        words = sorted({word for text in required for word in tokenize(text)})
        counts = Counter(word for text in texts for word in tokenize(text))
        for word in words:
            del counts[word]
        return cls([*SPECIAL, *words, *(word for word, _ in counts.most_common(size))])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text's words; those not in the vocabulary are [UNK]."""
        return [self.ids.get(word, UNK) for word in tokenize(text)]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the words of ids (a list, or an array or tensor of one dimension), with blanks between them."""
        return " ".join(self.words[int(i)] for i in ids)
