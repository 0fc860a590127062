"""The baselines of the papers in one harness: what each keeps of a text, and the perplexity that this buys.

Small Llamas of bytes, trained from the same weights on the same windows, as in the experiment on a book. The learning
rate of each is the best of `lr` times `lr_factors`, by bytes that are neither trained on meanwhile nor evaluated on
later, and a seed that no other run has. Each run is kept in the JSON as it ends, and is not run again:

    python -m segattn.bench.experiments.baselines --text book.txt --out results
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from ....runs.figures import write_figures
from ...report.experiments import spread
from ..book.experiment import all_runs, begin, by_position, rounded, tell, train
from ..harness import Advance, Figures, Job, Runs, command, run_all
from .counting import at_the_papers_sizes, counted_bytes, formula_bytes, formulas, parameters
from .models import BASELINES, BaselineSetup, build
from .plot import plot_baselines
from .speed import speeds

# a training row, and lengths that show what grows
LENGTHS = (256, 8192, 65536)
# the seed of what the learning rates are chosen by
CHOOSING = 1_000_000
# columns of the tables where no terminal says
PAGE = 160
NOTE = (
    "RMT: the formula counts keys and values of the memory tokens in every layer; counted is what is handed on from "
    "segment to segment, the tokens themselves"
)


def experiment(setup: BaselineSetup, text: Path, out: Path) -> dict[str, Any]:
    """Perform every run, count and time that `out` does not hold yet, print a table of them, and draw a picture.

    Raises:
        SettingError: The runs there are of another setup, or of another text, or the text is too short.
    """
    kept = out / "baselines.json"
    book, figures = begin(setup, text, kept)
    rates = chosen_rates(setup, book, kept, figures)
    figures = all_runs({name: replace(setup, lr=lr) for name, lr in rates.items()}, book, kept, figures, build)
    parts = {
        "kept": lambda: kept_by_all(setup),
        "papers": at_the_papers_sizes,
        "speed": lambda: speeds(setup, BASELINES),
    }
    for name, make in parts.items():
        if name not in figures:
            figures[name] = make()
            write_figures(kept, figures)
    plot_baselines(out / "baselines.png", figures)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = PAGE
    console.print(table(figures))
    console.print(papers_table(figures))
    return figures


def chosen_rates(setup: BaselineSetup, text: Tensor, kept: Path, figures: Figures) -> dict[str, float]:
    """Return the learning rate of each model; what the figures lack for it is tried, and added to them."""
    figures.setdefault("tried", [])
    known = text[: setup.cut(text)]
    setups = [replace(setup, lr=factor * setup.lr, held_out=setup.validation) for factor in setup.lr_factors]
    by_lr = {one.lr: one for one in setups}

    def perform(job: Job, advance: Advance) -> Figures:
        name, lr = job
        one, model = by_lr[lr], build(by_lr[lr], name, CHOOSING)
        cut = one.cut(known)
        train(model, known[:cut], one, CHOOSING, functools.partial(tell, advance))
        return {"nats": rounded(by_position(model, known[cut:], one.row).mean())}

    def line(run: Figures) -> str:
        return f"{run['variant']}, learning rate {run['lr']:g}: perplexity {math.exp(run['nats']):.3f}, validation"

    jobs = {(name, lr): setup.steps for name in BASELINES for lr in by_lr}
    identity = ("variant", "lr")
    runs = Runs("tried", identity, jobs, perform, line, lambda figures: {"rates": best_rates(figures["tried"])})
    rates: dict[str, float] = run_all(kept, figures, runs)["rates"]
    return {name: rates[name] for name in BASELINES}


def best_rates(tried: Sequence[Figures]) -> dict[str, float]:
    """Return the learning rate with the fewest nats, by model; NaN is never the fewest."""
    ordered = sorted(tried, key=lambda run: (math.isnan(run["nats"]), run["nats"]), reverse=True)
    return {run["variant"]: run["lr"] for run in ordered}


def kept_by_all(setup: BaselineSetup) -> dict[str, Any]:
    """Return, for each model, its parameters, and the bytes that it keeps of one text, by length."""
    found = {}
    for name in BASELINES:
        model = build(setup, name, 0)
        counted = counted_bytes(model, name, setup, LENGTHS)
        found[name] = {
            "parameters": parameters(model),
            "formula": formulas(setup, 0)[name][0],
            "bytes": {str(length): formula_bytes(setup, name, length) for length in LENGTHS},
            "counted": {str(length): value for length, value in counted.items()},
        }
    return found


def table(figures: dict[str, Any]) -> Table:
    """Return a table with a row for each model."""
    drawn = Table(title="Small models, equal steps")
    for column in ("", "parameters", *(f"kept at {n}, bytes" for n in LENGTHS)):
        drawn.add_column(column, justify="right" if column else "left")
    speeds_of = ("training speed, × local", "reading speed, × local")
    for column in ("learning rate", "perplexity", "nats, against local", *speeds_of):
        drawn.add_column(column, justify="right")
    for name, kept in figures["kept"].items():
        found = figures["summary"][name]
        values = [f"{value:,}" for value in (kept["parameters"], *kept["counted"].values())]
        speed = [f"{figures['speed'][kind][name]['ratio']:.2f}" for kind in ("train", "evaluate")]
        rate = f"{figures['rates'][name]:g}"
        drawn.add_row(
            name, *values, rate, spread(found["perplexity"], ".3f"), spread(found["nats_less_local"], "+.3f"), *speed
        )
    return drawn


def papers_table(figures: dict[str, Any]) -> Table:
    """Return a table with a row for each row of the paper's table 2."""
    drawn = Table(title="Numbers kept at the sizes of arXiv 2404.07143, millions (times fewer)", caption=NOTE)
    for column in ("", "table 1's formula", "by it", "counted", "printed"):
        drawn.add_column(column, justify="right" if column else "left")
    for row in figures["papers"]:
        drawn.add_row(
            row["title"],
            row["formula"],
            f"{row['numbers'] / 1e6:.2f} ({row['fewer']:.1f})",
            f"{row['counted'] / 1e6:.2f} ({row['counted_fewer']:.1f})",
            f"{row['printed']:g} ({row['printed_fewer']:g})",
        )
    return drawn


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status, as of `command`."""
    about, book = (__doc__ or "").splitlines()[0], "a book, any encoding: it is read as bytes"
    return command(
        BaselineSetup, experiment, "baselines", about, arguments, text=book, out="folder of the figures and the picture"
    )
