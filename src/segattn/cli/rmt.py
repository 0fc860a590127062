"""The command `segattn rmt`: train a memory task, measure it on longer texts, and show what its memory attends to."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..rmt.runs.settings import OF_MODEL, OF_TASK, TrainSettings, up_to
from ..runs.errors import SettingError
from .options import Out, Resume, ResumeMeasuring, help_of, options_of
from .progress import Progress, Reading
from .shell import Command, counts, print_files, quiet_transformers

if TYPE_CHECKING:
    from ..rmt.runs.curriculum import Stage, Step

app = typer.Typer(no_args_is_help=True, help="Recurrent memory: train a memory task, extrapolate it, look into it.")

FOLDER = Path("segattn-rmt")
Folder = Annotated[Path, typer.Argument(help="Folder of a run that segattn rmt train wrote.", show_default=False)]
Babi = Annotated[str | None, typer.Option(help="Folder of bAbI's files. Default: the run's.")]
Book = Annotated[str | None, typer.Option(help="File of running text, UTF-8. Default: the run's.")]
Device = Annotated[str | None, typer.Option(help="Where to run, such as cpu or cuda. Default: a GPU where one is.")]


@app.command()
@options_of(TrainSettings, arguments=("task",))
def train(
    task: Annotated[str | None, typer.Argument(help=help_of(TrainSettings, "task"), show_default=False)] = None,
    short: Annotated[str | None, typer.Option(help=help_of(TrainSettings, "short"))] = None,
    short_segments: Annotated[str | None, typer.Option(help=help_of(TrainSettings, "short_segments"))] = None,
    segments: Annotated[str | None, typer.Option(help=help_of(TrainSettings, "segments"))] = None,
    out: Out = FOLDER,
    resume: Resume = False,
    **given: Any,
) -> None:
    """Train a small model with a memory by curriculum: on one segment first, on more once those are learnt.

    Ctrl-C leaves a checkpoint, from which --resume goes on to what the run would have come to.
    """
    again = f"go on with: segattn rmt train --resume --out {shlex.quote(str(out))}"
    saved = (out / "checkpoint.pt").is_file
    with Command("rmt train", {"task": "TASK"}, again, saved, "a smaller --batch").run() as console:
        from ..rmt.runs.folder import RunFiles, settings_of
        from ..rmt.runs.training import run_training, saved_settings

        quiet_transformers()
        options = given if task is None else given | {"task": task}
        if resume:
            options = saved_settings(out) | options
        elif "start" in options:
            earlier = settings_of(Path(options["start"]), "start")
            options = {name: earlier[name] for name in (*OF_MODEL, *OF_TASK)} | options
        if "task" not in options:
            raise SettingError("task", "must be given, such as detect; --resume goes on with an earlier run's")
        if segments is not None:
            stages = counts("segments", segments.removesuffix(","), "2,8,64")
            every = len(stages) == 1 and not segments.endswith(",")
            options["segments"] = up_to(stages[0], options["task"]) if every else tuple(stages)
        for name, text in {"short": short, "short_segments": short_segments}.items():
            if text is not None:
                options[name] = () if text == "none" else tuple(counts(name, text, "64,128"))
        with Stages(console) as listener:
            figures = run_training(TrainSettings(**options), out, listener, resume=resume)
        console.print(stage_table(figures))
        if left := [stage for stage in figures["stages"] if not _is_learnt(stage)]:
            console.print(unlearnt_line(left, out), markup=False)
        files = RunFiles.of(out)
        print_files(console, {"figures": files.figures, "weights": files.weights})


@app.command()
def evaluate(
    folder: Folder,
    segments: Annotated[str, typer.Option(help="Lengths in segments, with commas.")] = "2,8,64,512,4096",
    samples: Annotated[
        str | None,
        typer.Option(help="Samples of each length: one number, or one for each. Default: 200; 100 at 512, 50 at 4096."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Samples read at once: one number, or one for each length.")] = "25",
    seed: Annotated[int, typer.Option(help="Seed of the random samples.")] = 0,
    babi: Babi = None,
    book: Book = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for what is written. Default: the run's.")] = None,
    resume: ResumeMeasuring = False,
) -> None:
    """Measure the accuracy of a trained run by length, on facts and text that it was not trained on.

    Ctrl-C leaves the batches that are measured.
    """
    written = folder if out is None else out
    again, saved = "go on with the same command and --resume", (written / "evaluation.json").is_file
    with Command("rmt evaluate", {"folder": "FOLDER"}, again, saved, "a smaller --batch").run() as console:
        from ..rmt.runs.evaluation import Grid, run_evaluation, usual_samples
        from ..rmt.runs.folder import RunFiles

        lengths = tuple(counts("segments", segments, "2,8,64"))
        number = tuple(map(usual_samples, lengths)) if samples is None else tuple(counts("samples", samples, "200"))
        grid = Grid(lengths, number, tuple(counts("batch", batch, "25")), seed)
        with Reading(console, "evaluate", describe_length) as listener:
            figures = run_evaluation(
                folder, grid, listener, out=out, device=device, resume=resume, babi=babi, book=book
            )
        console.print(length_table(figures))
        console.print(memory_line(figures))
        files = RunFiles.of(written)
        print_files(console, {"figures": files.evaluation, "picture": files.evaluation.with_suffix(".png")})


@app.command()
def attention(
    folder: Folder,
    segments: Annotated[int, typer.Option(help="Length of the text to read, in segments.")] = 3,
    sample: Annotated[
        int | None, typer.Option(help="Number of the sample, from 0 on. Default: one with an early fact.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random samples.")] = 0,
    babi: Babi = None,
    book: Book = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for what is written. Default: the run's.")] = None,
) -> None:
    """Show the attention maps of the segment with the first fact, and of the last one, where the question is."""
    written = folder if out is None else out
    with Command("rmt attention", {"folder": "FOLDER"}).run() as console:
        from ..rmt.runs.attention_maps import Sample, run_attention
        from ..rmt.runs.folder import RunFiles

        chosen = Sample(segments, sample, seed)
        figures = run_attention(folder, chosen, out=out, device=device, babi=babi, book=book)
        console.print(*attention_tables(figures), sep="\n")
        files = RunFiles.of(written)
        print_files(console, {"figures": files.attention, "picture": files.attention.with_suffix(".png")})


def stage_table(figures: dict[str, Any]) -> Table:
    """Return steps, time and accuracy by stage."""
    settings = figures["settings"]
    title = f"{settings['task']}, {figures['parameters']:,} parameters, right in %"
    table = Table(title=title, title_justify="left", caption_justify="left")
    if not all(map(_is_learnt, figures["stages"])):
        table.caption = f"* not converged: not {100 * settings['threshold']:g} % over 20 batches"
    for column in ("segments", "tokens", "steps", "seconds", "training", "test", "95 %"):
        table.add_column(column, justify="right")
    for stage in figures["stages"]:
        low, high = stage["test_interval"]
        table.add_row(
            _cut(stage["segments"], stage["segment_len"]) + " annealed" * stage["annealed"],
            f"{stage['tokens']:,}",
            f"{stage['steps']:,}",
            f"{stage['seconds']:.0f}",
            f"{100 * stage['training_accuracy']:.1f}" + "*" * (not _is_learnt(stage)),
            f"{100 * stage['test_accuracy']:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
        )
    return table


def unlearnt_line(stages: list[dict[str, Any]], out: Path) -> str:
    """Say which stages did not converge, and how to go on from the weights in the run's folder."""
    names = ", ".join(_of_figures(stage) for stage in stages)
    again = f"segattn rmt train --start {shlex.quote(str(out))} --out ANOTHER --steps MORE"
    return f"not converged: {names}; go on from these weights with: {again}, and the other options of the curriculum"


def length_table(figures: dict[str, Any]) -> Table:
    """Return accuracy by length, beside the paper's."""
    trained = figures["trained_segments"]
    table = Table(title=f"{figures['task']}, trained on up to {trained} segments, right in %", title_justify="left")
    for column in ("segments", "tokens", "samples", "right", "95 %", "paper", "µs/token"):
        table.add_column(column, justify="right")
    for cell in figures["lengths"]:
        low, high = cell["interval"]
        paper = figures["published"].get(str(cell["segments"]))
        table.add_row(
            f"{cell['segments']:,}",
            f"{cell['tokens']:,}",
            f"{cell['samples']:,}",
            f"{100 * cell['accuracy']:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
            "" if paper is None else f"{100 * paper:.1f}",
            f"{1e6 * cell['seconds_per_token']:.2f}",
        )
    return table


def memory_line(figures: dict[str, Any]) -> str:
    """Say how many bytes a text takes besides its tokens."""
    states = sorted({cell["state_bytes"] for cell in figures["lengths"]})
    peaks = sorted(cell["peak_bytes"] / 2**20 for cell in figures["lengths"] if cell["peak_bytes"] is not None)
    state = f"state of a text: {' to '.join(f'{size:,}' for size in dict.fromkeys([states[0], states[-1]]))} bytes"
    return state + (f"; most memory held: {peaks[0]:,.0f} to {peaks[-1]:,.0f} MiB" if peaks else "")


def attention_tables(figures: dict[str, Any]) -> list[Table]:
    """Return the attention of memory rows to facts, and of the answering row to memory, by layer and head."""
    tables = []
    for part in figures["parts"]:
        heads = len(part["share"][0])
        space = int(heads <= 8)
        # up to 12 heads fit into 80 characters; wider tables than the terminal would have numbers cut
        table = Table(
            title=f"segment {part['segment']}: {part['what']}, %",
            title_justify="left",
            padding=(0, space),
            width=(heads + 1) * (6 + 2 * space) + 1,
        )
        table.add_column("layer", justify="right", width=5)
        for head in range(heads):
            table.add_column(f"head\n{head}", justify="right", width=5)
        for layer, shares in enumerate(part["share"]):
            table.add_row(str(layer), *(f"{100 * share:.1f}" for share in shares))
        table.caption = f"spread evenly, it would be {100 * part['even']:.1f} %"
        tables.append(table)
    return tables


class Stages(Progress):
    """The stages of a training: a bar for each on a terminal, a line every 50 steps elsewhere."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.loss: float | None = None

    def trained(self, stage: Stage, done: int, step: Step) -> None:
        """Show a step; its loss and accuracy are those of batches as long as the stage."""
        name, right = _of_stage(stage), f"{100 * step.running:.1f} %"
        note = None
        if step.length == stage.length or self.loss is None:
            self.loss = step.loss
        if step.length == stage.length:
            note = f"loss {step.loss:.3f}  right {right}"
        self.bar(name, done, stage.steps, note)
        if done % 50 == 0:
            self.line(f"{name}, step {done}: loss {self.loss:.4f}, {right} right")

    def finished(self, figures: dict[str, Any]) -> None:
        """Show the test of a stage, and if it did not converge; a run killed in the test has no step before it."""
        name, steps, test = _of_figures(figures), figures["steps"], f"test {100 * figures['test_accuracy']:.1f} %"
        if not _is_learnt(figures):
            test += f", {_shortfall(figures)}"
        self.bar(name, steps, steps, test)
        # another stage may have the same name
        self.close(name)
        self.line(f"{name} done after {steps} steps, {figures['seconds']:.0f} s: {test}")


def describe_length(figures: dict[str, Any]) -> str:
    """Say what is measured at a length."""
    segments = figures["segments"]
    return f"{segments} segment{'s' * (segments > 1)}: {100 * figures['accuracy']:.1f} % right"


def _is_learnt(stage: dict[str, Any]) -> bool:
    """Say whether a stage reached its threshold; one that is annealed has none."""
    return bool(stage["annealed"] or stage["converged"])


def _shortfall(stage: dict[str, Any]) -> str:
    accuracy, threshold = stage["training_accuracy"], stage["threshold"]
    if accuracy >= threshold:
        return "not converged (too few steps to tell)"
    return f"not converged (training {100 * accuracy:.1f} % < {100 * threshold:g} %)"


def _of_stage(stage: Stage) -> str:
    return _name(stage.segments, stage.length, stage.segment_len, stage.annealed)


def _of_figures(stage: dict[str, Any]) -> str:
    return _name(stage["segments"], stage["tokens"], stage["segment_len"], stage["annealed"])


def _name(segments: int, tokens: int, segment_len: int, annealed: bool) -> str:
    """Name a stage, the same while it is trained and when it is done."""
    text = tokens if segments == 1 else _cut(segments, segment_len)
    return f"{text} tokens" + " annealed" * annealed


def _cut(segments: int, segment_len: int) -> str:
    """Write the number of segments, and where there are several, times their tokens."""
    return "1" if segments == 1 else f"{segments} × {segment_len}"
