"""The benchmark's providers all compute what they are said to, who does not is not timed, and its whole path runs."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="needs segattn[bench]")
pytest.importorskip("infini_transformer_pytorch", reason="needs segattn[bench]")

from segattn.bench import attention_calls, cases, suite
from segattn.bench.cases import BOTH, DIRECTIONS, Case, DecodeCase
from segattn.bench.decode_calls import DECODERS
from segattn.bench.device_cases import draw, errors_of, is_wrong, preparation
from segattn.bench.measure import peak_bytes
from segattn.bench.peers import BASELINE, PEERS, Peer, from_segments, to_segments
from segattn.bench.suite import Row, admitted, table
from segattn.bench.timing import Times

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")
# the kernels, which are interpreted here, have their own tests
HERE = tuple(name for name, x in PEERS.items() if x.refusal(CPU, False) is None and not (x.compiled or x.ours))
SMALL = Case("small", T=48, L=16, K=16, H=3, G=3, peers=HERE, B=2, dtype="float32")
STEP = DecodeCase("step", B=2, H=4, G=2, K=16, L=16, context=39, dtype="float32")


@pytest.mark.parametrize("name", HERE)
def test_providers_agree_with_the_reference(name: str) -> None:
    errors = errors_of(PEERS[name], SMALL, draw(SMALL, CPU)[0])
    assert set(errors) == {"out", "dq", "dk", "dv"}
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("name", HERE)
def test_all_rows_of_a_batch_are_computed(name: str) -> None:
    """The gate looks at the first row and head; here the others are looked at too."""
    peer, (drawn, *_) = PEERS[name], draw(SMALL, CPU)
    out = preparation(peer, SMALL, [drawn], "forward")(0)()
    assert isinstance(out, torch.Tensor)
    out = from_segments(out, SMALL.B) if peer.of_segments else out
    definition = Peer(
        lambda q, k, v, gate, L: attention_calls.ours(
            q, k, v, gate, SMALL.T if peer.full else L, update=peer.update, backend="reference"
        )
    )
    expected = preparation(definition, SMALL, [drawn], "forward")(0)()
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_segments_of_several_rows() -> None:
    x = torch.randn(2, 3, 12, 5)
    segments = to_segments(x, 4)
    assert torch.equal(segments[4], x[1, :, 4:8])
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


def test_a_wrong_provider_is_found() -> None:
    wrong = dataclasses.replace(PEERS["eager loop linear"], update="delta")
    errors = errors_of(wrong, SMALL, draw(SMALL, CPU)[0])
    assert errors["out"] > 1e-2
    assert is_wrong(wrong, "float32", errors)


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
    suite.admitted.cache_clear()
    assert found["too large"]["status"] == "out of memory"
    assert found["only forward"]["status"] == ("wrong" if gradients else "right")
    assert found["absent"] == {"status": "skipped", "reason": "no_such_package is not installed"}


def test_providers_of_gpus_are_refused_here() -> None:
    for name in ("SDPA cuDNN local", "SDPA efficient local", "fla gated delta rule"):
        assert PEERS[name].refusal(CPU, False, ("forward",)) == "needs a GPU"
    flex = PEERS["FlexAttention local"]
    assert flex.refusal(CPU, False, ("forward",)) is None
    assert flex.refusal(CPU, False, (BOTH,)) == "needs a GPU"
    assert PEERS["eager loop delta"].refusal(CPU, True) == "takes no grouped heads"


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_agree_with_their_definitions(name: str) -> None:
    found = DECODERS[name](STEP, CPU)
    with torch.no_grad():
        torch.testing.assert_close(found.run().double(), found.expected(), rtol=1e-5, atol=1e-5)
    assert (found.fold_ms(STEP.L, CPU) > 0) == (found.fold is not None)


def test_what_decoders_keep() -> None:
    kept = {name: make(STEP, CPU).kept_bytes for name, make in DECODERS.items()}
    assert kept["SDPA, growing cache"] == 2 * 2 * 2 * 39 * 16 * 4
    # a segment's keys and values, a memory of 16 by 16, and its normaliser
    assert kept["segattn delta"] == kept["eager delta"] == 2 * 2 * (2 * 16 * 16 + 16 * 16 + 16) * 4


def test_the_growing_cache_is_all_attended_to() -> None:
    """The first token of the text has its part in the last one's output."""
    first = DECODERS["SDPA, growing cache"](STEP, CPU)
    before = first.run()
    cache = first.run.__closure__
    assert cache is not None
    (values,) = [x.cell_contents for x in cache if getattr(x.cell_contents, "shape", ()) == (2, 2, 39, 16)][1:]
    values[:, :, 0] += 10.0
    assert not torch.allclose(first.run(), before)


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
    rows = [
        Row("g", "ours", "base", ratio=Times(2.0, 1.5, 2.5, 5), milliseconds=Times(8.0, 7.0, 9.0, 5), memory=3 << 20),
        Row("g", "theirs", "base", "wrong", "errors beyond the gate"),
        Row("h", "ours", "base", "skipped", "needs a GPU"),
    ]
    (first, lines), (second, others) = table(rows)
    assert (first, second) == ("g: p50 and p20-p80, ratio to base", "h: p50 and p20-p80, ratio to base")
    assert lines[0].split() == "ours 2.00 1.50-2.50 ratio 8.00 7.00-9.00 ms 3.00 MiB".split()
    assert lines[1].split() == "theirs wrong: errors beyond the gate".split()
    assert others[0].split() == "ours skipped: needs a GPU".split()


def test_the_whole_path(tmp_path: Path) -> None:
    """`pytest bench/` with a tiny workload: a JSON that has every provider, and the table."""
    out = tmp_path / "result.json"
    options = ["--workload=1,2,32,8,8", "--rounds=2", f"--benchmark-json={out}"]
    # compiling is slow
    options += ["-k", "not FlexAttention", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "bench/bench_segment_attention.py", *options],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    named = [name for name in cases.ANYWHERE if name != "FlexAttention local"]
    timed = {(b["group"], b["extra_info"]["provider"]) for b in result["benchmarks"]}
    other = {(row["group"], row["provider"]): row["reason"] for row in result["not_timed"]}
    group = "T32 L8 K8 H2/2 B1 float32"
    expected = {(f"{group}, {direction}", name) for direction in DIRECTIONS for name in named}
    expected |= {("decode H2/2 K8 L8, 32 behind B1 float32", name) for name in DECODERS}
    assert timed | set(other) == expected
    assert not timed & set(other)
    assert set(other.values()) == {"needs a GPU"}
    for benchmark in result["benchmarks"]:
        info = benchmark["extra_info"]
        assert info["ratio_fifths"][0] <= info["ratio"] <= info["ratio_fifths"][1]
        assert 0 < info["ms_fifths"][0] <= info["ms"] <= info["ms_fifths"][1]
        assert info.get("peak_bytes", info.get("kept_bytes")) > 0
        assert info["error"] < 1e-5
    baselines = {b["extra_info"]["baseline"] for b in result["benchmarks"]}
    assert baselines == {BASELINE, "SDPA, growing cache"}
    assert "node" not in result["machine_info"]
    for name in (*named, "skipped: needs a GPU"):
        assert name in done.stdout


@pytest.mark.parametrize("sizes", ["1,2,3", "1,2,32,8,0", "1,2,33,8,8", "1,2,x,8,8", ""])
def test_bad_workloads_are_named(sizes: str) -> None:
    with pytest.raises(ValueError, match=f"five positive integers B,H,T,K,L, T a multiple of L, got '{sizes}'"):
        cases.given([sizes], "float32")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_suites_name_providers_that_there_are(device: str) -> None:
    calls, steps = cases.suite(device)
    assert all(set(case.peers) <= set(PEERS) and case.T % case.L == 0 for case in calls)
    assert len({case.name for case in calls}) == len(calls)
    assert {case.dtype for case in (*calls, *steps)} == {"bfloat16" if device == "cuda" else "float32"}
    assert {x.dtype for x in cases.suite(device, "float16")[0]} == {"float16"}
    # of the sweep, its lengths double
    lengths = [case.T for case in calls if case.name.endswith("by length")]
    assert len(lengths) >= 4
    assert all(y == 2 * x for x, y in itertools.pairwise(lengths))
