"""Tokens per second of all models, by turns on the same rows, and ratios to local attention of the same turn."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...speed.timing import Prepare, take_turns
from ..book.experiment import nats
from ..harness import made_by
from .models import BaselineSetup, build

ROUNDS = 15
# rounds that are not counted
WARM_UP = 2
REFERENCE = "local"


def speeds(setup: BaselineSetup, names: Iterable[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Return the speeds of a training step's two passes, and of reading without gradients: medians over the rounds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (setup.batch, setup.row + 1), generator=generator, device="cpu")
    models = {name: build(setup, name, 0) for name in names}
    count = WARM_UP + rounds
    found = {}
    for kind, act in (("train", _train), ("evaluate", _evaluate)):
        prepares = {name: _prepared(act, model, rows) for name, model in models.items()}
        times = take_turns(prepares, torch.device("cpu"), seconds=math.inf, rounds=(count, count), warm_up=False)
        counted = {name: [x / 1e3 for x in milliseconds[WARM_UP:]] for name, milliseconds in times.items()}
        found[kind] = _medians(counted, setup.batch * setup.row)
    about = {"rounds": rounds, "rows": [setup.batch, setup.row], "reference": REFERENCE}
    return about | found | {"made": made_by()}


def _medians(seconds: Mapping[str, Sequence[float]], tokens: int) -> dict[str, dict[str, float]]:
    return {
        name: {
            "tokens_per_second": round(statistics.median(tokens / x for x in turns)),
            "ratio": round(statistics.median(y / x for x, y in zip(turns, seconds[REFERENCE], strict=True)), 3),
        }
        for name, turns in seconds.items()
    }


def _prepared(act: Callable[[nn.Module, Tensor], None], model: nn.Module, rows: Tensor) -> Prepare:
    return lambda copy: functools.partial(act, model, rows)


def _train(model: nn.Module, rows: Tensor) -> None:
    model.train()
    nats(model, rows).mean().backward()
    model.zero_grad()


@torch.no_grad()
def _evaluate(model: nn.Module, rows: Tensor) -> None:
    model.eval()
    nats(model, rows)
