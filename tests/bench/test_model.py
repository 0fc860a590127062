"""The model of a sub-core: what it makes of control words, loops and waits; its rates; the committed table's rule."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton")

from segattn.bench.compiled import predict
from segattn.bench.compiled.machine_code import blocks, sass
from segattn.bench.compiled.predict import TABLE, Prediction, Workload, lines, slower
from segattn.bench.compiled.sub_core import BARRIER, COPIED, LoopsError, Step, clocks, step, walk

# causal forward in 16 bits on an H100 SXM5 by Triton's kernel, segments of 2K, TFLOP/s by head width, as the plots of
# FlashAttention-3 (arXiv:2407.08608, figure 5) label it
PUBLISHED = {64: 342, 128: 323}
NONE = 7


def control(stall: int = 1, waits: int = 0, written: int = NONE, read: int = NONE) -> int:
    return stall | written << 5 | read << 8 | waits << 11


def taken(*code: tuple[str, int], warps: int = 4, programs: int = 1) -> float:
    return clocks([step(text, word, "sm_90") for text, word in code], warps, programs)


def test_control_words_are_read() -> None:
    text = """
        /*0010*/                   MUFU.EX2 R5, R5 ;                    /* 0x0000000500057308 */
                                                                        /* 0x000fe20000000800 */
.L_x_1:
        /*0020*/              @!P0 FMUL R5, R5, R6 ;                    /* 0x0000000605058220 */
                                                                        /* 0x004fca0000400000 */
"""
    first, _, second = sass(text)
    assert (first.instruction, second.instruction) == ("MUFU.EX2 R5, R5", "@!P0 FMUL R5, R5, R6")
    assert second.control == 0x004FCA0000400000 >> 41
    assert step(*second[1:], "sm_90") == Step("float", 1, 12, 5, (2,), NONE, NONE)
    assert step(*first[1:], "sm_90")[:4] == ("special", 8, 20, 1)


def test_warps_share_the_issue_and_the_pipes() -> None:
    adds = [("FADD R1, R1, R2", control(stall=4))] * 10
    assert taken(*adds) == 4 * 9 + 1
    # another warp of the sub-core fills the gaps, and so do three; a fifth has no clock left
    assert taken(*adds, warps=8) == 4 * 9 + 2
    assert taken(*adds, warps=16) == 4 * 9 + 4
    assert taken(*adds, warps=20) == 5 * 10
    assert taken(*[("MUFU.EX2 R1, R1", control())] * 10) == 8 * 9 + 1


def test_a_step_waits_for_its_scoreboard() -> None:
    load = ("LDG.E R1, [R2.64]", control(written=3))
    use = ("FADD R1, R1, R2", control(waits=1 << 3))
    assert taken(load, use) == 4 + 300 + 1
    assert taken(load, ("FADD R1, R1, R2", control(waits=1 << 2))) == 2


def test_products_run_behind_until_they_are_waited_for() -> None:
    product = ("HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0", control())
    add = ("FADD R1, R1, R2", control())
    wait, leave_one = (("WARPGROUP.DEPBAR.LE gsb0, 0x" + n, control()) for n in "01")
    needed = 64 * 128 * 16 / 2048
    assert taken(product, *[add] * 30, wait) == needed + 1
    assert taken(product, product, leave_one, *[add] * 80) == needed + 1 + 80
    assert taken(product, product, wait, add) == 2 * needed + 2
    # with both operands in shared memory these are what it waits for: (64 + 8) · 16 · 2 bytes
    small = ("HGMMA.64x8x16.F32.BF16 R24, gdesc[UR12], R24, gsb0", control())
    assert taken(small, wait) == pytest.approx(72 * 32 / 128 + 1)


def test_copies_and_barriers_hold_warps_up() -> None:
    copy, end = ("LDGSTS.E.BYPASS.128 [R1], [R2.64]", control()), ("LDGDEPBAR", control())
    assert taken(copy, end, ("DEPBAR.LE SB0, 0x0", control())) == COPIED + 1
    assert taken(copy, end, ("DEPBAR.LE SB0, 0x1", control())) == 3
    barrier, add = ("BAR.SYNC.DEFER_BLOCKING 0x0", control()), ("FADD R1, R1, R2", control())
    assert taken(barrier, add) == BARRIER + 1
    assert taken(barrier, add, warps=8) == 1 + BARRIER + 2


CODE = """
        /*0000*/                   MOV R1, R2 ;
        /*0010*/               @P3 BRA `(.L_x_3) ;
.L_x_1:
        /*0020*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_2:
        /*0030*/                   FMUL R3, R3, R4 ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   SHF R3, R3, R4 ;
        /*0060*/               @P2 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   MUFU.EX2 R3, R3 ;
        /*0080*/                   EXIT ;
.L_x_4:
        /*0090*/                   BRA `(.L_x_4) ;
"""


def test_a_walk_goes_round_its_loops_as_often_as_said() -> None:
    def pipes(*trips: int) -> dict[str, int]:
        steps = walk(blocks(sass(CODE)), trips, "sm_90")
        return {pipe: sum(x.pipe == pipe for x in steps) for pipe in ("float", "special", "integer")}

    # MOV; IADD3 and SHF in the outer loop
    assert pipes(3, 5) == {"float": 15, "special": 1, "integer": 1 + 2 * 3}
    assert pipes(1, 1) == {"float": 1, "special": 1, "integer": 3}
    # the loops are passed by where they must not run
    assert pipes(0, 0) == {"float": 0, "special": 1, "integer": 1}
    with pytest.raises(LoopsError, match="2 loops where 1 were expected"):
        pipes(3)


def committed() -> list[dict[str, Any]]:
    return json.loads(TABLE.read_text(encoding="utf-8"))


def test_the_rate_of_local_attention_is_near_what_is_published() -> None:
    rates = {}
    for row in committed():
        x = Workload(**row["workload"])
        if x.T > 8192 and x.H == x.G and x.update == "delta":
            rates[x.K] = x.B * x.H * x.T * (x.L + 1) * 2 * x.K / row["local"]["attend"] * 1e-6
    assert rates.keys() == PUBLISHED.keys()
    for width, rate in rates.items():
        assert 1.0 <= rate / PUBLISHED[width] <= 1.4


def test_the_table_has_a_time_for_every_kernel_of_every_workload() -> None:
    rows = committed()
    assert [Workload(**row["workload"]) for row in rows] == list(predict.WORKLOADS)
    for row in rows:
        assert {"attend", "query_grad", "key_grad"} == row["local"].keys() < row["whole"].keys()
        assert all(0 < x < math.inf for part in ("local", "whole") for x in row[part].values())


def prediction(kernel: str, time: float, error: str = "") -> Prediction:
    return Prediction(kernel, True, 8, 1, time, 0.1, error)


def test_a_kernel_that_has_become_slower_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = Workload(1, 8, 2, 4096, 64, 2048)
    table = [{"workload": workload._asdict(), "local": {"attend": 10.0}, "whole": {"attend": 12.0, "scan": 3.0}}]

    def found(attend: float, *more: Prediction) -> list[str]:
        parts = ([prediction("attend", 10.0)], [prediction("attend", attend), *more])
        monkeypatch.setattr(predict, "predict_all", lambda workloads, workers: {workload: parts})
        return slower(1, table)

    assert found(12.3) == []
    (line,) = found(12.5)
    assert "attend (whole, delta, sm_90" in line
    assert "12.5 µs, 12.0 in model.json" in line
    (line,) = found(12.0, prediction("scan", math.nan, "2 loops where 1 were expected"))
    assert "2 loops where 1 were expected" in line
    (line,) = found(12.0, prediction("gather", 0.5))
    assert line.startswith("gather")


def test_the_table_is_written_with_its_ratios() -> None:
    local = [prediction("attend", 100.0), prediction("key_grad", 300.0)._replace(forward=False)]
    whole = [prediction("scan", 50.0), *local]
    *_, last = lines(Workload(1, 8, 2, 4096, 64, 2048), local, whole)
    assert "forward 150 of 100 µs" in last
    assert last.endswith("450 of 400 µs: 1.12")


@pytest.mark.parametrize("text", ["1,8,2,4096,64", "1,8,3,4096,64,2048", "1,8,2,4096,64,x"])
def test_a_workload_is_refused_in_words(text: str) -> None:
    command = [sys.executable, "-m", "segattn.bench.compiled", "model", text]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert "six positive integers B,H,G,T,K,L" in done.stderr
