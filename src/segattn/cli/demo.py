"""The commands, and what they show while they work."""

from __future__ import annotations

import json as json_format
import shlex
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import evaluate, plan
from . import rmt as recurrence
from .finetune import finetune
from .progress import Bars, Lines

if TYPE_CHECKING:
    from ..infini.demo.evaluation import Cell
    from ..kernels.check.report import CheckReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segment attention with a compressive memory, for PyTorch.",
)


app.add_typer(evaluate.app, name="evaluate")
app.add_typer(recurrence.app, name="rmt")
app.add_typer(plan.app, name="plan")
app.command()(finetune)


@app.callback()
def main() -> None:
    """Segment attention with a compressive memory, for PyTorch."""


@app.command()
def config() -> None:
    """Show which backend runs here, and why."""
    from ..kernels.backends import show_config

    Console(soft_wrap=True).print(show_config(), highlight=False)


@app.command()
def check(
    device: Annotated[str | None, typer.Option(help="Where to run: cuda or cpu. Default: a GPU where one is.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="What to check: torch or triton; may be repeated. Default: all that run.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16 or bfloat16; may be repeated. Default: all three.")
    ] = None,
    json: Annotated[Path | None, typer.Option(help="File to write every error to.")] = None,
) -> None:
    """Compare every backend that runs here with the float64 reference, over calls of every kind, each run twice.

    Seconds on a CPU, a minute with TRITON_INTERPRET=1, minutes on a GPU. Exit status 1 if anything fails.
    """
    from ..kernels.check.check import OptionError, run_check

    console = Console(soft_wrap=True, highlight=False)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    try:
        if json is not None and (json.is_dir() or not json.parent.is_dir()):
            raise OptionError("json", f"must be a file in a folder that exists, got {str(json)!r}")
        with _Bar(console) if console.is_terminal else nullcontext() as bar:
            report = run_check(device, backend, dtype, listener=None if bar is None else bar.compared)
    except OptionError as error:
        errors.print(f"segattn check: --{error.name} {error.problem}", markup=False)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print("segattn check: stopped", markup=False)
        raise typer.Exit(130) from None
    _show_check(console, report)
    if json is not None:
        try:
            json.write_text(json_format.dumps(report.as_json(), indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            problem = f"must be a file that can be written, got {str(json)!r} ({error.strerror})"
            errors.print(f"segattn check: --json {problem}", markup=False)
            raise typer.Exit(2) from None
    raise typer.Exit(1 if report.failures else 0)


def _show_check(console: Console, report: CheckReport) -> None:
    """The worst error of every output, what failed, and how much was compared."""
    table = Table(title=f"Largest relative RMS errors, {report.device}", title_justify="left")
    for column in ("backend", "dtype", "output", "error", "gate", "worst in call"):
        table.add_column(column, justify="right" if column in ("error", "gate") else "left")
    group = None
    for row in report.worst():
        if (row.backend, row.dtype) != group and group is not None:
            table.add_section()
        group = (row.backend, row.dtype)
        table.add_row(row.backend, row.dtype, row.output, f"{row.error:.1e}", f"{row.gate:.0e}", row.call)
    console.print(table)
    for line in report.lines():
        console.print(line, markup=False)


@app.command()
def demo(
    text: Annotated[
        Path | None, typer.Option(help="Running text to hide passkeys in, UTF-8. Default: made-up words.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: 1500.")] = None,
    segment_len: Annotated[int | None, typer.Option(help="Tokens per segment. Default: 32.")] = None,
    segments: Annotated[int | None, typer.Option(help="Segments of the longest training text. Default: 8.")] = None,
    update: Annotated[
        str | None, typer.Option(help="How the memory is written: delta or linear. Default: delta.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights and samples. Default: 0.")] = None,
    reach: Annotated[int | None, typer.Option(help="Longest text tested, in trained lengths. Default: 64.")] = None,
    samples: Annotated[int | None, typer.Option(help="Texts tested per length and depth. Default: 40.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda. Default: cpu.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = Path("segattn-demo"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
) -> None:
    """Train a small decoder to recall a passkey, then find it in texts far longer than those it was trained on.

    Two to three minutes on two cores. Ctrl-C leaves a checkpoint to go on from.
    """
    from ..infini.demo.runs import DemoSettings, Outputs, run_demo, saved_settings
    from ..runs.checkpoint import InterruptedRunError, SettingError

    console = Console(soft_wrap=True, highlight=False)
    errors = Console(stderr=True, soft_wrap=True, highlight=False)
    given = {
        "text": None if text is None else str(text.resolve()),
        "steps": steps,
        "segment_len": segment_len,
        "segments": segments,
        "update": update,
        "seed": seed,
        "reach": reach,
        "samples": samples,
        "device": device,
    }
    again = f"go on with: segattn demo --resume --out {shlex.quote(str(out))}"
    try:
        settings = DemoSettings(
            **(saved_settings(out) if resume else {})
            | {name: value for name, value in given.items() if value is not None}
        )
        with _Bars(console) if console.is_terminal else _Lines(console) as listener:
            figures = run_demo(settings, out, listener, resume=resume)
    except SettingError as error:
        errors.print(f"segattn demo: --{error.name.replace('_', '-')} {error.problem}", markup=False)
        raise typer.Exit(2) from None
    except InterruptedRunError:
        errors.print(f"segattn demo: stopped, checkpoint written; {again}", markup=False)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        left = Outputs.of(out).checkpoint.is_file()
        errors.print(f"segattn demo: stopped; {again}" if left else "segattn demo: stopped", markup=False)
        raise typer.Exit(130) from None
    console.print(_table(figures))
    _summary(console, figures, Outputs.of(out)._asdict())


def _table(figures: dict[str, Any]) -> Table:
    """Recall by length and depth, in per cent."""
    trained = figures["trained_length"]
    lengths = sorted({cell["length"] for cell in figures["recall"]})
    table = Table(title=f"Passkeys recalled whole, % (trained on up to {trained} tokens)", title_justify="left")
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length}\n{length // trained}×", justify="right")
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
    for name, path in files.items():
        console.print(f"{name:10} {path}", markup=False)


class _Progress(Bars):
    """Bars with a description and a note."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        super().__init__(console, *columns)


class _Bar(_Progress):
    """The progress of a check, for a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.task = self.progress.add_task("check", total=None, note="")

    def compared(self, done: int, total: int, call: str) -> None:
        self.progress.update(self.task, completed=done, total=total, note=call)


class _Bars(_Progress):
    """Two progress bars, for a terminal."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.training = self.progress.add_task("train", total=None, note="")
        self.evaluation = self.progress.add_task("evaluate", total=None, note="", visible=False)

    def trained(self, step: int, steps: int, loss: float, accuracy: float) -> None:
        note = f"loss {loss:.3f}  recall {100 * accuracy:.0f} %"
        self.progress.update(self.training, completed=step, total=steps, note=note)

    def evaluated(self, done: int, cells: int, cell: Cell) -> None:
        note = f"{cell.length} tokens  recall {100 * cell.exact:.0f} %"
        self.progress.update(self.evaluation, completed=done, total=cells, note=note, visible=True)


class _Lines(Lines):
    """A few plain lines, for a file or a pipe."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.recall: list[float] = []

    def trained(self, step: int, steps: int, loss: float, accuracy: float) -> None:
        if step % max(1, steps // 6) == 0 or step == steps:
            self.console.print(f"step {step} of {steps}: loss {loss:.4f}, recall {100 * accuracy:.1f} %")

    def evaluated(self, done: int, cells: int, cell: Cell) -> None:
        self.recall.append(cell.exact)
        if cell.depth == 1:
            self.console.print(f"{cell.length} tokens: recall {100 * sum(self.recall) / len(self.recall):.1f} %")
            self.recall = []
