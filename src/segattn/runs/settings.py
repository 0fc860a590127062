"""What the settings of all runs are held to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from .errors import SettingError


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


def check_same(
    settings: Mapping[str, Any], saved: Mapping[str, Any], free: Collection[str], whose: str = "the checkpoint's"
) -> None:
    """Check that the settings of a run are those that it was begun with.

    Args:
        settings, saved: setting → value, now and at the beginning.
        free: settings that may change.
        whose: the saved settings are, for messages.

    Raises:
        SettingError: naming the first setting that is another.
    """
    for name, value in settings.items():
        before = saved.get(name)
        if name not in free and before != value:
            option = name.removesuffix("_sha256")
            raise SettingError(option, f"must be {whose} with --resume, {before!r}, got {value!r}")


def absolute(name: str | None) -> str | None:
    """Return the absolute path of what exists, which stays right in another folder, and other names as they are."""
    return name if name is None or not Path(name).exists() else str(Path(name).resolve())
