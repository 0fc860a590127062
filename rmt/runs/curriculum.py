"""Training by curriculum: on few segments first, on more once those are learnt (arXiv 2304.11062, section 5)."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ...runs.untrained import expect_short_texts
from ..tasks.answers import fewest_segments, length_of, right
from ..tasks.make import Task

# batches over which a stage's accuracy is averaged
WINDOW = 20
# key of the random numbers of lengths; those of samples have the index of their split, 0 or 1
_LENGTHS = 2


@dataclass(frozen=True)
class Recipe:
    """A curriculum, and the settings of AdamW, whose rate rises at the beginning of each stage.

    Args:
        short: tokens of the first stages, shorter than a segment.
        short_segments: number of segments in the next stages, of segments as short as the last of `short`: what to
            carry is learnt there at a fraction of the cost.
        segments: number of whole segments in the stages after them.
        steps: most steps of a stage.
        threshold: accuracy over the last 20 batches of a stage's own length that ends the stage.
        anneal: steps after the last stage, at its length, while the rate falls to nothing.
        vary: give every other batch a random length, of tokens up to one segment, of segments up to several.
        batch, later_batch: samples per step in stages of one segment, and of several.
        lr, later_lr: rates in stages of one segment, and of several.
        beta2: of AdamW, decay of the mean of squared gradients.
        weight_decay: of AdamW.
        clip: largest norm of the gradient.
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
        """Return the stages, in order.

        Raises:
            ValueError: a stage too short for the task's samples, one of `short` that is as long as a segment, or
                `short_segments` without `short`.
        """
        fewest = fewest_segments(task, segment_len)
        if self.segments[0] < fewest:
            raise ValueError(
                f"segments must begin with {fewest} of {segment_len} tokens or more to hold any sample of {task.name}, "
                f"got {self.segments[0]}"
            )
        if self.short and not task.shortest <= self.short[0] <= self.short[-1] < segment_len:
            stages = ",".join(map(str, self.short))
            raise ValueError(f"short must be from {task.shortest} to below {segment_len} tokens, got {stages}")
        if self.short_segments and not self.short:
            stages = ",".join(map(str, self.short_segments))
            raise ValueError(f"short_segments must be none without short, got {stages}")
        texts = [(tokens, 1, segment_len) for tokens in self.short]
        texts += [(n * self.short[-1], n, self.short[-1]) for n in self.short_segments]
        texts += [(n * segment_len, n, segment_len) for n in self.segments]
        plan = [
            Stage(length_of(task, tokens), n, cut, self.steps, self.lr if n == 1 else self.later_lr, self.threshold)
            for tokens, n, cut in texts
        ]
        return plan + [plan[-1]._replace(steps=self.anneal, threshold=None)] * bool(self.anneal)


class Stage(NamedTuple):
    """A stage of the curriculum.

    length: tokens of its longest samples.
    segments, segment_len: of these samples.
    steps: most steps.
    lr: rate after the warm-up.
    threshold: accuracy that ends the stage; None: all steps are taken, while the rate falls.
    """

    length: int
    segments: int
    segment_len: int
    steps: int
    lr: float
    threshold: float | None

    @property
    def annealed(self) -> bool:
        """Return whether the rate falls to nothing."""
        return self.threshold is None

    @property
    def kind(self) -> tuple[int, int, bool]:
        """Return what makes it the same stage in a resumed run: tokens, tokens per segment, whether the rate falls."""
        return self.length, self.segment_len, self.annealed

    def rate(self, step: int, warm_up: int) -> float:
        """Return the rate at a step, from 0 on."""
        return self.lr * (1 - step / self.steps if self.annealed else min(1.0, (step + 1) / warm_up))


class Step(NamedTuple):
    """A step of training.

    length: tokens of its samples.
    loss, accuracy: of its batch.
    running: mean accuracy of the last batches of the stage's own length.
    """

    length: int
    loss: float
    accuracy: float
    running: float


class DivergedError(ValueError):
    """A loss or gradient that is no number; the parameters are as before the step."""


class Trainer:
    """A memory, its optimiser, and the progress of the curriculum: all that a step depends on, besides its task.

    Args:
        memory: `RecurrentMemory` or `AssociativeMemory`; its parameters that need a gradient are trained. Its
            `segment_len` is the present stage's, until training is over.
        task: draws the samples.
        segment_len: tokens of a whole segment.
        recipe: the curriculum.
        seed: of the batches; each is a pure function of it and of its number.

    Attributes:
        plan: the stages.
        stage: index of the present one; past the last one when training is over.
        index: steps taken in all.
        seconds: of training in the present stage.
        log: the present stage's steps.
        done: figures of the stages before.
    """

    def __init__(self, memory: nn.Module, task: Task, segment_len: int, recipe: Recipe, seed: int) -> None:
        self.memory, self.task = memory.train(), task
        self.recipe, self.seed = recipe, seed
        self.plan = recipe.plan(task, segment_len)
        settings: Any = memory.settings
        # one for each stage, and, for after the training, its own again
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
        expect_short_texts(memory)
        self._enter(0)
        torch.manual_seed(seed)

    @property
    def step(self) -> int:
        """The number of steps taken in the present stage."""
        return len(self.log)

    @property
    def over(self) -> bool:
        """Return whether every stage is done."""
        return self.stage == len(self.plan)

    @property
    def converged(self) -> bool:
        """Return whether the present stage has reached its threshold."""
        threshold = self.plan[self.stage].threshold
        full = len(self._own()) == WINDOW
        return threshold is not None and full and self.log[-1].running >= threshold

    @property
    def stage_over(self) -> bool:
        """Return whether the present stage has no step left."""
        return self.step >= self.plan[self.stage].steps or self.converged

    def advance(self) -> Step:
        """Take one step.

        Raises:
            DivergedError: the loss or its gradient is no number.
        """
        begin, stage = time.perf_counter(), self.plan[self.stage]
        for group in self.optimiser.param_groups:
            group["lr"] = stage.rate(self.step, self.recipe.warm_up)
        length = self._length()
        size = self.recipe.batch if stage.segments == 1 else self.recipe.later_batch
        batch = self.task.batch(size, length, seed=self.seed, index=self.index)
        ids, labels = (x.to(self.device) for x in batch)
        # an encoder's [B, C] are always returned
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
        """Enter the next stage, and keep the figures of the present one."""
        self.done.append(figures)
        self.seconds, self.log = 0.0, []
        self._enter(self.stage + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that the next step depends on, in plain types and tensors."""
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
        """Continue from a `state_dict`."""
        self.memory.load_state_dict(saved["memory"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self._enter(saved["stage"])
        self.index, self.seconds = saved["index"], saved["seconds"]
        self.log, self.done = [Step(*step) for step in saved["log"]], list(saved["done"])
        torch.set_rng_state(saved["random"])
        if self.device.type == "cuda" and saved["random_cuda"] is not None:
            torch.cuda.set_rng_state(saved["random_cuda"], self.device)

    def _enter(self, stage: int) -> None:
        """Enter a stage, with its settings of the memory."""
        self.stage = stage
        self.memory.settings = self._settings[stage]

    def _own(self) -> list[float]:
        """Return the last accuracies at the present stage's own length, at most WINDOW."""
        length = self.plan[self.stage].length
        latest = (step.accuracy for step in reversed(self.log) if step.length == length)
        return list(islice(latest, WINDOW))[::-1]

    def _length(self) -> int:
        """Return the tokens of the next batch's samples."""
        stage = self.plan[self.stage]
        if not self.recipe.vary or self.index % 2 == 0:
            return stage.length
        generator = np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(_LENGTHS, self.index)))
        if stage.segments == 1:
            return length_of(self.task, int(generator.integers(self.task.shortest, stage.length + 1)))
        fewest = fewest_segments(self.task, stage.segment_len)
        return length_of(self.task, int(generator.integers(fewest, stage.segments + 1)) * stage.segment_len)
