"""The choice of the implementation that runs a call."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
from dataclasses import dataclass

import torch
from torch import Tensor

from .validation import check_choice

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from .triton.launch import is_redirected
    from .triton.tiles import INTERPRETED

# every name there is, here or elsewhere
NAMES = ("triton", "torch", "reference")


def takes_width(width: int) -> bool:
    """Return whether the kernels take K or V of this width."""
    return 16 <= width <= 256 and width % 8 == 0


def check_backend(backend: str | None) -> None:
    """Check that a backend of this name exists, here or elsewhere."""
    if backend is not None:
        check_choice("backend", backend, NAMES)


def default(device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[str, str]:
    """Return the backend of calls that name none, and why."""
    if not HAS_TRITON:
        return "torch", "triton is not installed"
    if device.type != "cuda":
        return "torch", f"the default on {device.type}"
    if dtype == torch.float64:
        return "torch", "the kernels do not compute in float64"
    return "triton", "the default on a GPU"


def resolve(backend: str | None, q: Tensor, v: Tensor) -> str:
    """Return the backend of a call with these tensors.

    Raises:
        ValueError: no such backend; one that does not run here, or not these tensors.
    """
    check_backend(backend)
    name = default(q.device, q.dtype)[0] if backend is None else backend
    if name == "triton":
        _check_triton(q, v)
    return name


def resolve_memory(backend: str | None, k: Tensor, v: Tensor) -> str:
    """Return the backend of the memory on its own: by default, torch for widths that the kernels do not take."""
    taken = takes_width(k.shape[3]) and takes_width(v.shape[3])
    if backend is None and default(k.device, k.dtype)[0] == "triton" and not taken:
        return "torch"
    return resolve(backend, k, v)


def _check_triton(q: Tensor, v: Tensor) -> None:
    remedy = "or pass backend='torch'"
    if not HAS_TRITON:
        raise ValueError(f"backend='triton' needs the triton package: pip install triton, {remedy}")
    if q.device.type != "cuda" and not (q.device.type == "cpu" and (INTERPRETED.value or is_redirected())):
        raise ValueError(
            f"backend='triton' needs tensors on a GPU, got {q.device}: move them, {remedy}; to try the kernels on a "
            "CPU, slowly, set TRITON_INTERPRET=1 before Python starts"
        )
    if q.dtype == torch.float64:
        raise ValueError(
            f"backend='triton' computes in bfloat16, float16 and float32, got {q.dtype}: convert, {remedy}"
        )
    for letter, width in (("K", q.shape[3]), ("V", v.shape[3])):
        if not takes_width(width):
            raise ValueError(
                f"backend='triton' needs {letter} in 16, 24, 32, ... 256 (multiples of 8), got {letter} = {width}: "
                f"pad, {remedy}"
            )


@dataclass(frozen=True)
class Config:
    """A backend, why it is chosen, and the versions beneath it. Prints as a short table."""

    backend: str
    reason: str
    device: str
    versions: dict[str, str]

    def __str__(self) -> str:
        rows = {"backend": f"{self.backend} ({self.reason})", "device": self.device, **self.versions}
        return "\n".join(f"{name:10} {value}" for name, value in rows.items())

    __repr__ = __str__


def _is_available(device: torch.device) -> bool:
    """Return whether this machine has devices of the type; True for types that PyTorch's core does not ask about."""
    if device.type == "cuda":
        return torch.cuda.is_available()
    return device.type != "mps" or torch.backends.mps.is_available()


def _device_of(device: torch.device | str) -> torch.device:
    """Return the device of that name.

    Raises:
        TypeError, ValueError: not a device, nor the name of one.
    """
    if not isinstance(device, (torch.device, str)):
        raise TypeError(f"device must be a torch.device, its name or None, got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device must be a torch.device or its name, such as 'cpu' or 'cuda', got {device!r}"
        ) from error


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
    """Return which backend a call on `device` (default: the best one here) would run, and why.

    The result prints as a table, and holds backend, reason, device and versions as fields. Where this machine has no
    such device, the reason says so, and the backend is that of a machine which has one.

    Raises:
        TypeError, ValueError: `device` is not a device, nor the name of one.
    """
    if device is None:
        chosen, description = _default_device()
    else:
        chosen, description = _device_of(device), ""
    backend, reason = default(chosen)
    if not _is_available(chosen):
        reason += f"; {chosen.type} is not available here"
    return Config(
        backend=backend,
        reason=reason,
        device=f"{chosen} {description}".strip(),
        versions={name: _version(name) for name in ("segattn", "torch", "triton", "numpy")}
        | {"python": platform.python_version()},
    )
