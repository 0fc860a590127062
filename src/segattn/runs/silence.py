"""The listener of a run that is called from Python: nothing is shown."""

from __future__ import annotations

from typing import Any


class Silent:
    """A listener of any run that shows nothing."""

    def begin(self, *what: Any) -> None:
        """Take no note of what is to be read."""

    def read(self, *what: Any) -> None:
        """Take no note of what has been read."""

    def trained(self, *what: Any) -> None:
        """Take no note of a step."""

    def finished(self, *what: Any) -> None:
        """Take no note of a part that is done."""


SILENT = Silent()
