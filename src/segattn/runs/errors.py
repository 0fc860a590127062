"""The error of a setting, by which a command names the option that its user can mend, and a warning of texts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class SettingError(ValueError):
    """A setting that cannot be: its name, what it must be, and what it was."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


class UntrainedMemoryWarning(UserWarning):
    """A warning that texts are too short to read the memory, which is then not trained."""


@contextmanager
def named(**options: str) -> Iterator[None]:
    """Turn a `ValueError` that begins with an argument's name into a `SettingError` of the option: argument=option."""
    try:
        yield
    except SettingError:
        raise
    except ValueError as error:
        name, _, problem = str(error).partition(" ")
        if name not in options:
            raise
        raise SettingError(options[name], problem) from None


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
