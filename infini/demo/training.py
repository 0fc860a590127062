"""Training of a `Decoder` on passkey retrieval by a curriculum, which can be stopped and resumed at any step."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.state import MemoryState
from ...runs.untrained import expect_short_texts
from ..gate import parameter_groups
from .decoder import Decoder, DecoderState
from .passkey import PasskeyTask


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters of a training.

    The texts of a step have one length, drawn evenly from the shortest possible to a longest one, which grows to
    `segments` over the first `curriculum` (a share) of the steps. After the first quarter of the steps, a share
    `stretched` of them multiplies the memory of the first segments by a factor of up to `stretch`: noise as of a text
    so many times as long, for the price of a short one.
    """

    steps: int = 1500
    segments: int = 8
    batch_tokens: int = 4096
    lr: float = 3e-3
    gate_lr: float = 3e-2
    weight_decay: float = 0.01
    warm_up: int = 20
    curriculum: float = 0.5
    stretched: float = 0.75
    stretch: float = 2.0**20
    clip: float = 1.0


def stretch(state: DecoderState, factor: float) -> DecoderState:
    """Multiply the memory by `factor`, as if its text had been read so often: it recalls the same, and weighs more."""
    layers = [
        s._replace(memory=MemoryState(s.memory.memory * factor, s.memory.normalizer * factor)) for s in state.layers
    ]
    return state._replace(layers=layers)


class Trainer:
    """A model, its optimiser and the random numbers of its samples: all that a step depends on, and nothing else.

    Raises:
        ValueError: texts of `recipe.segments` segments are too short for the task.
    """

    def __init__(self, model: Decoder, task: PasskeyTask, recipe: Recipe, seed: int) -> None:
        self.model, self.task, self.recipe = model, task, recipe
        expect_short_texts(model)
        self.shortest = -(-task.shortest // model.config.segment_len)
        if recipe.segments < self.shortest:
            raise ValueError(f"segments must be at least {self.shortest} to hold a sample, got {recipe.segments}")
        self.device = next(model.parameters()).device
        self.generator = torch.Generator().manual_seed(seed)
        groups = parameter_groups(model, recipe.lr, recipe.gate_lr, recipe.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.losses: list[float] = []
        self.accuracies: list[float] = []

    @property
    def step(self) -> int:
        """The number of steps that are done."""
        return len(self.losses)

    def advance(self) -> None:
        """Take one step; append its loss, and its share of passkeys recalled whole."""
        self._schedule()
        tokens, state = self._batch()
        digits = self.task.digits
        logits, _ = self.model(tokens[:, :-1], state, last=digits)
        key = tokens[:, -digits:]
        loss = F.cross_entropy(logits.flatten(0, 1), key.flatten())
        self.optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimiser.step()
        self.losses.append(loss.item())
        self.accuracies.append(exact(logits, key).float().mean().item())

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, in plain types and tensors."""
        return {
            "recipe": asdict(self.recipe),
            "losses": list(self.losses),
            "accuracies": list(self.accuracies),
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.generator.set_state(saved["generator"])
        self.losses, self.accuracies = list(saved["losses"]), list(saved["accuracies"])

    def _schedule(self) -> None:
        """Set the learning rates: a linear warm-up, then a cosine to zero."""
        done = self.step / self.recipe.steps
        factor = min((self.step + 1) / self.recipe.warm_up, 0.5 * (1 + math.cos(math.pi * done)))
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate

    def _batch(self) -> tuple[Tensor, DecoderState | None]:
        """Draw the tokens [B, T] of a step, and the state that they continue."""
        recipe, length = self.recipe, self.model.config.segment_len
        done = self.step / recipe.steps
        grown = min(1.0, done / recipe.curriculum) * (recipe.segments - self.shortest)
        segments = self._integer(self.shortest, self.shortest + math.ceil(grown))
        batch = max(8, recipe.batch_tokens // (segments * length))
        state = None
        if segments > self.shortest and done > 0.25 and self._uniform() < recipe.stretched:
            first = self._integer(1, segments - self.shortest)
            filler = self.task.filler(batch, first * length, self.generator)
            _, state = self.model(filler.to(self.device), last=1)
            state = stretch(state, math.exp(self._uniform() * math.log(recipe.stretch)))
            segments -= first
        samples = self.task.sample(batch, segments * length, self.generator)
        return samples.tokens.to(self.device), state

    def _integer(self, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=self.generator, device="cpu"))

    def _uniform(self) -> float:
        return float(torch.rand((), generator=self.generator, dtype=torch.float32, device="cpu"))


def exact(logits: Tensor, key: Tensor) -> Tensor:
    """Say for each text whether every digit is the likeliest token.

    Args:
        logits: [B, digits, vocabulary].
        key: [B, digits].

    Returns:
        bool [B].
    """
    return logits.argmax(dim=-1).eq(key).all(dim=-1)
