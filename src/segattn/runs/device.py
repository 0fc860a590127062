"""The device that a run is asked to use."""

from __future__ import annotations

from .errors import SettingError, first_line


def usable_device(device: str | None) -> str:
    """Return the device, by default a GPU where one is, once a tensor has been made on it.

    Raises:
        SettingError: of `device`: PyTorch cannot use it here.
    """
    # slow to import: settings, which import this, are read for the help of commands too
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        problem = f"must be one that PyTorch can use here, such as 'cpu', got {device!r} ({first_line(error)})"
        raise SettingError("device", problem) from None
    return device
