"""Facts in running text, and a question about them at its end (arXiv 2304.11062, section 4; BABILong, 2406.10149)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch

from ..segments import IGNORED
from .batch import SPLITS, Batch, generator_of
from .facts import Question
from .filler import Encode, Filler, Ids, token_ids
from .vocabulary import Vocabulary

Kind = Literal["class", "token"]


class TextTask:
    """Facts hidden in running text: samples [filler and facts | question], in a token task with [| GEN | answer].

    Facts stand before, between or after whole sentences of filler, in the order of their story, at places drawn
    uniformly with replacement. The filler is cut to the exact length at its end, before the question.

    Args:
        name: of the task.
        questions: of the splits "train" and "test", with the facts to hide.
        filler: the running text, encoded as the facts are.
        encode: returns the token ids of one sentence without special tokens. It gets no blank before the sentence: for
            a byte-level BPE pass `lambda text: tokenizer(" " + text, add_special_tokens=False).input_ids`.
        vocab_size: number of token ids.
        kind: "class": labels are indices of `classes`; "token": labels are the answer's tokens.
        gen_token: the token between question and answer of a token task; None: there is none.
        at_beginning: put facts in front of all filler.
        spread: put each of n facts into another n-th of the filler, in place of anywhere.
        decoys: share of the filler's tokens that are replaced by single ones out of facts, in half of the training
            samples; from 0 to below 1. Where a book says "garden" seldom, a model may take the word for the fact that
            someone went there. The test's filler is never changed.
        vocabulary: the one that encodes, if any; kept for the caller.

    Attributes:
        classes: the answers in alphabetical order; empty in a token task.
        shortest: the least length that holds every sample, in tokens.

    Raises:
        ValueError: a split without questions, ids outside the vocabulary, an unknown kind, a share out of range.
    """

    def __init__(
        self,
        name: str,
        questions: Mapping[str, Sequence[Question]],
        filler: Filler,
        encode: Encode,
        *,
        vocab_size: int,
        kind: Kind = "class",
        gen_token: int | None = None,
        at_beginning: bool = False,
        spread: bool = False,
        decoys: float = 0.0,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        if kind not in ("class", "token"):
            raise ValueError(f"kind must be 'class' or 'token', got {kind!r}")
        if not 0 <= decoys < 1:
            raise ValueError(f"decoys must be from 0 to below 1, got {decoys}")
        self.name, self.kind, self.vocab_size, self.vocabulary = name, kind, vocab_size, vocabulary
        self.at_beginning, self.spread = at_beginning, spread
        self._questions = {split: list(questions.get(split, ())) for split in SPLITS}
        for split in SPLITS:
            if not self._questions[split]:
                raise ValueError(f"questions must hold some for the split {split!r}, got none")
        self._filler, self._encode = filler, encode
        self._gen = np.array([] if gen_token is None else [gen_token], np.int64)
        self._known: dict[str, Ids] = {}
        self._decoys = decoys
        facts = {fact for question in self._questions["train"] for fact in question.facts}
        self._of_facts = np.unique([token for fact in facts for token in self._ids(fact)])
        if decoys and not facts:
            raise ValueError(f"decoys must be 0 where questions have no facts, got {decoys}")
        every = [question for split in SPLITS for question in self._questions[split]]
        self.classes = tuple(sorted({question.answer for question in every})) if kind == "class" else ()
        self.shortest = max(self._length(question) for question in every)
        seen = [filler.tokens(split) for split in SPLITS] + list(self._known.values()) + [self._gen]
        low, high = min(int(ids.min(initial=0)) for ids in seen), max(int(ids.max(initial=0)) for ids in seen)
        if low < 0 or high >= vocab_size:
            raise ValueError(f"vocab_size must exceed every token id, got {vocab_size} for ids from {low} to {high}")

    def batch(self, batch_size: int, length: int, *, seed: int, index: int, split: str = "train") -> Batch:
        """Return samples of exactly `length` tokens; the same arguments give the same batch.

        Raises:
            ValueError: a length below `shortest`, a batch of less than one, a negative seed or index, an unknown split.
        """
        generator = generator_of(batch_size, seed=seed, index=index, split=split)
        if length < self.shortest:
            raise ValueError(f"length must be at least {self.shortest} for the task {self.name}, got {length}")
        questions = self._questions[split]
        drawn = [questions[i] for i in generator.integers(len(questions), size=batch_size)]
        rows = np.empty((batch_size, length), np.int64)
        for row, question in zip(rows, drawn, strict=True):
            tail = self._tail(question)
            text, _ = self.text(question, length - len(tail), generator, split)
            np.concatenate([text, tail], out=row)
        if self.kind == "class":
            labels = np.array([self.classes.index(question.answer) for question in drawn])
            return Batch(torch.from_numpy(rows), torch.from_numpy(labels))
        labels = np.full_like(rows, IGNORED)
        for label, question in zip(labels, drawn, strict=True):
            answer = self._ids(question.answer)
            label[-len(answer) :] = answer
        return Batch(torch.from_numpy(rows), torch.from_numpy(labels))

    def questions(self, split: str) -> list[Question]:
        """Return the questions of a split, "train" or "test"."""
        return self._questions[split]

    def text(self, question: Question, length: int, generator: np.random.Generator, split: str) -> tuple[Ids, Ids]:
        """Draw filler with the facts of a question, int64 [length], and where each fact begins."""
        facts = [self._ids(fact) for fact in question.facts]
        tokens, gaps = self._filler.draw(generator, length - sum(map(len, facts)), split)
        if self._decoys and split == "train":
            tokens = self._with_decoys(generator, tokens)
        places = self._places(generator, gaps, len(facts))
        pieces, done = [], 0
        for place, fact in zip(places, facts, strict=True):
            pieces += [tokens[done:place], fact]
            done = place
        before = np.cumsum([0, *map(len, facts)])[:-1]
        return np.concatenate([*pieces, tokens[done:]]), places + before

    def ending(self, question: Question) -> tuple[Ids, Ids]:
        """Return the tokens of a question, with the one behind it that asks for the answer, and those of the answer."""
        return np.concatenate([self._ids(question.text), self._gen]), self._ids(question.answer)

    def _places(self, generator: np.random.Generator, gaps: Ids, facts: int) -> Ids:
        """Draw the gaps of the filler that facts stand in, in order."""
        if self.at_beginning:
            return np.zeros(facts, np.int64)
        if self.spread:
            # gaps end with the filler's length
            positions = (np.arange(facts) + generator.random(facts)) / facts * gaps[-1]
            return gaps[np.searchsorted(gaps, positions, side="right") - 1]
        return np.sort(gaps[generator.integers(len(gaps), size=facts)])

    def _with_decoys(self, generator: np.random.Generator, tokens: Ids) -> Ids:
        """Replace a share of a sample's filler by tokens of facts."""
        # half of the samples have no decoys, as the test's
        chosen = generator.random(len(tokens)) < self._decoys * generator.integers(2)
        return np.where(chosen, generator.choice(self._of_facts, len(tokens)), tokens)

    def _tail(self, question: Question) -> Ids:
        """Return the end of a sample: the question, and in a token task the answer."""
        return self._ids(question.text) if self.kind == "class" else np.concatenate(self.ending(question))

    def _length(self, question: Question) -> int:
        """Return the tokens of a sample without filler."""
        return sum(len(self._ids(fact)) for fact in question.facts) + len(self._tail(question))

    def _ids(self, text: str) -> Ids:
        """Return the token ids of a sentence, which is encoded once."""
        if text not in self._known:
            self._known[text] = token_ids(self._encode, text)
            if not len(self._known[text]):
                raise ValueError(f"encode must give at least one token for {text!r}, got none")
        return self._known[text]
