"""Lists of names on a command line, separated by commas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def listed(names: Iterable[str]) -> str:
    """Return names as the command line takes them."""
    return ",".join(names)


def choices(name: str, given: str | None, default: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """Return a list from the command line, once its members are known.

    Args:
        name: of the option, without dashes.
        given: what was typed; None: `default`.

    Raises:
        ValueError: what is not known.
    """
    if given is None:
        return default
    chosen = given.split(",")
    for x in chosen:
        if x not in known:
            raise ValueError(f"--{name} must be from {listed(known)}, got {x}")
    return chosen


def kernels(given: str | None, known: Sequence[str]) -> Sequence[str]:
    """Return the kernels that a list names, whole, without `_kernel`, or by how their names begin.

    Raises:
        ValueError: a name that is none of theirs.
    """
    if given is None:
        return known
    chosen: list[str] = []
    for x in given.split(","):
        whole = [name for name in known if x in (name, name.removesuffix("_kernel"))]
        named = whole or [name for name in known if x and name.startswith(x)]
        if not named:
            raise ValueError(f"--kernels must be from {listed(known)}, got {x}")
        chosen += named
    return tuple(dict.fromkeys(chosen))
