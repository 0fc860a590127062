"""Rounds of running text: the adapted model is to predict what its own full attention predicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..evaluate.loading import Loaded
from ..huggingface.watching import AttentionCall, watched
from .rounds import Step

# stretches of a round, one in each step
STEPS = 10
# tokens of a stretch whose predictions are compared, drawn from those beyond the window
COMPARED = 512


def stretch_at(begin: int, tokens: Tensor, length: int, prefix: Sequence[int]) -> Tensor:
    """Return so many tokens, int64 [length]: a tokenizer's prefix, and those of a text from `begin` on."""
    return torch.cat([torch.tensor([*prefix], dtype=torch.int64, device="cpu"), tokens[begin : begin + length]])[
        :length
    ]


class TextRounds:
    """Give the loss of stretches of a text: KL(full attention, adapted), in nats a token, of tokens beyond the window.

    Args:
        loaded: a converted model.
        tokens: of the text, int64 [N].
        length: tokens of a stretch, more than the window.
        window: tokens that local attention sees at most.
    """

    def __init__(self, loaded: Loaded, tokens: Tensor, length: int, window: int) -> None:
        self.model: Any = loaded.model
        self.prefix = loaded.tokenizer.prefix
        self.tokens, self.length, self.window = tokens, length, window

    @property
    def steps(self) -> int:
        """The number of steps of a round, each on one stretch."""
        return STEPS

    def losses(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the losses of new stretches."""
        size, beyond = self.length - len(self.prefix), self.length - self.window
        for _ in range(self.steps):
            begin = int(torch.randint(len(self.tokens) - size + 1, (), generator=generator, device="cpu"))
            stretch = stretch_at(begin, self.tokens, self.length, self.prefix)[None].to(self.model.device)
            compared = self.window + torch.randperm(beyond, generator=generator, device="cpu")[:COMPARED]
            with torch.no_grad(), watched(self.model, AttentionCall.full):
                wanted = self._log_probabilities(stretch, compared)
            got = self._log_probabilities(stretch, compared)
            yield Step(F.kl_div(got, wanted, log_target=True, reduction="none").sum(-1).mean())

    def figures(self, losses: Sequence[float], rest: Sequence[Any]) -> dict[str, float]:
        """Return the mean loss."""
        return {"loss": fmean(losses)}

    def said(self, figures: Mapping[str, float]) -> str:
        """Return the loss in words."""
        return f"{figures['loss']:.4f} nats a token from full attention"

    def _log_probabilities(self, stretch: Tensor, rows: Tensor) -> Tensor:
        output = self.model(stretch, use_cache=False, logits_to_keep=rows.to(stretch.device))
        return F.log_softmax(output.logits.float(), dim=-1)
