"""Passkey retrieval by length and depth, each text streamed in pieces through a state of constant size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .decoder import Decoder, DecoderState
from .passkey import PasskeyTask
from .training import exact


class Cell(NamedTuple):
    """The figures of one length and depth.

    exact: share of passkeys that are recalled whole.
    digits: share of their digits.
    """

    length: int
    depth: float
    samples: int
    exact: float
    digits: float


class Evaluation(NamedTuple):
    """A cell for each length and depth, and for each length the bytes of one text's state once it has been read."""

    cells: list[Cell]
    state_bytes: dict[int, int]


def state_bytes(state: DecoderState) -> int:
    """Return the bytes of a state's tensors for one text of the batch."""
    layers = [x for s in state.layers for x in (*s.memory, s.keys, s.values)]
    return sum(x.numel() * x.element_size() for x in [*layers, state.tokens]) // state.tokens.shape[0]


def stream(model: Decoder, tokens: Tensor, last: int, piece: int) -> tuple[Tensor, DecoderState]:
    """Read tokens [B, T] in pieces, and return the logits of the `last` positions and the state after them."""
    device = next(model.parameters()).device
    state = None
    for part in tokens[:, :-last].split(piece, dim=1):
        _, state = model(part.to(device), state, last=1)
    logits, state = model(tokens[:, -last:].to(device), state)
    return logits, state


@torch.no_grad()
def evaluate(
    model: Decoder,
    task: PasskeyTask,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: Sequence[int],
    seed: int,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> Evaluation:
    """Measure the recall of passkeys that are hidden in text which training did not read.

    A passkey counts when each of its digits is the likeliest token after the true digits before it, that is when greedy
    decoding says it whole.

    Args:
        lengths: tokens of a text, with question and answer.
        depths: place of the passkey, 0 at the beginning, 1 before the question, give or take half a segment.
        samples: texts per depth, for each length.
        seed: of the samples; those of a cell do not depend on the other cells.
        on_cell: called with each cell when it is done.
    """
    segment = model.config.segment_len
    cells, sizes = [], {}
    for length, texts in zip(lengths, samples, strict=True):
        for depth in depths:
            generator = torch.Generator().manual_seed(seed + 1_000_003 * length + round(388 * depth) + 1)
            drawn = task.sample(texts, length, generator, depth=depth, jitter=segment // 2, held_out=True)
            logits, state = stream(model, drawn.tokens[:, :-1], task.digits, piece=8 * segment)
            logits = logits.cpu()
            right = exact(logits, drawn.key).float().mean().item()
            digits = logits.argmax(dim=-1).eq(drawn.key).float().mean().item()
            cells.append(Cell(length, depth, texts, right, digits))
            sizes[length] = state_bytes(state)
            on_cell(cells[-1])
    return Evaluation(cells, sizes)
