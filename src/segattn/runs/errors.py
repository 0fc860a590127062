"""The error of a setting, by which a command names the option that its user can mend, and checks that raise it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


class SettingError(ValueError):
    """A setting that cannot be: its name, what it must be, and what it was."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


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


def check_least(settings: object, least: Mapping[str, int]) -> None:
    """Check that no setting is below its least value, where it has one; and that a seed is below 2**32.

    Args:
        least: setting → least value. A setting that is None has no value.

    Raises:
        SettingError: naming the setting.
    """
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise SettingError(name, f"must be at least {low}, got {value}")
        if name == "seed" and value >= 2**32:
            raise SettingError(name, f"must be below 2**32, got {value}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def absolute(path: str | None) -> str | None:
    """Return the absolute path, which stays right when a run is resumed from another folder."""
    return None if path is None else str(Path(path).resolve())
