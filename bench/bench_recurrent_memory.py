"""`pytest bench/bench_recurrent_memory.py`: steps and generation of recurrent memories, ours and others'.

Every timed round runs the group's baseline right before the provider; the ratio is the median over such pairs, with its
20th and 80th percentile, and the baseline's own is the noise. What is not as its definition fails, and is not timed.
`--workload B,S,L,m,layers,heads,width` for other sizes; with sizes of segment attention alone, these are left out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from segattn.bench import recurrent_generation as generation
from segattn.bench.measure import peak_bytes, synchronize
from segattn.bench.recurrent import DIRECTIONS, GROUPS, check, step
from segattn.bench.recurrent_models import SIZES, Sizes
from segattn.bench.timing import Times

# segments that were read before
LENGTHS = (2, 8, 64)
# a round of generation is long
GENERATION_ROUNDS = 3


class Row(NamedTuple):
    """Of the table.

    ratio: of times, to the baseline's.
    memory: bytes that a step holds at most, or that are kept of the text that is gone on with.
    """

    group: str
    baseline: str
    provider: str
    ratio: Times
    tokens_per_second: float
    memory: int


class Table:
    """Printed at the end."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        group = None
        for row in self.rows:
            if row.group != group:
                group = row.group
                terminalreporter.section(group, sep="-")
                terminalreporter.write_line(
                    f"{'':38} {'ratio':>6} {'20-80 %':>11} {'tokens/s':>10} {'MiB':>9}, ratio to {row.baseline}"
                )
            ratio = f"{row.ratio.median:6.2f}   {row.ratio.low:4.2f}-{row.ratio.high:4.2f}"
            terminalreporter.write_line(
                f"{row.provider:38} {ratio} {row.tokens_per_second:10.0f} {row.memory / 2**20:9.3f}"
            )


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Table:
    found = Table()
    request.config.pluginmanager.register(found)
    return found


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--workload")
    sizes = [SIZES] if given is None else [Sizes.parse(x) for x in given if x.count(",") != 4]
    metafunc.parametrize("sizes", sizes, ids=lambda x: x.name)


@pytest.mark.parametrize(
    ("group", "provider"), [(group, name) for group, entries in GROUPS.items() for name in entries]
)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_step(
    sizes: Sizes,
    direction: str,
    group: str,
    provider: str,
    benchmark: BenchmarkFixture,
    device: torch.device,
    table: Table,
    request: pytest.FixtureRequest,
) -> None:
    entry, baseline = GROUPS[group][provider], next(iter(GROUPS[group]))
    if entry.needs_gpu and device.type != "cuda":
        pytest.skip("needs a GPU")
    error = check(entry, sizes, device)
    assert error <= entry.tolerance, f"{provider} is wrong, and is not timed: relative error {error:.1e}"
    ids = sizes.ids(device)
    run = step(entry.make(sizes, device), ids, direction)
    beside = step(GROUPS[group][baseline].make(sizes, device), ids, direction)
    name = f"{sizes.name}, {group}, {direction}"
    seconds, ratio = timed(benchmark, name, run, beside, request.config.getoption("--rounds"), device)
    peak = peak_bytes(run, device)
    facts = about(provider, baseline, error, ratio, ids.numel() / seconds)
    benchmark.extra_info |= facts | {"peak_bytes": peak}
    table.rows.append(Row(name, baseline, provider, ratio, ids.numel() / seconds, peak))


@pytest.mark.parametrize("provider", generation.WRITERS)
@pytest.mark.parametrize("segments", LENGTHS)
def test_generation(
    sizes: Sizes,
    segments: int,
    provider: str,
    benchmark: BenchmarkFixture,
    device: torch.device,
    table: Table,
    request: pytest.FixtureRequest,
) -> None:
    entry, baseline = generation.WRITERS[provider], generation.BASELINE
    text, opened = generation.texts(sizes, segments, device)
    writer = entry.make(sizes, text, opened, sizes.L)
    new = writer.write()
    error = generation.check(entry.definition(sizes, device), text, opened, new)
    assert error <= generation.TOLERANCE, f"{provider} is wrong, and is not timed: {error:.1e} below the likeliest"
    beside = generation.WRITERS[baseline].make(sizes, text, opened, sizes.L).write
    name = f"{sizes.name}, generation after {segments} segments ({text.shape[1]} tokens)"
    rounds = min(GENERATION_ROUNDS, request.config.getoption("--rounds"))
    seconds, ratio = timed(benchmark, name, writer.write, beside, rounds, device)
    facts = about(provider, baseline, error, ratio, new.numel() / seconds)
    benchmark.extra_info |= facts | {"segments": segments, "kept_bytes": writer.kept_bytes}
    table.rows.append(Row(name, baseline, provider, ratio, new.numel() / seconds, writer.kept_bytes))


def about(provider: str, baseline: str, error: float, ratio: Times, tokens_per_second: float) -> dict[str, object]:
    """For the JSON."""
    return {
        "provider": provider,
        "baseline": baseline,
        "error": error,
        "ratio": ratio.median,
        "ratio_fifths": [ratio.low, ratio.high],
        "tokens_per_second": tokens_per_second,
    }


def timed(
    benchmark: BenchmarkFixture,
    group: str,
    run: Callable[[], object],
    beside: Callable[[], object],
    rounds: int,
    device: torch.device,
) -> tuple[float, Times]:
    """The median seconds of `run`, and its ratios to `beside`, which is run before it each time."""
    baseline: list[float] = []

    def whole() -> None:
        run()
        synchronize(device)

    def before() -> None:
        start = time.perf_counter()
        beside()
        synchronize(device)
        baseline.append(time.perf_counter() - start)

    benchmark.group = group
    benchmark.pedantic(whole, setup=before, rounds=rounds, warmup_rounds=1)
    assert benchmark.stats is not None
    own = benchmark.stats.stats.data
    pairs = zip(own, baseline[-rounds:], strict=True)
    return statistics.median(own), Times.of([mine / base for mine, base in pairs])
