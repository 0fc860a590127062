"""The `segattn` command: its sub-commands, and the options of all."""

from __future__ import annotations

from typing import Annotated

import typer

from . import evaluate, plan, rmt
from .adapt import adapt
from .check import check, config
from .conversions import convert_report
from .demo import demo
from .finetune import finetune

HELP = "Segment attention with a compressive memory, for PyTorch."
# a fault of the program keeps Python's own traceback, without the values of variables
app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=HELP)

app.command()(demo)
app.command()(check)
app.command()(config)
app.command()(finetune)
app.command(name="convert-report")(convert_report)
app.command()(adapt)
app.add_typer(evaluate.app, name="evaluate")
app.add_typer(rmt.app, name="rmt")
app.add_typer(plan.app, name="plan")


def _show_version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"segattn {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """Segment attention with a compressive memory, for PyTorch."""
