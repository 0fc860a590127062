"""The command `segattn convert-report`: what a model loses by each way to convert it, before any training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..infini.evaluate.settings import CONVERSIONS, Checkpoint, Conversions
from .options import Out, ResumeMeasuring, help_of, options_of, settings_from
from .progress import Reading
from .shell import Command, print_files
from .tables import figures_by_name

FOLDER = Path("segattn-convert-report")


@options_of(Checkpoint, Conversions, arguments=("model",))
def convert_report(
    conversions: Annotated[str, typer.Option(help=help_of(Conversions, "conversions"))] = ",".join(CONVERSIONS),
    out: Out = FOLDER,
    resume: ResumeMeasuring = False,
    **given: Any,
) -> None:
    """Show what a plain model loses by each way to convert it: the perplexity of a text, without any training.

    Beside full attention; in each quarter of the text and in all of it, with the bytes that are kept at its end.
    Ctrl-C leaves the conversions that are measured.
    """
    again = f"go on with the same command and --resume --out {shlex.quote(str(out))}"
    with Command("convert-report", {"model": "MODEL"}, again, smaller="fewer --tokens").run() as console:
        from ..infini.evaluate.conversions import run_conversions
        from ..infini.evaluate.runs import Outputs

        names = tuple(dict.fromkeys(filter(None, (" ".join(part.split()) for part in conversions.split(",")))))
        checkpoint = settings_from(Checkpoint, given)
        chosen = settings_from(Conversions, given | {"conversions": names})
        with Reading(console, "convert-report") as listener:
            figures = run_conversions(checkpoint, chosen, out, listener, resume=resume)
        title = f"Perplexity of {chosen.tokens:,} tokens, untrained"
        console.print(perplexities(figures["rows"], title))
        print_files(console, Outputs.of(out, "convert-report")._asdict())


def perplexities(rows: list[dict[str, Any]], title: str) -> Table:
    """Return a table of the perplexity of each way to read a text, by quarters of it, and of what is kept."""
    quarters = [f"quarter\n{number}" for number in range(1, 1 + len(rows[0]["quarters"]))]
    figures = {
        row["conversion"]: [
            *(f"{x:.4g}" for x in (*row["quarters"], row["perplexity"])),
            f"{row['cache_bytes'] / 2**10:,.0f}",
        ]
        for row in rows
    }
    return figures_by_name(title, ["conversion", *quarters, "all", "kept,\nKiB"], figures)
