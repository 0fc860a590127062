"""Training by curriculum: on few segments first, on more once those are learnt (arXiv 2304.11062, section 5)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..tasks.answers import fewest_segments, length_of, right
from ..tasks.make import Task

WINDOW = 20
# apart from the random numbers of the samples, whose keys are the splits
_LENGTHS = 2


@dataclass(frozen=True)
class Recipe:
    """How a memory is trained; AdamW, its rate rising at the beginning of each stage.

    Args:
        short: tokens of the first stages, shorter than a segment.
        short_segments: of the stages after them, of segments as short as the last of `short`: what to carry is learnt
            there at a fraction of the cost.
        segments: of the stages after them.
        steps: at most, per stage.
        threshold: accuracy over the last 20 batches of a stage's own length that ends it.
        anneal: steps after the last stage, at its length, while the rate falls to nothing.
        vary: every other batch has a random length, of tokens up to one segment, of segments up to several.
        batch, later_batch: samples per step up to one segment, and of several.
        lr, later_lr: rates, likewise.
        beta2: of AdamW, how long it remembers squared gradients.
        weight_decay, clip: decay, largest norm of the gradient.
        warm_up: steps over which the rate rises.
    """

    short: tuple[int, ...] = (64, 128)
    short_segments: tuple[int, ...] = ()
    segments: tuple[int, ...] = (1, 2, 3, 4, 5)
    steps: int = 1500
    threshold: float = 0.99
    anneal: int = 0
    vary: bool = True
    batch: int = 32
    later_batch: int = 32
    lr: float = 1e-3
    later_lr: float = 4e-4
    beta2: float = 0.999
    weight_decay: float = 1e-3
    clip: float = 1.0
    warm_up: int = 50

    def plan(self, task: Task, segment_len: int) -> list[Stage]:
        """What is trained, in order.

        Raises:
            ValueError: a stage too short for the task's samples, or of `short` as long as a segment; `short_segments`
                without `short`.
        """
        fewest = fewest_segments(task, segment_len)
        if self.segments[0] < fewest:
            raise ValueError(
                f"segments must begin with {fewest} of {segment_len} tokens or more to hold any sample of {task.name}, "
                f"got {self.segments[0]}"
            )
        if self.short and not task.shortest <= self.short[0] <= self.short[-1] < segment_len:
            given = ",".join(map(str, self.short))
            raise ValueError(f"short must be from {task.shortest} to below {segment_len} tokens, got {given}")
        if self.short_segments and not self.short:
            given = ",".join(map(str, self.short_segments))
            raise ValueError(f"short_segments must be none without short, got {given}")
        texts = [(tokens, 1, segment_len) for tokens in self.short]
        texts += [(n * self.short[-1], n, self.short[-1]) for n in self.short_segments]
        texts += [(n * segment_len, n, segment_len) for n in self.segments]
        stages = [
            Stage(length_of(task, tokens), n, cut, self.steps, self.lr if n == 1 else self.later_lr, self.threshold)
            for tokens, n, cut in texts
        ]
        return stages + [stages[-1]._replace(steps=self.anneal, threshold=None)] * bool(self.anneal)


class Stage(NamedTuple):
    """Up to so many tokens, segments and steps, at a rate; without `threshold` all steps, while the rate falls."""

    length: int
    segments: int
    segment_len: int
    steps: int
    lr: float
    threshold: float | None

    @property
    def annealed(self) -> bool:
        """Whether the rate falls to nothing."""
        return self.threshold is None

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What a run that goes on must have had: tokens, tokens per segment, and whether the rate falls."""
        return self.length, self.segment_len, self.annealed

    def rate(self, step: int, warm_up: int) -> float:
        """The rate at a step, from 0 on."""
        return self.lr * (1 - step / self.steps if self.annealed else min(1.0, (step + 1) / warm_up))


class Step(NamedTuple):
    """One step: tokens of its samples, its loss, its accuracy, and the running accuracy at the stage's own length."""

    length: int
    loss: float
    accuracy: float
    running: float


class DivergedError(ValueError):
    """The loss is no number any more; the parameters are as before the step."""


class Trainer:
    """A memory, its optimiser, and how far the curriculum has come: all that a step depends on, besides its task.

    Args:
        memory: `RecurrentMemory` or `AssociativeMemory`; the parameters that need a gradient are trained. Its
            `segment_len` is the present stage's, until training is over.
        seed: of the batches; each is a pure function of it and of its number.

    Attributes:
        plan: the stages.
        stage: index of the present one; past the last one when training is over.
        step: taken in it.
        index: taken in all.
        seconds: of training in the present stage.
        log: the present stage's steps.
        done: figures of the stages before.
    """

    def __init__(self, memory: nn.Module, task: Task, segment_len: int, recipe: Recipe, seed: int) -> None:
        self.memory, self.task = memory.train(), task
        self.recipe, self.seed = recipe, seed
        self.plan = recipe.plan(task, segment_len)
        settings: Any = memory.settings
        # the last are for after the training: its own again
        self._settings = [replace(settings, segment_len=stage.segment_len) for stage in self.plan] + [settings]
        self.trained = [parameter for parameter in memory.parameters() if parameter.requires_grad]
        self.device = self.trained[0].device
        self.optimiser = torch.optim.AdamW(
            self.trained, lr=recipe.lr, betas=(0.9, recipe.beta2), weight_decay=recipe.weight_decay
        )
        self.index = 0
        self.seconds = 0.0
        self.log: list[Step] = []
        self.done: list[dict[str, Any]] = []
        self._enter(0)
        torch.manual_seed(seed)

    @property
    def step(self) -> int:
        """Taken in the present stage."""
        return len(self.log)

    @property
    def over(self) -> bool:
        """Whether every stage is done."""
        return self.stage == len(self.plan)

    @property
    def converged(self) -> bool:
        """Whether the present stage has reached its threshold."""
        threshold = self.plan[self.stage].threshold
        full = len(self._own()) == WINDOW
        return threshold is not None and full and self.log[-1].running >= threshold

    @property
    def stage_over(self) -> bool:
        """Whether the present stage has no step left."""
        return self.step >= self.plan[self.stage].steps or self.converged

    def advance(self) -> Step:
        """One step.

        Raises:
            DivergedError: the loss or its gradient is no number any more.
        """
        begin, stage = time.perf_counter(), self.plan[self.stage]
        for group in self.optimiser.param_groups:
            group["lr"] = stage.rate(self.step, self.recipe.warm_up)
        length = self._length()
        size = self.recipe.batch if stage.segments == 1 else self.recipe.later_batch
        batch = self.task.batch(size, length, seed=self.seed, index=self.index)
        ids, labels = (x.to(self.device) for x in batch)
        # of an encoder [B, C] is there without asking
        out = self.memory(ids, labels=labels, output_logits=labels.ndim == 2)
        self.optimiser.zero_grad()
        out.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, self.recipe.clip).item()
        loss = out.loss.item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergedError(f"step {self.index + 1} has a loss of {loss}")
        self.optimiser.step()
        accuracy = right(out.logits, labels).float().mean().item()
        own = [*self._own(), *([accuracy] if length == stage.length else [])][-WINDOW:]
        self.log.append(Step(length, loss, accuracy, sum(own) / len(own) if own else 0.0))
        self.index += 1
        self.seconds += time.perf_counter() - begin
        return self.log[-1]

    def next_stage(self, figures: dict[str, Any]) -> None:
        """Leave the present stage, whose figures these are."""
        self.done.append(figures)
        self.seconds, self.log = 0.0, []
        self._enter(self.stage + 1)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, in plain types and tensors."""
        cuda = self.device.type == "cuda"
        now = None if self.over else self.plan[self.stage].kind
        return {
            "stage": self.stage,
            "now": now,
            "index": self.index,
            "seconds": self.seconds,
            "log": [tuple(step) for step in self.log],
            "done": self.done,
            "memory": self.memory.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.memory.load_state_dict(saved["memory"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self._enter(saved["stage"])
        self.index, self.seconds = saved["index"], saved["seconds"]
        self.log, self.done = [Step(*step) for step in saved["log"]], list(saved["done"])
        torch.set_rng_state(saved["random"])
        if self.device.type == "cuda" and saved["random_cuda"] is not None:
            torch.cuda.set_rng_state(saved["random_cuda"], self.device)

    def _enter(self, stage: int) -> None:
        self.stage = stage
        self.memory.settings = self._settings[stage]

    def _own(self) -> list[float]:
        """The last accuracies at the present stage's own length."""
        length, found = self.plan[self.stage].length, []
        for step in reversed(self.log):
            if step.length == length:
                found.append(step.accuracy)
            if len(found) == WINDOW:
                break
        return found[::-1]

    def _length(self) -> int:
        """Tokens of the next batch's samples."""
        stage = self.plan[self.stage]
        if not self.recipe.vary or self.index % 2 == 0:
            return stage.length
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_LENGTHS, self.index)))
        if stage.segments == 1:
            return length_of(self.task, int(generator.integers(self.task.shortest, stage.length + 1)))
        fewest = fewest_segments(self.task, stage.segment_len)
        return length_of(self.task, int(generator.integers(fewest, stage.segments + 1)) * stage.segment_len)
