"""The commands, and what they show while they work."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from .infini.evaluation import Cell

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Segment attention with a compressive memory, for PyTorch.",
)


@app.callback()
def main() -> None:
    """Segment attention with a compressive memory, for PyTorch."""


@app.command()
def config() -> None:
    """Show which backend runs here, and why."""
    from .kernels.backends import show_config

    Console(soft_wrap=True).print(show_config(), highlight=False)


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
    from .infini.demo import DemoSettings, InterruptedRunError, Outputs, SettingError, run_demo, saved_settings

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


class _Bars:
    """Two progress bars, for a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:8}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self.progress = Progress(*columns, console=console)
        self.training = self.progress.add_task("train", total=None, note="")
        self.evaluation = self.progress.add_task("evaluate", total=None, note="", visible=False)

    def __enter__(self) -> _Bars:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()

    def trained(self, step: int, steps: int, loss: float, accuracy: float) -> None:
        note = f"loss {loss:.3f}  recall {100 * accuracy:.0f} %"
        self.progress.update(self.training, completed=step, total=steps, note=note)

    def evaluated(self, done: int, cells: int, cell: Cell) -> None:
        note = f"{cell.length} tokens  recall {100 * cell.exact:.0f} %"
        self.progress.update(self.evaluation, completed=done, total=cells, note=note, visible=True)


class _Lines:
    """A few plain lines, for a file or a pipe."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.recall: list[float] = []

    def __enter__(self) -> _Lines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def trained(self, step: int, steps: int, loss: float, accuracy: float) -> None:
        if step % max(1, steps // 6) == 0 or step == steps:
            self.console.print(f"step {step} of {steps}: loss {loss:.4f}, recall {100 * accuracy:.1f} %")

    def evaluated(self, done: int, cells: int, cell: Cell) -> None:
        self.recall.append(cell.exact)
        if cell.depth == 1:
            self.console.print(f"{cell.length} tokens: recall {100 * sum(self.recall) / len(self.recall):.1f} %")
            self.recall = []
