"""`pytest bench/speed/bench_recurrent_memory.py`: steps and generation of recurrent memories, ours and others'.

Every round runs the group's baseline right before or after the peer, in turns, as in `bench_segment_attention`. A
peer that differs from its definition fails, and is not timed; the table names it. Other sizes are chosen by
`--workload B,S,L,m,layers,heads,width`; with sizes of segment attention alone, these tests are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace

import pytest
import torch

from segattn.bench.speed import fixture
from segattn.bench.speed import recurrent_generation as generation
from segattn.bench.speed.fixture import Bench
from segattn.bench.speed.measure import peak_bytes
from segattn.bench.speed.recurrent import DIRECTIONS, GROUPS, check, step
from segattn.bench.speed.recurrent_models import SIZES, Sizes
from segattn.bench.speed.rows import Row
from segattn.bench.speed.suite import TimedPeer, by_turns
from segattn.bench.speed.workloads import CALL_NUMBERS

pytestmark = pytest.mark.benchmark(timer=fixture.replayed)
# segments that were read before
LENGTHS = (2, 8, 64)
# a round of generation is long
GENERATION_ROUNDS = 3


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    workloads = metafunc.config.getoption("--workload")
    sizes = [SIZES] if workloads is None else [Sizes.parse(x) for x in workloads if x.count(",") != CALL_NUMBERS - 1]
    metafunc.parametrize("sizes", sizes, ids=lambda x: x.name)


def row_of(sizes: Sizes, group: str, peer: str, baseline: str, direction: str) -> Row:
    """Return the row of a peer before anything is known of it."""
    return Row(group, peer, baseline, direction, asdict(sizes) | {"dtype": "float32"})


@pytest.mark.parametrize(("group", "peer"), [(group, name) for group, entries in GROUPS.items() for name in entries])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_step(sizes: Sizes, direction: str, group: str, peer: str, bench: Bench) -> None:
    """Time one peer at reading, or at a training step."""
    device = bench.device
    entry, baseline = GROUPS[group][peer], next(iter(GROUPS[group]))
    row = row_of(sizes, f"{sizes.name}, {group}, {direction}", peer, baseline, direction)
    if entry.needs_gpu and device.type != "cuda":
        bench.finish(row.refused("skipped", "needs a GPU"))
    error = check(entry, sizes, device)
    if not error <= entry.tolerance:
        bench.finish(row.refused("wrong", f"relative error {error:.1e}"))
    ids = sizes.ids(device)
    run = step(entry.make(sizes, device), ids, direction)
    beside = step(GROUPS[group][baseline].make(sizes, device), ids, direction)
    row = replace(row, memory=peak_bytes(run, device), errors={"out": error})
    finish(bench, TimedPeer(row, lambda copy: run), beside, ids.numel(), bench.rounds())


@pytest.mark.parametrize("peer", generation.WRITERS)
@pytest.mark.parametrize("segments", LENGTHS)
def test_generation(sizes: Sizes, segments: int, peer: str, bench: Bench) -> None:
    """Time one peer at writing behind a text."""
    device = bench.device
    entry, baseline = generation.WRITERS[peer], generation.BASELINE
    text, opened = generation.texts(sizes, segments, device)
    group = f"{sizes.name}, generation after {segments} segments ({text.shape[1]} tokens)"
    row = row_of(sizes, group, peer, baseline, "generation")
    writer = entry.make(sizes, text, opened, sizes.L)
    new = writer.write()
    error = generation.check(entry.definition(sizes, device), text, opened, new)
    if not error <= generation.TOLERANCE:
        bench.finish(row.refused("wrong", f"{error:.1e} below the likeliest"))
    beside = generation.WRITERS[baseline].make(sizes, text, opened, sizes.L).write
    row = replace(row, memory=writer.kept_bytes, errors={"out": error}, facts={"segments": segments})

    def wrong(copy: int, result: object) -> str:
        return "" if isinstance(result, torch.Tensor) and torch.equal(result, new) else "other tokens"

    timed_peer = TimedPeer(row, lambda copy: writer.write, wrong=wrong)
    most = min(GENERATION_ROUNDS, bench.most_rounds)
    finish(bench, timed_peer, beside, new.numel(), (most, most))


def finish(
    bench: Bench, timed_peer: TimedPeer, beside: Callable[[], object], tokens: int, rounds: tuple[int, int]
) -> None:
    """Time a peer by turns with the baseline, and keep its row, with the tokens of a second."""
    (row,) = by_turns([timed_peer], lambda copy: beside, bench.device, rounds=rounds, seconds=math.inf)
    if row.ms is not None:
        row = replace(row, facts={**row.facts, "tokens_per_second": tokens / row.ms.median * 1e3})
    bench.finish(row)
