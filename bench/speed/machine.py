"""The conditions of a measurement: the device, its driver and limits, versions, the commit; never the host's name."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ...kernels.backends import show_config
from ..planner.floors import Peak, peak_of

ROOT = Path(__file__).resolve().parents[2]
QUERIES = (
    "driver_version",
    "power.limit",
    "power.max_limit",
    "clocks.max.sm",
    "clocks.max.mem",
    "clocks.sm",
    "clocks.mem",
    "temperature.gpu",
    "pstate",
    "mig.mode.current",
)


def output_of(*command: str) -> str | None:
    """Return what a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_limits() -> dict[str, str]:
    """Return driver, power, clocks and temperature of the first GPU, by nvidia-smi; nothing where that is missing."""
    line = output_of("nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in line.splitlines()[0].split(",")] if line else []
    return dict(zip(QUERIES, values, strict=True)) if len(values) == len(QUERIES) else {}


def device_facts(device: torch.device) -> dict[str, Any]:
    """Return a device's name, and a GPU's memory, multiprocessors, capability, cache and limits."""
    if device.type != "cuda":
        return {"name": f"{device.type} {platform.machine()}", "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(device)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
        "l2_bytes": found.L2_cache_size,
        "limits": gpu_limits(),
    }


def machine_info(device: torch.device) -> dict[str, Any]:
    """Return what figures on a device depend on, as `machine_info` of a result."""
    facts, peak = device_facts(device), peak_here(device)
    peaks = {} if peak is None else {"peak_operations_per_s": peak.operations, "peak_bytes_per_s": peak.bytes}
    info: dict[str, Any] = {
        "device": facts.pop("name"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        **{name: version for name, version in versions().items() if version is not None},
    }
    return info | facts | peaks


def peak_here(device: torch.device) -> Peak | None:
    """Return what a GPU can reach by its data sheet; None for other devices, and for unknown GPUs."""
    found = peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return found[1] if found else None


def versions() -> dict[str, str | None]:
    """Return the versions of the package, Python, PyTorch, Triton, and CUDA or HIP."""
    return show_config("cpu").versions | {"cuda": torch.version.cuda, "hip": torch.version.hip}


def commit() -> dict[str, Any]:
    """Return the checkout's commit, and whether files but results differ from it; None where git does not say."""
    found = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": found, "dirty": None if changed is None else bool(changed)}


def plain(error: BaseException) -> str:
    """Return the first line of an error, without the path of the checkout."""
    lines = str(error).replace(str(ROOT), ".").splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
