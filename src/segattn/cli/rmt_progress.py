"""What `segattn rmt` shows: progress while it works, tables of what came out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .progress import Bars, Lines

if TYPE_CHECKING:
    from ..rmt.runs.curriculum import Stage, Step


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
            _cut(stage["segments"], stage["segment_len"]) + " annealed" * stage["annealed"],
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
        heads = len(part["share"][0])
        space = int(heads <= 8)
        # as wide as it must be, 80 characters up to 12 heads: numbers that do not fit would be cut
        table = Table(
            title=f"segment {part['segment']}: {part['what']}, %",
            title_justify="left",
            padding=(0, space),
            width=(heads + 1) * (6 + 2 * space) + 1,
        )
        table.add_column("layer", justify="right", width=5)
        for head in range(heads):
            table.add_column(f"head\n{head + 1}", justify="right", width=5)
        for layer, shares in enumerate(part["share"]):
            table.add_row(str(layer + 1), *(f"{100 * share:.1f}" for share in shares))
        table.caption = f"evenly spread it were {100 * part['even']:.1f} %"
        tables.append(table)
    return tables


class Stages(Bars):
    """A bar for each stage of the curriculum, on a terminal."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        super().__init__(console, *columns, TextColumn("{task.fields[note]}"))
        self.bars: dict[str, TaskID] = {}

    def trained(self, stage: Stage, done: int, step: Step) -> None:
        bar = self._bar(_of_stage(stage))
        self.progress.update(bar, total=stage.steps, completed=done)
        if step.length == stage.length:
            self.progress.update(bar, note=f"loss {step.loss:.3f}  right {100 * step.running:.1f} %")

    def finished(self, figures: dict[str, Any]) -> None:
        # a run that was killed in a stage's test goes on with the test, before any step
        name, steps = _of_figures(figures), figures["steps"]
        note = f"test {100 * figures['test_accuracy']:.1f} %"
        self.progress.update(self._bar(name), total=steps, completed=steps, note=note)
        # another stage may have the same name
        del self.bars[name]

    def _bar(self, name: str) -> TaskID:
        """The bar of a stage, made when it is first asked for."""
        if name not in self.bars:
            self.bars[name] = self.progress.add_task(name, total=None, note="")
        return self.bars[name]


class StageLines(Lines):
    """A line every 50 steps, for a file or a pipe."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self.loss: float | None = None

    def trained(self, stage: Stage, done: int, step: Step) -> None:
        # as the accuracy beside it, of the stage's own length
        if step.length == stage.length or self.loss is None:
            self.loss = step.loss
        if done % 50 == 0:
            right = f"{100 * step.running:.1f} % right"
            self.console.print(f"{_of_stage(stage)}, step {done}: loss {self.loss:.4f}, {right}")

    def finished(self, figures: dict[str, Any]) -> None:
        self.console.print(
            f"{_of_figures(figures)} done after {figures['steps']} steps, {figures['seconds']:.0f} s: "
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


def _of_stage(stage: Stage) -> str:
    return _name(stage.segments, stage.length, stage.segment_len, stage.annealed)


def _of_figures(stage: dict[str, Any]) -> str:
    return _name(stage["segments"], stage["tokens"], stage["segment_len"], stage["annealed"])


def _name(segments: int, tokens: int, segment_len: int, annealed: bool) -> str:
    """What a stage is called, while it is trained and when it is done."""
    text = tokens if segments == 1 else _cut(segments, segment_len)
    return f"{text} tokens" + " annealed" * annealed


def _cut(segments: int, segment_len: int) -> str:
    """Segments, and of how many tokens where there are several."""
    return "1" if segments == 1 else f"{segments} × {segment_len}"


def _count(segments: int) -> str:
    return f"{segments} segment{'s' * (segments > 1)}"
