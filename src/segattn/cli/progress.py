"""How far a command has come: bars on a terminal, a few plain lines in a file or a pipe."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich import progress as rich_progress
from rich.console import Console

if TYPE_CHECKING:
    from typing_extensions import Self


class Progress:
    """A bar for each part of the work where somebody watches, and lines elsewhere.

    A command derives its run's listener from it, whose methods call both `bar` and `line`.

    Args:
        idle: what to say of a run that ends without a bar, as one does that is resumed although it is complete.
    """

    def __init__(self, console: Console, idle: str = "already done: nothing is left to do") -> None:
        self.console, self.idle = console, idle
        self.bars = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False),
            rich_progress.BarColumn(),
            rich_progress.MofNCompleteColumn(),
            rich_progress.TimeRemainingColumn(),
            rich_progress.TextColumn("{task.fields[note]}", markup=False),
            console=console,
            disable=not console.is_terminal,
        )
        self._open: dict[str, rich_progress.TaskID] = {}

    def __enter__(self) -> Self:
        self.bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bars.stop()
        if error is None and not self.bars.tasks:
            self.console.print(self.idle, markup=False)

    def bar(self, name: str, done: int, total: int | None, note: str | None = None) -> None:
        """Move the bar of that name, which its first call begins; a note that is None stays what it was."""
        if name not in self._open:
            self._open[name] = self.bars.add_task(name, total=total, note="")
        fields: dict[str, Any] = {} if note is None else {"note": note}
        self.bars.update(self._open[name], completed=done, total=total, **fields)

    def close(self, name: str) -> None:
        """Leave a bar as it is: the next of the same name is another."""
        del self._open[name]

    def line(self, text: str) -> None:
        """Print a line where there are no bars."""
        if not self.console.is_terminal:
            self.console.print(text, markup=False)


class Reading(Progress):
    """Tokens that an evaluation has read, of all that it is to read, and what it has measured.

    Args:
        name: of the bar.
        describe: what to say of a part that is measured; by default the listener is given words.
    """

    def __init__(self, console: Console, name: str, describe: Callable[[Any], str] = str) -> None:
        super().__init__(console)
        self.name, self.describe = name, describe
        self.done, self.total = 0, 0

    def begin(self, tokens: int) -> None:
        """Set the number of tokens that are to be read."""
        self.total = tokens
        if tokens:
            self.bar(self.name, 0, tokens)

    def read(self, tokens: int) -> None:
        """Count tokens that have been read."""
        self.done += tokens
        self.bar(self.name, self.done, self.total)

    def finished(self, measured: Any) -> None:
        """Show a part that is measured, or what is known before any is."""
        note = self.describe(measured)
        if self.total:
            self.bar(self.name, self.done, self.total, note)
            self.line(note)
        else:
            # there is no bar yet to say it
            self.console.print(note, markup=False)


def is_due(step: int, steps: int, lines: int) -> bool:
    """Say whether a step is one of about so many, evenly spread, that a line is printed for; the last one is."""
    return step % max(1, steps // lines) == 0 or step == steps
