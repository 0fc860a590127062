"""Times and memory of one function on one device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .providers import Provider
from .workloads import Inputs

DIRECTIONS = ("forward", "forward + backward")


def step(provider: Provider, inputs: Inputs, segment_len: int, direction: str) -> Callable[[], None]:
    """The function to measure: forward without gradients, or forward and the gradient of every input used.

    inputs: q, k, v and gate, in this order.
    """
    device = inputs.q.device
    used = inputs if provider.update else inputs[:3]
    dout = torch.ones_like(inputs.v)

    def forward() -> None:
        with torch.no_grad():
            provider.run(inputs, segment_len)
        synchronize(device)

    def both() -> None:
        torch.autograd.grad(provider.run(inputs, segment_len), used, dout)
        synchronize(device)

    return forward if direction == "forward" else both


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(run: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors allocated at once while `run` runs, beyond what was held before."""
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
