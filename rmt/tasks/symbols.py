"""Tasks of symbols alone: associative retrieval (ARMT, arXiv 2407.04841), copy and reverse (arXiv 2207.06881)."""

from __future__ import annotations

import numpy as np
import torch

from ..segments import IGNORED
from .batch import Batch, generator_of
from .vocabulary import GEN, SPECIAL, Vocabulary


class RetrievalTask:
    """Associative retrieval: pairs of key and value, then one of the keys, whose value is the answer.

    A pair fills a segment of `segment_len` = key_digits + 2 tokens: the key's digits, ":" and the value. The last
    segment is the key's digits, [GEN] and the value. With N pairs a row has (N + 1) * segment_len tokens: `length(N)`.

    Args:
        key_digits: digits of a key, from 1 to 6.
        rewrite: write keys again, mostly with another value, of which the last is the answer; otherwise all keys of a
            row differ.
        keys: with `rewrite`, number of different keys that a row's pairs are drawn from; None: half as many as pairs.
        symbols: number of digits, for keys and for values: from 2 to 10.

    Raises:
        ValueError: sizes out of range, or `keys` without `rewrite`.
    """

    name = "retrieval"
    classes: tuple[str, ...] = ()

    def __init__(
        self, *, key_digits: int = 2, rewrite: bool = False, keys: int | None = None, symbols: int = 10
    ) -> None:
        if not 1 <= key_digits <= 6:
            raise ValueError(f"key_digits must be from 1 to 6, got {key_digits}")
        if not 2 <= symbols <= 10:
            raise ValueError(f"symbols must be from 2 to 10, got {symbols}")
        if keys is not None and not rewrite:
            raise ValueError(f"keys must come with rewrite=True, got {keys} without")
        self.possible = symbols**key_digits
        if keys is not None and not 1 <= keys <= self.possible:
            raise ValueError(f"keys must be from 1 to {self.possible}, of {key_digits} digits, got {keys}")
        self.key_digits, self.rewrite, self.keys, self.symbols = key_digits, rewrite, keys, symbols
        self.vocabulary = Vocabulary([*SPECIAL, *map(str, range(symbols)), ":"])
        self.vocab_size = len(self.vocabulary)
        self.segment_len = key_digits + 2
        self.shortest = self.length(1)

    def length(self, pairs: int) -> int:
        """Return the tokens of a row with `pairs` pairs."""
        return (pairs + 1) * self.segment_len

    def batch(self, batch_size: int, length: int, *, seed: int, index: int, split: str = "train") -> Batch:
        """Return samples of exactly `length` tokens; the same arguments give the same batch.

        Raises:
            ValueError: a length that is not `length(N)` of at least one pair, more pairs than there are keys where all
                must differ, a batch of less than one, a negative seed or index, an unknown split.
        """
        generator = generator_of(batch_size, seed=seed, index=index, split=split)
        pairs, rest = divmod(length - self.segment_len, self.segment_len)
        if pairs < 1 or rest:
            raise ValueError(
                f"length must be (pairs + 1) * {self.segment_len} for at least one pair, got {length}; "
                f"take length(pairs), such as {self.length(max(pairs, 1))}"
            )
        if not self.rewrite and pairs > self.possible:
            raise ValueError(
                f"length must hold at most {self.possible} pairs, whose keys differ, got {pairs}; "
                f"raise key_digits or set rewrite=True"
            )
        written, asked, answer = self._draw(generator, batch_size, pairs)
        values = generator.integers(self.symbols, size=(batch_size, pairs))
        rows = np.empty((batch_size, pairs + 1, self.segment_len), np.int64)
        first = self.vocabulary.ids["0"]
        place = self.symbols ** np.arange(self.key_digits - 1, -1, -1)
        rows[:, :, :-2] = first + np.append(written, asked, axis=1)[..., None] // place % self.symbols
        rows[:, :-1, -2], rows[:, -1, -2] = self.vocabulary.ids[":"], GEN
        rows[:, :, -1] = first + np.append(values, np.take_along_axis(values, answer, axis=1), axis=1)
        labels = np.full((batch_size, length), IGNORED, np.int64)
        labels[:, -1] = rows[:, -1, -1]
        return Batch(torch.from_numpy(rows.reshape(batch_size, length)), torch.from_numpy(labels))

    def _draw(self, generator: np.random.Generator, rows: int, pairs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Draw the keys of all pairs [rows, pairs], the last key [rows, 1], and the pair that answers it [rows, 1]."""
        pool = min(self.keys or (pairs + 1) // 2, self.possible) if self.rewrite else pairs
        written = np.stack([generator.choice(self.possible, pool, replace=False) for _ in range(rows)])
        if self.rewrite:
            written = np.take_along_axis(written, generator.integers(pool, size=(rows, pairs)), axis=1)
        asked = np.array([[generator.choice(np.unique(row))] for row in written])
        return written, asked, pairs - 1 - (written == asked)[:, ::-1].argmax(axis=1, keepdims=True)


class CopyTask:
    """Copying: N random symbols, [GEN], then the same symbols, in order or in reverse.

    A row has N + 1 + copies * N tokens: `length(N)`. The paper's copy repeats the sequence twice: copies=2.

    Args:
        reverse: repeat the last symbol first.
        copies: number of repetitions, at least 1.
        symbols: number of different symbols, at least 2.

    Raises:
        ValueError: sizes out of range.
    """

    classes: tuple[str, ...] = ()

    def __init__(self, *, reverse: bool = False, copies: int = 1, symbols: int = 10) -> None:
        for name, value, least in (("copies", copies, 1), ("symbols", symbols, 2)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.name = "reverse" if reverse else "copy"
        self.reverse, self.copies, self.symbols = reverse, copies, symbols
        self.vocabulary = Vocabulary([*SPECIAL, *map(str, range(symbols))])
        self.vocab_size = len(self.vocabulary)
        self.shortest = self.length(1)

    def length(self, symbols: int) -> int:
        """Return the tokens of a row that copies `symbols` symbols."""
        return symbols * (1 + self.copies) + 1

    def batch(self, batch_size: int, length: int, *, seed: int, index: int, split: str = "train") -> Batch:
        """Return samples of exactly `length` tokens; the same arguments give the same batch.

        Raises:
            ValueError: a length that is not `length(N)` of at least one symbol, a batch of less than one, a negative
                seed or index, an unknown split.
        """
        generator = generator_of(batch_size, seed=seed, index=index, split=split)
        count, rest = divmod(length - 1, 1 + self.copies)
        if count < 1 or rest:
            raise ValueError(
                f"length must be {1 + self.copies} * symbols + 1 for at least one symbol, got {length}; "
                f"take length(symbols), such as {self.length(max(count, 1))}"
            )
        drawn = len(SPECIAL) + generator.integers(self.symbols, size=(batch_size, count))
        copy = np.tile(drawn[:, ::-1] if self.reverse else drawn, self.copies)
        rows = np.concatenate([drawn, np.full((batch_size, 1), GEN), copy], axis=1)
        labels = np.full((batch_size, length), IGNORED, np.int64)
        labels[:, count + 1 :] = copy
        return Batch(torch.from_numpy(rows), torch.from_numpy(labels))
