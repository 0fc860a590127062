"""The device that a run is asked to use."""

from __future__ import annotations

import torch

from .checkpoint import SettingError


def usable_device(device: str | None) -> str:
    """Return the device, by default a GPU where one is, once a tensor has been made on it.

    Raises:
        SettingError: of `device`: PyTorch cannot use it here.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            "device", f"must be one that PyTorch can use here, such as 'cpu', got {device!r} ({reason})"
        ) from None
    return device
