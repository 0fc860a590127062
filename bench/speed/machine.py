"""What figures depend on: the GPU, its driver and limits, versions, and the commit. Never the machine's name."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from ...kernels.backends import show_config

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
    """What a command prints; None where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except subprocess.TimeoutExpired:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def gpu_limits() -> dict[str, str]:
    """Driver, power, clocks and temperature of the first GPU, as nvidia-smi tells them."""
    line = output_of("nvidia-smi", f"--query-gpu={','.join(QUERIES)}", "--format=csv,noheader", "--id=0")
    values = [value.strip() for value in line.splitlines()[0].split(",")] if line else []
    return dict(zip(QUERIES, values, strict=True)) if len(values) == len(QUERIES) else {}


def device_facts(device: torch.device) -> dict[str, Any]:
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


def versions() -> dict[str, str | None]:
    return show_config("cpu").versions | {"cuda": torch.version.cuda, "hip": torch.version.hip}


def commit() -> dict[str, Any]:
    """The checkout's commit, and whether files but results differ from it; None where that cannot be known."""
    found = output_of("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = output_of("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return {"commit": found, "dirty": None if changed is None else bool(changed)}


def plain(error: BaseException) -> str:
    """The first line of an error, without where the checkout lies."""
    lines = str(error).replace(str(ROOT), ".").splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"
