"""What one call does on a device: how many kernels it starts, which, and how long each takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile

from ...kernels.check.check import interpreted
from .measure import synchronize

if TYPE_CHECKING:
    # which needs Triton
    from ...kernels.triton.launch import Launch


def kernel_times(run: Callable[[], object], device: torch.device) -> list[dict[str, Any]]:
    """Return the kernels of one call on a GPU, PyTorch's operations on a CPU, the slowest first."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        run()
        synchronize(device)
    found = []
    for event in profiler.key_averages():
        # a GPU's events stand beside those of the CPU that started them
        if (event.device_type.name != "CPU") == on_gpu:
            spent = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            found.append({"name": str(event.key)[:100], "count": int(event.count), "ms": round(spent / 1e3, 5)})
    return sorted(found, key=lambda x: -x["ms"])


def recorded(run: Callable[[], object], device: torch.device) -> list[Launch]:
    """Return our kernels' launches in the order that one call would start them; nothing runs."""
    from ...kernels.triton.launch import recording, target_of

    # a GPU's backward would run in another thread, which does not see what is set in this one
    with torch.autograd.set_multithreading_enabled(False), recording(target_of(device)) as listed:
        run()
    return listed


def launches(run: Callable[[], object], device: torch.device) -> int | None:
    """Return how many kernels one call starts; on a CPU those of ours alone, None where there are none."""
    if device.type == "cuda":
        moves = ("Memcpy", "Memset")
        return sum(x["count"] for x in kernel_times(run, device) if not x["name"].startswith(moves))
    return len(recorded(run, device)) or None if interpreted() else None


def profile_of(run: Callable[[], object], device: torch.device, ours: bool) -> dict[str, Any]:
    """Return where the time of a call goes; for ours also how often each of our kernels is started, and its tile."""
    run()
    kernels = kernel_times(run, device)
    total = sum(x["ms"] for x in kernels)
    record: dict[str, Any] = {"total_ms": round(total, 5), "kernels": kernels[:20]}
    for kernel in record["kernels"]:
        kernel["share"] = round(kernel["ms"] / total, 4) if total else None
    if ours:
        listed = recorded(run, device)
        counts = Counter(x.kernel.__name__ for x in listed)
        record["tiles"] = {x.kernel.__name__: {"launches": counts[x.kernel.__name__], **asdict(x.tile)} for x in listed}
    return record
