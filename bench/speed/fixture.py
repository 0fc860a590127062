"""Rows as tests of pytest-benchmark: a timed row's rounds are handed to the fixture, any other row ends the test."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .admission import is_out_of_memory
from .rows import Row

LEAST_ROUNDS = 3

_readings: deque[float] = deque()


def replayed() -> float:
    """Return the next reading: pytest-benchmark's timer, which replays what the one clock has taken."""
    return _readings.popleft()


@dataclass(frozen=True)
class Bench:
    """Hold what every benchmark needs: pytest-benchmark's fixture, and the options of the command line.

    keep: Takes a row of the table.
    most_rounds: Timed rounds at most.
    seconds: The time after which the last round begins.
    """

    benchmark: BenchmarkFixture
    keep: Callable[[Row], None]
    device: torch.device
    most_rounds: int
    seconds: float

    def rounds(self, times: int = 1) -> tuple[int, int]:
        """Return the least and the most rounds, so many times as many for what is short."""
        most = times * self.most_rounds
        return min(LEAST_ROUNDS, most), most

    @contextmanager
    def enough_memory(self, row: Row) -> Iterator[None]:
        """Skip the test where the device's memory does not suffice for the block."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self.finish(row.refused("out of memory"))

    def finish(self, row: Row) -> None:
        """Keep the row; skip the test where the peer cannot run, and fail it where it is wrong, or ours fails."""
        self.keep(row)
        self.benchmark.group = row.group
        self.benchmark.extra_info |= row.extra_info()
        if row.status == "wrong" or (row.status == "failed" and row.is_ours):
            pytest.fail(f"{row.peer} is {row.status}, and is not timed: {row.reason}", pytrace=False)
        if row.status != "timed":
            pytest.skip(row.reason or row.status)
        _readings.clear()
        _readings.extend(x for seconds in row.seconds for x in (0.0, seconds))
        self.benchmark.pedantic(lambda: None, rounds=len(row.seconds))
