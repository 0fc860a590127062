"""Every test runs where a GPU is, or on the CPU; memory that a kernel forgot to write is NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

# before PyTorch is imported, and for the processes that tests start: tensors are small, and workers share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # the kernels then run too, interpreted; Triton reads this when it is imported, which `segattn` does
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        import quick_interpreter

        quick_interpreter.hasten()

settings.register_profile("segattn", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("segattn")


def pytest_configure() -> None:
    """Hide pytest-xdist from the processes that tests start: pytest-benchmark, for one, would time nothing there."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """Let PyTorch fill `torch.empty` and its kin with NaN, as it does under deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
