"""`pytest bench/`: segment attention and decoding against attention alone and public implementations.

Every timed round runs the baseline right before the provider; the ratio is the median over such pairs, which holds when
the machine's speed drifts, and the baseline's own is the noise. Who is wrong fails and is not timed; who cannot run
here is skipped; the table names both. `--benchmark-json FILE` keeps everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from segattn.bench.cases import BOTH, GIVEN, Case, DecodeCase, given, suite
from segattn.bench.check import GATES
from segattn.bench.decode_calls import BASELINE as GROWING_CACHE
from segattn.bench.decode_calls import DECODERS
from segattn.bench.device_cases import LENIENCY, is_out_of_memory, preparation
from segattn.bench.peers import BASELINE, PEERS
from segattn.bench.suite import Row, admitted, drawn_for, timed

Keep = Callable[[Row], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cases, decodes = suite(option("--device").partition(":")[0], option("--dtype"))
    if option("--workload") is not None:
        # those of other benchmarks have more numbers
        own = [x for x in option("--workload") if x.count(",") <= GIVEN]
        cases, decodes = given(own, option("--dtype") or "float32")
    if "case" in metafunc.fixturenames:
        rows = [(case, direction, name) for case in cases for direction in case.directions for name in case.peers]
        metafunc.parametrize(("case", "direction", "provider"), rows, ids=lambda x: getattr(x, "name", x))
    elif "decode" in metafunc.fixturenames:
        metafunc.parametrize("decode", decodes, ids=lambda x: x.name)


def refuse(keep: Keep, row: Row) -> NoReturn:
    keep(row)
    # what others cannot do here is their limit, and is told in the table
    if row.status == "wrong" or (row.status == "failed" and row.provider.startswith("segattn")):
        pytest.fail(f"{row.provider} is {row.status}, and is not timed: {row.reason}", pytrace=False)
    pytest.skip(row.reason or row.status)


def test_speed(
    case: Case,
    direction: str,
    provider: str,
    benchmark: BenchmarkFixture,
    device: torch.device,
    keep: Keep,
    request: pytest.FixtureRequest,
) -> None:
    benchmark.group = f"{case.name} {case.dtype}, {direction}"
    row = Row(benchmark.group, provider, BASELINE, about={"case": case.as_json(), "direction": direction})
    try:
        gate = admitted(case, provider, device, direction != "forward")
        if gate["status"] != "right":
            refuse(keep, row._replace(status=gate["status"], reason=_reason(gate)))
        drawn = drawn_for(case, device)
        own, base = (preparation(PEERS[name], case, drawn, direction) for name in (provider, BASELINE))
        option = request.config.getoption
        times, ratio = timed(
            benchmark, own, base, device, rounds=option("--rounds"), seconds=option("--seconds"), copies=len(drawn)
        )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refuse(keep, row._replace(status="out of memory"))
    peak = gate[direction if direction == "forward" else BOTH]["peak_bytes"]
    row = row._replace(ratio=ratio, milliseconds=times, memory=peak)
    keep(row)
    errors = {"errors": gate["errors"], "error": gate["errors"]["out"]}
    benchmark.extra_info |= row.as_json() | errors | {"peak_bytes": peak}


def _reason(gate: dict[str, Any]) -> str:
    errors = {name: f"{error:.1e}" for name, error in gate.get("errors", {}).items()}
    return f"{gate.get('reason', '')}{' ' if errors else ''}{errors or ''}"


@pytest.mark.parametrize("provider", DECODERS)
def test_decode(
    decode: DecodeCase,
    provider: str,
    benchmark: BenchmarkFixture,
    device: torch.device,
    keep: Keep,
    request: pytest.FixtureRequest,
) -> None:
    """One token's step, and for ours its part of writing a segment into the memory."""
    benchmark.group = f"{decode.name} {decode.dtype}"
    row = Row(benchmark.group, provider, GROWING_CACHE, about={"case": decode.as_json(), "direction": "decode"})
    try:
        found, base = (DECODERS[name](decode, device) for name in (provider, GROWING_CACHE))
        with torch.no_grad():
            expected = found.expected()
            error = float((found.run().double() - expected).norm() / expected.norm())
            gate = GATES[decode.dtype].outputs * (1 if provider.startswith("segattn") else LENIENCY)
            if not error <= gate:
                refuse(keep, row._replace(status="wrong", reason=f"relative error {error:.1e}"))
            fold = found.fold_ms(decode.L, device)
            option = request.config.getoption
            times, ratio = timed(
                benchmark,
                lambda copy: found.run,
                lambda copy: base.run,
                device,
                # a step is short
                rounds=10 * option("--rounds"),
                seconds=option("--seconds"),
                added=fold,
            )
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        refuse(keep, row._replace(status="out of memory"))
    row = row._replace(ratio=ratio, milliseconds=times, memory=found.kept_bytes)
    keep(row)
    benchmark.extra_info |= row.as_json() | {"error": error, "kept_bytes": found.kept_bytes, "fold_ms": fold}
