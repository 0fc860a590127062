"""What GPUs do at most: a multiprocessor of every target in a clock, and the GPUs for which times are predicted."""

from __future__ import annotations

from typing import NamedTuple

from ..planner.settings import gpu_of


class Rate(NamedTuple):
    """Hold what a multiprocessor does in one clock: instructions of threads, and operations of bfloat16 products."""

    instructions: int
    operations: int


# peak operations of the makers' data sheets over multiprocessors and boost clock; four schedulers of 32 threads, on
# gfx942 of 16
RATES = {
    "sm_80": Rate(128, 2048),
    "sm_90": Rate(128, 4096),
    "sm_100": Rate(128, 8192),
    "sm_120": Rate(128, 512),
    "gfx942": Rate(64, 2048),
}


class Gpu(NamedTuple):
    """Name a GPU, as in `floors.PEAKS`, and hold its multiprocessors and their clocks in a microsecond."""

    name: str
    multiprocessors: int
    clocks: float

    @property
    def bytes(self) -> float:
        """Return the bytes that go through its memory in a microsecond."""
        return gpu_of(self.name)[1].bytes * 1e-6


GPUS = {
    "sm_80": Gpu("A100 40GB", 108, 1410),
    "sm_90": Gpu("H100 SXM", 132, 1755),
    "sm_120": Gpu("RTX 5090", 170, 2407),
}
