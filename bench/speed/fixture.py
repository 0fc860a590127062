"""Rows as tests of pytest-benchmark: a timed row's rounds are handed to the fixture, any other row ends the test."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from .admission import is_out_of_memory
from .rows import Row

Keep = Callable[[Row], None]
LEAST_ROUNDS = 3


_readings: deque[float] = deque()


def replayed() -> float:
    """Return the next reading: pytest-benchmark's timer, which replays what the one clock has taken."""
    return _readings.popleft()


def bounds(rounds: int) -> tuple[int, int]:
    """Return the least and the most rounds."""
    return min(LEAST_ROUNDS, rounds), rounds


@contextmanager
def enough_memory(row: Row, benchmark: BenchmarkFixture, keep: Keep) -> Iterator[None]:
    """Skip the test where the device's memory does not suffice for the block."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        finish(row.refused("out of memory"), benchmark, keep)


def finish(row: Row, benchmark: BenchmarkFixture, keep: Keep) -> None:
    """Keep the row; skip the test where the provider cannot run here, and fail it where it is wrong, or ours fails."""
    keep(row)
    benchmark.group = row.group
    benchmark.extra_info |= row.extra_info()
    if row.status == "wrong" or (row.status == "failed" and row.is_ours):
        pytest.fail(f"{row.provider} is {row.status}, and is not timed: {row.reason}", pytrace=False)
    if row.status != "timed":
        pytest.skip(row.reason or row.status)
    _readings.clear()
    _readings.extend(x for seconds in row.seconds for x in (0.0, seconds))
    benchmark.pedantic(lambda: None, rounds=len(row.seconds))
