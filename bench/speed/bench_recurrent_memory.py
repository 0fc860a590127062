"""`pytest bench/speed/bench_recurrent_memory.py`: steps and generation of recurrent memories, ours and others'.

Every timed round runs the group's baseline right before or after the provider, in turns; the ratio is the median over
such pairs, with its 20th and 80th percentile, and the baseline's own is the noise. What is not as its definition fails,
and is not timed; the table names it. `--workload B,S,L,m,layers,heads,width` for other sizes; with sizes of segment
attention alone, these are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from segattn.bench.speed import recurrent_generation as generation
from segattn.bench.speed.measure import peak_bytes
from segattn.bench.speed.recurrent import DIRECTIONS, GROUPS, check, step
from segattn.bench.speed.recurrent_models import SIZES, Sizes
from segattn.bench.speed.suite import Row, refuse, timed
from segattn.bench.speed.workloads import GIVEN

Keep = Callable[[Row], None]
# segments that were read before
LENGTHS = (2, 8, 64)
# a round of generation is long
GENERATION_ROUNDS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = metafunc.config.getoption("--workload")
    sizes = [SIZES] if given is None else [Sizes.parse(x) for x in given if x.count(",") != GIVEN - 1]
    metafunc.parametrize("sizes", sizes, ids=lambda x: x.name)


def about(sizes: Sizes, direction: str) -> dict[str, Any]:
    """For the JSON."""
    return {"case": asdict(sizes) | {"dtype": "float32"}, "direction": direction}


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
    keep: Keep,
    request: pytest.FixtureRequest,
) -> None:
    entry, baseline = GROUPS[group][provider], next(iter(GROUPS[group]))
    benchmark.group = f"{sizes.name}, {group}, {direction}"
    row = Row(benchmark.group, provider, baseline, about=about(sizes, direction))
    if entry.needs_gpu and device.type != "cuda":
        refuse(keep, row._replace(status="skipped", reason="needs a GPU"))
    error = check(entry, sizes, device)
    if not error <= entry.tolerance:
        refuse(keep, row._replace(status="wrong", reason=f"relative error {error:.1e}"))
    ids = sizes.ids(device)
    run = step(entry.make(sizes, device), ids, direction)
    beside = step(GROUPS[group][baseline].make(sizes, device), ids, direction)
    option = request.config.getoption
    found = timed(benchmark, lambda copy: run, lambda copy: beside, device, rounds=option("--rounds"), seconds=math.inf)
    row = row._replace(
        ratio=found.ratio,
        milliseconds=found.milliseconds,
        memory=peak_bytes(run, device),
        tokens_per_second=ids.numel() / found.milliseconds.median * 1e3,
    )
    keep(row)
    benchmark.extra_info |= row.as_json() | {"error": error, "peak_bytes": row.memory}


@pytest.mark.parametrize("provider", generation.WRITERS)
@pytest.mark.parametrize("segments", LENGTHS)
def test_generation(
    sizes: Sizes,
    segments: int,
    provider: str,
    benchmark: BenchmarkFixture,
    device: torch.device,
    keep: Keep,
    request: pytest.FixtureRequest,
) -> None:
    entry, baseline = generation.WRITERS[provider], generation.BASELINE
    text, opened = generation.texts(sizes, segments, device)
    benchmark.group = f"{sizes.name}, generation after {segments} segments ({text.shape[1]} tokens)"
    row = Row(benchmark.group, provider, baseline, about=about(sizes, "generation") | {"segments": segments})
    writer = entry.make(sizes, text, opened, sizes.L)
    definition = entry.definition(sizes, device)
    new = writer.write()
    error = generation.check(definition, text, opened, new)
    if not error <= generation.TOLERANCE:
        refuse(keep, row._replace(status="wrong", reason=f"{error:.1e} below the likeliest"))
    beside = generation.WRITERS[baseline].make(sizes, text, opened, sizes.L).write
    rounds = min(GENERATION_ROUNDS, request.config.getoption("--rounds"))
    found = timed(benchmark, lambda copy: writer.write, lambda copy: beside, device, rounds=rounds, seconds=math.inf)
    if not (isinstance(found.result, torch.Tensor) and torch.equal(found.result, new)):
        benchmark.has_error = True
        refuse(keep, row._replace(status="wrong", reason="other tokens in the last timed round"))
    row = row._replace(
        ratio=found.ratio,
        milliseconds=found.milliseconds,
        memory=writer.kept_bytes,
        tokens_per_second=new.numel() / found.milliseconds.median * 1e3,
    )
    keep(row)
    benchmark.extra_info |= row.as_json() | {"error": error, "kept_bytes": writer.kept_bytes}
