"""What the settings of all runs are held to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from .errors import SettingError

_KINDS: Mapping[type, str] = {Integral: "integers", Real: "numbers", str: "strings"}


def check_least(settings: object, least: Mapping[str, int]) -> None:
    """Check that no setting is below its least value, where it has one; and that a seed is below 2**32.

    Args:
        least: setting → least value. A setting that is None has no value.

    Raises:
        SettingError: naming the setting.
    """
    for name, low in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if not is_number:
            raise SettingError(name, f"must be a number, got {value!r}")
        if value < low:
            raise SettingError(name, f"must be at least {low}, got {value}")
        if name == "seed" and value >= 2**32:
            raise SettingError(name, f"must be below 2**32, got {value}")


def check_several(settings: object, kinds: Mapping[str, type]) -> None:
    """Check that settings are tuples or lists of one kind, with at least one entry.

    Args:
        kinds: setting → Integral, Real or str.

    Raises:
        SettingError: naming the setting.
    """
    for name, kind in kinds.items():
        values = getattr(settings, name)
        if not isinstance(values, (tuple, list)) or not all(isinstance(value, kind) for value in values):
            raise SettingError(name, f"must be a tuple of {_KINDS[kind]}, got {values!r}")
        if not values:
            raise SettingError(name, "must name at least one, got none")


def check_same(
    settings: Mapping[str, Any], saved: Mapping[str, Any], free: Collection[str], whose: str = "the checkpoint's"
) -> None:
    """Check that the settings of a run are those that it was begun with.

    Args:
        settings, saved: setting → value, now and at the beginning; of `text_sha256` and its like the setting is `text`.
        free: settings that may change.
        whose: the saved settings are, for messages.

    Raises:
        SettingError: naming the first setting that is another.
    """
    for name, value in settings.items():
        before = saved.get(name)
        if name in free or before == value:
            continue
        option = name.removesuffix("_sha256")
        if option != name:
            # hashes say nothing to the reader of a message
            file = settings.get(option)
            got = "another text" if file is None else f"{file!r}, which holds another text"
            raise SettingError(option, f"must be the earlier run's with --resume, got {got}")
        raise SettingError(name, f"must be {whose} with --resume, {before!r}, got {value!r}")


def absolute(name: str | None) -> str | None:
    """Return the absolute path of what exists, which stays right in another folder, and other names as they are."""
    return name if name is None or not Path(name).exists() else str(Path(name).resolve())
