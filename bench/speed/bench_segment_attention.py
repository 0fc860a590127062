"""`pytest bench/`: segment attention and decoding against attention alone and public implementations.

Every round runs the baseline right before or after the peer, in turns; the ratio is the median over such pairs,
which holds when the machine's speed drifts, and the baseline's own ratio is the noise. A wrong peer fails and is
not timed; one that cannot run here is skipped; the table names both. `--benchmark-json FILE` keeps everything.

To add a peer, add an entry to `PEERS` in peers.py, and its name to the cases in workloads.py; to add a size, add a
case there.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from segattn.bench.speed import fixture
from segattn.bench.speed.admission import Admission, admit, admit_step
from segattn.bench.speed.decode_calls import DECODERS, names_of
from segattn.bench.speed.fixture import Bench
from segattn.bench.speed.machine import peak_here
from segattn.bench.speed.peers import PEERS
from segattn.bench.speed.prepared import Drawn, draw
from segattn.bench.speed.suite import call_row, step_row, time_calls, time_steps
from segattn.bench.speed.workloads import BOTH, CALL_NUMBERS, Case, DecodeCase, parse_workloads, suite

pytestmark = pytest.mark.benchmark(timer=fixture.replayed)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cases, decodes = suite(option("--device").partition(":")[0], option("--dtype"))
    if option("--workload") is not None:
        # the sizes of recurrent memories are more numbers
        sizes = [x for x in option("--workload") if x.count(",") == CALL_NUMBERS - 1]
        cases, decodes = parse_workloads(sizes, option("--dtype") or "float32")
    if "case" in metafunc.fixturenames:
        rows = [(case, direction, name) for case in cases for direction in case.directions for name in case.peers]
        metafunc.parametrize(("case", "direction", "peer"), rows, ids=lambda x: getattr(x, "name", x))
    elif "decode" in metafunc.fixturenames:
        steps = [(decode, name) for decode in decodes for name in names_of(decode)]
        metafunc.parametrize(("decode", "peer"), steps, ids=lambda x: getattr(x, "name", x))


@functools.lru_cache(maxsize=1)
def drawn_for(case: Case, device: torch.device) -> list[Drawn]:
    """Return copies of a case's inputs, the same for all of its tests."""
    return draw(case, device)


@functools.cache
def admitted(case: Case, name: str, device: torch.device, gradients: bool) -> Admission:
    """Return the gate's word on a peer, once for the forward pass and once for the others."""
    direction = BOTH if gradients else "forward"
    directions = ("backward", BOTH) if gradients else (direction,)
    return admit(PEERS[name], replace(case, directions=directions, counted=False), drawn_for(case, device), device)


def test_speed(case: Case, direction: str, peer: str, bench: Bench) -> None:
    """Time one peer in one direction."""
    device = bench.device
    with bench.enough_memory(call_row(case, direction, peer)):
        gate = admitted(case, peer, device, direction != "forward")
        drawn = drawn_for(case, device)
    clock: dict[str, Any] = {"peak": peak_here(device), "rounds": bench.rounds(), "seconds": bench.seconds}
    (row,) = time_calls(case, direction, {peer: gate}, drawn, device, **clock)
    bench.finish(row)


def test_decode(decode: DecodeCase, peer: str, bench: Bench) -> None:
    """Time one token's step, and for ours its part of writing a segment into the memory."""
    device, baseline = bench.device, names_of(decode)[0]
    with bench.enough_memory(step_row(decode, peer, baseline)):
        decoders = {name: DECODERS[name](decode, device) for name in {baseline, peer}}
        gate = admit_step(decoders[peer], device)
    # a step is short
    clock: dict[str, Any] = {"peak": peak_here(device), "rounds": bench.rounds(10), "seconds": bench.seconds}
    (row,) = time_steps(decode, decoders, {peer: gate}, baseline, device, **clock)
    bench.finish(row)
