"""Tokens per second of all models, by turns on the same rows, and ratios to local attention of the same turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..book_experiment import nats
from ..book_setup import made_by
from .models import BaselineSetup, build

ROUNDS = 15
WARM_UP = 2
REFERENCE = "local"


def speeds(setup: BaselineSetup, names: Iterable[str], rounds: int = ROUNDS) -> dict[str, Any]:
    """Of a training step's forward and backward pass, and of reading without gradients: medians over the rounds."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(256, (setup.batch, setup.row + 1), generator=generator)
    models = {name: build(setup, name, 0) for name in names}
    found = {}
    for kind, act in (("train", _train), ("evaluate", _evaluate)):
        turns = [{name: _seconds(act, model, rows) for name, model in models.items()} for _ in range(WARM_UP + rounds)]
        found[kind] = _medians(turns[WARM_UP:], setup.batch * setup.row)
    about = {"rounds": rounds, "rows": [setup.batch, setup.row], "reference": REFERENCE}
    return about | found | {"made": made_by()}


def _medians(turns: list[dict[str, float]], tokens: int) -> dict[str, dict[str, float]]:
    return {
        name: {
            "tokens_per_second": round(statistics.median(tokens / turn[name] for turn in turns)),
            "ratio": round(statistics.median(turn[REFERENCE] / turn[name] for turn in turns), 3),
        }
        for name in turns[0]
    }


def _seconds(act: Callable[[nn.Module, Tensor], None], model: nn.Module, rows: Tensor) -> float:
    begin = time.perf_counter()
    act(model, rows)
    return time.perf_counter() - begin


def _train(model: nn.Module, rows: Tensor) -> None:
    model.train()
    nats(model, rows).mean().backward()
    model.zero_grad()


@torch.no_grad()
def _evaluate(model: nn.Module, rows: Tensor) -> None:
    model.eval()
    nats(model, rows)
