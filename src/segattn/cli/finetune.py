"""The command `segattn finetune`: continue training a Hugging Face model on a text, with a memory."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from .progress import Bars, Lines

FOLDER = Path("segattn-finetune")


def finetune(
    model: Annotated[
        str | None, typer.Argument(help="Folder or name of a model; a plain one is converted.", show_default=False)
    ] = None,
    text: Annotated[Path | None, typer.Option(help="Text to train on, UTF-8.")] = None,
    dataset: Annotated[str | None, typer.Option(help="Instead, a data set: a name of the hub, or a folder.")] = None,
    split: Annotated[str | None, typer.Option(help="Of the data set. Default: train.")] = None,
    column: Annotated[str | None, typer.Option(help="Of the data set, with the text. Default: text.")] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Folder or name, or 'bytes' for a model of bytes. Default: the model's.")
    ] = None,
    segment_len: Annotated[int | None, typer.Option(help="Of a plain model: tokens a segment. Default: 2048.")] = None,
    update: Annotated[str | None, typer.Option(help="Of a plain model: delta or linear. Default: delta.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row. Default: 8192.")] = None,
    piece: Annotated[int | None, typer.Option(help="Tokens of a row read at once. Default: all.")] = None,
    truncate: Annotated[
        int | None, typer.Option(help="Pieces that gradients reach back, and that are held. Default: all.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the optimiser. Default: 1000.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: 2e-5.")] = None,
    gate_lr: Annotated[float | None, typer.Option(help="Learning rate of the gates. Default: 1e-2.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices. Default: 0.01.")] = None,
    warmup: Annotated[int | None, typer.Option(help="Steps over which the rates rise. Default: 20.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows read at once. Default: 1.")] = None,
    accumulate: Annotated[int | None, typer.Option(help="Batches per step. Default: 1.")] = None,
    gates_only: Annotated[
        bool | None, typer.Option("--freeze-but-gates", help="Train the gates alone.", show_default=False)
    ] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Less memory for a third more time.", show_default=False),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the rows' order, and of dropout. Default: 0.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights: float32, bfloat16, float16 or auto. Default: float32.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Such as cpu or cuda. Default: a GPU where one is.")] = None,
    save_every: Annotated[int | None, typer.Option(help="Steps between checkpoints. Default: 100.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = FOLDER,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
) -> None:
    """Continue training a model on a text, each row read in pieces with its memory carried on.

    Ctrl-C leaves a checkpoint, from which --resume goes on to what the run would have come to.
    """
    given = {name: value for name, value in locals().items() if value is not None and name not in ("out", "resume")}
    if text is not None:
        given["text"] = str(text.resolve())
    with _Errors(out) as console:
        from ..infini.finetune.finetuner import FinetuneSettings
        from ..infini.finetune.runs import Outputs, run_finetune, saved_settings
        from ..runs.checkpoint import SettingError

        if model is None and not resume:
            raise SettingError("model", "must be given: a folder, or a name of the hub")
        if not console.is_terminal:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        settings = FinetuneSettings(**(saved_settings(out) if resume else {}) | given)
        with _Bar(console) if console.is_terminal else _Lines(console) as listener:
            figures = run_finetune(settings, out, listener, resume=resume)
        if figures:
            console.print(f"loss {figures['loss']:.4f} after {figures['tokens']} tokens, {figures['seconds']:.0f} s")
        for name, path in Outputs.of(out)._asdict().items():
            console.print(f"{name:10} {path}", markup=False)


class _Errors:
    """The console, and what becomes of errors."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.console = Console(soft_wrap=True, highlight=False)
        self.errors = Console(stderr=True, soft_wrap=True, highlight=False)

    def __enter__(self) -> Console:
        return self.console

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from torch import OutOfMemoryError

        from ..runs.checkpoint import InterruptedRunError, SettingError

        again = f"; go on with: segattn finetune --resume --out {shlex.quote(str(self.out))}"
        names = {"model": "MODEL", "gates_only": "--freeze-but-gates"}
        if isinstance(error, SettingError):
            self._stop(f"{names.get(error.name, '--' + error.name.replace('_', '-'))} {error.problem}", 2)
        if isinstance(error, ImportError) and error.name in ("transformers", "safetensors"):
            self._stop(f"needs {error.name}: pip install 'segattn[hf]'", 1)
        if isinstance(error, OutOfMemoryError):
            self._stop("out of memory: try a smaller --batch, --piece or --truncate, or --gradient-checkpointing", 1)
        if isinstance(error, InterruptedRunError):
            self._stop(f"stopped, checkpoint written{again}", 130)
        if isinstance(error, KeyboardInterrupt):
            self._stop(f"stopped{again if (self.out / 'checkpoint.pt').is_file() else ''}", 130)

    def _stop(self, message: str, status: int) -> None:
        self.errors.print(f"segattn finetune: {message}", markup=False)
        raise typer.Exit(status) from None


class _Bar(Bars):
    """Steps done, on a terminal."""

    def __init__(self, console: Console) -> None:
        note = TextColumn("{task.fields[note]}")
        super().__init__(console, TextColumn("train"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), note)
        self.task = self.progress.add_task("train", total=None, note="")

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        note = f"loss {figures['loss']:.3f}  gates {figures['gate_least']:.2f} to {figures['gate_largest']:.2f}"
        self.progress.update(self.task, completed=step, total=steps, note=note)


class _Lines(Lines):
    """A few plain lines, for a file or a pipe."""

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        if step % max(1, steps // 20) == 0 or step == steps:
            gates = f"{figures['gate_least']:.3f} to {figures['gate_largest']:.3f}"
            self.console.print(f"step {step} of {steps}: loss {figures['loss']:.4f}, gates {gates}")
