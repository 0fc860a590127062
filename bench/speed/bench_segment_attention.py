"""`pytest bench/`: segment attention and decoding against attention alone and public implementations.

Every timed round runs the baseline right before or after the provider, in turns; the ratio is the median over such
pairs, which holds when the machine's speed drifts, and the baseline's own is the noise. Who is wrong fails and is not
timed; who cannot run here is skipped; the table names both. `--benchmark-json FILE` keeps everything.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from segattn.bench.device.cases import is_out_of_memory
from segattn.bench.device.decode import allowed_in_decoding
from segattn.bench.speed.correctness import WrongError, at_the_far_end, complaint, named
from segattn.bench.speed.decode_calls import BASELINE as GROWING_CACHE
from segattn.bench.speed.decode_calls import DECODERS, Decoder
from segattn.bench.speed.peers import BASELINE, PEERS
from segattn.bench.speed.prepared import Drawn, preparation
from segattn.bench.speed.suite import Row, admitted, drawn_for, refuse, timed
from segattn.bench.speed.timing import Prepare
from segattn.bench.speed.workloads import BOTH, GIVEN, Case, DecodeCase, given, suite

Keep = Callable[[Row], None]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    cases, decodes = suite(option("--device").partition(":")[0], option("--dtype"))
    if option("--workload") is not None:
        # those of other benchmarks have more numbers
        own = [x for x in option("--workload") if x.count(",") == GIVEN - 1]
        cases, decodes = given(own, option("--dtype") or "float32")
    if "case" in metafunc.fixturenames:
        rows = [(case, direction, name) for case in cases for direction in case.directions for name in case.peers]
        metafunc.parametrize(("case", "direction", "provider"), rows, ids=lambda x: getattr(x, "name", x))
    elif "decode" in metafunc.fixturenames:
        metafunc.parametrize("decode", decodes, ids=lambda x: x.name)


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
            refuse(keep, row._replace(status=gate["status"], reason=gate.get("reason", "")))
        drawn = drawn_for(case, device)
        own, base = (preparation(PEERS[name], case, drawn, direction) for name in (provider, BASELINE))
        option = request.config.getoption
        found = timed(
            benchmark,
            own,
            base,
            device,
            rounds=option("--rounds"),
            seconds=option("--seconds"),
            copies=len(drawn),
            alter=lambda copy: drawn[copy].v.neg_(),
        )
        wrong = _is_wrong(provider, case, drawn[found.copy], found.result)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        refuse(keep, row._replace(status="out of memory"))
    if wrong:
        benchmark.has_error = True
        refuse(keep, row._replace(status="wrong", reason=f"in the last timed round: {wrong}"))
    peak = gate[direction if direction == "forward" else BOTH]["peak_bytes"]
    row = row._replace(ratio=found.ratio, milliseconds=found.milliseconds, memory=peak)
    keep(row)
    errors = {"errors": gate["errors"], "error": gate["errors"]["out"]}
    benchmark.extra_info |= row.as_json() | errors | {"peak_bytes": peak}


def _is_wrong(provider: str, case: Case, drawn: Drawn, result: object) -> str:
    peer = PEERS[provider]
    try:
        return complaint(at_the_far_end(peer, case, drawn, named(peer, case, result)))
    except WrongError as error:
        return str(error)


def _beyond(error: float, allowed: float) -> str:
    return f"relative error of {error:.1e} (at most {allowed:.1e})"


def _step_of(decoder: Decoder) -> Prepare:
    return lambda copy: functools.partial(decoder.run, copy % decoder.copies)


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
            error = max(found.error(0, found.run(0)), found.fold_error())
            allowed = allowed_in_decoding(provider, decode.dtype)
            if not error <= allowed:
                refuse(keep, row._replace(status="wrong", reason=_beyond(error, allowed)))
            fold = found.fold_ms(decode.L, device)
            option = request.config.getoption
            times = timed(
                benchmark,
                _step_of(found),
                _step_of(base),
                device,
                # a step is short
                rounds=10 * option("--rounds"),
                seconds=option("--seconds"),
                copies=max(found.copies, base.copies),
                added=fold,
                alter=lambda copy: found.alter(copy % found.copies),
            )
            last = found.error(times.copy % found.copies, times.result)
    except RuntimeError as failure:
        if not is_out_of_memory(failure):
            raise
        refuse(keep, row._replace(status="out of memory"))
    if not last <= allowed:
        benchmark.has_error = True
        refuse(keep, row._replace(status="wrong", reason=f"in the last timed round: {_beyond(last, allowed)}"))
    row = row._replace(ratio=times.ratio, milliseconds=times.milliseconds, memory=found.kept_bytes)
    keep(row)
    benchmark.extra_info |= row.as_json() | {"error": error, "kept_bytes": found.kept_bytes, "fold_ms": fold}
