"""Random numbers of a caller's generator, for code that takes none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def drawn_from(generator: torch.Generator | None, device: torch.device) -> Iterator[None]:
    """Draw from `generator` whatever is drawn on `device` without one; None: from PyTorch's own.

    Raises:
        TypeError, ValueError: the generator is none, or one of another device.
    """
    if generator is None:
        yield
        return
    if not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if generator.device.type != device.type:
        raise ValueError(f"generator must be on input_ids' device {device}, got one on {generator.device}")
    numbers = torch if device.type == "cpu" else torch.get_device_module(device)
    # these two have one generator each
    where = () if device.type in ("cpu", "mps") else (device,)
    before = numbers.get_rng_state(*where)
    numbers.set_rng_state(generator.get_state(), *where)
    try:
        yield
        generator.set_state(numbers.get_rng_state(*where))
    finally:
        numbers.set_rng_state(before, *where)
