"""Kernels compiled for GPUs that are not here: how machine code is read, what breaks a rule, and the command."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
import triton.language as tl

from segattn.bench.choices import kernels
from segattn.bench.compiled import jobs as compile_jobs
from segattn.bench.compiled import rules as compile_rules
from segattn.bench.compiled import table as compile_table
from segattn.bench.compiled.ahead_of_time import CASES, Compiled, resident_warps, signature
from segattn.bench.compiled.jobs import Job, Row
from segattn.bench.compiled.machine_code import Loop, amdgcn, blocks, loops, sass, tensor_core
from segattn.bench.speed.workloads import DTYPES
from segattn.kernels.triton.configs import TARGETS, Tile
from segattn.kernels.triton.launch import Launch
from segattn.kernels.triton.tiles import MemoryTokens

ROOT = Path(__file__).resolve().parents[2]

# a loop in a loop, a wait behind the code that comes back into it, and the loop that every program ends with
SASS = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0020*/              @!P0 BRA `(.L_x_9) ;
.L_x_3:
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   FMUL R3, R3, R4 ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   FADD R3, R3, R4 ;
        /*0070*/               @P2 BRA `(.L_x_1) ;
        /*0080*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0090*/                   EXIT ;
.L_x_9:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64 P0, [UR4], R5 ;
        /*00b0*/              @!P0 BRA `(.L_x_9) ;
        /*00c0*/                   BRA `(.L_x_3) ;
.L_x_10:
        /*00d0*/                   BRA `(.L_x_10) ;
"""
AMDGCN = """
	.text
kernel:
	s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
	v_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
	v_add_f32_e32 v0, v1, v2                ; a comment
	s_cbranch_scc1 .LBB0_1
; %bb.2:
	v_exp_f32_e32 v0, v1
.LBB0_3:
	v_add_f32_e32 v0, v1, v2
	s_cbranch_vccnz .LBB0_3
	s_endpgm
"""


def test_the_innermost_loop_is_found() -> None:
    # with the wait, which is on the way of some of its rounds
    assert loops(sass(SASS)) == [Loop(instructions=7, tensor_core=1)]
    assert loops(amdgcn(AMDGCN)) == [Loop(instructions=3, tensor_core=1)]


def test_a_wait_behind_the_code_is_no_loop() -> None:
    """Where the product is not in a loop, the way back from a wait looks like one that holds it."""
    straight = SASS.replace("@P1 BRA `(.L_x_2)", "NOP").replace("@P2 BRA `(.L_x_1)", "NOP")
    assert loops(sass(straight)) == []


def test_loops_stand_in_the_order_of_the_code() -> None:
    second = AMDGCN.replace(
        "v_exp_f32_e32 v0, v1", "v_exp_f32_e32 v0, v1\n.LBB0_8:\n\tv_mfma_f32_4x4x4f16 a[0:3]\n"
    ).replace("s_endpgm", "s_cbranch_scc0 .LBB0_8\n\ts_endpgm")
    assert loops(amdgcn(second)) == [Loop(3, 1), Loop(4, 1)]


def test_blocks_follow_each_other() -> None:
    found = [block.successors for block in blocks(sass(SASS))]
    assert found == [[1], [2], [6, 3], [2, 4], [1, 5], [], [6, 7], [3], [8]]
    # a condition may be an operand
    moved = SASS.replace("@!P0 BRA `(.L_x_9)", "BRA.U !UP0, `(.L_x_9)").replace("@P1 BRA", "@P1 BRA.U")
    assert [block.successors for block in blocks(sass(moved))] == found


def test_tensor_core_instructions_are_told_apart() -> None:
    code = [
        "@P0 HMMA.16816.F32.BF16 R4, R8, R2, R4",
        "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
        "UTCHMMA gdesc[UR6], gdesc[UR4], tmem[UR9]",
        "UTCHMMA.2CTA gdesc[UR6], gdesc[UR4]",
        "v_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3]",
        "FFMA R1, R2, R3, R4",
        "v_fma_f32 v0, v1, v2, v3",
    ]
    assert tensor_core(code) == {"HMMA": 1, "HGMMA": 1, "UTCHMMA": 2, "v_mfma": 1}


def kernel(*names: str, constants: tuple[str, ...] = (), plain: tuple[str, ...] = ()) -> Any:
    params = [SimpleNamespace(name=name, is_constexpr=name in constants) for name in names]
    return SimpleNamespace(params=params, arg_names=list(names), do_not_specialize=list(plain), __name__="kernel")


def test_a_signature_is_what_the_compiler_specialises() -> None:
    arguments: dict[str, Any] = {
        "x": (torch.empty(1, device="meta", dtype=torch.bfloat16), 4096, 1, 24),
        "missing": None,
        "time": 4096,
        "one": 1,
        "plain_one": 1,
        "large": 2**40,
        "scale": 1.0,
        "K": 64,
        "named": MemoryTokens(tl.constexpr(3), 4),
    }
    made = kernel(*arguments, "BLOCK_M", constants=("K", "BLOCK_M"), plain=("time", "plain_one"))
    types, known, attributes = signature(Launch(made, 1, Tile(BLOCK_M=32), arguments))
    assert types == {
        "x": ("*bf16", "i32", "constexpr", "i32"),
        "missing": "constexpr",
        "time": "i32",
        "one": "constexpr",
        "plain_one": "i32",
        "large": "i64",
        "scale": "fp32",
        "K": "constexpr",
        "named": ("constexpr", "i32"),
        "BLOCK_M": "constexpr",
    }
    # by whose names the kernel calls its members
    assert isinstance(types["named"], MemoryTokens)
    assert known == {(0, 2): 1, (1,): None, (3,): 1, (7,): 64, (8, 0): 3, (9,): 32}
    assert set(attributes) == {(0, 0), (0, 1), (5,)}


@pytest.mark.parametrize(
    ("needs", "warps"),
    [
        (("sm_90", 8, 64, 0, 0), 32),  # registers: 4 programs
        (("sm_90", 8, 250, 0, 0), 8),
        (("sm_90", 4, 32, 100_000, 0), 8),  # shared memory: 2
        (("sm_90", 4, 32, 300_000, 0), 0),
        (("sm_100", 4, 32, 0, 256), 8),  # tensor memory: 2
        (("sm_120", 4, 8, 0, 0), 48),
        (("gfx942", 4, 128, 0, 0), 16),
    ],
)
def test_resident_warps(needs: tuple[str, int, int, int, int], warps: int) -> None:
    assert resident_warps(*needs) == warps


GOOD = Compiled(
    registers=128,
    spilled=0,
    shared=1024,
    tensor_memory=0,
    products=4,
    tensor_core={"HGMMA": 12},
    resident_warps=8,
    loops=(Loop(100, 6), Loop(150, 6)),
    instructions=500,
)


def row(kernel: str = "attend_kernel", case: str = "delta", tile: Tile | None = None, **changes: Any) -> Row:
    job = {name: changes.pop(name) for name in ("target", "dtype", "width") if name in changes}
    made = Job(**({"target": "sm_90", "dtype": "bfloat16", "width": 128} | job), case=case, place=0, kernel=kernel)
    return Row(made, tile or Tile(128, 64, num_warps=8), replace(GOOD, **changes))


def test_what_keeps_to_the_rules() -> None:
    assert compile_rules.failures([row(), row(case="local")]) == []
    assert compile_rules.failures([row(spilled=8, width=256)]) == []
    assert compile_rules.failures([row(spilled=8, width=80)]) == []
    assert compile_rules.failures([row(tensor_core={}, dtype="float32")]) == []
    assert compile_rules.failures([row("key_sums_kernel", products=0, tensor_core={})]) == []
    assert compile_rules.failures([row("decode_kernel", tensor_core={"HMMA": 3})]) == []
    assert compile_rules.failures([row(tile=Tile(32, 64), tensor_core={"HMMA": 3}, target="sm_100")]) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spilled": 8}, "8 bytes spilled"),
        ({"spilled": 8, "dtype": "float32", "width": 64}, "8 bytes spilled"),
        ({"shared": 232449}, "232449 bytes of shared memory, the limit is 232448"),
        ({"tensor_memory": 513}, "513 columns of tensor memory, the limit is 512"),
        ({"tensor_core": {}}, "multiplies matrices without HGMMA"),
        ({"tensor_core": {"HMMA": 9}}, "multiplies matrices without HGMMA"),
        ({"tensor_core": {"HMMA": 9}, "dtype": "float16", "target": "sm_100"}, "without UTCHMMA"),
        ({"tensor_core": {"HMMA": 9}, "kernel": "key_grad_kernel"}, "without HGMMA"),
        ({"tensor_core": {"HMMA": 9}, "kernel": "product_kernel"}, "without HGMMA"),
        ({"tensor_core": {}, "kernel": "decode_kernel"}, "without HGMMA or HMMA"),
        ({"tensor_core": {}, "kernel": "decode_kernel", "target": "gfx942"}, "without v_mfma"),
    ],
)
def test_each_rule_can_be_broken(changes: dict[str, Any], problem: str) -> None:
    (found,) = compile_rules.failures([row(**changes)])
    assert problem in found
    assert found.startswith(str(row(**changes).job))


def test_what_does_not_compile_fails() -> None:
    broken = Row(row().job, Tile(), None, "PassManager::run failed")
    assert compile_rules.failures([broken]) == [f"{broken.job}: does not compile: PassManager::run failed"]
    assert any("does not compile: PassManager" in line for line in compile_table.table([broken, row()]))


def test_the_memory_must_stay_out_of_the_softmax_loops() -> None:
    local = row(case="local")
    # behind them it may have a loop of its own, and a register's worth of difference is none of its own
    assert compile_rules.failures([row(loops=(Loop(102, 6), Loop(150, 6), Loop(400, 2))), local]) == []
    (found,) = compile_rules.failures([row(loops=(Loop(103, 6), Loop(150, 6))), local])
    assert "the softmax loop holds 103 instructions, 100 without" in found
    (found,) = compile_rules.failures([row(loops=(Loop(100, 6), Loop(160, 6))), local])
    assert "the masked softmax loop holds 160 instructions, 150 without" in found
    (found,) = compile_rules.failures([row(loops=(Loop(100, 6),)), local])
    assert "were not found" in found
    # another width or target is no measure
    assert compile_rules.failures([row(loops=(Loop(103, 6), Loop(150, 6))), row(case="local", width=64)]) == []


def test_costs_by_hand() -> None:
    cost = compile_rules.cost_of(row())
    assert cost is not None
    # 100 instructions of 8 warps of 32 for 128 by 64 pairs; q kᵀ and p v of 128 each
    assert cost[:2] == (3.125, 512)
    assert (cost.issue, cost.tensor_core) == (3.125 / 128, 512 / 4096)
    assert cost.share == pytest.approx(0.125 / (0.125 + 3.125 / 128))
    last = compile_rules.cost_of(row("key_grad_kernel"))
    assert last is not None
    assert last[:2] == (150 * 256 / 8192, 1024)
    assert compile_rules.cost_of(row(loops=())) is None
    assert compile_rules.cost_of(row("scan_kernel")) is None
    text = "\n".join(compile_table.costs([row()]))
    assert "3.12" in text
    # 32 heads, 32768 rows, 1024.5 pairs a row, q kᵀ and p v of 64 each
    assert pytest.approx(275.01e9, rel=1e-4) == 32 * 32768 * 1024.5 * 4 * 64
    assert "T32K L2048 K64 H32/32       local   forward           275.01" in text


def test_a_compiler_that_ends_its_process_makes_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compile_jobs, "compile_job", os._exit)
    monkeypatch.setattr(compile_jobs, "launch_of", lambda job: SimpleNamespace(tile=Tile()))
    jobs: Any = [3, 4]
    found = list(compile_jobs.compile_all(jobs, 1))
    assert [(r.job, r.compiled, r.error) for r in found] == [
        (job, None, "the compiler ended its process") for job in jobs
    ]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    return subprocess.run(
        [str(ROOT / "ci" / "compile"), "--here", *arguments],
        env=plain | {"PATH": path, "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
    )


def test_the_command_compiles_and_judges(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    kernels = "attend_kernel,scan_kernel,decode_kernel"
    done = command("--quick", "--floors", "--targets=sm_90,gfx942", f"--kernels={kernels}", f"--json={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["failures"] == []
    rows = document["rows"]
    assert {(r["kernel"], r["target"]) for r in rows} == {
        (k, t) for k in kernels.split(",") for t in ("sm_90", "gfx942")
    }
    for r in rows:
        found = r["compiled"]
        assert 0 < found["registers"] <= 512, r
        assert 0 < found["shared"] <= TARGETS[r["target"]].shared, r
        assert found["resident_warps"] > 0, r
        if r["kernel"] == "attend_kernel":
            assert {"sm_90": "HGMMA", "gfx942": "v_mfma"}[r["target"]] in found["tensor_core"]
            assert len(found["loops"]) >= 2
    assert {r["case"] for r in rows if r["kernel"] == "attend_kernel"} == {"delta", "local"}
    for line in ("fewest resident warps", "loops without masks", "floors in bfloat16", "0 failures"):
        assert line in done.stdout


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (None, ("read_kernel", "read_grad_kernel", "decode_kernel")),
        ("decode", ("decode_kernel",)),
        ("read", ("read_kernel",)),
        ("read_g,decode_kernel,read_", ("read_grad_kernel", "decode_kernel", "read_kernel")),
    ],
)
def test_kernels_are_named_in_short(given: str | None, named: tuple[str, ...]) -> None:
    assert kernels(given, ("read_kernel", "read_grad_kernel", "decode_kernel")) == named


def test_gradients_of_narrow_heads_compile() -> None:
    """Where a tile holds all the columns of K, loops over them run once, and the compiler sees other code."""
    done = command("--targets=sm_100", "--dtypes=bfloat16", "--widths=16,24,32", "--kernels=query_grad")
    assert done.returncode == 0, done.stdout + done.stderr


def test_narrow_and_odd_widths_are_compiled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_report = pytest.importorskip("segattn.bench.compiled.report")
    planned: list[tuple[list[str], list[int], Sequence[str]]] = []
    monkeypatch.setattr(compile_report, "interpreted", lambda: False)

    def plan(
        targets: Sequence[str], dtypes: Sequence[str], widths: list[int], kernels: Sequence[str], every: bool = False
    ) -> list[Job]:
        planned.append((list(dtypes), widths, kernels))
        return []

    monkeypatch.setattr(compile_jobs, "plan", plan)
    assert compile_report.main(["--targets=sm_100"]) == 0
    assert planned == [
        (["bfloat16", "float16", "float32"], [64, 128, 256], compile_jobs.KERNELS),
        (["bfloat16"], [24, 80], compile_jobs.KERNELS),
    ]
    assert compile_report.main(["--targets=sm_100", "--widths=200"]) == 0
    assert [widths for _, widths, _ in planned[2:]] == [[200]]


def test_every_kind_of_call_and_every_class_of_width_on_demand(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_report = pytest.importorskip("segattn.bench.compiled.report")
    planned: list[Job] = []
    monkeypatch.setattr(compile_report, "interpreted", lambda: False)
    # kernels of the interpreter have no signature
    monkeypatch.setattr(compile_jobs, "signature", lambda launch: launch.arguments)
    monkeypatch.setattr(compile_jobs, "compile_all", lambda jobs, workers: planned.extend(jobs) or [])
    arguments = ["--targets=sm_90", "--kernels=attend,decode"]
    assert compile_report.main(["--every", *arguments]) == 0
    kinds = {(job.dtype, job.width, job.case) for job in planned if job.kernel == "attend_kernel"}
    assert kinds == set(itertools.product(DTYPES, map(int, compile_report.EVERY), CASES))
    assert {job.width for job in planned if job.kernel == "decode_kernel"} == set(map(int, compile_report.EVERY))
    planned.clear()
    assert compile_report.main(["--every", "--widths=40", "--dtypes=float16", *arguments]) == 0
    assert {(job.dtype, job.width) for job in planned} == {("float16", 40)}


def test_the_command_refuses_the_interpreter() -> None:
    done = command(TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "TRITON_INTERPRET is set" in done.stderr


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--targets=sm_70", "--targets must be from sm_80"),
        ("--dtypes=float64", "--dtypes must be from bfloat16,float16,float32, got float64"),
        ("--widths=128,20", "--widths must be from 16,24,32,"),
        ("--kernels=mine", "--kernels must be from attend_kernel"),
        ("--kernels=attend,", "--kernels must be from attend_kernel"),
        ("--jobs=0", "--jobs must be positive, got 0"),
    ],
)
def test_the_command_refuses(
    argument: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compile_report = pytest.importorskip("segattn.bench.compiled.report")
    monkeypatch.setattr(compile_report, "interpreted", lambda: False)
    assert compile_report.main([argument]) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
