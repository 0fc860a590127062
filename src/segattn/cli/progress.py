"""Where the commands show their progress: bars on a terminal, lines in a file or a pipe."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, ProgressColumn

if TYPE_CHECKING:
    from typing_extensions import Self


class Bars:
    """Progress bars that are on the screen while the block runs."""

    def __init__(self, console: Console, *columns: ProgressColumn) -> None:
        self.progress = Progress(*columns, console=console)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.progress.stop()


class Lines:
    """A console to print to while the block runs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None
