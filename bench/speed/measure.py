"""What every measurement on a device needs: to wait for it, and the memory that a function takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ...kernels.state import MemoryState


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """Return the most bytes of tensors allocated at once while `run` runs, beyond what was held before."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    result = profiler.profiler.kineto_results if profiler.profiler is not None else None
    events = [e for e in result.events() if e.name() == "[memory]"] if result is not None else []
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def tensors_in(state: Any) -> Iterator[Tensor]:
    """Yield the tensors of a state, or of transformers' cache of keys and values."""
    if isinstance(state, Tensor):
        yield state
    elif isinstance(state, (tuple, MemoryState)):
        for part in state:
            yield from tensors_in(part)
    elif hasattr(state, "layers"):
        for layer in state.layers:
            yield from (layer.keys, layer.values)


def kept_bytes(state: Any) -> int:
    """Return the bytes of the numbers in a state or a cache."""
    return sum(x.nbytes for x in tensors_in(state))
