"""Training of maps and gates end to end, in rounds of new texts, with all else frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from ..huggingface.settings import GATE, attentions_of, conversion_of, trunk_of
from .fit import memory_parameters, trained
from .kept import Kept, Listener
from .schedule import cosine

# biases and gates move so much faster than matrices
BIAS_FACTOR, GATE_FACTOR = 3.0, 10.0
# the least β at first: a gate that is shut further has no gradient
LEAST_GATE = -4.0
LARGEST_NORM = 1.0


class Step(NamedTuple):
    """Hold a step's loss [], with its graph, and what else the figures of its round are made of."""

    loss: Tensor
    rest: Any = None


class Rounds(Protocol):
    """A source of texts, of their losses, and of the figures of a round."""

    @property
    def steps(self) -> int:
        """The number of steps of a round."""

    def losses(self, generator: torch.Generator) -> Iterator[Step]:
        """Yield the steps of a round, each with the parameters as they are by then."""

    def figures(self, losses: Sequence[float], rest: Sequence[Any]) -> Mapping[str, float]:
        """Return the figures of a round from those of its steps."""

    def said(self, figures: Mapping[str, float]) -> str:
        """Return the figures of a round in words."""


def train_in_rounds(model: Any, task: Rounds, count: int, lr: float, seed: int, kept: Kept, listener: Listener) -> None:
    """Take the rounds that are left: steps of Adam on the maps and the gates of all layers with a memory.

    The learning rates rise over the first round, and fall to 0 as a cosine over all of them.

    Args:
        model: converted.
        count: number of rounds in all.
        lr: learning rate of the maps' matrices; of biases and gates it is `BIAS_FACTOR` and `GATE_FACTOR` times that.
        seed: of the texts and their order.
        kept: the rounds that are done, and the optimizer behind them; those taken are added.
    """
    attentions = [attentions_of(trunk_of(model))[layer] for layer in conversion_of(model).settings.memory_layers]
    named = [item for attention in attentions for item in memory_parameters(attention).items()]
    parameters = [parameter for _, parameter in named]
    if not kept.rounds:
        with torch.no_grad():
            for name, parameter in named:
                if name.startswith(GATE):
                    parameter.clamp_(min=LEAST_GATE)
    optimizer = torch.optim.Adam([_group(name, x, lr) for name, x in named], betas=(0.9, 0.98))
    if kept.optimizer:
        optimizer.load_state_dict(kept.optimizer)
    done = len(kept.rounds) * task.steps
    schedule = cosine(optimizer, count * task.steps, warm_up=task.steps, done=done)
    stage = "train in rounds"
    listener.begin(stage, count * task.steps - done)
    for number in range(len(kept.rounds), count):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
        losses, rest = [], []
        with torch.enable_grad(), trained(parameters):
            for step in task.losses(generator):
                step.loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, LARGEST_NORM)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                losses.append(step.loss.item())
                rest.append(step.rest)
                listener.read(stage, 1)
        figures = task.figures(losses, rest)
        kept.add_round(attentions, dict(figures), optimizer.state_dict())
        listener.finished(f"round {number + 1}: {task.said(figures)}")


def _group(name: str, parameter: nn.Parameter, lr: float) -> dict[str, Any]:
    factor = GATE_FACTOR if name.startswith(GATE) else BIAS_FACTOR if parameter.ndim == 1 else 1.0
    return {"params": [parameter], "lr": factor * lr}
