"""Every test runs where a GPU is, or on the CPU; memory that a kernel forgot to write is NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # the kernels then run too, interpreted; Triton reads this when it is imported, which `segattn` does
    os.environ.setdefault("TRITON_INTERPRET", "1")

settings.register_profile("segattn", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("segattn")


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def poisoned_memory() -> Iterator[None]:
    """PyTorch fills `torch.empty` and its kin with NaN under deterministic algorithms."""
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
