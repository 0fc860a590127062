"""Kernels' code for GPUs that are not here, executed on the CPU: every kernel once, the table, and the commands."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from small_ptx import program

from segattn.bench.compiled.ahead_of_time import signature
from segattn.bench.compiled.jobs import KERNELS
from segattn.bench.emulated import launches as emulated_launches
from segattn.bench.emulated.cases import CASES, QUICK, RECORDED
from segattn.bench.emulated.counts import Counts
from segattn.bench.emulated.executor import Executable, execute
from segattn.bench.emulated.faults import Fault
from segattn.bench.emulated.jobs import Job, Measured, Row, execute_job, kernels_of, plan
from segattn.bench.emulated.kept import Kept, copies
from segattn.bench.emulated.launches import EMULATED, Launched, arguments_of, emulating, outputs_of
from segattn.bench.emulated.profile import profile
from segattn.bench.emulated.table import OUTPUTS, failures, table
from segattn.kernels.check.gates import DTYPES, GATES
from segattn.kernels.check.gates import OUTPUTS as FORWARD
from segattn.kernels.triton.configs import TARGETS, Tile
from segattn.kernels.triton.launch import Launch, view

ROOT = Path(__file__).resolve().parents[2]
DEVICE_RESULTS = [
    path for path in sorted((ROOT / "bench" / "results").glob("*.json")) if json.loads(path.read_text()).get("bits")
]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run one of the package's modules where kernels are compiled."""
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        env=plain | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path, dict[str, Any]]:
    """The short form."""
    folder = tmp_path_factory.mktemp("emulated")
    kept, out = folder / "kept", folder / "rows.json"
    done = command("segattn.bench.emulated", "--quick", f"--kept={kept}", f"--json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    return done, kept, json.loads(out.read_text(encoding="utf-8"))


def test_every_kernel_computes_what_the_reference_does(
    finished: tuple[subprocess.CompletedProcess[str], Path, dict[str, Any]],
) -> None:
    """On sm_80 and sm_90, forward and backward, within the gates, by the code that the compiler made."""
    done, _, document = finished
    assert document["failures"] == []
    for target in ("sm_80", "sm_90"):
        rows = [row for row in document["rows"] if row["job"][0] == target]
        assert {launch["kernel"] for row in rows for launch in row["launches"]} == set(KERNELS)
        for row in rows:
            assert all(launch["programs"] > 0 and launch["executing"] > 0 for launch in row["launches"])
            for name, (error, gate) in row["measured"].items():
                assert 0 < error < gate, (row["job"], name)
                assert gate <= (GATES["bfloat16"].outputs if name in FORWARD else GATES["bfloat16"].through_delta)
    # rounding shows: an error of nearly 0 would mean that nothing was compared
    assert all(row["measured"]["out"][0] > GATES["bfloat16"].outputs / 10 for row in document["rows"])
    assert len([line for line in done.stdout.splitlines() if line.startswith("sm_")]) >= 2 * len(KERNELS)


def test_what_is_done_is_not_done_again(
    finished: tuple[subprocess.CompletedProcess[str], Path, dict[str, Any]],
) -> None:
    done, kept, _ = finished
    before = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    again = command("segattn.bench.emulated", "--quick", f"--kept={kept}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    # but for the seconds in its last line
    assert again.stdout.splitlines()[:-1] == done.stdout.splitlines()[:-1]


def test_a_users_own_shapes(finished: object, tmp_path: Path) -> None:
    pytest.importorskip("typer")
    out = tmp_path / "check.json"
    call = "H=4,G=2,T=101,K=64,V=64,segment_len=37"
    done = command("segattn", "check", "--emulate=sm_90", f"--call={call}", "--dtype=bfloat16", f"--json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sm_90, executed on the CPU" in done.stdout
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["passed"]
    errors = report["errors"]["triton"]["bfloat16"][call]
    assert GATES["bfloat16"].outputs / 10 < errors["out"] < GATES["bfloat16"].outputs
    assert {"dq", "dk", "dv", "dmemory", "dnormalizer", "dgate"} <= errors.keys()


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (("--emulate=sm_70",), {}, "--emulate must be one of sm_80, sm_90, sm_100, sm_120, got 'sm_70'"),
        (("--emulate=gfx942",), {}, "--emulate must be one of sm_80"),
        (("--emulate=sm_90", "--device=cuda"), {}, "--device must be cpu with --emulate, got 'cuda'"),
        (("--emulate=sm_90",), {"TRITON_INTERPRET": "1"}, "--emulate compiles the kernels, which TRITON_INTERPRET=1"),
        (("--call=H=3,G=2",), {}, "--call must be of calls that segment_attention takes, got 'H=3,G=2'"),
    ],
)
def test_the_check_refuses(arguments: tuple[str, ...], environment: dict[str, str], message: str) -> None:
    pytest.importorskip("typer")
    done = command("segattn", "check", *arguments, **environment)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(not DEVICE_RESULTS, reason="no result of bench/on_device in bench/results has bits yet")
@pytest.mark.parametrize("path", DEVICE_RESULTS, ids=lambda path: path.name)
def test_a_device_computes_what_the_executor_does(path: Path) -> None:
    done = command("segattn.bench.emulated", f"--against={path}")
    assert done.returncode == 0, done.stdout + done.stderr


def test_bits_are_held_against_those_of_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the interpreter in the place of both."""
    from contextlib import nullcontext

    from segattn.bench.emulated import bits

    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = json.loads(json.dumps(bits.record("decode", "sm_90", device)))
    assert kept["outputs"].keys() == {"out"}
    monkeypatch.setattr(bits, "emulating", lambda target: nullcontext())
    (found,) = bits.differences([kept])
    assert (found.call, found.output, found.same, found.error) == ("decode", "out", 1.0, 0.0)
    case = CASES["decode"]
    spoilt = {"out": 1.01 * case.evaluate(case.draw(torch.bfloat16), "triton")["out"]}
    monkeypatch.setitem(CASES, "decode", case._replace(evaluate=lambda made, backend: spoilt))
    (found,) = bits.differences([kept])
    assert found.same < 0.9
    assert found.error == pytest.approx(0.01, rel=0.1)
    assert found.error > found.gate == GATES["bfloat16"].outputs / 4
    with pytest.raises(ValueError, match="code for gfx942 is not executed"):
        list(bits.differences([kept | {"target": "gfx942"}]))


def test_the_calls_are_of_every_kind() -> None:
    assert {kernel for call in QUICK for kernel in kernels_of(call)} == set(KERNELS) == set(OUTPUTS)
    assert set(RECORDED) <= set(CASES)
    assert plan(["sm_80"], ["float16"], list(CASES), ["decode_kernel"]) == [
        Job("sm_80", "float16", name) for name in CASES if name.startswith("decode")
    ]


def row(call: str = "delta", error: float = 1e-3, **changes: Any) -> Row:
    launches = (Launched("scan_kernel", 8, 0.5, 0.25), Launched("attend_kernel", 12, 0.5, 0.5))
    made = Row(
        Job("sm_90", "bfloat16", call), launches, {"out": Measured(error, 4e-3), "dq": Measured(9e-3, 1e-2)}, 2.0
    )
    return replace(made, **changes)


def test_the_table_names_the_worst_of_each_kernel() -> None:
    lines = list(table([row(), row("linear", 2e-3)], ["attend_kernel", "scan_kernel", "query_grad_kernel"]))
    (attend,) = [line.split() for line in lines[1:] if "attend_kernel" in line][:1]
    assert attend == "sm_90 bfloat16 attend_kernel 2 24 2.0e-03 4e-03 0.50 0 0 1.0 out, linear".split()
    (scan,) = [line.split() for line in lines[1:] if "scan_kernel" in line]
    assert scan[3:] == "2 16 - - - 0 0 0.5 -".split()
    assert not any("query_grad_kernel" in line for line in lines)


@pytest.mark.parametrize("error", [5e-3, math.nan, math.inf])
def test_what_is_above_its_gate_fails(error: float) -> None:
    assert failures([row()]) == []
    (found,) = failures([row(error=error)])
    assert found == f"delta (bfloat16, sm_90): out is off by {error:.1e}, its gate is 4e-03"


def test_faults_are_counted_where_they_happen() -> None:
    broken = row(measured={}, problem="attend_kernel, line 7: race: two warps", kind="race")
    lines = list(table([broken, row("linear")], ["attend_kernel", "scan_kernel"]))
    assert [line.split()[8:10] for line in lines[1:3]] == [["1", "0"], ["0", "0"]]
    assert failures([broken]) == ["delta (bfloat16, sm_90): attend_kernel, line 7: race: two warps"]


def test_a_profile_adds_up_a_kernels_launches() -> None:
    counts = Counts(
        issued={"float": 8},
        loop={"float": 3.0, "matrix": 1.5},
        loaded=3000,
        stored=1000,
        sectors=6000,
        least=4000,
        tensors=2000,
        passes=30,
        least_passes=20,
        loop_conflicts=4,
        operations=500_000_000,
        waits={"bar.sync": 2.0},
    )
    launches = tuple(Launched("product_kernel", 8, 0.5, 0.25, counts) for _ in range(2))
    made = row("whole tiles K64", launches=launches)
    lines = list(profile([made], ["product_kernel"]))
    traffic, loop, waits, floor = [line for line in lines if line.startswith("sm_90")]
    assert traffic.split()[-7:] == ["6.0", "2.0", "1.50", "3.00", "1.50", "8", "*"]
    assert loop.split()[-3:] == ["4.500", "3.000", "1.500"]
    assert waits.endswith("2.0 bar.sync")
    work = CASES["whole tiles K64"].floor
    assert work is not None
    found = [float(x) for x in floor.split()[-8:]]
    assert found == pytest.approx(
        [
            1000, work(2).operations / 1e6, 1e9 / work(2).operations, work(2).bytes / 1e3, 4, 4e3 / work(2).bytes,
            12, 12e3 / work(2).bytes,
        ],
        abs=0.06,
    )  # fmt: skip


def test_the_figures_of_the_kernels_are_those_that_were_counted() -> None:
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8")
    rows = json.loads((ROOT / "bench" / "results" / "emulated" / "counts.json").read_text(encoding="utf-8"))["rows"]
    columns = []
    for made in sorted(rows, key=lambda row: row["job"][2], reverse=True):
        floor, counts = CASES[made["job"][2]].floor, {x["kernel"]: x["counts"] for x in made["launches"]}
        assert floor is not None
        work = floor(2)
        sums = [sum(x["counts"][name] for x in made["launches"]) for name in ("operations", "tensors", "sectors")]
        loops = [sum(counts[f"{name}_kernel"]["loop"].values()) for name in ("attend", "query_grad", "key_grad")]
        columns.append([sums[0] / work.operations, sums[1] / work.bytes, sums[2] / work.bytes, *loops])
    section = text.partition("### Counted")[2].partition("\n##")[0]
    shown = [line.split("|")[2:4] for line in section.splitlines() if line.startswith("| ")][2:]
    assert [[float(x) for x in pair] for pair in shown] == [
        [round(a, 2), round(b, 2)] for a, b in zip(*columns, strict=True)
    ]


def kernel(*names: str) -> Any:
    params = [SimpleNamespace(name=name, is_constexpr=name.isupper()) for name in names]
    return SimpleNamespace(params=params, arg_names=list(names), do_not_specialize=[], __name__="kernel")


def faulty(monkeypatch: pytest.MonkeyPatch, fault: Exception) -> None:
    """Let every launch raise `fault` in place of being compiled and executed."""
    compiled = SimpleNamespace(asm={"ptx": ""}, metadata=SimpleNamespace(shared=0))

    def execute(*arguments: Any, **options: Any) -> None:
        raise fault

    monkeypatch.setattr(emulated_launches, "build", lambda launch, target: compiled)
    monkeypatch.setattr(emulated_launches, "_parsed", lambda text: None)
    monkeypatch.setattr(emulated_launches, "arguments_of", lambda launch: [])
    monkeypatch.setattr(emulated_launches, "execute", execute)


def test_a_fault_ends_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through PyTorch's operations, and with the launch that it comes from."""
    faulty(monkeypatch, Fault("bounds", "behind q"))
    found = execute_job(Job("sm_80", "float32", "delta"))
    assert (found.kind, found.problem, found.measured) == ("bounds", "bounds: behind q", {})
    assert [launch.kernel for launch in found.launches] == ["product_kernel"]


def test_launches_are_kept_by_what_they_execute(tmp_path: Path) -> None:
    """The same code from the same memory is not executed again; wherever it stands in a source."""
    load, rest = "    ld.global.b32 %r10, [%rd0];\n", "    st.global.b32 [%rd1], %r10;\n"
    kinds, kept = ["u64", "u64"], Kept(tmp_path / "kept")

    def launch(body: str, first: float) -> Executable:
        x, out = torch.full((1,), first), torch.full((1,), math.nan)
        return Executable("kernel", program(body, kinds), 1, [x, out], 0, [out])

    made = launch(load + rest, 3.0)
    place, before = kept.place(made), copies(made)
    assert kept.take(place, made) is None
    execute(*made[1:5], outputs=made.outputs)
    kept.add(place, made, before, 0.5)
    again = launch(load + "    .loc 1 30 0\n" + rest, 3.0)
    assert kept.place(again) == place
    assert kept.take(place, again) == 0.5
    assert again.outputs[0].item() == 3
    assert kept.place(launch(load + rest, 4.0)) != place
    assert kept.place(launch(load + load + rest, 3.0)) != place
    assert kept.place(made._replace(programs=2)) != place
    x, out = made.arguments
    assert isinstance(x, torch.Tensor)
    assert kept.place(made._replace(arguments=[x, x, out])) != kept.place(made._replace(arguments=[x, x.clone(), out]))


def test_launches_are_what_the_code_takes() -> None:
    """Arguments that are not compiled in, those of tuples one by one; tensors aligned where they begin at 16 bytes."""
    x, shifted = view(torch.zeros(1, 2, 40, 16)), view(torch.zeros(1281)[1:].view(1, 2, 40, 16))
    out = view(torch.full((1, 2, 40, 16), math.nan))
    arguments = {"x": x, "shifted": shifted, "missing": None, "out": out, "time": 40, "one": 1, "scale": 0.5, "K": 16}
    launch = Launch(kernel(*arguments, "BLOCK_M"), 3, Tile(), arguments)
    # the strides of a row and of a head, of a token, and the heads; the width is compiled in
    strides = [1280, 640, 16, 2]
    assert arguments_of(launch) == [
        x.pointer, *strides, shifted.pointer, *strides, out.pointer, *strides, 40, 0.5
    ]  # fmt: skip
    attributes = signature(launch).attributes
    assert (0, 0) in attributes
    assert (1, 0) not in attributes
    assert (1, 1) in attributes


def test_outputs_are_what_holds_nothing_yet() -> None:
    out, dk = torch.full((1, 2, 40, 16), math.nan), torch.zeros(1, 2, 40, 16)
    launch = Launch(kernel("out", "dk"), 3, Tile(), {"out": view(out), "dk": view(dk), "after": None})
    (found,) = outputs_of(launch)
    assert found is out
    out[0, 0, 0, 0] = 0
    assert outputs_of(launch) == []


def test_new_memory_is_poisoned_inside_alone() -> None:
    torch.use_deterministic_algorithms(False)
    try:
        with emulating(TARGETS["sm_80"]):
            assert torch.empty(3).isnan().all()
            assert torch.are_deterministic_algorithms_enabled()
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets=gfx942",), "--targets must be from sm_80,sm_90,sm_100,sm_120, got gfx942"),
        (("--dtypes=float64",), "--dtypes must be from float32,float16,bfloat16, got float64"),
        (("--kernels=mine",), "--kernels must be from attend_kernel"),
        (("--calls=mine",), "--calls must be from delta,linear"),
        (("--jobs=0",), "--jobs must be positive, got 0"),
        (("--against=nowhere.json",), "--against must be a result of bench/on_device"),
        (("--kernels=attend", "--calls=decode"), "--kernels must be launched by one of the calls decode, got attend"),
        (("--kept=a file",), "--kept must be a folder, or where one can be made, got a file"),
        (("--json=nowhere/rows.json",), "--json must be a file that can be written, got nowhere/rows.json"),
        (("--json=.",), "--json must be a file that can be written, got ."),
    ],
)
def test_the_command_refuses(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    report = pytest.importorskip("segattn.bench.emulated.report")
    monkeypatch.setattr(report, "interpreted", lambda: False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a file").touch()
    assert report.main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""


def test_the_command_does_one_thing(capsys: pytest.CaptureFixture[str]) -> None:
    report = pytest.importorskip("segattn.bench.emulated.report")
    for other in ("--counts", "--against=rows.json"):
        with pytest.raises(SystemExit) as ended:
            report.main([other, "--mutations=1"])
        assert ended.value.code == 2
        assert "--mutations: not allowed with argument" in capsys.readouterr().err


def test_the_command_refuses_the_interpreter(capsys: pytest.CaptureFixture[str]) -> None:
    report = pytest.importorskip("segattn.bench.emulated.report")
    if "TRITON_INTERPRET" not in os.environ:
        pytest.skip("the kernels run on a GPU")
    assert report.main([]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


def test_targets_and_dtypes_are_the_packages() -> None:
    assert set(EMULATED) == {name for name in TARGETS if not name.startswith("gfx")}
    assert set(DTYPES) == set(GATES)
