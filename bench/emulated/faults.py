"""Errors of executed PTX."""

from __future__ import annotations


class LocatedError(Exception):
    """Error that may name a kernel, a line of its PTX, and the line that `.loc` says it is from."""

    kernel, line, source = "", 0, ""

    def __str__(self) -> str:
        where = f"{self.kernel}, line {self.line} of its PTX ({self.source}): " if self.kernel else ""
        return where + ": ".join(str(arg) for arg in self.args)


class Unsupported(LocatedError, NotImplementedError):  # noqa: N818
    """Error of PTX, or of a launch, that the executor does not know."""


class Fault(LocatedError, RuntimeError):  # noqa: N818
    """Error of running code: what a GPU would trap, what compute-sanitizer would report, or what nothing would notice.

    kind: the check that fired, such as "bounds" or "race".
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
