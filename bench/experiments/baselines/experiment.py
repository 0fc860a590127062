"""The baselines of the papers in one harness: what each keeps of a text, and the perplexity that this buys.

Seven small Llamas of bytes, trained from the same weights on the same windows, as in the experiment on a book. Each run
is kept in the JSON as it ends, and is not run again:

    python -m segattn.bench.experiments.baselines --text book.txt --out results
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ....runs.figures import write_figures
from ...report.experiments import spread
from ..book.experiment import all_runs
from ..harness import command
from .counting import at_the_papers_sizes, counted_bytes, formula_bytes, formulas, parameters
from .models import BASELINES, BaselineSetup, build
from .plot import plot_baselines
from .speed import speeds

# a training row, and lengths that show what grows
LENGTHS = (512, 8192, 65536)
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
    figures = all_runs(setup, text, kept, tuple(BASELINES), build)
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
    for column in ("perplexity", "nats, against local", "training speed, × local", "reading speed, × local"):
        drawn.add_column(column, justify="right")
    for name, kept in figures["kept"].items():
        found = figures["summary"][name]
        values = [f"{value:,}" for value in (kept["parameters"], *kept["counted"].values())]
        speed = [f"{figures['speed'][kind][name]['ratio']:.2f}" for kind in ("train", "evaluate")]
        drawn.add_row(
            name, *values, spread(found["perplexity"], ".3f"), spread(found["nats_less_local"], "+.3f"), *speed
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
