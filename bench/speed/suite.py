"""What the tests of `pytest bench/` share: the gate, pairs of times, and the rows of the table."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from ..device.cases import admit
from .measure import synchronize
from .peers import PEERS
from .prepared import Drawn, draw
from .timing import Prepare, Times
from .workloads import BOTH, Case

LEAST_ROUNDS = 3
# of ratios: the 20th to the 80th percentile, over the median
WIDE = 0.25
# what fails here is an error, not another's limit
OURS = ("segattn", "torch backend", "compiled torch")


class Row(NamedTuple):
    """Of the table.

    about: sizes, direction and the like, for the JSON.
    ratio: of times to the baseline's, pair by pair; None where it was not timed, and `reason` says why.
    memory: bytes that a call holds at most beyond its inputs; of a decoder, bytes that are kept.
    noisy: why the times are not to be trusted, if so.
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
    tokens_per_second: float | None = None
    noisy: str = ""

    def as_json(self) -> dict[str, Any]:
        """What the benchmark's own figures lack; of one that was not timed, why."""
        found = {"provider": self.provider, "baseline": self.baseline, **self.about}
        if self.ratio is None or self.milliseconds is None:
            return found | {"group": self.group, "status": self.status, "reason": self.reason}
        if self.tokens_per_second is not None:
            found["tokens_per_second"] = self.tokens_per_second
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
        parts = [
            f"{self.provider:34} {_spread(self.ratio, 'ratio')} {_spread(self.milliseconds, 'ms')}",
            f"{'-' if self.memory is None else _mebibytes(self.memory):>9} MiB",
        ]
        if self.tokens_per_second is not None:
            parts.append(f"{self.tokens_per_second:9.0f} tokens/s")
        if self.noisy:
            parts.append(f"noisy: {self.noisy}")
        return " ".join(parts)


def _spread(times: Times, unit: str) -> str:
    return f"{times.median:8.2f} {f'{times.low:.2f}-{times.high:.2f}':>17} {unit}"


def _mebibytes(count: int) -> str:
    size = count / 2**20
    return f"{size:.2f}" if size >= 0.1 else f"{size:.2g}"


def marked(rows: Iterable[Row]) -> list[Row]:
    """The same, and which are noisy."""
    found = list(rows)
    alone = {
        (str(row.about["case"]), row.provider): row.milliseconds.median
        for row in found
        if row.milliseconds is not None and row.about.get("direction") == "backward"
    }
    for i, row in enumerate(found):
        if row.ratio is None or row.milliseconds is None:
            continue
        reasons, wide = [], (row.ratio.high - row.ratio.low) / row.ratio.median
        if wide > WIDE:
            reasons.append(f"p20-p80 is {wide:.0%} of the ratio")
        if row.about.get("direction") == BOTH and (
            alone.get((str(row.about["case"]), row.provider), 0.0) > row.milliseconds.median
        ):
            reasons.append("the backward alone took longer")
        found[i] = row._replace(noisy=", ".join(reasons))
    return found


def table(rows: Iterable[Row]) -> Iterator[tuple[str, list[str]]]:
    """For each group its heading and lines."""
    groups: dict[str, list[Row]] = {}
    for row in marked(rows):
        groups.setdefault(row.group, []).append(row)
    for group, own in groups.items():
        yield f"{group}: p50 and p20-p80, ratio to {own[0].baseline}", [row.line for row in own]


def refuse(keep: Callable[[Row], None], row: Row) -> NoReturn:
    """Not timed: wrong, or ours that fails, fails the test; what others cannot do here is their limit."""
    keep(row)
    if row.status == "wrong" or (row.status == "failed" and row.provider.startswith(OURS)):
        pytest.fail(f"{row.provider} is {row.status}, and is not timed: {row.reason}", pytrace=False)
    pytest.skip(row.reason or row.status)


@functools.lru_cache(maxsize=1)
def drawn_for(case: Case, device: torch.device) -> list[Drawn]:
    return draw(case, device)


@functools.cache
def admitted(case: Case, name: str, device: torch.device, gradients: bool) -> dict[str, Any]:
    """The gate: status "right" with errors and peaks, or why it is not timed."""
    direction = BOTH if gradients else "forward"
    return admit(PEERS[name], replace(case, directions=(direction,), counted=False), drawn_for(case, device), device)


class Timed(NamedTuple):
    """ratio: to `beside`. copy, result: of the last timed round."""

    milliseconds: Times
    ratio: Times
    copy: int
    result: object


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
    alter: Callable[[int], object] = lambda copy: None,
) -> Timed:
    """Pairs of times with `beside`, which is run right before or right after, in turns, on the next copy of the inputs.

    What prepares either is not timed. rounds: at most, and fewer but `LEAST_ROUNDS` where they take longer than
    `seconds`. added: milliseconds to each. alter: changes a copy's inputs before the last round, so that a result
    which is remembered shows.
    """
    # the first may compile, allocate, load
    for warm_up in (beside, prepare):
        warm_up(0)()
    once = _by_clock(beside, 0, device) + _by_clock(prepare, 0, device)
    count = max(min(rounds, LEAST_ROUNDS), int(min(rounds, seconds * 1e3 / once)))
    baseline: list[float] = []
    results: list[object] = []
    begun = 0

    def pair(number: int) -> None:
        baseline.append(_by_clock(beside, (2 * number + number % 2) % copies, device))

    def before() -> tuple[tuple[object], dict[str, object]]:
        nonlocal begun
        number, begun = begun, begun + 1
        if number % 2 == 0:
            # first that of the round before, which had its own turn first
            for one in range(max(number - 1, 0), number + 1):
                pair(one)
        copy = (2 * number + 1 - number % 2) % copies
        if begun == count:
            alter(copy)
        run = prepare(copy)
        synchronize(device)
        return (run,), {}

    def whole(run: Any) -> None:
        found = run()
        synchronize(device)
        if begun == count:
            results.append(found)

    benchmark.pedantic(whole, setup=before, rounds=count)
    if count % 2 == 0:
        pair(count - 1)
    assert benchmark.stats is not None
    own = [1e3 * x + added for x in benchmark.stats.stats.data]
    ratios = [mine / base for mine, base in zip(own, baseline, strict=True)]
    last = count - 1
    return Timed(Times.of(own), Times.of(ratios), (2 * last + 1 - last % 2) % copies, results[0])


def _by_clock(prepare: Prepare, copy: int, device: torch.device) -> float:
    """Milliseconds as the benchmark counts them, launches included; `bench/on_device` takes a GPU's own events."""
    run = prepare(copy)
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return (time.perf_counter() - start) * 1e3
