"""Code with one instruction spoilt: what the checks notice, why they do not notice the rest, and the table of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from small_ptx import program

pytest.importorskip("triton")
from segattn.bench.emulated import mutations
from segattn.bench.emulated.cases import CASES, Case
from segattn.bench.emulated.executor import Executable
from segattn.bench.emulated.jobs import Job
from segattn.bench.emulated.mutants import EACH, KINDS, mutants, sample
from segattn.bench.emulated.mutations import GOAL, Judged, Spoilt, Tally, lines, spoil_all, tallies
from segattn.bench.emulated.trials import HOLE, NOTICED, REDUNDANT, UNREACHED, Trial, Verdict

ROOT = Path(__file__).resolve().parents[2]

# two warps exchange words that copies bring; the second barrier orders nothing, and %p2 holds nowhere
EXCHANGE = """
    shl.b32 %r11, %r0, 2;
    mad.wide.u32 %rd10, %r0, 4, %rd0;
    cp.async.ca.shared.global [%r11], [%rd10], 4;
    cp.async.commit_group;
    cp.async.wait_group 0;
    bar.sync 0;
    xor.b32 %r12, %r11, 128;
    ld.shared.b32 %r10, [%r12];
    setp.lt.s32 %p1, %r0, 60;
    setp.gt.s32 %p2, %r0, 70;
    mad.wide.u32 %rd11, %r0, 4, %rd1;
    @%p1 st.global.b32 [%rd11], %r10;
    bar.sync 0;
    @!%p2 bra END;
    bar.sync 0;
END:
"""
PRODUCT = """
    mad.wide.u32 %rd10, %r0, 16, %rd0;
    mad.wide.u32 %rd11, %r0, 16, %rd1;
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd10];
    mov.b32 %r20, 0;
    mov.b32 %r21, 0;
    mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r30, %r31, %r32, %r33}, {%r10, %r11, %r12, %r13},
        {%r10, %r13}, {%r20, %r21, %r20, %r21};
    st.global.v4.b32 [%rd11], {%r30, %r31, %r32, %r33};
"""


def judged(
    body: str, *tensors: torch.Tensor, threads: int, shared: int = 0, programs: int = 1, target: str = "sm_90a"
) -> dict[tuple[str, str, str], Verdict]:
    """Return what becomes of every mutant, by its kind, its instruction and its change."""
    parsed = program(body, ["u64"] * len(tensors), threads=threads, target=target)
    outputs = tensors[1:] if programs == 1 else ()
    trial = Trial(Executable("kernel", parsed, programs, tensors, shared, outputs), 1e-2)
    return {
        (m.kind, f"{m.at} {parsed.instructions[m.at].opcode}", m.change): trial.judge(m)
        for m in mutants(parsed)
        if parsed.instructions[m.at].source == "hand.py:20"
    }


def test_what_the_checks_notice() -> None:
    found = judged(EXCHANGE, torch.arange(1.0, 65.0), torch.zeros(60), threads=64, shared=256)
    verdicts = [(kind, change, *verdict) for (kind, _, change), verdict in found.items()]
    assert verdicts == [
        ("offset", "%r11 + 0 by 4 more", NOTICED, "bounds"),
        ("offset", "%rd10 + 0 by 4 more", NOTICED, "bounds"),
        ("wait", "for all but 1", NOTICED, "asynchronous copy"),
        ("wait", "for all but 1 past thread 32", NOTICED, "asynchronous copy"),
        ("barrier", "taken out", NOTICED, "race"),
        ("offset", "%r12 + 0 by 4 more", NOTICED, "bounds"),
        ("bound", "setp.le.s32", NOTICED, "bounds"),
        ("bound", "setp.ge.s32", REDUNDANT, "it does the same wherever it runs"),
        ("mask", "without %p1", NOTICED, "bounds"),
        ("offset", "%rd11 + 0 by 4 more", NOTICED, "bounds"),
        ("barrier", "taken out", REDUNDANT, "no two warps meet across it"),
        ("barrier", "taken out", UNREACHED, "no call gets there"),
    ]


# two products of zeros, each with an mbarrier of its own, behind a fence; a third mbarrier is begun and ended
TWO_PRODUCTS = """
    setp.lt.u32 %p2, %r0, 32;
    setp.eq.s32 %p3, %r0, 0;
    mov.u32 %r40, 8192;
    mov.u32 %r41, 8200;
    mov.u32 %r42, 8208;
    @%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40], 32;
    @%p3 mbarrier.init.shared::cta.b64 [%r41], 1;
    @%p3 mbarrier.init.shared::cta.b64 [%r42], 1;
    shl.b32 %r11, %r0, 4;
    mov.u32 %r12, 0;
    st.shared.v4.b32 [%r11], {%r12, %r12, %r12, %r12};
    st.shared.v4.b32 [%r11+2048], {%r12, %r12, %r12, %r12};
    st.shared.v4.b32 [%r11+4096], {%r12, %r12, %r12, %r12};
    fence.proxy.async.shared::cta;
    bar.sync 0;
    ld.shared.b32 %r43, [%r40];
    mov.b64 %rd20, 0x401000080000;
    mov.b64 %rd21, 0x401000080100;
    mov.u32 %r44, 0x8040490;
    setp.ne.s32 %p4, %r0, %r0;
    @%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r43 + 0 ], %rd20, %rd21, %r44, %p4;
    @%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r41];
    @%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r43 + 16 ], %rd20, %rd21, %r44, %p4;
    @%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r42];
FIRST:
    mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r41], 0;
    @!%p5 bra FIRST;
SECOND:
    mbarrier.try_wait.parity.shared::cta.b64 %p5, [%r42], 0;
    @!%p5 bra SECOND;
    shr.u32 %r45, %r0, 5;
    shl.b32 %r45, %r45, 21;
    add.s32 %r45, %r45, %r43;
    tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r50}, [%r45 + 16];
    tcgen05.wait::ld.sync.aligned;
    mad.wide.u32 %rd11, %r0, 4, %rd1;
    st.global.b32 [%rd11], %r50;
    bar.sync 0;
    @%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r43, 32;
    @%p3 mbarrier.inval.shared::cta.b64 [%r41];
"""


def test_spoilt_waits_of_tcgen05() -> None:
    made = judged(TWO_PRODUCTS, torch.zeros(1), torch.zeros(128), threads=128, shared=8320, target="sm_100a")
    found = [(what.split(".")[0], kind, change, *why) for (kind, what, change), why in made.items() if kind in EACH]
    needless = "what it ends is ended by another before its use, or is not used"
    early, race = (NOTICED, "asynchronous copy"), (NOTICED, "race")
    assert [(kind, change, *why) for _, kind, change, *why in found] == [
        ("fence", "taken out", NOTICED, "proxy fence"),
        ("fence", "taken out past thread 32", NOTICED, "proxy fence"),
        ("barrier", "taken out", *race),
        # the second commit tracks both products
        ("wait", "said to have ended", REDUNDANT, needless),
        ("wait", "said to have ended past thread 32", REDUNDANT, needless),
        ("wait", "at [%r42]", REDUNDANT, needless),
        ("wait", "at [%r42] past thread 32", REDUNDANT, needless),
        ("wait", "not tried again", REDUNDANT, needless),
        ("wait", "said to have ended", *early),
        ("wait", "said to have ended past thread 32", *race),
        ("wait", "at [%r41]", *early),
        ("wait", "at [%r41] past thread 32", *race),
        ("wait", "not tried again", *early),
        ("wait", "taken out", NOTICED, "asynchronous result"),
        ("wait", "taken out past thread 32", NOTICED, "asynchronous result"),
        ("barrier", "taken out", *race),
        ("wait", "taken out", NOTICED, "tensor memory"),
        ("wait", "taken out", REDUNDANT, needless),
    ]


def test_atomics_without_an_order() -> None:
    """Two warps count by an atomic, the last of two programs reads what both stored."""
    body = """
    setp.eq.u32 %p1, %r0, 0;
    mov.u32 %r6, 0;
    mov.u32 %r7, %ctaid.x;
    mad.wide.u32 %rd10, %r7, 4, %rd0;
    @%p1 st.global.b32 [%rd10], %r7;
    bar.sync 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r11, [%rd1], 1;
    @%p1 st.shared.b32 [%r6], %r11;
    bar.sync 0;
    ld.shared.b32 %r11, [%r6];
    setp.ne.u32 %p2, %r11, 1;
    @%p2 bra END;
    ld.global.b32 %r10, [%rd0];
END:
"""
    found = judged(body, torch.zeros(2), torch.zeros(1), threads=64, shared=64, programs=2)
    assert [why for (kind, _, _), why in found.items() if kind == "fence"] == [Verdict(NOTICED, "race")]


def test_swapped_fragments() -> None:
    x = torch.randn(32 * 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = judged(PRODUCT, x, torch.zeros(32 * 4), threads=32)
    swapped = [verdict for (kind, _, _), verdict in found.items() if kind == "fragment"]
    same = Verdict(REDUNDANT, "it does the same wherever it runs")  # of the zeros that are added
    assert swapped == [Verdict(NOTICED, "result")] * 3 + [same]


def test_what_reaches_no_result_is_redundant() -> None:
    """A load without its mask, of a value that is multiplied by nought; and one whose value is used after all."""
    load = """
    mad.wide.u32 %rd10, %r0, 4, %rd0;
    mad.wide.u32 %rd11, %r0, 4, %rd1;
    setp.lt.s32 %p1, %r0, 16;
    mov.b32 %r10, 0;
    @%p1 ld.global.b32 %r10, [%rd10];
    mov.b32 %r11, 0f3F800000;
    selp.b32 %r11, %r11, 0, %p1;
    {}
    st.global.b32 [%rd11], %r12;
"""
    for use, expected in (
        ("mul.f32 %r12, %r10, %r11;", Verdict(REDUNDANT, "nothing that it changes reaches a result")),
        ("mov.b32 %r12, %r10;", Verdict(NOTICED, "result")),
    ):
        found = judged(load.format(use), torch.arange(1.0, 33.0), torch.zeros(32), threads=32)
        assert [verdict for (kind, _, _), verdict in found.items() if kind == "mask"] == [expected]


def test_a_sample_has_every_barrier_and_wait() -> None:
    parsed = program(EXCHANGE, ["u64", "u64"], threads=64)
    all_of, few = list(mutants(parsed)), sample(parsed, 1, 0)
    assert few == sample(parsed, 1, 0)
    counts = Counter(m.kind for m in few)
    assert {kind: counts[kind] for kind in EACH if counts[kind]} == {"barrier": 3, "wait": 2}
    assert all(counts[kind] == 1 for kind in KINDS if kind not in EACH and any(m.kind == kind for m in all_of))
    assert {m.kind for m in all_of} <= set(KINDS)


def spoilt(what: str, kind: str = "barrier", why: str = "race") -> Spoilt:
    return Spoilt("sm_90", "scan_kernel", "d", 7, kind, "bar.sync", "taken out", "write.py:1", what, why, "delta")


def test_the_table_counts_shares() -> None:
    rows = [spoilt(NOTICED)] * 3 + [spoilt(HOLE, why="below the gate"), spoilt(REDUNDANT), spoilt(UNREACHED, "mask")]
    assert tallies(rows)[0] == Tally("sm_90 scan_kernel", 3, 1, 1, 1)
    assert tallies(rows)[-1].share == 0.75
    text = list(lines(rows))
    assert text[1].split() == ["sm_90", "scan_kernel", "3", "75.0%", "1", "1", "1"]
    assert "barrier        3  race" in text
    assert text[-1] == "  sm_90 scan_kernel (write.py:1): bar.sync, taken out; delta"


def test_launches_are_kept(tmp_path: Path) -> None:
    job = Job("sm_90", "bfloat16", "delta")
    for number, what in enumerate((NOTICED, HOLE, NOTICED)):
        Judged(tmp_path).add("d", job, min(number, 1), spoilt(what))
    kept = Judged(tmp_path)
    (cut,) = (path for path in kept.folder.iterdir() if path.read_text(encoding="utf-8").count("\n") == 1)
    with cut.open("a", encoding="utf-8") as file:
        file.write('{"job": ["sm_90')  # a line that is still written
    assert kept.of("d", job, 0) == [spoilt(NOTICED)]
    assert kept.of("d", job, 1) == [spoilt(HOLE), spoilt(NOTICED)]
    assert kept.of("d", job._replace(dtype="float16"), 0) == kept.of("e", job, 0) == []
    assert kept.noticed("d", [job]) == {spoilt(NOTICED).key}
    assert kept.noticed("d", [job._replace(call="linear")]) == kept.noticed("e", [job]) == set()


def test_what_a_call_leaves_out_another_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutants that one call notices are not judged in the next, but are where that is run without it."""
    tensors = torch.arange(1.0, 65.0), torch.zeros(60)
    launch = Executable("attend_kernel", program(EXCHANGE, ["u64", "u64"], threads=64), 1, tensors, 256, tensors[1:])

    @contextmanager
    def emulating(target: object, *, kept: object, before: Callable[[Executable], None]) -> Iterator[None]:
        before(launch)
        yield

    monkeypatch.setattr(mutations, "emulating", emulating)
    nothing: Any = Case(lambda dtype: {}, lambda made, backend: {}, lambda output, dtype: 0.0)
    for name in ("one", "two"):
        monkeypatch.setitem(CASES, name, nothing)
    jobs = [Job("sm_80", "float32", name) for name in ("one", "two")]

    monkeypatch.setattr(mutations, "each_of", lambda do, jobs, workers, ended: [do(job) for job in reversed(jobs)])

    def spoil(
        jobs: list[Job], name: str, workers: int = 1, kernels: tuple[str, ...] = ("attend_kernel",)
    ) -> set[tuple[object, ...]]:
        told: list[Job] = []
        found = spoil_all(jobs, kernels, 2, 0, tmp_path / name, workers, told.append)
        assert told == jobs[:: 1 if workers == 1 else -1]
        assert len(found) == len({x.key for x in found})
        return {(*x.key, x.what, x.why) for x in found}

    assert spoil(jobs, "both") == spoil(jobs[1:], "both") == spoil(jobs[1:], "alone") != set()
    assert spoil(jobs, "apart", workers=2) == spoil(jobs, "both")  # the second call is done first
    assert spoil(jobs, "both", kernels=("scan_kernel",)) == set()


def test_the_table_that_is_shown_is_the_one_that_was_measured() -> None:
    text = (ROOT / "kernels" / "README.md").read_text(encoding="utf-8").partition("### Spoilt")[2].partition("\n## ")[0]
    made = json.loads((ROOT / "bench" / "results" / "emulated" / "mutations.json").read_text(encoding="utf-8"))
    measured = {x["name"]: Tally(**x) for x in made["tallies"]}
    shown = [[x.strip() for x in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")][2:]
    assert {row[0] for row in shown} == {*KINDS, "all"}
    for name, *cells in shown:
        tally = measured[name]
        assert cells == [
            str(tally.noticed), f"{tally.share:.1%}", str(tally.holes), str(tally.redundant), str(tally.unreached)
        ]  # fmt: skip
    assert measured["all"].share >= GOAL
    assert measured["all"].holes == len(made["holes"])
