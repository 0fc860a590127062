"""`pytest bench/`: segment attention against local attention alone and against public implementations.

Every timed round runs the baseline right before the provider; the ratio is the median over such pairs, which holds when
the machine's speed drifts. `--benchmark-json FILE` keeps everything.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from segattn.bench.measure import DIRECTIONS, peak_bytes, step
from segattn.bench.providers import BASELINE, PROVIDERS, check
from segattn.bench.workloads import Workload


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_speed(
    workload: Workload,
    direction: str,
    provider: str,
    benchmark: BenchmarkFixture,
    device: torch.device,
    rows: list[tuple[str, str, str, float, int]],
    request: pytest.FixtureRequest,
) -> None:
    inputs = workload.inputs(device)
    error = check(PROVIDERS[provider], inputs, workload.L)
    assert error < 1e-4, f"{provider} is wrong, and is not timed: relative error {error:.1e}"
    run = step(PROVIDERS[provider], inputs, workload.L, direction)
    baseline = step(PROVIDERS[BASELINE], inputs, workload.L, direction)
    baseline_seconds: list[float] = []

    def beside() -> None:
        start = time.perf_counter()
        baseline()
        baseline_seconds.append(time.perf_counter() - start)

    rounds = request.config.getoption("--rounds")
    benchmark.group = f"{workload.name}, {direction}"
    benchmark.pedantic(run, setup=beside, rounds=rounds, warmup_rounds=1)
    assert benchmark.stats is not None
    pairs = zip(benchmark.stats.stats.data, baseline_seconds[-rounds:], strict=True)
    ratio = statistics.median(ours / base for ours, base in pairs)
    peak = peak_bytes(run, device)
    benchmark.extra_info |= {"ratio": ratio, "peak_bytes": peak, "error": error, "provider": provider}
    rows.append((workload.name, direction, provider, ratio, peak))
