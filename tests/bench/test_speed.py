"""The benchmark's peers all compute what they are said to, who does not is not timed, and its whole path runs."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="needs segattn[bench]")
pytest.importorskip("infini_transformer_pytorch", reason="needs segattn[bench]")

from processes import python

from segattn.bench import conftest
from segattn.bench.planner import floors
from segattn.bench.speed import attention_calls, bench_segment_attention, decode_calls, fixture, workloads
from segattn.bench.speed.admission import Admission
from segattn.bench.speed.bench_segment_attention import admitted, drawn_for
from segattn.bench.speed.correctness import at_reduced_length, at_the_far_end, complaint, gated, results
from segattn.bench.speed.decode_calls import DECODERS, EAGER, GROWING_CACHE, names_of
from segattn.bench.speed.measure import peak_bytes
from segattn.bench.speed.peers import BASELINE, PEERS, Peer, from_segments, to_segments
from segattn.bench.speed.prepared import draw, preparation
from segattn.bench.speed.rows import Row, as_json, from_json, marked, stats_of, table
from segattn.bench.speed.suite import TimedPeer, by_turns
from segattn.bench.speed.timing import Times, take_turns
from segattn.bench.speed.workloads import BOTH, DIRECTIONS, Case, DecodeCase

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
# the kernels, which are interpreted here, have their own tests
HERE = tuple(name for name, x in PEERS.items() if x.refusal(CPU, False) is None and not (x.compiled or x.ours))
SMALL = Case("small", T=48, L=16, K=16, H=3, G=3, peers=HERE, B=2, dtype="float32")
STEP = DecodeCase("step", B=2, H=4, G=2, K=16, L=16, context=39, dtype="float32")


LONG = dataclasses.replace(SMALL, name="long", T=160, H=2, G=2)


@pytest.mark.parametrize("name", HERE)
def test_peers_agree_with_the_reference(name: str) -> None:
    case = dataclasses.replace(SMALL, H=4, G=4 if PEERS[name].equal_heads else 2)
    found = at_reduced_length(PEERS[name], case, CPU, True)
    assert set(found) == {"out", "dq", "dk", "dv", "dgate"}
    assert max(x.error for x in found.values()) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", HERE)
def test_peers_pass_the_gate_in_every_dtype(name: str, dtype: str) -> None:
    case = dataclasses.replace(LONG, dtype=dtype, K=32, B=1)
    assert complaint(gated(PEERS[name], case, CPU, draw(case, CPU, copies=1)[0], True)) == ""


@pytest.mark.parametrize(("update", "full"), [(None, False), (None, True), ("linear", False), ("delta", False)])
def test_the_far_end_is_that_of_the_whole(update: str | None, full: bool) -> None:
    """The last segment by the memory before it, against the reference over everything, both in float64."""
    case = dataclasses.replace(LONG, H=4)
    drawn = draw(case, CPU, copies=1)[0]
    whole = Peer(
        lambda q, k, v, gate, L: attention_calls.ours(
            *(x.double() for x in (q, k, v, gate)), case.T if full else L, update=update, backend="reference"
        ).float(),
        update,
        full,
    )
    far = at_the_far_end(whole, case, drawn, results(whole, case, drawn, True))
    assert set(far) == {"out", "dq", "dk", "dv"}
    # of rounding the results to float32
    assert max(x.error for x in far.values()) < 1e-7


def test_segments_of_several_rows() -> None:
    x = torch.randn(2, 3, 12, 5)
    segments = to_segments(x, 4)
    assert torch.equal(segments[4], x[1, :, 4:8])
    assert to_segments(x[:1], 4).data_ptr() == x.data_ptr()
    assert torch.equal(from_segments(segments, 2), x)


def test_definitions_of_linear_attention_agree_where_they_meet() -> None:
    """Without decay, keys at right angles to each other leave the delta rule nothing to correct: β times the linear."""
    k = torch.eye(6, dtype=torch.float64)[None, None]
    q, v = torch.randn(2, 1, 1, 6, 6, dtype=torch.float64)
    gate = torch.zeros(1)
    linear = attention_calls.linear_by_definition(q, k, v, gate, 3)
    explicit = torch.stack([sum((q[0, 0, t] @ k[0, 0, j]) * v[0, 0, j] for j in range(t + 1)) for t in range(6)])
    torch.testing.assert_close(linear[0, 0], explicit / math.sqrt(6))
    decayed = attention_calls.gated_delta_by_definition(q, k, v, gate, 3)
    decay = torch.tensor(
        [[attention_calls.STRENGTH * math.exp(attention_calls.LOG_DECAY * (t - j)) for j in range(6)] for t in range(6)]
    )
    expected = ((q @ k.mT).tril() * decay) @ v / math.sqrt(6)
    torch.testing.assert_close(decayed, expected)


def test_the_delta_rule_replaces_a_value() -> None:
    """The same key twice: what is read then is what was left of the first value, and half of the second."""
    k = torch.tensor([2.0, 0.0], dtype=torch.float64).expand(1, 1, 2, 2)
    q = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 2, 2)
    v = torch.tensor([[1.0, 5.0], [3.0, 7.0]], dtype=torch.float64)[None, None]
    out = attention_calls.gated_delta_by_definition(q, k, v, torch.zeros(1), 2)
    kept, beta = math.exp(attention_calls.LOG_DECAY), attention_calls.STRENGTH
    expected = (kept * beta * (1 - beta) * v[0, 0, 0] + beta * v[0, 0, 1]) / math.sqrt(2)
    torch.testing.assert_close(out[0, 0, 1], expected)


def loop(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
    return attention_calls.eager_loop(q, k, v, gate, L, update="delta")


def first_segments_only(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
    out = loop(*(x[:, :, : 3 * L] for x in (q, k, v)), gate, L)
    return torch.nn.functional.pad(out, (0, 0, 0, q.shape[2] - 3 * L))


def first_head_only(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
    out = loop(*(x[:1, :1] for x in (q, k, v)), gate[:1], L)
    return torch.nn.functional.pad(out, (0, 0, 0, 0, 0, q.shape[1] - 1, 0, q.shape[0] - 1))


def local_only(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
    return attention_calls.ours(q, k, v, gate, L, update=None, backend="torch")


def too_short(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
    return loop(q, k, v, gate, L)[:, :, : 3 * L]


def gate_without_gradient(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
    return loop(q, k, v, gate.detach(), L) + 0 * gate.sum()


def one_not_a_number(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
    out = loop(q, k, v, gate, L).clone()
    out[..., 5, 0] = math.nan
    return out


def remembering() -> Callable[..., torch.Tensor]:
    """By where the inputs lie."""
    known: dict[tuple[int, bool], torch.Tensor] = {}

    def run(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
        key = q.data_ptr(), q.requires_grad
        if key not in known:
            known[key] = loop(q, k, v, gate, L)
        return known[key]

    return run


WRONG = {
    "first segments only": Peer(first_segments_only, "delta"),
    "first head only": Peer(first_head_only, "delta"),
    "local called full": Peer(local_only, full=True),
    "remembering": Peer(remembering(), "delta"),
    "too short": Peer(too_short, "delta"),
    "gate without gradient": Peer(gate_without_gradient, "delta"),
    "not a number": Peer(one_not_a_number, "delta"),
    "linear called delta": dataclasses.replace(PEERS["eager loop linear"], update="delta"),
    "a little off": Peer(lambda *x: loop(*x) * (1 + 5e-6), "delta"),
    "another dtype": Peer(lambda *x: loop(*x).double(), "delta"),
}


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_peers_are_not_admitted(name: str, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PEERS, name, WRONG[name])
    try:
        found = admitted(LONG, name, CPU, gradients)
    finally:
        admitted.cache_clear()
    # its gradient is not asked for
    right = name == "gate without gradient" and not gradients
    assert found.status == ("right" if right else "wrong"), found
    assert right or found.reason


def test_half_precision_is_no_licence() -> None:
    case = dataclasses.replace(LONG, dtype="bfloat16", K=32)
    for run in (lambda *x: loop(*x) * 1.03, lambda q, *x: loop(q * 1.06, *x)):
        drawn = draw(case, CPU, copies=1)[0]
        assert "out" in complaint(gated(Peer(run, "delta"), case, CPU, drawn, False))
    # which differs from float64 by as much as it does
    assert complaint(gated(Peer(loop, "delta"), case, CPU, draw(case, CPU, copies=1)[0], False)) == ""


def test_a_worthless_memory_in_half_precision_is_no_measure() -> None:
    """In float16 the sums of keys overflow, and the loop is wrong."""
    case = Case("overflow", T=1024, L=512, K=128, H=1, G=1, peers=(), dtype="float16")
    assert "out" in complaint(at_reduced_length(Peer(loop, "delta"), case, CPU, False))


class Benchmark:
    """What `finish` uses of pytest-benchmark's fixture, by its timer."""

    def __init__(self) -> None:
        self.extra_info: dict[str, Any] = {}
        self.group = ""
        self.seconds: list[float] = []

    def pedantic(self, target: Callable[[], object], rounds: int) -> None:
        for _ in range(rounds):
            start = fixture.replayed()
            target()
            self.seconds.append(fixture.replayed() - start)


def bench_of(benchmark: Any, rows: list[Row]) -> fixture.Bench:
    return fixture.Bench(benchmark, rows.append, CPU, 3, 1.0)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_last_timed_result_is_looked_at(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right when it was admitted, and idle afterwards."""
    kept: list[torch.Tensor] = []
    timing = False

    def run(q: Any, k: Any, v: Any, gate: Any, L: int) -> torch.Tensor:
        if not timing or not kept:
            kept[:] = [loop(q, k, v, gate, L)]
        # of its value no more than the first
        return kept[0].detach() + 0 * (q + k + v).sum() + 0 * gate.sum()

    honest = Peer(loop, "delta")
    monkeypatch.setitem(PEERS, "idle", Peer(lambda *x: run(*x) if timing else loop(*x), "delta"))
    monkeypatch.setitem(PEERS, "honest", honest)
    case = dataclasses.replace(LONG, name=f"idle {direction}")
    rows: list[Row] = []
    try:
        for name in ("idle", "honest"):
            timing = False
            assert admitted(case, name, CPU, direction != "forward").status == "right"
            timing = True
            benchmark: Any = Benchmark()
            arguments = (case, direction, name, bench_of(benchmark, rows))
            if name == "honest":
                bench_segment_attention.test_speed(*arguments)
                assert benchmark.seconds == rows[-1].seconds
                continue
            with pytest.raises(pytest.fail.Exception, match="idle is wrong, and is not timed: in the last timed round"):
                bench_segment_attention.test_speed(*arguments)
            assert benchmark.seconds == []
    finally:
        admitted.cache_clear()
        drawn_for.cache_clear()
    assert [(row.peer, row.status) for row in rows] == [("idle", "wrong"), ("honest", "timed")]


@pytest.mark.parametrize("wrong", ["remembered", "fold"])
def test_decoders_that_are_wrong_are_not_timed(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = DECODERS["eager delta"](STEP, CPU)
    if wrong == "fold":
        made = made._replace(fold=lambda: [1.01 * x for x in DECODERS["eager delta"](STEP, CPU).fold()])
    else:
        outs = [made.run(copy) for copy in range(made.copies)]
        made = made._replace(run=lambda copy: outs[copy])
    monkeypatch.setitem(DECODERS, "wrong", lambda case, device: made)
    rows: list[Row] = []
    benchmark: Any = Benchmark()
    with pytest.raises(pytest.fail.Exception, match="wrong is wrong, and is not timed"):
        bench_segment_attention.test_decode(STEP, "wrong", bench_of(benchmark, rows))
    assert ("last timed round" in rows[0].reason) == (wrong == "remembered")


def test_functions_take_turns_and_every_run_takes_the_next_copy() -> None:
    calls: list[str] = []

    def prepare(name: str) -> Callable[[int], Callable[[], str]]:
        return lambda copy: lambda: (calls.append(f"{name}{copy}"), f"{name}{copy}")[1]

    seen: list[tuple[str, int, object]] = []
    times = take_turns(
        {name: prepare(name) for name in ("base", "own")},
        CPU,
        rounds=(4, 4),
        seconds=math.inf,
        copies=3,
        before_last=lambda name, copy: calls.append(f"alter {name}{copy}"),
        after_last=lambda *x: seen.append(x),
    )
    # warm
    assert calls[:2] == ["base0", "own0"]
    assert calls[2:8] == ["base0", "own1", "own2", "base0", "base1", "own2"]
    assert calls[8:] == ["alter own0", "own0", "alter base1", "base1"]
    assert seen == [("own", 0, "own0"), ("base", 1, "base1")]
    assert {name: len(x) for name, x in times.items()} == {"base": 4, "own": 4}
    assert Times.of([3.0, 1.0, 2.0, 5.0, 4.0, 6.0]) == Times(3.5, 2.0, 5.0)


def test_the_last_round_begins_when_the_time_is_over() -> None:
    runs = {"own": lambda copy: lambda: None}
    for seconds, rounds, count in ((-1.0, (3, 9), 3), (math.inf, (3, 9), 9), (-1.0, (1, 9), 1)):
        assert len(take_turns(runs, CPU, seconds=seconds, rounds=rounds)["own"]) == count


def test_ratios_are_of_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"beside": [1.0, 2.0, 4.0], "ours": [2.0, 4.0, 12.0], "theirs": [1.0, 1.0, 1.0]}

    def turns(prepares: Any, device: Any, *, after_last: Any, **clock: Any) -> dict[str, list[float]]:
        for name in prepares:
            after_last(name, 0, name)
        return times

    monkeypatch.setattr("segattn.bench.speed.suite.take_turns", turns)
    ours, theirs = (
        TimedPeer(
            Row("g", name, "base", "forward"),
            lambda copy: lambda: None,
            wrong=lambda copy, result: "another" if result == "theirs" else "",
            work=floors.Work(6_000_000, 12_000),
            added=1.0,
        )
        for name in ("ours", "theirs")
    )
    timed, refused = by_turns([ours, theirs], lambda copy: lambda: None, CPU, peak=floors.Peak(1e10, 1e10))
    assert timed.ratio == Times.of([3.0, 2.5, 13 / 4])
    assert timed.seconds == [0.003, 0.005, 0.013]
    assert timed.facts["tflops"] == pytest.approx(6e6 / 5e-3 / 1e12)
    assert timed.facts["floor_share"] == pytest.approx(0.6 / 5)
    assert (refused.status, refused.reason, refused.ratio) == ("wrong", "in the last timed round: another", None)


def test_rows_are_read_as_they_were_written() -> None:
    case = {"name": "small", "T": 8, "dtype": "bfloat16"}
    row = Row("g, forward", "ours", "base", "forward", case, errors={"out": 1e-3}, facts={"launches": 3}, memory=5)
    rows = [row.timed([1.0, 2.0, 3.0], [1.0, 1.0, 1.0]), row.refused("wrong", "out"), row.refused("skipped")]
    document = {"machine_info": {"device": "cpu"}} | json.loads(json.dumps(as_json(rows)))
    written = [dataclasses.replace(x, device="cpu") for x in rows]
    # of what was not timed there is no memory
    written[1:] = [dataclasses.replace(x, memory=None, facts=x.facts) for x in written[1:]]
    assert list(from_json(document)) == written


def test_statistics_are_those_of_pytest_benchmark() -> None:
    from pytest_benchmark.stats import Stats

    for data in ([0.3], [0.2, 0.1], [1.0, 2.0, 1.5, 1.25, 9.0, 1.125]):
        stats = Stats()
        for value in data:
            stats.update(value)
        expected = {name: getattr(stats, name) for name in stats.fields} | {"data": data, "iterations": 1}
        found = stats_of(data)
        assert set(found) >= set(expected)
        for name in ("min", "max", "mean", "stddev", "rounds", "median", "ops", "total", "stddev_outliers"):
            assert found[name] == pytest.approx(expected[name]), name


@pytest.mark.parametrize("gradients", [False, True])
def test_the_gate_says_why(monkeypatch: pytest.MonkeyPatch, gradients: bool) -> None:
    def too_large(*inputs: Any) -> torch.Tensor:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 byte")

    def only_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, gate: torch.Tensor, L: int) -> torch.Tensor:
        out = attention_calls.eager_loop(q, k, v, gate, L, update="linear")
        # its value is right, its gradient is not
        return out + out.detach() - out.clone().detach() + (q - q.detach()) * 3

    loop = PEERS["eager loop linear"]
    for name, run in (("too large", too_large), ("only forward", only_forward)):
        monkeypatch.setitem(PEERS, name, dataclasses.replace(loop, run=run))
    monkeypatch.setitem(PEERS, "absent", dataclasses.replace(loop, package="no_such_package"))
    found = {name: admitted(SMALL, name, CPU, gradients) for name in ("too large", "only forward", "absent")}
    admitted.cache_clear()
    assert found["too large"].status == "out of memory"
    assert found["only forward"].status == ("wrong" if gradients else "right")
    assert found["absent"] == Admission("skipped", "no_such_package is not installed")


def test_peers_of_gpus_are_refused_here() -> None:
    for name in ("SDPA cuDNN local", "SDPA efficient local", "fla gated delta rule"):
        assert PEERS[name].refusal(CPU, False, ("forward",)) == "needs a GPU"
    flex = PEERS["FlexAttention local"]
    assert flex.refusal(CPU, False, ("forward",)) is None
    assert flex.refusal(CPU, False, (BOTH,)) == "needs a GPU"
    assert PEERS["eager loop delta"].refusal(CPU, True) == "takes no grouped heads"


@pytest.mark.parametrize("context", [39, 9], ids=["behind segments", "nothing in the memory"])
@pytest.mark.parametrize("name", DECODERS)
def test_decoders_agree_with_their_definitions(name: str, context: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_calls, "FOLDS", 1)
    found = DECODERS[name](dataclasses.replace(STEP, context=context), CPU)
    assert found.copies > 1
    with torch.no_grad():
        for copy in range(found.copies):
            before = found.expected(copy)
            torch.testing.assert_close(found.run(copy).double(), before, rtol=1e-5, atol=1e-5)
            found.alter(copy)
            torch.testing.assert_close(found.run(copy).double(), -before, rtol=1e-5, atol=1e-5)
            assert found.error(copy, found.run(copy)) < 1e-5
            assert found.error(copy, found.run(copy)[:1]) == math.inf
    assert found.fold_error() < 1e-5
    assert (found.fold_ms(STEP.L, CPU) > 0) == (found.fold is not None)


def test_what_decoders_keep() -> None:
    kept = {name: make(STEP, CPU).kept_bytes for name, make in DECODERS.items()}
    assert kept["SDPA, growing cache"] == 2 * 2 * 2 * 39 * 16 * 4
    # a segment's keys and values, a memory of 16 by 16, and its normaliser
    assert kept["segattn delta"] == kept["eager delta"] == 2 * 2 * (2 * 16 * 16 + 16 * 16 + 16) * 4


def test_peak_memory_is_counted() -> None:
    def run() -> None:
        first = torch.zeros(1024, 256)
        second = first + 1
        del first
        second.clone()

    expected = 2 * 1024 * 256 * 4
    # scalars come on top
    assert expected <= peak_bytes(run, CPU) <= expected + 256


def test_ours_holds_less_than_the_loop() -> None:
    long = Case("long", T=16384, L=128, K=32, H=2, G=2, peers=(), dtype="float32")
    drawn = draw(long, CPU, copies=1)
    peaks = {}
    # of the kernels this environment has the interpreter
    for name in ("torch backend delta", "eager loop delta"):
        run = preparation(PEERS[name], long, drawn, BOTH)(0)
        peaks[name] = peak_bytes(lambda run=run: (run(), None)[1], CPU)
    assert peaks["torch backend delta"] < peaks["eager loop delta"]


def test_the_table_has_who_was_not_timed() -> None:
    row = Row("g", "ours", "base", "forward", ratio=Times(2.0, 1.9, 2.1), ms=Times(8.0, 7.0, 9.0), memory=3 << 20)
    rows = [
        row,
        Row("g", "theirs", "base", "forward", status="wrong", reason="errors beyond the gate"),
        Row("h", "ours", "base", "forward", status="skipped", reason="needs a GPU"),
        dataclasses.replace(row, group="h", facts={"floor_share": 0.5, "launches": 4}),
    ]
    (first, lines), (second, others) = table(rows)
    assert (first, second) == ("g: p50 and p20-p80, ratio to base", "h: p50 and p20-p80, ratio to base")
    assert lines[0].split() == "ours 2.00 1.90-2.10 ratio 8.00 7.00-9.00 ms 3.00 MiB".split()
    assert lines[1].split() == "theirs wrong: errors beyond the gate".split()
    assert others[0].split() == "ours skipped: needs a GPU".split()
    assert others[1].split()[9:] == "50% of the floor 4 launches".split()


def test_noise_is_marked() -> None:
    def row(peer: str, direction: str, ms: float, *, low: float = 0.95) -> Row:
        times = Times(ms, ms, ms)
        return Row(direction, peer, "base", direction, {"T": 8}, ratio=Times(1.0, low, 1.05), ms=times)

    rows = [row("a", "backward", 3.0), row("a", BOTH, 2.0), row("b", "backward", 1.0), row("b", BOTH, 2.0)]
    rows.append(row("b", "forward", 1.0, low=0.7))
    reasons = ["", "the backward alone took longer", "", "", "p20-p80 is 35% of the ratio"]
    assert [x.noisy for x in marked(rows)] == reasons
    lines = [line for _, group in table(marked(rows)) for line in group]
    assert [line.partition("noisy")[1] for line in lines] == ["", "", "noisy", "", "noisy"]


def test_the_whole_path(tmp_path: Path) -> None:
    """`pytest bench/` with a tiny workload: a JSON that has every peer, and the table."""
    out = tmp_path / "result.json"
    options = ["--device=cpu", "--workload=1,2,32,8,8", "--rounds=2", "--seconds=0.5", f"--benchmark-json={out}"]
    # compiling is slow
    options += ["-k", "not FlexAttention", "-p", "no:cacheprovider"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    suite = "bench/speed/bench_segment_attention.py"
    done = python("-m", "pytest", "-q", suite, *options, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    own = [name for name in workloads.ANYWHERE if name != "FlexAttention local"]
    timed = {(b["group"], b["extra_info"]["provider"]) for b in result["benchmarks"]}
    other = {(row["group"], row["provider"]): row["reason"] for row in result["not_timed"]}
    group = "T32 L8 K8 H2/2 B1 float32"
    expected = {(f"{group}, {direction}", name) for direction in DIRECTIONS for name in own}
    expected |= {("decode H2/2 K8 L8, 32 behind B1 float32", name) for name in DECODERS}
    assert timed | set(other) == expected
    assert not timed & set(other)
    assert set(other.values()) == {"needs a GPU"}
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        assert info["ratio_fifths"][0] <= info["ratio"] <= info["ratio_fifths"][1]
        assert 0 < info["ms_fifths"][0] <= info["ms"] <= info["ms_fifths"][1]
        assert info.get("peak_bytes", info.get("kept_bytes")) > 0
        assert max(info["errors"].values()) < 1e-5
        assert benchmark["stats"]["median"] * 1e3 == pytest.approx(info["ms"], rel=0.5)
    baselines = {b["extra_info"]["baseline"] for b in result["benchmarks"]}
    assert baselines == {BASELINE, "SDPA, growing cache"}
    assert "node" not in result["machine_info"]
    for name in (*own, "skipped: needs a GPU"):
        assert name in done.stdout
    # one table, and not pytest-benchmark's beneath it
    assert "OPS" not in done.stdout
    assert done.stdout.count("segattn delta") == len(DIRECTIONS) + 1


@pytest.mark.parametrize(
    ("parse", "given", "message"),
    [
        (conftest.a_device, "foo", "must be cpu, cuda, cuda:N or mps, got 'foo'"),
        (conftest.a_device, "meta", "must be cpu, cuda, cuda:N or mps, got 'meta'"),
        (conftest.a_device, "cuda:99", "must be a device that PyTorch finds here, got 'cuda:99'"),
        (conftest.some_rounds, "0", "must be an integer of at least 1, got '0'"),
        (conftest.some_rounds, "1.5", "must be an integer of at least 1, got '1.5'"),
        (conftest.some_seconds, "0", "must be a number above 0, got '0'"),
        (conftest.some_seconds, "nan", "must be a number above 0, got 'nan'"),
        *(
            (conftest.sizes, sizes, f"five positive integers B,H,T,K,L, T a multiple of L, got '{sizes}'")
            for sizes in ("1,2,33,8,8", "1,2,32,8,0", "1,2,x,8,8")
        ),
        (conftest.sizes, "1,2,8,2,1,3,8", "seven positive integers B,S,L,m,layers,heads,width.*got '1,2,8,2,1,3,8'"),
        (conftest.sizes, "1,2,3,4", "must be B,H,T,K,L or B,S,L,m,layers,heads,width, got '1,2,3,4'"),
        (conftest.sizes, "1,2,3,4,5,6", "must be B,H,T,K,L or B,S,L,m,layers,heads,width, got '1,2,3,4,5,6'"),
    ],
)
def test_bad_options_are_named(parse: Callable[[str], object], given: str, message: str) -> None:
    if parse is conftest.sizes:
        pytest.importorskip("transformers")
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        parse(given)


def test_a_bad_option_is_one_usage_error() -> None:
    done = python("-m", "pytest", "bench/", "--workload=1,2,3", "-p", "no:cacheprovider", cwd=ROOT)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    printed = done.stdout + done.stderr
    assert printed.count("argument --workload: must be B,H,T,K,L or B,S,L,m,layers,heads,width, got '1,2,3'") == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_name_peers_that_there_are(device: str) -> None:
    calls, steps = workloads.suite(device)
    assert all(set(case.peers) <= set(PEERS) and case.T % case.L == 0 for case in calls)
    assert len({case.name for case in calls}) == len(calls)
    assert {case.dtype for case in (*calls, *steps)} == ({"bfloat16", "float16"} if device == "cuda" else {"float32"})
    chosen = workloads.suite(device, "float16")[0]
    assert {x.dtype for x in chosen} == {"float16"}
    assert len({case.name for case in chosen}) == len(chosen)
    # of the sweep, its lengths double
    lengths = [case.T for case in calls if case.name.endswith("by length")]
    assert len(lengths) >= 4
    assert all(y == 2 * x for x, y in itertools.pairwise(lengths))
    if device == "cuda":
        assert (calls, steps) == (workloads.CASES, workloads.DECODES)


def test_a_cache_that_has_no_room_does_not_grow() -> None:
    names = {case: names_of(case) for case in workloads.DECODES}
    assert {case.context for case, found in names.items() if case.B == 1 and found[0] == GROWING_CACHE} == {
        1 << 10, 4 << 10, 64 << 10, 1 << 20,
    }  # fmt: skip
    assert {case.context for case, found in names.items() if case.B == 64 and found[0] == EAGER} == {64 << 10, 1 << 20}
    assert all(found[-2:] == (EAGER, "segattn delta") for found in names.values())
