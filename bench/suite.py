"""What the tests of `pytest bench/` share: the gate, pairs of times, and the rows of the table."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from .cases import BOTH, Case
from .device_cases import Drawn, admit, draw
from .measure import synchronize
from .peers import PEERS
from .timing import Prepare, Times

LEAST_ROUNDS = 3


class Row(NamedTuple):
    """Of the table.

    about: sizes, direction and the like, for the JSON.
    ratio: of times to the baseline's, pair by pair; None where it was not timed, and `reason` says why.
    memory: bytes that a call holds at most beyond its inputs; of a decoder, bytes that are kept.
    """

    group: str
    provider: str
    baseline: str
    status: str = "timed"
    reason: str = ""
    ratio: Times | None = None
    milliseconds: Times | None = None
    memory: int | None = None
    about: Mapping[str, Any] = MappingProxyType({})

    def as_json(self) -> dict[str, Any]:
        """What the benchmark's own figures lack; of one that was not timed, why."""
        found = {"provider": self.provider, "baseline": self.baseline, **self.about}
        if self.ratio is None or self.milliseconds is None:
            return found | {"group": self.group, "status": self.status, "reason": self.reason}
        return found | {
            "ratio": self.ratio.median,
            "ratio_fifths": [self.ratio.low, self.ratio.high],
            "ms": self.milliseconds.median,
            "ms_fifths": [self.milliseconds.low, self.milliseconds.high],
        }

    @property
    def line(self) -> str:
        if self.ratio is None or self.milliseconds is None:
            return f"{self.provider:34} {self.status}{': ' if self.reason else ''}{self.reason}"
        memory = "-" if self.memory is None else f"{self.memory / 2**20:.2f}"
        return f"{self.provider:34} {_spread(self.ratio, 'ratio')} {_spread(self.milliseconds, 'ms')} {memory:>9} MiB"


def _spread(times: Times, unit: str) -> str:
    return f"{times.median:8.2f} {f'{times.low:.2f}-{times.high:.2f}':>17} {unit}"


def table(rows: Iterable[Row]) -> Iterator[tuple[str, list[str]]]:
    """For each group its heading and lines."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    for group, own in groups.items():
        yield f"{group}: p50 and p20-p80, ratio to {own[0].baseline}", [row.line for row in own]


@functools.lru_cache(maxsize=1)
def drawn_for(case: Case, device: torch.device) -> list[Drawn]:
    return draw(case, device)


@functools.cache
def admitted(case: Case, name: str, device: torch.device, gradients: bool) -> dict[str, Any]:
    """The gate: status "right" with errors and peaks, or why it is not timed."""
    direction = BOTH if gradients else "forward"
    return admit(PEERS[name], replace(case, directions=(direction,), counted=False), drawn_for(case, device), device)


def timed(
    benchmark: BenchmarkFixture,
    prepare: Prepare,
    beside: Prepare,
    device: torch.device,
    *,
    rounds: int,
    seconds: float,
    copies: int = 1,
    added: float = 0.0,
) -> tuple[Times, Times]:
    """Milliseconds, and ratios to `beside`, which is run right before it each time.

    What prepares either is not timed. rounds: at most, and fewer but `LEAST_ROUNDS` where they take longer than
    `seconds`. added: milliseconds to each.
    """
    # the first may compile, allocate, load
    for warm_up in (beside, prepare):
        warm_up(0)()
    once = _by_clock(beside, 0, device) + _by_clock(prepare, 0, device)
    count = max(min(rounds, LEAST_ROUNDS), min(rounds, int(seconds * 1e3 / once)))
    baseline: list[float] = []

    def before() -> tuple[tuple[object], dict[str, object]]:
        copy = len(baseline) % copies
        baseline.append(_by_clock(beside, copy, device))
        run = prepare(copy)
        synchronize(device)
        return (run,), {}

    def whole(run: Any) -> None:
        run()
        synchronize(device)

    benchmark.pedantic(whole, setup=before, rounds=count)
    assert benchmark.stats is not None
    own = [1e3 * x + added for x in benchmark.stats.stats.data]
    return Times.of(own), Times.of([mine / base for mine, base in zip(own, baseline[-count:], strict=True)])


def _by_clock(prepare: Prepare, copy: int, device: torch.device) -> float:
    """Milliseconds as the benchmark counts them, launches included; `bench/on_device` takes a GPU's own events."""
    run = prepare(copy)
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3
