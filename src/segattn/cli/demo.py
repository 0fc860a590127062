"""The command `segattn demo`: train a small decoder to recall a passkey, and ask for it in far longer texts."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..infini.demo.settings import DemoSettings, doubled
from ..runs.errors import SettingError
from .options import Out, Resume, help_of, options_of
from .progress import Progress, is_due
from .shell import Command, counts, print_files

if TYPE_CHECKING:
    from ..infini.demo.evaluation import Cell

FOLDER = Path("segattn-demo")

Lengths = Annotated[str | None, typer.Option(help=help_of(DemoSettings, "lengths"), show_default=False)]
Reach = Annotated[
    int | None, typer.Option(help="In place of --lengths: the trained length, doubled up to so many times it.")
]


@options_of(DemoSettings)
def demo(
    lengths: Lengths = None,
    reach: Reach = None,
    out: Out = FOLDER,
    resume: Resume = False,
    **given: Any,
) -> None:
    """Train a small decoder to recall a passkey, then find it in texts far longer than those it was trained on.

    Takes minutes on two cores. Ctrl-C leaves a checkpoint, from which --resume goes on.
    """
    again = f"go on with: segattn demo --resume --out {shlex.quote(str(out))}"
    with Command("demo", again=again, saved=(out / "checkpoint.pt").is_file).run() as console:
        from ..infini.demo.runs import Outputs, finished_figures, run_demo, saved_settings

        settings = DemoSettings(**(saved_settings(out) if resume else {}) | given)
        settings = replace(settings, lengths=_lengths(settings, lengths, reach))
        figures = finished_figures(settings, out)
        if figures is None:
            with Training(console) as listener:
                figures = run_demo(settings, out, listener, resume=resume)
        else:
            console.print(f"already done, in {out}; to train anew, choose another --out or delete it", markup=False)
        console.print(_table(figures))
        _summary(console, figures, Outputs.of(out)._asdict())


class Training(Progress):
    """The steps of a demo's training, and the cells of its evaluation."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.recall: list[float] = []

    def trained(self, step: int, steps: int, loss: float, accuracy: float) -> None:
        """Show a step."""
        self.bar("train", step, steps, f"loss {loss:.3f}  recall {100 * accuracy:.0f} %")
        if is_due(step, steps, 6):
            self.line(f"step {step} of {steps}: loss {loss:.4f}, recall {100 * accuracy:.1f} %")

    def evaluated(self, done: int, cells: int, cell: Cell) -> None:
        """Show a cell; of the lines, one for each length, with the mean over its depths."""
        self.bar("evaluate", done, cells, f"{cell.length} tokens  recall {100 * cell.exact:.0f} %")
        self.recall.append(cell.exact)
        if cell.depth == 1:
            self.line(f"{cell.length} tokens: recall {100 * sum(self.recall) / len(self.recall):.1f} %")
            self.recall = []


def _lengths(settings: DemoSettings, lengths: str | None, reach: int | None) -> tuple[int, ...]:
    """Return the lengths that the options name, those of the settings where neither is given."""
    if lengths is not None and reach is not None:
        raise SettingError("reach", "cannot go with --lengths, got both")
    if lengths is not None:
        return tuple(sorted(set(counts("lengths", lengths, "256,16K,1M"))))
    return settings.lengths if reach is None else doubled(settings.segments * settings.segment_len, reach)


def _table(figures: dict[str, Any]) -> Table:
    """Return recall by length and depth, in per cent."""
    trained = figures["trained_length"]
    lengths = sorted({cell["length"] for cell in figures["recall"]})
    table = Table(title=f"Passkeys recalled whole, % (trained on up to {trained} tokens)", title_justify="left")
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length}\n{length / trained:g}×", justify="right")
    for depth in sorted({cell["depth"] for cell in figures["recall"]}):
        row = {cell["length"]: f"{100 * cell['exact']:.1f}" for cell in figures["recall"] if cell["depth"] == depth}
        table.add_row(f"{100 * depth:.0f} %", *(row[length] for length in lengths))
    return table


def _summary(console: Console, figures: dict[str, Any], files: dict[str, Path]) -> None:
    seconds, sizes = figures["seconds"], set(figures["state_bytes"].values())
    console.print(
        f"state of a text: {', '.join(map(str, sorted(sizes)))} bytes at {'every' if len(sizes) == 1 else 'its'} length"
    )
    console.print(f"trained in {seconds['train']} s, evaluated in {seconds['evaluate']} s")
    print_files(console, files)
