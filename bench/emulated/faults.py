"""Errors of executed PTX."""

from __future__ import annotations


class Unsupported(NotImplementedError):  # noqa: N818
    """Error of PTX, or of a launch, that the executor does not know: raised before anything runs."""


class Fault(RuntimeError):  # noqa: N818
    """Error of running code: what a GPU would trap, what compute-sanitizer would report, or what nothing would notice.

    kind: the check that fired, such as "bounds" or "race".
    kernel, line, source: where, once the machine knows it: the line of the PTX, and what `.loc` says it is from.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason
        self.kernel, self.line, self.source = "", 0, ""

    def __str__(self) -> str:
        where = f"{self.kernel}, line {self.line} of its PTX ({self.source}): " if self.kernel else ""
        return f"{where}{self.kind}: {self.reason}"
