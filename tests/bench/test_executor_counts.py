"""What executed code is counted to move and to issue, by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_ptx import place, program

from segattn.bench.emulated.counts import Counts, class_of, count, main_loops
from segattn.bench.emulated.executor import execute
from segattn.bench.emulated.traffic import global_traffic, shared_traffic

LANE = np.arange(64)


@pytest.mark.parametrize(
    ("at", "width", "sectors", "least"),
    [
        (4 * LANE, 4, 8, 8),
        (16 * LANE, 16, 32, 32),
        (2 * LANE, 2, 4, 4),
        (32 * LANE, 4, 64, 8),
        (4 * LANE + 16, 4, 10, 8),
        (0 * LANE, 4, 2, 2),
        (4 * (LANE % 32), 4, 8, 8),
        (4 * LANE[::-1], 4, 8, 8),
    ],
    ids=["one after the other", "wide", "halves", "far apart", "shifted", "one place", "two warps alike", "backwards"],
)
def test_sectors_are_counted_for_each_warp(at: Any, width: int, sectors: int, least: int) -> None:
    assert global_traffic(LANE // 32, at, width) == ("global", 2, 64 * width, sectors, least)


@pytest.mark.parametrize(
    ("place_of", "width", "passes", "least"),
    [
        (lambda lane: 4 * lane, 4, 1, 1),
        (lambda lane: 8 * lane, 4, 2, 1),
        (lambda lane: 128 * lane, 4, 32, 1),
        (lambda lane: 0 * lane, 4, 1, 1),
        (lambda lane: 132 * lane, 4, 1, 1),
        (lambda lane: 2 * lane, 2, 1, 1),
        (lambda lane: 8 * lane, 8, 2, 2),
        (lambda lane: 16 * lane, 16, 4, 4),
        (lambda lane: 128 * lane, 16, 32, 4),
        (lambda lane: 128 * lane + 16 * (lane % 8), 16, 4, 4),
        (lambda lane: 64 * lane + 16 * (lane // 2 % 4), 16, 4, 4),
    ],
    ids=[
        "one after the other", "every second word", "one bank", "one word", "padded rows", "halves", "pairs", "fours",
        "rows in one bank", "rows that are swizzled", "half rows that are swizzled",
    ],
)  # fmt: skip
def test_passes_over_the_banks(place_of: Callable[[Any], Any], width: int, passes: int, least: int) -> None:
    at = np.concatenate([place_of(LANE[:32])] * 2)
    assert shared_traffic(LANE // 32, LANE % 32, at, width) == ("shared", 2, 64 * width, 2 * passes, 2 * least)


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "matrix"),
        ("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16", "matrix"),
        ("tcgen05.mma.cta_group::1.kind::f16", "matrix"),
        ("wgmma.wait_group.sync.aligned", "wait"),
        ("tcgen05.wait::ld.sync.aligned", "wait"),
        ("mbarrier.try_wait.parity.shared.b64", "wait"),
        ("bar.sync", "wait"),
        ("ld.global.v4.b32", "global"),
        ("cp.async.cg.shared.global", "global"),
        ("cp.async.wait_group", "wait"),
        ("st.shared.v4.b32", "shared"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16", "shared"),
        ("ex2.approx.ftz.f32", "special"),
        ("cvt.rn.bf16x2.f32", "convert"),
        ("fma.rn.f32", "float"),
        ("setp.lt.f32", "float"),
        ("add.s32", "integer"),
        ("mov.b32", "integer"),
        ("ld.param.b64", "integer"),
        ("bra.uni", "branch"),
    ],
)
def test_classes(opcode: str, name: str) -> None:
    assert class_of(opcode) == name


BODY = f"""
    mov.b32 %r2, 0;
    mov.b32 %r20, 0;
    mov.b32 %r21, 0;
    mov.b32 %r22, 0;
    mov.b32 %r23, 0;
again:
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {{%r20, %r21, %r22, %r23}}, {{%r20, %r21, %r22, %r23}}, \
{{%r20, %r21}}, {{%r20, %r21, %r22, %r23}};
    st.shared.b32 [%r3], %r20;
    bar.sync 0;
    add.s32 %r2, %r2, 1;
    setp.lt.s32 %p0, %r2, 3;
    @%p0 bra again;
wait:
    setp.lt.s32 %p1, %r2, 0;
    @%p1 bra wait;
{place("%rd5", "%rd0", 8)}
    ld.global.b32 %r4, [%rd5];
{place("%rd6", "%rd1", 4)}
    st.global.b32 [%rd6], %r4;
"""


def counted(pairs: int | None) -> Counts:
    """The counts of two programs of two warps: three rounds of a product and a store to one bank, then a copy."""
    body = "    shl.b32 %r3, %r0, 7;\n" + BODY
    kernel = program(body, ("u64", "u64"), threads=64)
    source, target = torch.zeros(256, dtype=torch.int32), torch.zeros(128, dtype=torch.int32)
    run = execute(kernel, 2, (source, target), 64 * 128, counting=True)
    return count(run, 2, (source, target), pairs)


def test_counts_of_a_kernel() -> None:
    found = counted(16)
    # every second word is loaded: 8 bytes a lane of sectors, all of them used by half
    assert (found.loaded, found.stored, found.tensors) == (128 * 4, 128 * 4, 256 * 4 + 128 * 4)
    assert (found.sectors, found.least) == (128 * 8 + 128 * 4, 2 * 128 * 4)
    # 4 warps in 3 rounds, 32 lanes in one bank
    assert (found.passes, found.least_passes, found.loop_conflicts) == (12 * 32, 12, 12 * 31)
    assert found.operations == 12 * 2 * 16 * 8 * 16
    assert found.issued["matrix"] == found.issued["shared"] == found.issued["wait"] == 12
    assert found.waits == {"bar.sync": 3.0}
    # two warps of 32 lanes for each round's 16 pairs
    assert found.loop == dict.fromkeys(("integer", "matrix", "shared", "wait", "branch"), 2 * 32 / 16) | {
        "integer": 2 * 2 * 32 / 16
    }
    assert counted(None).loop == {}


def test_main_loops_are_the_innermost_with_products() -> None:
    kernel = program("    shl.b32 %r3, %r0, 7;\n" + BODY, ("u64", "u64"))
    (loop,) = main_loops(kernel)
    assert kernel.instructions[loop.start].opcode.startswith("mma")
    assert kernel.instructions[loop.stop - 1].opcode == "bra"
