"""The command `segattn rmt`: memory tasks for the recurrent memory transformer, trained, extrapolated, looked into."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from .rmt_progress import LengthLines, Lengths, StageLines, Stages, attention_tables, held, length_table, stage_table

if TYPE_CHECKING:
    from typing_extensions import Self


app = typer.Typer(no_args_is_help=True, help="Recurrent memory: train a memory task, extrapolate it, look into it.")

FOLDER = Path("segattn-rmt")
Folder = Annotated[Path, typer.Argument(help="Folder that segattn rmt train wrote.", show_default=False)]
Babi = Annotated[Path | None, typer.Option(help="Folder of bAbI's files. Default: the run's.")]
Book = Annotated[Path | None, typer.Option(help="Running text, UTF-8. Default: the run's.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda. Default: a GPU where one is.")]


@app.command()
def train(
    task: Annotated[
        str | None,
        typer.Argument(
            help="memorize, detect, reasoning; qa1, qa2, qa4; retrieval, copy or reverse.", show_default=False
        ),
    ] = None,
    babi: Annotated[Path | None, typer.Option(help="Folder of bAbI's files. Default: generated facts.")] = None,
    book: Annotated[Path | None, typer.Option(help="Running text, UTF-8. Default: generated sentences.")] = None,
    vocabulary: Annotated[int | None, typer.Option(help="Words of the text that are kept. Default: 4000.")] = None,
    decoys: Annotated[
        float | None, typer.Option(help="Share of stray words of facts in the text of half the samples. Default: 0.")
    ] = None,
    key_digits: Annotated[int | None, typer.Option(help="Of retrieval. Default: 2.")] = None,
    rewrite: Annotated[
        bool | None, typer.Option("--rewrite", help="Of retrieval: keys are written again.", show_default=False)
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Of tasks of classes: bert or modernbert. Default: bert.")] = None,
    layers: Annotated[int | None, typer.Option(help="Of the small model. Default: 2.")] = None,
    width: Annotated[int | None, typer.Option(help="Of the small model. Default: 64.")] = None,
    heads: Annotated[int | None, typer.Option(help="Of the small model. Default: 4.")] = None,
    pretrained: Annotated[
        Path | None, typer.Option(help="Instead, folder of a Hugging Face encoder and its tokenizer.")
    ] = None,
    freeze: Annotated[
        bool | None,
        typer.Option("--freeze", help="Of a pretrained one, train memory and head alone.", show_default=False),
    ] = None,
    start: Annotated[
        Path | None, typer.Option(help="Folder of an earlier run, whose model and weights are taken.")
    ] = None,
    architecture: Annotated[str | None, typer.Option(help="rmt, or armt for tasks of tokens. Default: rmt.")] = None,
    memory: Annotated[int | None, typer.Option(help="Memory tokens. Default: 10.")] = None,
    d_mem: Annotated[int | None, typer.Option(help="Of armt: width of keys. Default: 64.")] = None,
    segment_len: Annotated[int | None, typer.Option(help="Tokens per segment. Default: 499.")] = None,
    short: Annotated[
        str | None, typer.Option(help="Tokens of stages before a whole segment, or none. Default: 64,128.")
    ] = None,
    short_segments: Annotated[
        str | None,
        typer.Option(help="Then, stages of so many segments as short as the last of --short. Default: none."),
    ] = None,
    segments: Annotated[
        str | None, typer.Option(help="How far the curriculum goes, as 5, or its stages, as 1,2,5 or 5,. Default: 5.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Per stage, at most. Default: 1500.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Accuracy that ends a stage. Default: 0.99.")] = None,
    anneal: Annotated[
        int | None, typer.Option(help="Steps after the last stage while the rate falls to nothing. Default: 0.")
    ] = None,
    vary: Annotated[
        bool | None,
        typer.Option("--vary/--no-vary", help="Every other batch is shorter. Default: so.", show_default=False),
    ] = None,
    batch: Annotated[int | None, typer.Option(help="Samples per step. Default: 32.")] = None,
    later_batch: Annotated[int | None, typer.Option(help="Of stages of several segments. Default: --batch.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate. Default: 1e-3.")] = None,
    later_lr: Annotated[float | None, typer.Option(help="Of stages of several segments. Default: 0.4 of --lr.")] = None,
    beta2: Annotated[float | None, typer.Option(help="Of AdamW. Default: 0.999.")] = None,
    noise: Annotated[float | None, typer.Option(help="On the memory in training, relative. Default: 0.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of all parameters. Default: 1e-3.")] = None,
    warm_up: Annotated[int | None, typer.Option(help="Steps over which the rate rises. Default: 50.")] = None,
    bptt: Annotated[int | None, typer.Option(help="Segments that gradients reach back. Default: all.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of weights, dropout and samples. Default: 0.")] = None,
    test_samples: Annotated[int | None, typer.Option(help="After each stage. Default: 200.")] = None,
    device: Device = None,
    out: Annotated[Path, typer.Option(help="Folder for everything that is written.")] = FOLDER,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the output folder.")] = False,
) -> None:
    """Train a small model with a memory by curriculum: on one segment first, on more once those are learnt.

    Ctrl-C leaves a checkpoint, from which --resume goes on to what the run would have come to.
    """
    given = {name: value for name, value in locals().items() if value is not None and name not in ("out", "resume")}
    given |= {name: str(path.resolve()) for name, path in given.items() if isinstance(path, Path)}
    with _Command("train", out, "checkpoint.pt") as command:
        from ..rmt.runs.folder import settings_of
        from ..rmt.runs.settings import OF_MODEL, OF_TASK, TrainSettings, up_to
        from ..rmt.runs.training import run_training, saved_settings
        from ..runs.checkpoint import SettingError

        if resume:
            given = saved_settings(out) | given
        elif start is not None:
            earlier = settings_of(start, "start")
            given = {name: earlier[name] for name in (*OF_MODEL, *OF_TASK)} | given
        if "task" not in given:
            raise SettingError("task", "must be given, such as detect; --resume goes on with an earlier run's")
        if not command.console.is_terminal:
            from transformers.utils.logging import disable_progress_bar

            disable_progress_bar()
        if segments is not None:
            stages = _numbers("segments", segments.removesuffix(","))
            every = len(stages) == 1 and not segments.endswith(",")
            given["segments"] = up_to(stages[0], given["task"]) if every else stages
        if short is not None:
            given["short"] = () if short == "none" else _numbers("short", short)
        if short_segments is not None:
            given["short_segments"] = () if short_segments == "none" else _numbers("short-segments", short_segments)
        settings = TrainSettings(**given)
        with Stages(command.console) if command.console.is_terminal else StageLines(command.console) as listener:
            figures = run_training(settings, out, listener, resume=resume)
        command.show(stage_table(figures))


@app.command()
def evaluate(
    folder: Folder,
    segments: Annotated[str, typer.Option(help="Lengths in segments, with commas.")] = "2,8,64,512,4096",
    samples: Annotated[
        str | None,
        typer.Option(help="Of each length: one number, or one for each. Default: 200; 100 at 512, 50 at 4096."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Samples read at once: one number, or one for each length.")] = "25",
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    babi: Babi = None,
    book: Book = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for what is written. Default: the run's.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what is measured, and measure the rest.")] = False,
) -> None:
    """Accuracy of a trained run against length, on facts and text that it was not trained on.

    Ctrl-C leaves the batches that are done.
    """
    with _Command("evaluate", folder if out is None else out, "evaluation.json") as command:
        from ..rmt.runs.evaluation import Grid, run_evaluation, usual_samples

        lengths = _numbers("segments", segments)
        number = tuple(map(usual_samples, lengths)) if samples is None else _numbers("samples", samples)
        grid = Grid(lengths, number, _numbers("batch", batch), seed)
        with Lengths(command.console) if command.console.is_terminal else LengthLines(command.console) as listener:
            figures = run_evaluation(
                folder, grid, listener, out=out, babi=_path(babi), book=_path(book), device=device, resume=resume
            )
        command.show(length_table(figures), held(figures))


@app.command()
def attention(
    folder: Folder,
    segments: Annotated[int, typer.Option(help="Of the text that is read.")] = 3,
    sample: Annotated[
        int | None, typer.Option(help="Which of the test's, from 0 on. Default: one with an early fact.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    babi: Babi = None,
    book: Book = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for what is written. Default: the run's.")] = None,
) -> None:
    """Attention maps of the segment that holds the first fact, and of the last one, where the question is."""
    with _Command("attention", folder if out is None else out) as command:
        from ..rmt.runs.attention_maps import Sample, run_attention

        chosen = Sample(segments, sample, seed)
        figures = run_attention(folder, chosen, out=out, babi=_path(babi), book=_path(book), device=device)
        command.show(*attention_tables(figures))


def _path(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _numbers(name: str, given: str) -> tuple[int, ...]:
    from ..runs.checkpoint import SettingError

    parts = [part.strip() for part in given.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise SettingError(name, f"must be numbers from 1 on with commas, as 2,8,64, got {given!r}")
    return tuple(map(int, parts))


class _Command:
    """One command: what it prints, and what becomes of its errors.

    resumed: the file in `out` that it goes on from with --resume, where it has that.
    """

    def __init__(self, name: str, out: Path, resumed: str | None = None) -> None:
        self.name, self.out, self.resumed = name, out, resumed
        self.console = Console(soft_wrap=True, highlight=False)
        self.errors = Console(stderr=True, soft_wrap=True, highlight=False)

    def show(self, *shown: Any) -> None:
        """Tables, and where the files are."""
        for table in shown:
            self.console.print(table)
        self.console.print(f"written to {self.out}", markup=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from torch import OutOfMemoryError

        from ..runs.checkpoint import InterruptedRunError, SettingError

        if isinstance(error, SettingError):
            option = error.name.upper() if error.name in ("task", "folder") else f"--{error.name.replace('_', '-')}"
            self._stop(f"{option} {error.problem}", 2)
        if isinstance(error, ImportError) and error.name in ("transformers", "safetensors"):
            self._stop(f"needs {error.name}: pip install 'segattn[hf]'", 1)
        if isinstance(error, OutOfMemoryError):
            self._stop("out of memory: try a smaller --batch", 1)
        if isinstance(error, InterruptedRunError):
            self._stop(f"stopped, checkpoint written{self._again()}", 130)
        if isinstance(error, KeyboardInterrupt):
            self._stop(f"stopped{self._again()}", 130)

    def _again(self) -> str:
        """How to go on, where there is something to go on from."""
        if self.resumed is None:
            return ""
        if not (self.out / self.resumed).is_file():
            return "; there is nothing to go on from yet"
        if self.name == "train":
            return f"; go on with: segattn rmt train --resume --out {shlex.quote(str(self.out))}"
        return "; go on with the same command and --resume"

    def _stop(self, message: str, status: int) -> None:
        self.errors.print(f"segattn rmt {self.name}: {message}", markup=False)
        raise typer.Exit(status) from None
