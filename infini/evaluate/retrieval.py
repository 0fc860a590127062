"""Retrieval: something is hidden in a long text and asked for at its end, measured by length and depth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from .reading import Reading, cache_bytes, decode, longest_text, read, segment_len_of


class Prompt(NamedTuple):
    """A text and the answer that should follow it, as tokens; `start` is where the hidden statement begins."""

    tokens: list[int]
    answer: list[int]
    start: int


class RetrievalTask(Protocol):
    """A source of prompts that also judges the answers.

    extra: tokens that are decoded beyond the answer's.
    """

    extra: int

    @property
    def shortest(self) -> int:
        """The number of tokens of a prompt without filler, at most."""

    def prompt(self, length: int, depth: float, generator: torch.Generator) -> Prompt:
        """Make a prompt of `length` tokens, with the statement at `depth` of the filler: 0 its beginning, 1 its end."""

    def right(self, prompt: Prompt, said: Sequence[int]) -> bool:
        """Say whether the tokens `said` hold the answer."""


class RetrievalCell(NamedTuple):
    """The figures of one length and depth.

    exact: share of prompts that are answered right.
    tokens: share of the answers' tokens that are decoded in their place.
    cache_bytes: of one prompt at its end.
    seconds: of what was read for this cell; what its prompts share with those of cells before it was read there.
    """

    length: int
    depth: float
    samples: int
    exact: float
    tokens: float
    cache_bytes: int
    seconds: float


class Beginning(NamedTuple):
    """Hold the tokens [n] that prompts begin with alike, and a model after them; None where there are none."""

    tokens: Tensor
    reading: Reading | None


NO_BEGINNING = Beginning(torch.empty(0, dtype=torch.int64, device="cpu"), None)


def measure(
    model: nn.Module,
    task: RetrievalTask,
    length: int,
    depth: float,
    *,
    samples: int,
    seed: int = 0,
    batch: int = 1,
    piece: int | None = None,
    earlier: Beginning = NO_BEGINNING,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> tuple[RetrievalCell, Beginning]:
    """Measure one cell by greedy decoding; its prompts depend on seed, length and depth alone.

    A converted model, whose cache is small, reads once what all prompts begin with.

    Args:
        length: tokens of a prompt, without the answer.
        depth: place of the statement, 0 the beginning, 1 the end.
        samples: number of prompts.
        batch: prompts read at once.
        piece: tokens of each that are read at once; None: about 4096 of all together.
        earlier: the beginning of another cell's prompts, which these may begin with.
        on_tokens: called with the number of tokens of each piece, and of what need not be read again.

    Returns:
        The cell, and what its prompts begin with.

    Raises:
        ValueError: the model has too few positions, or `piece` is not whole segments.
    """
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed((seed * 1_000_003 + length) * 1009 + round(1000 * depth))
    prompts = [task.prompt(length, depth, generator) for _ in range(samples)]
    check_positions(model, length + max(len(prompt.answer) for prompt in prompts) + task.extra)
    tokens = torch.tensor([prompt.tokens for prompt in prompts], device="cpu")
    beginning, segment = NO_BEGINNING, segment_len_of(model)
    if segment is not None:
        shared = tokens[0, : _shared(tokens, min(prompt.start for prompt in prompts), segment)]
        # each token counts for all the prompts that need not read it
        beginning = _read_beginning(model, shared, earlier, piece, lambda count: on_tokens(count * samples))
    right, hits, held = 0, 0.0, 0
    for rows in torch.arange(samples, device="cpu").split(batch):
        group = [prompts[row] for row in rows.tolist()]
        steps = max(len(prompt.answer) for prompt in group) + task.extra
        rest = tokens[rows, len(beginning.tokens) :]
        reading = read(model, rest, after=beginning.reading, piece=piece, on_tokens=on_tokens)
        held = max(held, cache_bytes(reading.cache) // len(group))
        said = decode(model, reading, steps)
        for prompt, answer in zip(group, said.tolist(), strict=True):
            right += task.right(prompt, answer)
            hits += _share(prompt.answer, answer)
    seconds = round(time.perf_counter() - begin, 3)
    return RetrievalCell(length, depth, samples, right / samples, hits / samples, held, seconds), beginning


def measure_grid(
    model: nn.Module,
    task: RetrievalTask,
    lengths: Sequence[int],
    depths: Sequence[float],
    *,
    done: Iterable[RetrievalCell] = (),
    on_cell: Callable[[RetrievalCell, list[RetrievalCell]], None] = lambda cell, cells: None,
    samples: int,
    seed: int = 0,
    batch: int = 1,
    piece: int | None = None,
    on_tokens: Callable[[int], None] = lambda count: None,
) -> list[RetrievalCell]:
    """Measure every cell of the grid that is not among `done`, in rising order, and return all.

    Args:
        done: cells measured earlier, which are kept, those outside the grid too.
        on_cell: called with each new cell, and all that are measured.

    Raises:
        ValueError: as of `measure`.
    """
    cells = {(cell.length, cell.depth): cell for cell in done}
    for length in lengths:
        beginning = NO_BEGINNING
        # in rising order, so that one cell's prompts go on from what another's begin with
        for depth in sorted(depths):
            if (length, depth) not in cells:
                cells[length, depth], beginning = measure(
                    model,
                    task,
                    length,
                    depth,
                    samples=samples,
                    seed=seed,
                    batch=batch,
                    piece=piece,
                    earlier=beginning,
                    on_tokens=on_tokens,
                )
                on_cell(cells[length, depth], in_order(cells.values()))
    return in_order(cells.values())


def _shared(tokens: Tensor, most: int, segment: int) -> int:
    """Return how many tokens the rows of [N, T] begin with alike: whole segments, and at most so many."""
    alike = (tokens[:, :most] == tokens[0, :most]).all(dim=0)
    count = most if alike.all() else int(alike.int().argmin())
    return count - count % segment


def _read_beginning(
    model: nn.Module, tokens: Tensor, earlier: Beginning, piece: int | None, on_tokens: Callable[[int], None]
) -> Beginning:
    """Read tokens [n], after the earlier beginning where they begin with it."""
    known = len(earlier.tokens)
    if not known or not torch.equal(tokens[:known], earlier.tokens):
        known, earlier = 0, NO_BEGINNING
    on_tokens(known)
    if len(tokens) == known:
        return earlier
    new = tokens[None, known:]
    return Beginning(tokens, read(model, new, after=earlier.reading, piece=piece, on_tokens=on_tokens))


def in_order(cells: Iterable[RetrievalCell]) -> list[RetrievalCell]:
    """Sort cells by length, then by depth."""
    return sorted(cells, key=lambda cell: (cell.length, cell.depth))


def check_positions(model: nn.Module, length: int) -> None:
    """Check that a model has positions for `length` tokens.

    Raises:
        ValueError: it has fewer.
    """
    limit = longest_text(model)
    if limit is not None and length > limit:
        raise ValueError(
            f"length must be at most the {limit} positions of a model that is not converted, answer included, got "
            f"{length}: convert it, or read shorter texts"
        )


def place(
    before: list[int], filler: list[int], hidden: list[int], after: list[int], depth: float
) -> tuple[list[int], int]:
    """Join the parts to one text with `hidden` at `depth` of the filler; return it, and where `hidden` begins."""
    cut = round(depth * len(filler))
    return [*before, *filler[:cut], *hidden, *filler[cut:], *after], len(before) + cut


def split_answer(
    whole: list[int], question: list[int], is_answer: Callable[[int], bool]
) -> tuple[list[int], list[int]]:
    """Cut the tokens of a question with its answer into those of the question and those of the answer.

    A tokenizer may join the last letters of a question to the first of an answer, or put a blank between them.

    Args:
        whole: tokens of question and answer.
        question: tokens of the question alone.
        is_answer: says whether a token can begin the answer.
    """
    pairs = zip(whole, question, strict=False)
    cut = next((i for i, (token, other) in enumerate(pairs) if token != other), min(len(whole), len(question)))
    while cut < len(whole) - 1 and not is_answer(whole[cut]):
        cut += 1
    return whole[:cut], whole[cut:]


def check_prompt(length: int, depth: float, shortest: int) -> None:
    """Check that there can be a prompt of that length and depth.

    Raises:
        ValueError: naming length or depth.
    """
    if not 0 <= depth <= 1:
        raise ValueError(f"depth must be between 0 and 1, got {depth}")
    if length < shortest:
        raise ValueError(f"length must be at least {shortest}, for what is hidden and asked, got {length}")


def random_integer(low: int, high: int, generator: torch.Generator) -> int:
    """Draw an integer evenly from [low, high)."""
    drawn: Tensor = torch.randint(low, high, (1,), generator=generator, device="cpu")
    return int(drawn)


def _share(answer: list[int], said: Sequence[int]) -> float:
    return sum(a == b for a, b in zip(answer, said, strict=False)) / len(answer)
