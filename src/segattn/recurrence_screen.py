"""What `segattn rmt` shows: progress while it works, tables of what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .screen import Bars, Lines

if TYPE_CHECKING:
    from .rmt.curriculum import Stage, Step


def stage_table(figures: dict[str, Any]) -> Table:
    """Steps, time and accuracy by stage."""
    table = Table(
        title=f"{figures['settings']['task']}, {figures['parameters']:,} parameters, right in %", title_justify="left"
    )
    for column in ("segments", "tokens", "steps", "seconds", "training", "test", "95 %"):
        table.add_column(column, justify="right")
    for stage in figures["stages"]:
        low, high = stage["test_interval"]
        table.add_row(
            f"{stage['segments']}{' annealed' * stage['annealed']}",
            f"{stage['tokens']:,}",
            f"{stage['steps']:,}",
            f"{stage['seconds']:.0f}",
            f"{100 * stage['training_accuracy']:.1f}",
            f"{100 * stage['test_accuracy']:.1f}",
            f"{100 * low:.1f}–{100 * high:.1f}",
        )
    return table


def length_table(figures: dict[str, Any]) -> Table:
    """Accuracy by length, beside the paper's."""
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


def held(figures: dict[str, Any]) -> str:
    """What a text takes besides its tokens."""
    states = sorted({cell["state_bytes"] for cell in figures["lengths"]})
    peaks = sorted(cell["peak_bytes"] / 2**20 for cell in figures["lengths"] if cell["peak_bytes"] is not None)
    state = f"state of a text: {' to '.join(f'{size:,}' for size in dict.fromkeys([states[0], states[-1]]))} bytes"
    return state + (f"; most memory held: {peaks[0]:,.0f} to {peaks[-1]:,.0f} MiB" if peaks else "")


def attention_tables(figures: dict[str, Any]) -> list[Table]:
    """What memory rows take from facts, and the answering row from memory, by layer and head."""
    tables = []
    for part in figures["parts"]:
        table = Table(title=f"segment {part['segment']}: {part['what']}, %", title_justify="left")
        table.add_column("layer", justify="right")
        for head in range(len(part["share"][0])):
            table.add_column(f"head {head + 1}", justify="right")
        for layer, heads in enumerate(part["share"]):
            table.add_row(str(layer + 1), *(f"{100 * share:.1f}" for share in heads))
        table.caption = f"evenly spread it were {100 * part['even']:.1f} %"
        tables.append(table)
    return tables


class Stages(Bars):
    """A bar for each stage of the curriculum, on a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(console, *columns, TextColumn("{task.fields[note]}"))
        self.bars: dict[Stage, Any] = {}

    def trained(self, stage: Stage, done: int, step: Step) -> None:
        if stage not in self.bars:
            self.bars[stage] = self.progress.add_task(_name(stage), total=stage.steps, note="")
        note = f"loss {step.loss:.3f}  right {100 * step.running:.1f} %"
        self.progress.update(self.bars[stage], completed=done, note=note)

    def finished(self, figures: dict[str, Any]) -> None:
        bar = self.progress.tasks[-1].id
        self.progress.update(
            bar, total=figures["steps"], completed=figures["steps"], note=f"test {100 * figures['test_accuracy']:.1f} %"
        )


class StageLines(Lines):
    """A line every 50 steps, for a file or a pipe."""

    def trained(self, stage: Stage, done: int, step: Step) -> None:
        if done % 50 == 0:
            right = f"{100 * step.running:.1f} % right"
            self.console.print(f"{_name(stage)}, step {done}: loss {step.loss:.4f}, {right}")

    def finished(self, figures: dict[str, Any]) -> None:
        self.console.print(
            f"{figures['tokens']} tokens done after {figures['steps']} steps, {figures['seconds']:.0f} s: "
            f"test {100 * figures['test_accuracy']:.1f} %"
        )


class Lengths(Bars):
    """Tokens read of those to read, on a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("evaluate"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        super().__init__(console, *columns, TextColumn("{task.fields[note]}"))
        self.bar = self.progress.add_task("evaluate", total=None, note="")

    def begin(self, tokens: int) -> None:
        self.progress.update(self.bar, total=tokens)

    def read(self, tokens: int) -> None:
        self.progress.advance(self.bar, tokens)

    def finished(self, figures: dict[str, Any]) -> None:
        self.progress.update(self.bar, note=_measured(figures))


class LengthLines(Lines):
    """A line for every length, for a file or a pipe."""

    def begin(self, tokens: int) -> None:
        return None

    def read(self, tokens: int) -> None:
        return None

    def finished(self, figures: dict[str, Any]) -> None:
        self.console.print(_measured(figures))


def _measured(figures: dict[str, Any]) -> str:
    return f"{_count(figures['segments'])}: {100 * figures['accuracy']:.1f} % right"


def _name(stage: Stage) -> str:
    length = _count(stage.segments) if stage.segments > 1 else f"{stage.length} tokens"
    return length + " annealed" * stage.annealed


def _count(segments: int) -> str:
    return f"{segments} segment{'s' * (segments > 1)}"
