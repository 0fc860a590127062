"""Which implementation runs a call."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable
from dataclasses import dataclass

import torch

from . import reference, torch_backend
from .autocast import without_autocast
from .state import SegmentOutput
from .validation import check_choice

BACKENDS: dict[str, Callable[..., SegmentOutput]] = {
    "torch": without_autocast(torch_backend.segment_attention),
    "reference": without_autocast(reference.segment_attention),
}


def resolve(backend: str | None, device: torch.device) -> str:
    """The backend's name; None takes the default of the device."""
    if backend is None:
        return "torch"
    check_choice("backend", backend, tuple(BACKENDS))
    return backend


@dataclass(frozen=True)
class Config:
    """What `show_config` found. Prints as a short table."""

    backend: str
    reason: str
    device: str
    versions: dict[str, str]

    def __str__(self) -> str:
        rows = {"backend": f"{self.backend} ({self.reason})", "device": self.device, **self.versions}
        return "\n".join(f"{name:10} {value}" for name, value in rows.items())

    __repr__ = __str__


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _default_device() -> tuple[torch.device, str]:
    if torch.cuda.is_available():
        return torch.device("cuda"), torch.cuda.get_device_name()
    if torch.backends.mps.is_available():
        return torch.device("mps"), "Apple GPU"
    return torch.device("cpu"), f"{platform.machine()}, {torch.get_num_threads()} threads"


def show_config(device: torch.device | str | None = None) -> Config:
    """Which backend a call on `device` (default: the best one here) would run, and why.

    The result prints as a table, and holds backend, reason, device and versions as fields.
    """
    if device is None:
        chosen, description = _default_device()
    else:
        chosen, description = torch.device(device), ""
    backend = resolve(None, chosen)
    return Config(
        backend=backend,
        reason=f"the default on {chosen.type}",
        device=f"{chosen} {description}".strip(),
        versions={name: _version(name) for name in ("segattn", "torch", "triton", "numpy")}
        | {"python": platform.python_version()},
    )
