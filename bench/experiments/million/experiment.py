"""Passkeys in texts of up to a million tokens: the demo's model, trained by each rule and from several seeds.

Each model is trained as `segattn demo` trains it, and asked for passkeys at the start, in the middle and at the end of
texts that it has not read. A length and depth of a model is kept in the JSON as it ends, and is not run again:

    python -m segattn.bench.experiments.million --out million.json
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ....infini.conversion_options import UPDATES
from ....infini.demo.evaluation import evaluate
from ....infini.demo.runs import build
from ....infini.demo.settings import DemoSettings
from ....infini.demo.training import Recipe, Trainer
from ....runs.errors import SettingError
from ....runs.figures import versions
from ...planner.settings import check_size
from ..harness import Advance, Figures, Job, Runs, command, earlier, made_by, run_all

# tokens that are read in about the time of a step of training
TOKENS_PER_STEP = 15_000


@dataclass(frozen=True)
class Setup:
    """The settings of the command; all but the seeds and the rules are the same for all cells.

    lengths: Of the texts, in tokens.
    depths: Of the passkey, from 0 to 1.
    samples: Texts per length and depth.
    """

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    updates: tuple[str, ...] = UPDATES
    steps: int = 1500
    lengths: tuple[int, ...] = (131_072, 1_048_576)
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)
    samples: int = 20

    def __post_init__(self) -> None:
        for name in ("steps", "samples"):
            check_size(name, getattr(self, name))
        for update in self.updates:
            if update not in UPDATES:
                raise SettingError("updates", f"must be of {', '.join(UPDATES)}, got {update}")
        if not all(0 <= depth <= 1 for depth in self.depths):
            raise SettingError("depths", f"must be from 0 to 1, got {list(self.depths)}")


def train(setup: Setup, update: str, seed: int, advance: Advance) -> tuple[Trainer, float]:
    """Return a model that is trained as the demo's, and the CPU seconds that this took."""
    trainer, _ = build(DemoSettings(steps=setup.steps, update=update, seed=seed))
    begin = time.process_time()
    while trainer.step < setup.steps:
        trainer.advance()
        advance(1, " is trained")
    trainer.model.eval()
    return trainer, round(time.process_time() - begin, 1)


def summary(setup: Setup, cells: Sequence[Figures]) -> list[Figures]:
    """Return, for each rule, length and depth, how many passkeys all seeds recalled whole, and of how many."""
    table = []
    for update in setup.updates:
        for length in setup.lengths:
            for depth in setup.depths:
                found = [x for x in cells if (x["update"], x["length"], x["depth"]) == (update, length, depth)]
                counts = {name: sum(x[name] for x in found) for name in ("right", "samples")}
                table.append({"update": update, "length": length, "depth": depth, "seeds": len(found)} | counts)
    return table


def experiment(setup: Setup, out: Path) -> Figures:
    """Measure every cell that `out` does not hold yet.

    Raises:
        SettingError: `out` holds figures of another setup.
    """
    kept = {name: value for name, value in asdict(setup).items() if name not in ("seeds", "updates")}
    about: Figures = {"setup": json.loads(json.dumps(kept)), "recipe": asdict(Recipe(steps=setup.steps))}

    # of the code that is loaded; the checkout may go on while a long run lasts
    made = made_by() | {"versions": versions()}

    # the cells of a model follow each other
    @functools.lru_cache(maxsize=1)
    def trained(update: str, seed: int) -> tuple[Trainer, float]:
        return train(setup, update, seed, lambda amount, word: None)

    def perform(job: Job, advance: Advance) -> Figures:
        update, seed, length, depth = job
        trainer, seconds = trained(update, seed)
        begin = time.process_time()
        drawn: dict[str, Any] = {"samples": (setup.samples,), "seed": seed}
        found = evaluate(trainer.model, trainer.task, lengths=(length,), depths=(depth,), **drawn)
        advance(amounts[job], "")
        cell = found.cells[0]
        return {
            "samples": cell.samples,
            "right": round(cell.exact * cell.samples),
            "digits": cell.digits,
            "state_bytes": found.state_bytes[length],
            "cpu_seconds": {"train": seconds, "read": round(time.process_time() - begin, 1)},
            "made": made,
        }

    amounts = {
        (update, seed, length, depth): setup.samples * length // TOKENS_PER_STEP
        for seed in setup.seeds
        for update in setup.updates
        for length in setup.lengths
        for depth in setup.depths
    }
    identity = ("update", "seed", "length", "depth")
    runs = Runs(
        "cells", identity, amounts, perform, line, lambda figures: {"summary": summary(setup, figures["cells"])}
    )
    return run_all(out, earlier(out, about, "cells"), runs)


def line(cell: Figures) -> str:
    """Return a cell's figures as a line."""
    where = f"{cell['length']:,} tokens, passkey at {100 * cell['depth']:g} %"
    return f"{cell['update']}, seed {cell['seed']}, {where}: {cell['right']} of {cell['samples']}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, as of `command`."""
    return command(Setup, experiment, "million", (__doc__ or "").splitlines()[0], arguments, out="the JSON")
