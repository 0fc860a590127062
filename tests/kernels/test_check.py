"""`segattn check` passes what is right, and catches what is wrong, not finite, or not the same twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_defaults import defaults

from segattn.kernels import attention
from segattn.kernels.check import check
from segattn.kernels.check.calls import Call, directions, evaluate, gate_gradient_size, sink_gradient_size, tensors
from segattn.kernels.check.check import OptionError, run_check
from segattn.kernels.check.gates import GATES, judge
from segattn.kernels.check.report import CheckReport, Row
from segattn.kernels.check.table import SMALL, TABLE, call_of, calls_of
from segattn.kernels.state import MemoryState, SegmentOutput

commands = pytest.importorskip("segattn.cli.main")
from rich.console import Console
from typer.testing import CliRunner, Result

from segattn.cli.check import Comparisons

CPU = torch.device("cpu")
FEW = {name: call for name, call in calls_of("small").items() if name in ("rows", "packed", "local")}


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[SegmentOutput], SegmentOutput]) -> None:
    """A torch backend whose results pass through `change`, and a table of few calls."""
    right = attention.torch_attention
    monkeypatch.setattr(attention, "torch_attention", lambda *arguments: change(right(*arguments)))
    monkeypatch.setattr(check, "calls_of", lambda size: FEW)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(commands.app, ["check", "--device", "cpu", "--backend", "torch", *arguments])


def test_the_torch_backend_passes(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    result = command("--json", str(path))
    assert result.exit_code == 0, result.output
    small = calls_of("small")
    assert f"{3 * len(small)} comparisons of {len(small)} calls, each run twice, bitwise equal\npassed" in result.stdout
    report = json.loads(path.read_text())
    assert (report["passed"], report["failures"], report["size"]) == (True, [], "small")
    assert report["versions"]["torch"] == torch.__version__
    assert report["errors"]["torch"].keys() == GATES.keys()
    for dtype, calls in report["errors"]["torch"].items():
        assert calls.keys() == small.keys()
        # rounding shows in every dtype: an error of 0 would mean that nothing was compared
        assert GATES[dtype].outputs / 100 < calls["rows"]["out"] < GATES[dtype].outputs
    shown = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    worst = [row for row in report["worst"] if (row["dtype"], row["output"]) == ("float16", "dq")]
    assert len(worst) == 1
    assert worst[0]["error"] == max(calls["dq"] for calls in report["errors"]["torch"]["float16"].values())
    error, gate = f"{worst[0]['error']:.1e}", f"{worst[0]['gate']:.0e}"
    assert any(row[:5] == ["torch", "float16", "dq", error, gate] for row in shown)


def test_a_wrong_output_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda found: found._replace(out=found.out * 1.001))
    result = command("--dtype", "float32")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    for name in FEW:
        assert f"FAILED torch, float32, '{name}', out: error 1.00e-03, gate 2e-06, above the gate" in failed
    assert "'rows', memory" not in result.stdout


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 1.01


def test_a_wrong_gradient_of_the_state_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(found: SegmentOutput) -> SegmentOutput:
        if found.state is None:
            return found
        return found._replace(state=MemoryState(_WrongGradient.apply(found.state.memory), found.state.normalizer))

    spoil(monkeypatch, change)
    report = run_check("cpu", ["torch"], ["float32"])
    failed = {row.output for row in report.failures if row.call == "rows"}
    assert failed == {"dv", "dmemory_k", "dmemory", "dnormalizer"}
    assert not [row for row in report.failures if row.call == "local"]


def test_results_that_change_from_run_to_run_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    def change(found: SegmentOutput) -> SegmentOutput:
        nonlocal runs
        runs += 1
        return found._replace(out=found.out * (1 + 2e-7 * (runs % 2)))

    spoil(monkeypatch, change)
    result = command("--dtype", "float32")
    assert result.exit_code == 1
    assert "FAILED torch, float32, 'rows', out: error" in result.stdout
    assert result.stdout.count("gate 2e-06, differs between two runs\n") == len(FEW)
    assert f"each run twice, {len(FEW)} of them not bitwise equal" in result.stdout


def test_what_is_not_finite_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def change(found: SegmentOutput) -> SegmentOutput:
        last = torch.zeros_like(found.out)
        last[..., -1, 0] = math.nan
        return found._replace(out=found.out + last)

    spoil(monkeypatch, change)
    result = command("--dtype", "bfloat16", "--json", str(tmp_path / "check.json"))
    assert result.exit_code == 1
    assert "FAILED torch, bfloat16, 'rows', out: not finite" in result.stdout
    report = json.loads((tmp_path / "check.json").read_text(), parse_constant=pytest.fail)
    assert report["errors"]["torch"]["bfloat16"]["rows"]["out"] is None
    assert [row["problem"] for row in report["failures"]] == ["not finite"] * len(FEW)
    assert report["worst"][0]["error"] is None


def test_a_backend_that_raises_fails_and_the_rest_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(found: SegmentOutput) -> SegmentOutput:
        if found.state is None:
            raise RuntimeError("does not fit\nsecond line")
        return found

    spoil(monkeypatch, change)
    result = command("--dtype", "float16")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if line.startswith("FAILED")]
    assert failed == ["FAILED torch, float16, 'local', out, dq, dk, dv: raised RuntimeError: does not fit"]
    assert f"{len(FEW)} comparisons of {len(FEW)} calls" in result.stdout
    assert "1 could not be measured" in result.stdout


def test_missing_and_misshapen_outputs_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda found: SegmentOutput(found.out[:, :, :-1], None))
    problems = {(row.call, row.output): row.problem for row in run_check("cpu", dtypes=["float32"]).failures}
    assert problems["rows", "memory"] == "missing"
    assert problems["rows", "out"] == "of shape [1, 2, 20, 16], expected [1, 2, 21, 16]"


@pytest.mark.parametrize(
    ("output", "error", "baseline", "expected"),
    [
        ("out", 3.9e-3, 3.9e-3, []),
        ("out", 4.1e-3, 3.9e-3, ["above the gate"]),
        ("out", 3.9e-3, 2.5e-3, ["1.6 times the error of torch, at most 1.5 allowed"]),
        ("dq", 3.9e-3, 2.5e-3, []),
        ("dq", 5.9e-3, 2.5e-3, ["2.4 times the error of torch, at most 2 allowed"]),
        # one rounding to bfloat16 is free
        ("memory", 2.2e-3, 1e-7, []),
        ("out", 5e-3, 1e-3, ["above the gate", "5.0 times the error of torch, at most 1.5 allowed"]),
        ("dq", 9e-3, None, []),
        ("dq", 1.1e-2, None, ["above the gate"]),
    ],
)
def test_errors_are_judged_by_gate_and_baseline(
    output: str, error: float, baseline: float | None, expected: list[str]
) -> None:
    assert judge(output, error, "bfloat16", FEW["rows"], baseline) == expected


def test_gates_depend_on_the_rule() -> None:
    gate = GATES["bfloat16"]
    calls = calls_of("small")
    assert [gate.of("out", calls["rows"]), gate.of("dq", calls["rows"])] == [4e-3, 1e-2]
    assert [gate.of("dq", calls["linear"]), gate.of("dq", calls["local"])] == [6e-3, 6e-3]


@pytest.mark.parametrize("other", [{"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_the_default_dtype_and_device_change_no_tensor(other: dict[str, Any]) -> None:
    call = calls_of("small")["rows"]

    def drawn() -> list[Tensor]:
        made = tensors(call, torch.float32, CPU)
        return [*made.values(), *directions(made).values()]

    wanted = drawn()
    with defaults(**other):
        mine = drawn()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(mine, wanted, strict=True))


def test_both_sizes_hold_calls_of_every_kind() -> None:
    small, full = calls_of("small"), calls_of("full")
    assert full.keys() == TABLE.keys() > small.keys()
    for calls in (small, full):
        for option, values in {
            "update": {"delta", "linear"},
            "causal": {True, False},
            "gated": {True, False},
            "own_memory_inputs": {True, False},
            "token_major": {True, False},
            "empty_memory": {"local", "gated"},
            "scale": {None, 1.0},
            "softcap": {None, 5.0},
        }.items():
            assert {getattr(call, option) for call in calls.values()} == values
        for option in ("cu_seqlens", "spans", "num_read", "num_write", "with_state"):
            assert len({bool(getattr(call, option)) for call in calls.values()}) == 2
        assert {call.Tq < call.Tk for call in calls.values()} == {True, False}
        assert len({call.remembered for call in calls.values()}) == 2
        assert any(call.Tk % call.segment_len for call in calls.values())
        assert any(call.Tk % call.segment_len == 0 for call in calls.values())
        assert len({call.H // call.G for call in calls.values()}) > 1
    assert {16, 24, 64, 80, 96, 128, 192, 256} <= {width for call in full.values() for width in (call.K, call.V)}
    assert {call.H // call.G for call in full.values()} == {1, 2, 4, 8}


def test_the_size_of_the_gates_gradient_is_what_it_is_on_average() -> None:
    """Over random directions, the square of the gate's gradient is the sum of its terms' squares."""
    call = Call(B=1, H=64, G=64, Tq=40, Tk=40, K=16, V=16, segment_len=8, remembered=40)
    made = {name: x.double() for name, x in tensors(call, torch.float32, CPU).items()}
    expected = evaluate(call, made, "reference")
    assert gate_gradient_size(call, made, expected["out"]) == pytest.approx(float(expected["dgate"].norm()), rel=0.2)


def test_the_size_of_the_sink_logits_gradient_is_what_it_is_on_average() -> None:
    call = Call(B=1, H=64, G=64, Tq=40, Tk=40, K=16, V=16, segment_len=8, gated=False, sink_logits=True)
    made = {name: x.double() for name, x in tensors(call, torch.float32, CPU).items()}
    expected = evaluate(call, made, "reference")
    assert sink_gradient_size(call, made) == pytest.approx(float(expected["dsink_logits"].norm()), rel=0.2)


def test_tensors_are_those_of_the_call() -> None:
    call = calls_of("small")["token major"]
    made = tensors(call, torch.float16, CPU)
    assert made["q"].stride() == (call.Tk * call.H * call.K, call.K, call.H * call.K, 1)
    assert made["q"].dtype == torch.float16
    assert made["normalizer"].dtype == torch.float32
    plain = tensors(calls_of("small")["rows"], torch.float16, CPU)
    assert plain["q"].is_contiguous()
    assert all(
        torch.equal(x, y) for x, y in zip(tensors(call, torch.float16, CPU).values(), made.values(), strict=True)
    )


def test_worst_is_by_share_of_the_gate() -> None:
    rows = (
        Row("torch", "bfloat16", "delta", "dq", 7e-3, 1e-2),
        Row("torch", "bfloat16", "linear", "dq", 5e-3, 6e-3),
        Row("torch", "bfloat16", "linear", "out", 1e-3, 4e-3),
    )
    report = CheckReport("cpu", {}, "small", 2, rows)
    assert [(row.output, row.call) for row in report.worst()] == [("out", "linear"), ("dq", "linear")]
    assert report.compared == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "abacus"], "--device must be one that PyTorch can use here in float64, such as 'cpu', got 'ab"),
        (["--device", "meta"], "--device must be one that PyTorch can use here in float64, such as 'cpu', got 'meta'"),
        (["--backend", "reference"], "--backend must be one of 'torch'"),
        (["--dtype", "float64"], "--dtype must be one of 'float32', 'float16', 'bfloat16', got 'float64'"),
        (["--json", "no-such-folder/x"], "--json must be a file in a folder that exists, got 'no-such-folder/x'"),
    ],
)
def test_command_names_what_is_wrong(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(commands.app, ["check", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"segattn check: {message}")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_triton_says_where_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "interpreted", lambda: False)
    with pytest.raises(OptionError, match=r"'torch' on cpu, got 'triton'; triton runs on a GPU, or where TRITON_INTER"):
        run_check("cpu", ["triton"])


def test_ctrl_c_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    def press(found: SegmentOutput) -> SegmentOutput:
        raise KeyboardInterrupt

    spoil(monkeypatch, press)
    result = command()
    assert result.exit_code == 130
    assert result.stderr == "segattn check: stopped\n"


def test_the_bar_follows_a_check() -> None:
    console = Console(force_terminal=True, width=120, quiet=True)
    with Comparisons(console) as bar:
        run_check("cpu", ["torch"], ["float32"], FEW, bar.compared)
        (task,) = bar.bars.tasks
        assert (task.completed, task.total) == (len(FEW), len(FEW))
        assert task.fields["note"] == "float32, local"


def test_the_kernels_are_checked_where_they_run(device: torch.device) -> None:
    """On a GPU, or interpreted."""
    pytest.importorskip("triton")
    report = run_check(device, dtypes=["float32"], calls={"one token": calls_of("small")["one token"]})
    assert {row.backend for row in report.rows} == {"torch", "triton"}
    assert report.failures == []


def test_a_call_is_read_from_a_text() -> None:
    assert call_of("H=8,G=2, T=300,K=96,update=linear,causal=false,scale=0.5") == replace(
        SMALL, H=8, G=2, Tq=300, Tk=300, K=96, update="linear", causal=False, scale=0.5
    )
    assert call_of("T=20,Tq=3,cu_seqlens=0:7:20") == replace(SMALL, Tq=3, Tk=20, cu_seqlens=(0, 7, 20))
    assert call_of("Tk=20,B=2,spans=3:20:0:6") == replace(SMALL, Tq=20, Tk=20, B=2, spans=((3, 20), (0, 6)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must name T, B, H, .*, got ''"),
        ("H=8,heads=2", "must name T, B, H, .*, got 'heads'"),
        ("H=1.5", "must have a whole number as H, got '1.5'"),
        ("causal=0", "must have true or false as causal, got '0'"),
        ("scale=big", "must have a number as scale, got 'big'"),
        ("cu_seqlens=0;3", "must have numbers with colons between them as cu_seqlens, got '0;3'"),
        ("spans=0:3:5", "must have pairs of numbers with colons between them as spans, got '0:3:5'"),
    ],
)
def test_a_text_that_is_no_call_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call_of(text)
    result = command("--call", text)
    assert result.exit_code == 2


def test_a_call_of_ones_own_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "check.json"
    result = command("--call", "H=4,G=2,T=33,update=linear", "--dtype", "float32", "--json", str(path))
    assert result.exit_code == 0, result.output
    report = json.loads(path.read_text())
    assert (report["calls"], report["size"]) == (1, "given")
    assert report["errors"]["torch"]["float32"].keys() == {"H=4,G=2,T=33,update=linear"}
