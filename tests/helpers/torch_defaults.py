"""PyTorch's default dtype and device, on which no result may depend."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def defaults(*, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Iterator[None]:
    """Make PyTorch's default dtype and device others, within the context."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
