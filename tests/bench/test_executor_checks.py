"""Every check of the executor made to fire, and silent on the same code without its fault."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from small_ptx import place, run

from segattn.bench.emulated.faults import Fault


def fault(kind: str, body: str, *arguments: Any, **options: Any) -> Fault:
    """Execute a kernel that must fault, and return the fault; it names the kernel, and a line of the body."""
    with pytest.raises(Fault) as caught:
        run(body, *arguments, **options)
    assert caught.value.kind == kind, str(caught.value)
    assert re.match(r"kernel, line \d+ of its PTX \((hand.py:20|$)", str(caught.value))
    return caught.value


def zeros(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


STORE = place("%rd10", "%rd0", 4) + "    st.global.b32 [%rd10], %r10;\n"
# each thread writes its word of shared memory, and its neighbour's in the next warp is in %r12
WRITE = "    shl.b32 %r11, %r0, 2;\n    st.shared.b32 [%r11], %r0;\n"
NEXT = "    add.s32 %r12, %r11, 128;\n    and.b32 %r12, %r12, 255;\n"
READ = "    ld.shared.b32 %r10, [%r12];\n"
BARRIER = "    bar.sync 0;\n"


def test_bounds_of_a_tensor() -> None:
    inside, x = "    mov.u32 %r10, 5;\n", zeros(32)
    run(inside + STORE, x)
    error = fault("bounds", inside + STORE, zeros(31))
    assert "after the start of storage 0, of 124 bytes" in str(error)
    fault("bounds", inside + "    st.global.b32 [%rd0+-4], %r10;\n", x)
    fault("bounds", "    ld.global.b32 %r10, [%rd0];\n", x[:0])


def test_bounds_between_the_elements_of_a_strided_tensor() -> None:
    x = zeros(64).reshape(32, 2)[:, 0]
    run(place("%rd10", "%rd0", 8) + "    st.global.b32 [%rd10], %r1;\n", x)
    assert x.tolist() == list(range(32))
    fault("bounds", place("%rd10", "%rd0", 8) + "    st.global.v2.b32 [%rd10], {%r1, %r1};\n", x)


def test_predicated_accesses_are_not_made() -> None:
    body = "    setp.lt.u32 %p1, %r0, 31;\n    mov.u32 %r10, 1;\n" + STORE.replace("    st", "    @%p1 st")
    x = zeros(31)
    run(body, x, outputs=[x])


def test_alignment() -> None:
    fault("alignment", "    ld.global.v2.b32 {%r10, %r11}, [%rd0+4];\n", zeros(8))
    fault("alignment", "    st.shared.b32 [%r0], %r0;\n", shared=64)
    fault("alignment", "    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd0];\n", zeros(8)[1:5])


def test_bounds_of_shared_memory() -> None:
    run(WRITE, shared=128)
    fault("bounds", WRITE, shared=124)
    fault("bounds", "    mov.u32 %r11, -4;\n    st.shared.b32 [%r11], %r0;\n", shared=64)


def test_outputs_that_are_not_written() -> None:
    x = zeros(33)
    error = fault("unwritten output", "    mov.u32 %r10, 5;\n" + STORE, x, outputs=[x])
    assert "1 of 33 elements of output 0, first [32]" in str(error)
    y = torch.zeros(32)
    run("    ld.global.b32 %r10, [%rd0];\n    bar.warp.sync -1;\n" + STORE, y, outputs=[y])
    assert y.isnan().any()  # it was poisoned


def test_shared_memory_that_was_never_written() -> None:
    fault("uninitialised register", "    mov.u32 %r12, 0;\n" + READ + STORE, zeros(32), shared=64)
    run("    mov.u32 %r12, 0;\n" + READ, shared=64)  # nothing depends on it
    # a register that was never written, by way of shared memory
    body = "    shl.b32 %r11, %r0, 2;\n    st.shared.b32 [%r11], %r50;\n    ld.shared.b32 %r10, [%r11];\n"
    fault("uninitialised register", body + STORE, zeros(32), shared=128)


@pytest.mark.parametrize(
    "use",
    [
        STORE,
        "    add.s32 %r10, %r10, 1;\n" + STORE,
        "    shfl.sync.bfly.b32 %r10, %r10, 1, 31, -1;\n" + STORE,
        "    cvt.u64.u32 %rd11, %r10;\n    add.s64 %rd11, %rd11, %rd0;\n    ld.global.b32 %r11, [%rd11];\n",
        "    setp.eq.s32 %p1, %r10, 0;\n    @%p1 bra END;\nEND:\n",
        "    setp.eq.s32 %p1, %r10, 0;\n    selp.b32 %r10, 1, 2, %p1;\n" + STORE,
    ],
)
def test_registers_that_were_never_written(use: str) -> None:
    half = "    setp.lt.u32 %p2, %r0, 16;\n    @%p2 mov.u32 %r10, 0;\n"
    fault("uninitialised register", half + use, zeros(32))
    run(half + "    @!%p2 mov.u32 %r10, 0;\n" + use, zeros(32))


def test_what_is_not_chosen_may_be_anything() -> None:
    run("    setp.lt.u32 %p1, %r0, 64;\n    selp.b32 %r10, %r0, %r50, %p1;\n" + STORE, zeros(32))


def test_barriers_that_not_all_reach() -> None:
    half = "    setp.lt.u32 %p1, %r0, {};\n    @%p1 bra END;\n" + BARRIER + "END:\n"
    fault("barrier", half.format(32), threads=64)  # a warp has ended
    fault("barrier", half.format(16), threads=64)  # half a warp
    fault("barrier", half.format(16).replace(BARRIER, "    bar.warp.sync -1;\n"))
    fault("barrier", half.format(16).replace(BARRIER, "    shfl.sync.bfly.b32 %r10, %r0, 1, 31, -1;\n"))
    run(half.format(0), threads=64)
    # the same barrier, at two places
    run(half.format(32).replace("END:", "    bra DONE;\nEND:\n" + BARRIER + "DONE:"), threads=64)


def test_races_between_warps() -> None:
    options = {"threads": 64, "shared": 256}
    run(WRITE + NEXT + BARRIER + READ + STORE, zeros(64), **options)
    error = fault("race", WRITE + NEXT + READ + STORE, zeros(64), **options)
    # the write is three instructions before the read
    assert re.search(
        rf"reads what was written there by warp \d .*, at line {error.line - 3} \(hand.py:20\)", str(error)
    )
    # the other way: a read, then another warp's write
    again = WRITE + NEXT + BARRIER + READ + "{}    st.shared.b32 [%r11], %r10;\n"
    run(again.format(BARRIER), **options)
    assert "overwrites what is read there by warp" in str(fault("race", again.format(""), **options))
    # two writes; and a read by all, of which every warp counts
    fault("race", WRITE + NEXT + "    st.shared.b32 [%r12], %r0;\n", **options)
    everyone = (
        WRITE
        + BARRIER
        + "    mov.u32 %r12, 0;\n"
        + READ
        + "    setp.eq.s32 %p1, %r0, 0;\n    @%p1 st.shared.b32 [%r12], %r0;\n"
    )
    assert "several warps" in str(fault("race", everyone, **options))
    # at once: harmless by one warp, or of one value
    at_once = "    mov.u32 %r11, 0;\n    st.shared.b32 [%r11], {};\n"
    run(at_once.format("%r11"), **options)
    run(at_once.format("%r0"), shared=256)
    assert "different values" in str(fault("race", at_once.format("%r0"), **options))


def test_races_of_one_program_do_not_meet_another() -> None:
    run(WRITE + NEXT + BARRIER + READ + STORE, zeros(192), threads=64, shared=256, programs=3)


def test_races_within_a_warp() -> None:
    body = WRITE + "    xor.b32 %r12, %r11, 4;\n{}" + READ + STORE
    fault("race", body.format(""), zeros(32), shared=128)
    run(body.format("    bar.warp.sync -1;\n"), zeros(32), shared=128)


def test_two_programs_that_write_one_address() -> None:
    fault("two writers", "    st.global.b32 [%rd0], %r1;\n", zeros(1), programs=2)
    run("    st.global.b32 [%rd0], %r1;\n", zeros(1))
    run("    atom.global.add.u32 %r10, [%rd0], 1;\n", zeros(1), programs=2)


# each thread stores its word of global memory, and loads the one of a thread of another warp or program
EXCHANGE = (
    place("%rd10", "%rd0", 4)
    + "    st.global.b32 [%rd10], %r1;\n    xor.b32 %r5, %r1, 32;\n{}"
    + place("%rd11", "%rd0", 4, "%r5")
    + "    ld.global.b32 %r10, [%rd11];\n"
    + STORE.replace("%rd0", "%rd1")
)


def test_races_on_global_memory() -> None:
    out = zeros(64)
    run(EXCHANGE.format(BARRIER), zeros(64), out, threads=64)
    assert out.tolist() == [i ^ 32 for i in range(64)]
    fault("race", EXCHANGE.format(""), zeros(64), out, threads=64)
    fault("race", "    st.global.b32 [%rd0], %r0;\n", zeros(1), threads=64)  # different values
    over = "    ld.global.b32 %r10, [%rd10];\n{}    setp.eq.u32 %p1, %r0, 0;\n    @%p1 st.global.b32 [%rd0+128], %r0;\n"
    run(place("%rd10", "%rd0", 4) + over.format(BARRIER), zeros(64), threads=64)
    fault("race", place("%rd10", "%rd0", 4) + over.format(""), zeros(64), threads=64)


def test_what_another_program_stored() -> None:
    """The last of two programs to count reads what both stored, behind a barrier, a release, an acquire, a barrier."""
    body = (
        place("%rd10", "%rd0", 4)
        + """
    st.global.b32 [%rd10], %r1;
    bar.sync 0;
    mov.u32 %r6, 0;
    setp.eq.u32 %p1, %r0, 0;
    @%p1 atom.global.gpu.acq_rel.add.u32 %r11, [%rd2], 1;
    @%p1 st.shared.b32 [%r6], %r11;
    bar.sync 0;
    ld.shared.b32 %r11, [%r6];
    setp.ne.u32 %p2, %r11, 1;
    @%p2 bra END;
    xor.b32 %r5, %r1, 32;
"""
        + place("%rd11", "%rd0", 4, "%r5")
        + "    ld.global.b32 %r10, [%rd11];\n"
        + place("%rd10", "%rd1", 4, "%r0")
        + "    st.global.b32 [%rd10], %r10;\nEND:\n"
    )

    def arguments() -> tuple[torch.Tensor, ...]:
        return zeros(64), zeros(32), zeros(1)

    one, out, count = arguments()
    run(body, one, out, count, programs=2, shared=64)
    assert out.tolist() == list(range(32))
    for wrong in (
        body.replace("acq_rel", "relaxed"),
        body.replace("acq_rel", "release"),
        body.replace("acq_rel", "acquire"),
        body.replace("    bar.sync 0;\n", "", 1),
    ):
        error = fault("race", wrong, *arguments(), programs=2, shared=64)
        assert "by program 0, without a release and an acquire" in str(error)
    fault("race", EXCHANGE.format(BARRIER), zeros(64), zeros(64), programs=2)


def test_reads_of_a_warp_before_its_barrier() -> None:
    body = """
    setp.eq.u32 %p1, %r0, 0;
    setp.eq.u32 %p2, %r0, 1;
    mov.u32 %r5, 0;
    @%p1 st.shared.b32 [%r5], %r0;
    bar.warp.sync -1;
    @%p1 ld.shared.b32 %r10, [%r5];
    {}
    @%p2 ld.shared.b32 %r10, [%r5];
    @%p2 st.shared.b32 [%r5], %r0;
"""
    run(body.format("bar.warp.sync -1;"), shared=64)
    fault("race", body.format(""), shared=64)


def test_bounds_are_of_one_storage() -> None:
    x, y = zeros(32), zeros(4096)
    for away in (4352, 8192, 1 << 20, -4096, -(1 << 41)):
        fault("bounds", f"    ld.global.b32 %r10, [%rd0+{away}];\n", x, y)
    holes = torch.zeros(64, dtype=torch.int16)[::3]  # the ends are elements, what is between is not
    fault("bounds", "    mov.b16 %rs1, 7;\n    st.global.v4.b16 [%rd0], {%rs1, %rs1, %rs1, %rs1};\n", holes)


COPY = """
    shl.b32 %r11, %r0, 2;
    add.s64 %rd10, %rd0, 0;
    mad.wide.u32 %rd10, %r0, 4, %rd10;
    cp.async.ca.shared.global [%r11], [%rd10], 4;
    cp.async.commit_group;
"""


def test_copies_before_their_wait() -> None:
    x, out = torch.arange(32, dtype=torch.int32), zeros(32)
    read = "    ld.shared.b32 %r10, [%r11];\n" + STORE.replace("%rd0", "%rd1")
    run(COPY + "    cp.async.wait_group 0;\n" + read, x, out, shared=128)
    assert torch.equal(out, x)
    fault("asynchronous copy", COPY + read, x, out, shared=128)
    fault("asynchronous copy", COPY + "    cp.async.wait_group 1;\n" + read, x, out, shared=128)
    fault("asynchronous copy", COPY + "    st.shared.b32 [%r11], %r0;\n", x, out, shared=128)
    # a copy over what another warp reads; and what another warp's copy brought, without a barrier
    wait = COPY + "    cp.async.wait_group 0;\n"
    fault("race", wait + NEXT + READ, torch.arange(64, dtype=torch.int32), shared=256, threads=64)
    over = WRITE + BARRIER + NEXT + READ + "{}" + COPY
    fault("race", over.format(""), torch.arange(64, dtype=torch.int32), shared=256, threads=64)
    run(over.format(BARRIER), torch.arange(64, dtype=torch.int32), shared=256, threads=64)


def test_copies_end_with_zeros() -> None:
    x, out = torch.arange(1, 33, dtype=torch.int32), zeros(32)
    body = COPY.replace("], 4;", "], 4, %r13;")
    size = "    setp.lt.u32 %p1, %r0, 20;\n    selp.b32 %r13, 4, 0, %p1;\n"
    read = "    cp.async.wait_group 0;\n    ld.shared.b32 %r10, [%r11];\n" + STORE.replace("%rd0", "%rd1")
    run(size + body + read, x[:20], out, shared=128)  # beyond its end nothing is read
    assert torch.equal(out[:20], x[:20])
    assert not out[20:].any()


# 128 threads: 64 × 16 halves of zeros as A at 0, 8 × 16 as B at 4096, both without a swizzle
FILL = """
    shl.b32 %r11, %r0, 4;
    mov.u32 %r12, 0;
    st.shared.v4.b32 [%r11], {%r12, %r12, %r12, %r12};
    st.shared.v4.b32 [%r11+4096], {%r12, %r12, %r12, %r12};
"""
FENCE = "    fence.proxy.async.shared::cta;\n"
# leading offsets of 128 bytes, strides of 256
PRODUCT = """
    mov.b64 %rd20, 0x1000080000;
    mov.b64 %rd21, 0x1000080100;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r20, %r21, %r22, %r23}, %rd20, %rd21, 0, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
"""
WAIT = "    wgmma.wait_group.sync.aligned 0;\n"
USE = STORE.replace("%r10", "%r20")
HOPPER: dict[str, Any] = {"threads": 128, "shared": 8192}


def test_wgmma_between_its_fences_and_waits() -> None:
    out = zeros(128)
    run(FILL + BARRIER + FENCE + PRODUCT + WAIT + USE, out, outputs=[out], **HOPPER)
    run(FILL + FENCE + BARRIER + PRODUCT + WAIT + USE, out, outputs=[out], **HOPPER)
    error = fault("race", FILL + FENCE + PRODUCT + WAIT + USE, out, **HOPPER)
    assert "since the last barrier, at line" in str(error)
    fault("proxy fence", FILL + BARRIER + PRODUCT + WAIT + USE, out, **HOPPER)
    fault("asynchronous result", FILL + BARRIER + FENCE + PRODUCT + USE, out, **HOPPER)
    fault(
        "asynchronous result",
        FILL + BARRIER + FENCE + PRODUCT + "    wgmma.wait_group.sync.aligned 1;\n" + USE,
        out,
        **HOPPER,
    )
    fault("asynchronous result", FILL + BARRIER + FENCE + PRODUCT + "    mov.u32 %r21, 0;\n", out, **HOPPER)
    fault("uninitialised shared memory", BARRIER + FENCE + PRODUCT, out, **HOPPER)
    unfenced = PRODUCT.replace("    wgmma.fence.sync.aligned;\n", "")
    fault("register fence", FILL + BARRIER + FENCE + unfenced, out, **HOPPER)
    again = FILL + BARRIER + FENCE + PRODUCT + WAIT + "{}" + unfenced + WAIT
    run(again.replace("{}", ""), out, **HOPPER)
    fault("register fence", again.replace("{}", "    mov.u32 %r22, 0;\n"), out, **HOPPER)
    run(again.replace("{}", "    mov.u32 %r22, %r23;\n"), out, **HOPPER)


def test_tiles_that_wgmma_reads() -> None:
    overwrite = "    st.shared.b32 [%r11], %r12;\n"
    before = FILL + BARRIER + FENCE + PRODUCT
    fault("asynchronous copy", before + BARRIER + overwrite + WAIT, zeros(1), **HOPPER)
    fault("race", before + WAIT + overwrite, zeros(1), **HOPPER)
    run(before + WAIT + BARRIER + overwrite, zeros(1), **HOPPER)


def test_wgmma_of_a_copy_before_its_wait() -> None:
    x = zeros(512)
    copy, product = FILL + BARRIER + COPY, BARRIER + FENCE + PRODUCT + WAIT
    fault("asynchronous copy", copy + product, x, **HOPPER)
    run(copy + "    cp.async.wait_group 0;\n" + product, x, **HOPPER)
    # a fence behind the copy that its wait does not precede is none
    for early, late in ((FENCE, ""), ("", FENCE)):
        unfenced = FILL + early + BARRIER + COPY + late + "    cp.async.wait_group 0;\n" + BARRIER + PRODUCT + WAIT
        fault("proxy fence", unfenced, x, **HOPPER)


def only(threads: str, body: str) -> str:
    """Return lines that some threads execute."""
    return f"    setp.{threads};\n    @!%p9 bra PAST;\n{body}PAST:\n"


def test_fences_by_others_than_those_who_need_them() -> None:
    before, after = FILL + BARRIER, PRODUCT + WAIT
    run(before + only("lt.u32 %p9, %r0, 128", FENCE) + after, **HOPPER)
    fault("proxy fence", before + only("lt.u32 %p9, %r0, 32", FENCE) + after, **HOPPER)  # one warp reads behind it
    fault("proxy fence", before + only("eq.u32 %p9, %r0, 0", FENCE) + after, **HOPPER)
    # the writer's, which counts before the barrier alone
    tile = only(
        "ge.u32 %p9, %r0, 96",
        "    sub.s32 %r14, %r0, 96;\n    shl.b32 %r11, %r14, 6;\n    mov.u32 %r12, 0;\n"
        + "".join(f"    st.shared.v4.b32 [%r11+{16 * i}], {{%r12, %r12, %r12, %r12}};\n" for i in range(4))
        + "{}",
    )
    product = PRODUCT.replace("0x1000080100", "0x1000080000") + WAIT
    run(tile.replace("{}", FENCE) + BARRIER + product, **HOPPER)
    late = only("ge.u32 %p9, %r0, 96", FENCE).replace("PAST", "LATE")
    fault("proxy fence", tile.replace("{}", "") + BARRIER + late + product, **HOPPER)


@pytest.mark.parametrize(("programs", "threads"), [(2, 128), (1, 256)])
def test_tiles_that_others_have_waited_for(programs: int, threads: int) -> None:
    wait = "    mov.u32 %r30, %ctaid.x;\n    shr.u32 %r31, %r0, 7;\n    or.b32 %r30, %r30, %r31;\n" + only(
        "eq.u32 %p9, %r30, {}", WAIT
    )
    overwrite = BARRIER + "    st.shared.b32 [%r11], %r12;\n" + WAIT
    options = {"threads": threads, "programs": programs, "shared": 16384}
    begin = FILL + BARRIER + FENCE + PRODUCT
    for first in (0, 1):
        fault("asynchronous copy", begin + wait.format(first) + overwrite, **options)
    run(begin + WAIT + overwrite, **options)


def test_copies_of_different_data_to_one_place() -> None:
    body = COPY.replace("shl.b32 %r11, %r0, 2", "mov.u32 %r11, 0") + "    cp.async.wait_group 0;\n"
    run(body, zeros(64), threads=64, shared=64)
    fault("race", body, torch.arange(64, dtype=torch.int32), threads=64, shared=64)


def test_part_of_a_warpgroup() -> None:
    body = FILL + BARRIER + FENCE + "    setp.lt.u32 %p1, %r0, 32;\n    @%p1 bra END;\n" + PRODUCT + "END:\n"
    fault("barrier", body, zeros(1), **HOPPER)
