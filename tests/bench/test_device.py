"""The run on a device: its whole path on small shapes, what it judges wrong, and what it does when time runs out."""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import python

from segattn.bench.device import goals, tune
from segattn.bench.device import run as device_run
from segattn.bench.device.cases import measure_case
from segattn.bench.device.worker import Outcome, Worker
from segattn.bench.planner import floors
from segattn.bench.report.records import read
from segattn.bench.speed.peers import BASELINE, PEERS
from segattn.bench.speed.workloads import CASES, DECODES, TINY_CASES, TINY_DECODES, TINY_MAIN
from segattn.kernels.triton.configs import Tile

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """From elsewhere, and without what an installation adds to the path."""
    return python(str(ROOT / "bench" / "on_device"), *arguments, cwd="/", env=ENVIRONMENT)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], str]:
    pytest.importorskip("triton")
    out = tmp_path_factory.mktemp("run") / "result.json"
    done = command("--tiny", f"--out={out}")
    return done, out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(finished: tuple[subprocess.CompletedProcess[str], str]) -> dict[str, Any]:
    return json.loads(finished[1])


def cases_in(document: dict[str, Any]) -> list[str]:
    """The names of its cases, in their order."""
    rows = [*(x["extra_info"] for x in document["benchmarks"]), *document["not_timed"]]
    return list(dict.fromkeys(row["case"]["name"] for row in rows))


def timed_in(document: dict[str, Any], name: str, direction: str) -> dict[str, dict[str, Any]]:
    """What is known of the timed rows of a case, by peer."""
    rows = [x["extra_info"] for x in document["benchmarks"]]
    return {x["provider"]: x for x in rows if (x["case"]["name"], x["direction"]) == (name, direction)}


def refused_in(document: dict[str, Any], name: str, direction: str) -> dict[str, tuple[str, str]]:
    rows = [x for x in document["not_timed"] if (x["case"]["name"], x["direction"]) == (name, direction)]
    return {x["provider"]: (x["status"], x["reason"]) for x in rows}


def test_the_whole_path(finished: tuple[subprocess.CompletedProcess[str], str], document: dict[str, Any]) -> None:
    done, _ = finished
    assert done.returncode == 0, done.stdout + done.stderr
    assert document["skipped"] == []
    assert set(cases_in(document)) == {x.name for x in (*TINY_CASES, *TINY_DECODES)}
    assert 0 < document["spent_s"] < document["budget_s"]
    for line in ("tiny float32", "segattn delta", "goals", "tiny context 4096 float32", "profile of segattn delta"):
        assert line in done.stdout


def test_it_says_what_it_ran_on_and_not_where(
    finished: tuple[subprocess.CompletedProcess[str], str], document: dict[str, Any]
) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    if head.returncode == 0:
        assert document["commit_info"]["id"] == head.stdout.strip()
        assert isinstance(document["commit_info"]["dirty"], bool)
    assert document["machine_info"]["torch"] == torch.__version__
    assert document["machine_info"]["python"] == platform.python_version()
    assert document["machine_info"]["device"].startswith("cpu ")
    assert str(ROOT) not in finished[1]
    # a host may be called by a word
    if len(socket.gethostname()) > 5:
        assert socket.gethostname() not in finished[1]


def test_kernels_are_checked_twice_and_under_every_tile(document: dict[str, Any]) -> None:
    assert [(record["dtype"], record["number"]) for record in document["check"]] == [("float32", 1), ("float32", 2)]
    assert all(record["passed"] and record["compared"] == 1 for record in document["check"])
    assert document["same_twice"] == {"float32": True}
    (tiles,) = document["tiles"]
    assert tiles["passed"]
    assert {"attend_kernel", "query_grad_kernel", "key_grad_kernel", "scan_kernel"} <= set(tiles["tiles"])
    errors = [x for found in tiles["errors"]["triton"]["float32"].values() for x in found.values()]
    assert all(0 <= error < 1e-5 for error in errors)


def test_bits_of_outputs_are_kept(document: dict[str, Any]) -> None:
    (kept,) = document["bits"]
    assert (kept["call"], kept["dtype"], kept["target"]) == ("decode", "bfloat16", "interpreter")
    assert kept["outputs"].keys() == {"out"}
    # of 2 rows, 6 heads and 64 columns every third element
    assert len(base64.b64decode(kept["outputs"]["out"]["sample"])) == 2 * 256


def test_right_peers_are_timed_beside_their_floors(document: dict[str, Any]) -> None:
    sizes = TINY_MAIN.sizes()
    right = {"segattn delta", "segattn local", "SDPA flash local", "eager loop delta"}
    for direction in TINY_MAIN.directions:
        found = timed_in(document, "tiny", direction)
        assert set(found) == right
        refused = dict.fromkeys(("SDPA cuDNN local", "FlexAttention local"), ("skipped", "needs a GPU"))
        assert refused_in(document, "tiny", direction) == refused
        for name, row in found.items():
            assert max(row["errors"].values()) < 1e-5
            assert row["baseline"] == BASELINE
            assert 0 < row["ms_fifths"][0] <= row["ms"] <= row["ms_fifths"][1]
            assert row["ratio"] > 0
            work = floors.forward(sizes, PEERS[name].update)
            if direction == "forward":
                assert (row["operations"], row["bytes"]) == (work.operations, work.bytes)
            assert row["operations"] > 0
            assert row["tflops"] == pytest.approx(row["operations"] / row["ms"] / 1e9, rel=1e-3)
    both = timed_in(document, "tiny", "forward + backward")
    # out and the three gradients are 32 rows of 16 float32 each, by whoever makes them
    assert both["SDPA flash local"]["peak_bytes"] >= 4 * 32 * 16 * 4
    assert timed_in(document, "tiny", "forward")["segattn local"]["launches"] == 1
    assert both["segattn delta"]["launches"] > 5
    for direction in TINY_CASES[2].directions:
        assert refused_in(document, "tiny grouped", direction) == {
            "eager loop delta": ("skipped", "takes no grouped heads")
        }
        assert set(timed_in(document, "tiny grouped", direction)) == {"torch backend delta"}


def test_decode_is_measured_and_holds_the_same_at_every_context(document: dict[str, Any]) -> None:
    for case in TINY_DECODES:
        found = timed_in(document, case.name, "decode")
        assert set(found) == {"SDPA, growing cache", "segattn delta", "eager delta"}
        assert refused_in(document, case.name, "decode")["segattn delta graph"] == ("skipped", "no GPU")
        # a segment of 32 keys and values of width 16; a memory of 16 by 16 and a normaliser
        kept = {name: x["kept_bytes"] for name, x in found.items()}
        assert kept["segattn delta"] == kept["eager delta"] == (2 * 32 * 16 + 16 * 17) * 4
        assert kept["SDPA, growing cache"] == 2 * case.context * 16 * 4
        assert {x["baseline"] for x in found.values()} == {"SDPA, growing cache"}
        ours = found["segattn delta"]
        assert ours["ms"] > ours["fold_ms"] > 0
        assert ours["errors"]["out"] < 2e-6
        assert ours["launches"] == 1


def test_the_report_and_pytest_benchmark_read_it(finished: tuple[Any, str], tmp_path: Path) -> None:
    path = tmp_path / "device.json"
    path.write_text(finished[1], encoding="utf-8")
    result = read(path)
    groups = {row.group for row in result.rows}
    assert {"tiny float32, forward", "tiny context 64 float32"} <= groups
    assert "PyTorch" in result.conditions
    pytest.importorskip("pytest_benchmark")
    done = python("-m", "pytest_benchmark", "compare", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "tiny float32, forward, segattn delta" in done.stdout


@pytest.mark.parametrize("module", ["run", "jobs", "tune"])
def test_it_needs_nothing_but_the_checkout_torch_triton_and_numpy(module: str) -> None:
    extras = ("pytest", "pytest_benchmark", "transformers", "safetensors", "rich", "typer", "matplotlib", "tqdm")
    blocked = f"import sys; sys.modules.update(dict.fromkeys({extras!r}))"
    done = python("-c", f"{blocked}; import segattn.bench.device.{module}", env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr


def test_goals_are_computed_from_the_timings(document: dict[str, Any]) -> None:
    found = {goal["goal"]: goal for goal in document["goals"]}

    def ratio(above: str, below: str, direction: str) -> float:
        rows = timed_in(document, "tiny", direction)
        return rows[above]["ms"] / rows[below]["ms"]

    slower = found["tiny: segattn delta ÷ SDPA flash local, forward"]
    assert slower["measured"] == pytest.approx(ratio("segattn delta", "SDPA flash local", "forward"), rel=1e-3)
    # the interpreter is slow
    assert slower["met"] is False
    eager = found["tiny: eager loop delta ÷ segattn delta, forward + backward"]
    expected = ratio("eager loop delta", "segattn delta", "forward + backward")
    assert eager["measured"] == pytest.approx(expected, rel=1e-3)
    streaming = found["streaming: bytes held at the longest context ÷ at the shortest"]
    assert (streaming["measured"], streaming["met"]) == (1.0, True)
    launches = found["decode: launches per token and layer"]
    assert (launches["measured"], launches["met"]) == (1, True)
    assert all(goal["measured"] is not None for goal in document["goals"])
    for record in document["profile"]:
        assert record["total_ms"] > 0
        assert record["tiles"]["attend_kernel"]["launches"] == 1


def test_a_goal_met_and_a_goal_missed() -> None:
    def with_ms(ours: float) -> dict[str, Any]:
        rows = [
            {"provider": name, "direction": "forward", "case": {"name": "tiny"}, "ms": ms}
            for name, ms in (("SDPA flash local", 2.0), ("segattn delta", ours))
        ]
        return {"benchmarks": [{"extra_info": row} for row in rows]}

    for ours, met in ((1.9, True), (2.1, False)):
        judged = goals.judge(with_ms(ours), tiny=True)
        assert (judged[0]["measured"], judged[0]["met"]) == (pytest.approx(ours / 2), met)
        assert judged[1]["met"] is None


def test_every_goal_of_a_full_run_has_its_cases() -> None:
    """Ratios are of peers that their case times."""
    names = {case.name: case for case in CASES}
    assert len(names) == len(CASES)
    for goal in goals.judge({}, tiny=False):
        case, _, rest = goal["goal"].partition(": ")
        if " ÷ " in rest and case in names:
            pair = rest.split(",")[0].split(" ÷ ")
            assert set(pair) <= set(names[case].peers), goal["goal"]
    assert {(case.B, case.context) for case in DECODES} >= {(64, 4096), (64, 1 << 20), (1, 1 << 20)}


def test_wrong_peers_are_flagged_and_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {
        "wrong rule": dataclasses.replace(PEERS["eager loop linear"], update="delta"),
        "not a number": dataclasses.replace(
            PEERS["eager loop linear"], run=lambda q, k, v, gate, L: (q + k + v) * torch.nan
        ),
        "broken": dataclasses.replace(PEERS["eager loop linear"], run=lambda q, k, v, gate, L: q @ k),
        "right": PEERS["eager loop linear"],
    }
    for name, peer in others.items():
        monkeypatch.setitem(PEERS, name, peer)
    names = ("wrong rule", "not a number", "broken", "right", "segattn delta")
    case = dataclasses.replace(TINY_MAIN, T=64, peers=names)
    notes: list[dict[str, Any]] = []
    excluded = {"segattn delta": "its process ended with status 1"}
    document = measure_case(case, CPU, floors.Peak(1e12, 1e11), notes.append, excluded)
    for direction in case.directions:
        assert set(timed_in(document, case.name, direction)) == {"right"}
        refused = refused_in(document, case.name, direction)
        assert {name: status for name, (status, _) in refused.items()} == {
            "wrong rule": "wrong", "not a number": "wrong", "broken": "failed", "segattn delta": "failed",
        }  # fmt: skip
        assert refused["not a number"][1] == "out is not finite"
        assert refused["segattn delta"][1] == excluded["segattn delta"]
    wrong = next(row for row in document["not_timed"] if row["provider"] == "wrong rule")
    assert max(wrong["errors"].values()) > 1e-2
    timed = timed_in(document, case.name, "forward")["right"]
    assert timed["floor_share"] == pytest.approx(timed["floor_ms"] / timed["ms"], rel=1e-3)
    assert [note["at"] for note in notes] == [*case.peers, None]


def test_a_baseline_that_fails_gives_way_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel for this device")

    monkeypatch.setitem(PEERS, BASELINE, dataclasses.replace(PEERS[BASELINE], run=broken))
    case = dataclasses.replace(
        TINY_MAIN, peers=(BASELINE, "eager loop delta", "eager loop linear"), directions=("forward",)
    )
    document = measure_case(case, CPU, None, lambda line: None)
    assert refused_in(document, case.name, "forward") == {
        BASELINE: ("failed", "RuntimeError: no kernel for this device")
    }
    timed = timed_in(document, case.name, "forward")
    assert set(timed) == {"eager loop delta", "eager loop linear"}
    assert {x["baseline"] for x in timed.values()} == {"eager loop delta"}


def test_what_the_budget_does_not_reach_is_named(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    done = command("--tiny", "--budget=5", f"--out={out}")
    found = json.loads(out.read_text())
    assert found["benchmarks"] == found["not_timed"] == []
    skipped = {(row["part"], row["job"]): row["reason"] for row in found["skipped"]}
    for case in TINY_CASES:
        assert skipped["timings", case.name] == "the budget is spent"
        assert f"skipped timings {case.name}: the budget is spent" in done.stdout
    # nothing was checked, so nothing is known to be right
    assert done.returncode == 1


def test_an_interruption_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(run: device_run.Run) -> None:
        run.keep("tiles", {"dtype": "float32", "passed": True, "failures": {}})
        raise KeyboardInterrupt

    monkeypatch.setattr(device_run, "whole_run", stopped)
    out = tmp_path / "result.json"
    assert device_run.main(["--tiny", f"--out={out}", "--commit=abc"]) == 130
    found = json.loads(out.read_text())
    assert found["interrupted"]
    assert found["commit_info"]["id"] == "abc"
    assert len(found["tiles"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


CHILD = """
import json, sys, time
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps({"at": "peer"}), flush=True)
    if job["do"] == "hang": time.sleep(60)
    if job["do"] == "die": sys.exit(7)
    if job["do"] == "lose": print(json.dumps({"error": "illegal access", "lost": True}), flush=True)
    print(json.dumps({"record": job["do"]} if job["do"] == "well" else {"error": "too large"}), flush=True)
"""


def test_a_worker_outlives_its_processes() -> None:
    with Worker(dict(os.environ), (sys.executable, "-c", CHILD)) as worker:
        assert worker.do({"do": "well"}, 20) == Outcome(record="well")
        assert worker.do({"do": "die"}, 20) == Outcome(None, "its process ended with status 7", "peer")
        assert worker.do({"do": "well"}, 20).record == "well"
        assert worker.do({"do": "hang"}, 0.5) == Outcome(None, "ended after 0 s", "peer")
        assert worker.do({"do": "fail"}, 20) == Outcome(reason="too large")
        assert worker.do({"do": "lose"}, 20) == Outcome(reason="illegal access", at="peer")
        assert worker.do({"do": "well"}, 20).record == "well"
    assert worker.process is None


def test_peers_that_end_the_process_are_left_out(tmp_path: Path) -> None:
    class Stub(Worker):
        def do(self, job: dict[str, Any], seconds: float) -> Outcome:
            if "bad" not in job["excluded"]:
                return Outcome(reason="its process ended with status 3", at="bad")
            return Outcome(record={"not_timed": [dict(job["excluded"])]})

    run = device_run.Run(device_run.Settings(tmp_path / "result.json", 60.0, True, 1, None))
    run.do(Stub({}), device_run.make_job("timings", True, 30, name="tiny"), 30)
    assert run.document["not_timed"] == [{"bad": "its process ended with status 3"}]


class TestTune:
    TAKEN = ("BLOCK_M", "BLOCK_N", "CHUNK", "num_warps", "num_stages")
    JOB = {"kernel": "attend_kernel", "K": 16, "V": 16, "L": 16, "T": 16, "H": 1, "G": 1, "dtype": "float32"} | {
        "update": "linear", "gated": True, "part": "tune", "tile": None, "describe": False
    }  # fmt: skip

    def test_candidates_are_sensible(self) -> None:
        tile = dataclasses.asdict(Tile())
        found = list(tune.first_round(self.TAKEN, tile, 128))
        assert {(x["BLOCK_M"], x["BLOCK_N"], x["num_warps"]) for x in found} >= {(128, 64, 8), (64, 64, 4)}
        assert not any(max(x["BLOCK_M"], x["BLOCK_N"]) < 32 and x["num_warps"] == 8 for x in found)
        assert all(x["ROWS"] == tile["ROWS"] for x in found)
        second = list(tune.second_round(self.TAKEN, found[:2], 128))
        assert {x["num_stages"] for x in second} == {1, 2, 3, 4}
        assert {x["CHUNK"] for x in second} == {16, 32, 64, 128}

    def test_rows_are_source(self) -> None:
        tile = dataclasses.asdict(Tile(BLOCK_M=128, num_warps=8))
        row = tune.as_row(self.JOB, "sm_90", self.TAKEN, tile, "1.00 ms")
        ((key, value),) = eval("{" + row + "\n}", {"Tile": Tile}).items()
        assert (key, value) == (("attend_kernel", "sm_90", 32, 16), Tile(BLOCK_M=128, num_warps=8))

    def test_wrong_and_failing_tiles_are_dropped(self, capsys: pytest.CaptureFixture[str]) -> None:
        about = {"kernels": ["attend_kernel"], "target": "sm_90", "taken": list(self.TAKEN)}

        class Stub(Worker):
            def do(self, job: dict[str, Any], seconds: float) -> Outcome:
                if job["describe"]:
                    return Outcome(record=about | {"tile": dataclasses.asdict(Tile())})
                tile = job["tile"] or dataclasses.asdict(Tile())
                if tile["BLOCK_N"] == 16:
                    return Outcome(reason="RuntimeError: attend_kernel does not fit")
                right = tile["BLOCK_M"] == 32
                return Outcome(
                    record={"ms": 1.0 / tile["num_stages"], "right": right, "error_share": 0.1 if right else 9.0}
                )

        given = tune.parse(["--kernel", "attend_kernel", "--tiny"])
        found_about, found = tune.search(self.JOB, given, Stub({}))
        assert found_about["ms"] == 0.5
        assert [(ms, x["BLOCK_M"], x["BLOCK_N"]) for ms, x in found] == [(0.5, 32, 32), (1.0, 32, 32)]
        told = capsys.readouterr().err
        assert "WRONG" in told
        assert "does not fit" in told

    def test_a_candidate_runs(self) -> None:
        pytest.importorskip("triton")
        environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "src")}
        with Worker(environment) as worker:
            about = worker.do(self.JOB | {"describe": True}, 60).record
            assert about["taken"] == list(self.TAKEN)
            tried = worker.do(self.JOB | {"tile": about["tile"] | {"BLOCK_N": 32}}, 60).record
        assert tried["right"]
        assert tried["ms"] > 0
