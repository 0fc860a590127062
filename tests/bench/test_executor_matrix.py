"""Executed matrix instructions against plain products, with layouts as the PTX ISA's figures number them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from small_ptx import place, run
from torch import Tensor

from segattn.bench.emulated.faults import Fault, Unsupported

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def draw(seed: int, *shape: int, kind: str = "bf16") -> Tensor:
    """Return numbers whose products and sums are exact in every format."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).to(DTYPES[kind])


def words(x: Tensor) -> Tensor:
    """Return the last dimension as 32-bit words."""
    return x.contiguous().view(torch.int32)


def load(registers: list[str], base: str) -> str:
    """Return the lines that load a thread's registers, which follow one another in memory."""
    lines = place("%rd60", base, 4 * len(registers))
    return lines + "".join(f"    ld.global.b32 {r}, [%rd60+{4 * i}];\n" for i, r in enumerate(registers))


def store(registers: list[str], base: str) -> str:
    """Return the lines that store a thread's registers."""
    lines = place("%rd60", base, 4 * len(registers))
    return lines + "".join(f"    st.global.b32 [%rd60+{4 * i}], {r};\n" for i, r in enumerate(registers))


def names(first: int, count: int) -> list[str]:
    return [f"%r{first + i}" for i in range(count)]


def vector(registers: list[str]) -> str:
    return "{" + ", ".join(registers) + "}"


# element i of a lane's fragment, of m16n8k16 and m16n8k8: its row and column
def a_half(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i in (2, 3, 6, 7) else 0), lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_half(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def a_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def b_tf32(lane: int, i: int) -> tuple[int, int]:
    return lane % 4 + 4 * i, lane // 4


def c_float(lane: int, i: int) -> tuple[int, int]:
    return lane // 4 + (8 if i >= 2 else 0), lane % 4 * 2 + (i & 1)


def spread(matrix: Tensor, layout: Any, elements: int) -> Tensor:
    """Return the fragments of a matrix, [32 × elements]."""
    return torch.stack([matrix[layout(lane, i)] for lane in range(32) for i in range(elements)])


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_mma(kind: str) -> None:
    K, half = (8, False) if kind == "tf32" else (16, True)
    a, b, c = draw(0, 16, K, kind=kind), draw(1, K, 8, kind=kind), draw(2, 16, 8).float()
    parts = [
        spread(a, a_half if half else a_tf32, 8 if half else 4),
        spread(b, b_half if half else b_tf32, 4 if half else 2),
        spread(c, c_float, 4),
    ]
    out = torch.zeros(32 * 4)
    body = load(names(20, 4), "%rd0") + load(names(30, 2), "%rd1") + load(names(40, 4), "%rd2")
    name = f"mma.sync.aligned.m16n8k{K}.row.col.f32.{kind}.{kind}.f32"
    body += (
        f"    {name} {vector(names(50, 4))}, {vector(names(20, 4))}, {vector(names(30, 2))}, {vector(names(40, 4))};\n"
    )
    done = run(body + store(names(50, 4), "%rd3"), *map(words, parts), out, outputs=[out])
    assert done.operations == 2 * 16 * 8 * K
    assert torch.equal(out, spread(a.float() @ b.float() + c, c_float, 4))


def test_mma_ignores_the_last_bits_of_tf32() -> None:
    a, b = draw(0, 16, 8, kind="tf32"), draw(1, 8, 8, kind="tf32")
    noisy = (words(a) | 0x1FFF).view(torch.float32)
    out = torch.zeros(32 * 4)
    body = load(names(20, 4), "%rd0") + load(names(30, 2), "%rd1") + "    mov.u32 %r40, 0;\n"
    body += f"    mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {vector(names(50, 4))}, {vector(names(20, 4))}, "
    body += f"{vector(names(30, 2))}, {{%r40, %r40, %r40, %r40}};\n"
    run(body + store(names(50, 4), "%rd2"), words(spread(noisy, a_tf32, 4)), words(spread(b, b_tf32, 2)), out)
    assert torch.equal(out, spread(a @ b, c_float, 4))


@pytest.mark.parametrize(("count", "transposed"), list(itertools.product([1, 2, 4], [False, True])))
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Through shared memory whose rows are 48 bytes apart, in the opposite order."""
    matrices = torch.arange(count * 64, dtype=torch.int16).reshape(count, 8, 8)
    layout = matrices.transpose(1, 2) if transposed else matrices
    fragments = torch.stack(
        [layout[i, lane // 4, lane % 4 * 2 + j] for lane in range(32) for i in range(count) for j in (0, 1)]
    )
    suffix = f"sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    size = count * 8 * 48
    address = f"    mul.lo.s32 %r10, %r0, -48;\n    add.s32 %r10, %r10, {size - 48};\n"
    registers = names(20, count)
    rows = (
        place("%rd10", "%rd0", 16)
        + "    setp.lt.u32 %p1, %r0, {0};\n    @%p1 ld.global.v4.b32 {{%r30, %r31, %r32, %r33}}, [%rd10];\n"
    )
    rows = (
        rows.format(8 * count)
        + address
        + "    @%p1 st.shared.v4.b32 [%r10], {%r30, %r31, %r32, %r33};\n    bar.warp.sync -1;\n"
    )
    out = torch.zeros(32 * count, dtype=torch.int32)
    run(
        rows + f"    ldmatrix.{suffix} {vector(registers)}, [%r10];\n" + store(registers, "%rd1"),
        words(matrices),
        out,
        shared=size,
        outputs=[out],
    )
    assert torch.equal(out, words(fragments))
    back = torch.zeros(count, 8, 8, dtype=torch.int16)
    body = (
        load(registers, "%rd0")
        + address
        + f"    stmatrix.{suffix} [%r10], {vector(registers)};\n    bar.warp.sync -1;\n"
    )
    body += (
        place("%rd10", "%rd1", 16)
        + f"    setp.lt.u32 %p1, %r0, {8 * count};\n    @%p1 ld.shared.v4.b32 {{%r30, %r31, %r32, %r33}}, [%r10];\n"
    )
    body += "    @%p1 st.global.v4.b32 [%rd10], {%r30, %r31, %r32, %r33};\n"
    run(body, out, words(back), shared=size)
    assert torch.equal(back, matrices)


class Operand:
    """A matrix [rows, K] as bytes of shared memory, and its descriptors, one for each 32 bytes along K.

    swizzle: the bytes of a row of the swizzled atoms, 16 for none. Transposed, M or N lies along these rows.
    """

    def __init__(self, matrix: Tensor, swizzle: int, transposed: bool, start: int, hopper: bool) -> None:
        rows, K = matrix.shape
        size = matrix.itemsize
        atom = 8 * swizzle  # bytes of eight rows
        self.data = bytearray(rows * K * size)
        across = swizzle // size  # elements of an atom's row
        if transposed:
            groups_along, groups_k = rows // across, K // 8
            along, of_k = atom * groups_k, atom
            leading, stride = (of_k, along) if swizzle == 16 else (along, of_k)
            steps = [2 * of_k * i for i in range(K * size // 32)]
            assert groups_along >= 1
        else:
            # atoms of eight rows: down the rows first
            stride, leading = atom, atom * (rows // 8)
            steps = [
                32 * i % swizzle + 32 * i // swizzle * leading if swizzle > 16 else 2 * i * leading
                for i in range(K * size // 32)
            ]
        for r, k in itertools.product(range(rows), range(K)):
            line, place = (k, r) if transposed else (r, k)
            chunk, inside = place % across * size // 16, place % across * size % 16
            turned = chunk ^ line % 8 * swizzle // 128 % 8 if swizzle > 16 else chunk
            if transposed:
                at = place // across * along + line // 8 * of_k
            else:
                at = line // 8 * stride + place // across * leading
            at += line % 8 * swizzle + turned * 16 + inside
            element = matrix[r, k : k + 1].view(torch.uint8).numpy().tobytes()
            self.data[at : at + size] = element
        code = {16: 0, 128: 1, 64: 2, 32: 3} if hopper else {16: 0, 128: 2, 64: 4, 32: 6}
        kind = code[swizzle] << 62 if hopper else code[swizzle] << 61 | 1 << 46
        self.descriptors = [(start + step) >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | kind for step in steps]


def copy_to_shared(size: int, threads: int) -> str:
    """Return the lines that copy the bytes at %rd0 to shared memory, fence them, and meet at a barrier."""
    lines = "    mov.u32 %r10, %r0;\nCOPY:\n    mad.wide.u32 %rd40, %r10, 16, %rd0;\n"
    lines += "    ld.global.v4.b32 {%r11, %r12, %r13, %r14}, [%rd40];\n    shl.b32 %r15, %r10, 4;\n"
    lines += "    st.shared.v4.b32 [%r15], {%r11, %r12, %r13, %r14};\n"
    lines += f"    add.s32 %r10, %r10, {threads};\n    setp.lt.u32 %p1, %r10, {size // 16};\n    @%p1 bra COPY;\n"
    return lines + "    fence.proxy.async.shared::cta;\n    bar.sync 0;\n"


def shared_image(*operands: tuple[int, Operand]) -> Tensor:
    size = max(start + len(o.data) for start, o in operands)
    image = bytearray(-(-size // 2048) * 2048)
    for start, operand in operands:
        image[start : start + len(operand.data)] = operand.data
    return torch.frombuffer(image, dtype=torch.uint8)


def warpgroup_rows(N: int) -> list[list[tuple[int, int]]]:
    """Return row and column of every register of D, of every thread of a warpgroup."""
    return [
        [(t // 32 * 16 + t % 32 // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + t % 4 * 2 + i % 2) for i in range(N // 2)]
        for t in range(128)
    ]


CASES = [
    ("bf16", swizzle, a, b)
    for swizzle, a, b in itertools.product([128, 64, 32, 16], ["rows", "columns", "registers"], ["rows", "columns"])
]
CASES += [
    ("f16", 128, "rows", "columns"),
    ("tf32", 128, "rows", "rows"),
    ("tf32", 64, "registers", "rows"),
    ("tf32", 16, "rows", "rows"),
]


@pytest.mark.parametrize(("kind", "swizzle", "a_from", "b_from"), CASES)
def test_wgmma(kind: str, swizzle: int, a_from: str, b_from: str) -> None:
    K, N = (32, 32) if kind == "tf32" else (64, 64)
    step = 8 if kind == "tf32" else 16
    a, b = draw(0, 64, K, kind=kind), draw(1, N, K, kind=kind)
    start = 8192
    right = Operand(b, swizzle, b_from == "columns", start, True)
    parts = [(start, right)]
    if a_from != "registers":
        left = Operand(a, swizzle, a_from == "columns", 0, True)
        parts.append((0, left))
    image = shared_image(*parts)
    d = names(100, N // 2)
    fragments = torch.zeros(1)
    body = copy_to_shared(image.numel(), 128) + "    wgmma.fence.sync.aligned;\n"
    transposes = f", {int(a_from == 'columns')}, {int(b_from == 'columns')}" if kind != "tf32" else ""
    steps = K // step
    if a_from == "registers":
        transposes = f", {int(b_from == 'columns')}" if kind != "tf32" else ""
        layout, elements = (a_tf32, 4) if kind == "tf32" else (a_half, 8)
        warps = [
            [
                spread(a[16 * w : 16 * w + 16, step * s : step * s + step], layout, elements).reshape(32, -1)
                for s in range(steps)
            ]
            for w in range(4)
        ]
        fragments = torch.cat([torch.cat(row, 1) for row in warps])
        body += load(names(300, 4 * steps), "%rd1")
    for s in range(steps):
        operand = vector(names(300 + 4 * s, 4)) if a_from == "registers" else "%rd20"
        if a_from != "registers":
            body += f"    mov.b64 %rd20, {left.descriptors[s]};\n"
        body += f"    mov.b64 %rd21, {right.descriptors[s]};\n"
        name = f"wgmma.mma_async.sync.aligned.m64n{N}k{step}.f32.{kind}.{kind}"
        body += f"    {name} {vector(d)}, {operand}, %rd21, {int(s > 0)}, 1, 1{transposes};\n"
    body += "    wgmma.commit_group.sync.aligned;\n    wgmma.wait_group.sync.aligned 0;\n" + store(d, "%rd2")
    out = torch.zeros(128, N // 2)
    run(body, image, words(fragments), out, threads=128, shared=image.numel(), outputs=[out])
    product = a.float() @ b.float().T
    want = torch.tensor([[product[place] for place in row] for row in warpgroup_rows(N)])
    assert torch.equal(out, want)


def test_wgmma_of_several_warpgroups_and_programs() -> None:
    """Each warpgroup of each program has rows of its own; B is the program's."""
    a, b = draw(0, 2, 128, 16), draw(1, 2, 8, 16)
    tiles = [
        shared_image(
            (0, Operand(a[p, :64], 32, False, 0, True)),
            (2048, Operand(a[p, 64:], 32, False, 2048, True)),
            (4096, Operand(b[p], 32, False, 4096, True)),
        )
        for p in range(2)
    ]
    descriptor = Operand(a[0, :64], 32, False, 0, True).descriptors[0]
    size = tiles[0].numel()
    body = f"    mov.u32 %r16, %ctaid.x;\n    mad.wide.u32 %rd0, %r16, {size}, %rd0;\n" + copy_to_shared(size, 256)
    body += f"    shr.u32 %r17, %r0, 7;\n    mul.wide.u32 %rd20, %r17, 128;\n    add.s64 %rd20, %rd20, {descriptor};\n"
    body += f"    mov.b64 %rd21, {descriptor + 256};\n    wgmma.fence.sync.aligned;\n"
    name, d = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16", names(100, 4)
    body += f"    {name} {vector(d)}, %rd20, %rd21, 0, 1, 1, 0, 0;\n    wgmma.commit_group.sync.aligned;\n"
    body += "    wgmma.wait_group.sync.aligned 0;\n" + store(d, "%rd1")
    out = torch.zeros(2, 2, 128, 4)
    run(body, torch.stack(tiles), out, threads=256, programs=2, shared=size, outputs=[out])
    product = (a.float() @ b.float().transpose(1, 2)).reshape(2, 2, 64, 8)
    want = [
        [[[product[p, w][place] for place in row] for row in warpgroup_rows(8)] for w in range(2)] for p in range(2)
    ]
    assert torch.equal(out, torch.tensor(want))


SETUP = """
    setp.lt.u32 %p2, %r0, 32;
    @%p2 tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40], 512;
    setp.eq.s32 %p3, %r0, 0;
    @%p3 mbarrier.init.shared::cta.b64 [%r41], 1;
    bar.sync 0;
    ld.shared.b32 %r42, [%r40];
"""
# the lanes of tensor memory that a warp may touch
WARP_LANES = "    shr.u32 %r43, %r0, 5;\n    shl.b32 %r43, %r43, 21;\n    add.s32 %r43, %r43, %r42;\n"
WAITS = """
    {
    .reg .pred complete;
    waitLoop:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r41], 0;
    @!complete bra.uni waitLoop;
    }
"""
COMMIT = "    @%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r41];\n"


def blackwell(body: str, *arguments: Any, image: Tensor, **options: Any) -> None:
    """Execute a kernel of 128 threads with shared memory as it is in `image`, and tensor memory from %r42 on."""
    size = image.numel()
    start = copy_to_shared(size, 128) + f"    mov.u32 %r40, {size};\n    mov.u32 %r41, {size + 8};\n" + SETUP
    end = "    bar.sync 0;\n    @%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r42, 512;\n"
    run(start + body + end, image, *arguments, threads=128, shared=size + 16, target="sm_100a", **options)


def fetch(registers: list[str]) -> str:
    """Return the lines that load a row of tensor memory."""
    shape = f"32x32b.x{len(registers)}.b32"
    return f"    tcgen05.ld.sync.aligned.{shape} {vector(registers)}, [%r43 + 0];\n    tcgen05.wait::ld.sync.aligned;\n"


def descriptor_of(M: int, N: int, kind: str, a: bool, b: bool) -> int:
    code = {"f16": 0, "bf16": 1, "tf32": 2}[kind]
    return 1 << 4 | code << 7 | code << 10 | a << 15 | b << 16 | N >> 3 << 17 | M >> 4 << 24


@pytest.mark.parametrize(
    ("M", "swizzle", "a_from", "b_from"),
    [
        c
        for c in itertools.product(
            [128, 64], [128, 64, 32, 16], ["rows", "columns", "tensor memory"], ["rows", "columns"]
        )
        if c[2] != "tensor memory" or c[1] == 128
    ],
)
def test_tcgen05(M: int, swizzle: int, a_from: str, b_from: str) -> None:
    K, N = 64, 64
    a, b = draw(0, M, K), draw(1, N, K)
    right = Operand(b, swizzle, b_from == "columns", 16384, False)
    left = Operand(a, swizzle, a_from == "columns", 0, False)
    image = shared_image((0, left), (16384, right))
    how = descriptor_of(M, N, "bf16", a_from == "columns", b_from == "columns")
    body = ""
    # lane of tensor memory → row of A and D
    row_of = {r if M == 128 else r // 16 * 32 + r % 16: r for r in range(M)}
    held = torch.zeros(128, K, dtype=torch.bfloat16)
    for lane, r in row_of.items():
        held[lane] = a[r]
    body += WARP_LANES
    if a_from == "tensor memory":
        body += (
            load(names(200, 32), "%rd1")
            + f"    tcgen05.st.sync.aligned.32x32b.x32.b32 [%r43 + 256], {vector(names(200, 32))};\n"
        )
        body += "    tcgen05.wait::st.sync.aligned;\n    bar.sync 0;\n"
    body += f"    mov.u32 %r44, {how};\n"
    for s in range(4):
        operand = f"[ %r42 + {256 + 8 * s} ]" if a_from == "tensor memory" else "%rd20"
        body += f"    mov.b64 %rd20, {left.descriptors[s]};\n    mov.b64 %rd21, {right.descriptors[s]};\n"
        body += f"    setp.ne.s32 %p4, {s}, 0;\n"
        body += f"    @%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r42 + 0 ], {operand}, %rd21, %r44, %p4;\n"
    body += COMMIT + WAITS + fetch(names(300, 64))
    if M == 64:  # only half of the lanes have rows
        body += "    and.b32 %r45, %r0, 16;\n    setp.eq.s32 %p5, %r45, 0;\n"
        body += store(names(300, 64), "%rd2").replace("    st", "    @%p5 st")
    else:
        body += store(names(300, 64), "%rd2")
    out = torch.zeros(128, N)
    blackwell(body, words(held), out, image=image)
    product = a.float() @ b.float().T
    for lane, r in row_of.items():
        assert torch.equal(out[lane], product[r]), lane


def test_tcgen05_in_tf32() -> None:
    a, b = draw(0, 128, 8, kind="tf32"), draw(1, 16, 8, kind="tf32")
    left, right = Operand(a, 32, False, 0, False), Operand(b, 32, False, 8192, False)
    body = f"    mov.u32 %r44, {descriptor_of(128, 16, 'tf32', False, False)};\n    setp.ne.s32 %p4, %r44, %r44;\n"
    body += f"    mov.b64 %rd20, {left.descriptors[0]};\n    mov.b64 %rd21, {right.descriptors[0]};\n"
    body += "    @%p3 tcgen05.mma.cta_group::1.kind::tf32 [ %r42 + 0 ], %rd20, %rd21, %r44, %p4;\n" + COMMIT + WAITS
    body += WARP_LANES + fetch(names(300, 16))
    out = torch.zeros(128, 16)
    blackwell(body + store(names(300, 16), "%rd1"), out, image=shared_image((0, left), (8192, right)))
    assert torch.equal(out, a @ b.T)


def test_tensor_memory_in_halves_of_a_warp() -> None:
    """16x32bx2: lanes 16 to 31 have the same 16 rows, in columns further right."""
    values = torch.arange(128 * 4, dtype=torch.int32)
    body = load(names(200, 4), "%rd1") + WARP_LANES
    body += f"    tcgen05.st.sync.aligned.16x32bx2.x4.b32 [%r43 + 0], 4, {vector(names(200, 4))};\n"
    body += "    tcgen05.wait::st.sync.aligned;\n    bar.warp.sync -1;\n" + fetch(names(300, 8))
    body += "    and.b32 %r45, %r0, 16;\n    setp.eq.s32 %p5, %r45, 0;\n"
    body += store(names(300, 8), "%rd2").replace("    st", "    @%p5 st")
    out = torch.zeros(128, 8, dtype=torch.int32)
    blackwell(body, values, out, image=torch.zeros(2048, dtype=torch.uint8))
    rows = values.reshape(4, 2, 16, 4)
    assert torch.equal(out.reshape(4, 2, 16, 8)[:, 0], torch.cat([rows[:, 0], rows[:, 1]], -1))


PRODUCT = """
    mov.u32 %r44, {how};
    mov.b64 %rd20, {left};
    mov.b64 %rd21, {right};
    setp.ne.s32 %p4, %r44, %r44;
    @%p3 tcgen05.mma.cta_group::1.kind::f16 [ %r42 + 0 ], %rd20, %rd21, %r44, %p4;
"""
LOAD = """
    shr.u32 %r43, %r0, 5;
    shl.b32 %r43, %r43, 21;
    add.s32 %r43, %r43, %r42;
    tcgen05.ld.sync.aligned.32x32b.x8.b32 {%r300, %r301, %r302, %r303, %r304, %r305, %r306, %r307}, [%r43 + 0];
"""
FREE = "    @%p2 tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r42, 512;\n"
WAIT_LOAD = "    tcgen05.wait::ld.sync.aligned;\n"


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("asynchronous copy", COMMIT + LOAD + WAIT_LOAD),  # the product has not ended
        ("asynchronous result", COMMIT + WAITS + LOAD + "    add.s32 %r300, %r300, 1;\n"),
        ("deadlock", WAITS),
        ("deadlock", COMMIT + WAITS + WAITS.replace("], 0", "], 1")),
        ("asynchronous copy", COMMIT + "    bar.sync 0;\n    st.shared.b32 [%r15], %r0;\n"),  # over its operand
        ("bounds", COMMIT + WAITS + LOAD.replace("%r42;", "%r42;\n    add.s32 %r43, %r43, 512;")),
        ("bounds", COMMIT + WAITS + LOAD.replace(", 21", ", 20")),
        ("race", COMMIT + WAITS + LOAD + WAIT_LOAD + "{again}"),
        ("mbarrier", "    @%p3 tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%r41+-8];\n"),
        # by another thread than the product's; without asking again; loads that no wait ends
        ("asynchronous copy", "    setp.eq.s32 %p6, %r0, 32;\n" + COMMIT.replace("%p3", "%p6") + WAITS + LOAD),
        (
            "asynchronous copy",
            COMMIT
            + WAITS.replace("@!complete bra", "@!%p15 bra").replace("    {", "    mov.pred %p15, -1;\n    {", 1)
            + LOAD,
        ),
        ("race", COMMIT + WAITS + LOAD + "    bar.sync 0;\n{again}" + WAIT_LOAD),
        # tensor memory given back while others read it, or a product writes it; other columns than were allocated
        ("race", COMMIT + WAITS + LOAD + WAIT_LOAD + FREE),
        ("asynchronous copy", FREE),
        ("tensor memory", "    mov.u32 %r42, 77;\n" + FREE),
        ("tensor memory", COMMIT + WAITS + LOAD.replace("%r42;", "%r42;\n    add.s32 %r43, %r43, %r0;")),
        # an mbarrier is overwritten, or begins again
        ("mbarrier", "    bar.sync 0;\n    @%p3 st.shared.b32 [%r41], %r0;\n"),
        ("mbarrier", "    bar.sync 0;\n    @%p3 mbarrier.init.shared::cta.b64 [%r41], 1;\n"),
    ],
)
def test_faults_of_tcgen05(kind: str, wrong: str) -> None:
    a, b = draw(0, 128, 16), draw(1, 16, 16)
    left, right = Operand(a, 32, False, 0, False), Operand(b, 32, False, 6144, False)
    image = shared_image((0, left), (6144, right))
    product = PRODUCT.format(
        how=descriptor_of(128, 16, "bf16", False, False), left=left.descriptors[0], right=right.descriptors[0]
    )
    again = product + COMMIT + WAITS.replace("], 0", "], 1")
    blackwell(product + COMMIT + WAITS + LOAD + WAIT_LOAD + "    bar.sync 0;\n" + again, image=image)
    with pytest.raises(Fault) as caught:
        blackwell(product + wrong.replace("{again}", product), image=image)
    assert caught.value.kind == kind, str(caught.value)


def test_products_of_what_products_leave() -> None:
    """The sums of one product as A of another: a thread that does not wait may add to them, no more."""
    a, b = draw(0, 128, 16), draw(1, 16, 16)
    left, right = Operand(a, 32, False, 0, False), Operand(b, 32, False, 6144, False)
    image, how = shared_image((0, left), (6144, right)), descriptor_of(128, 16, "bf16", False, False)
    product = PRODUCT.format(how=how, left=left.descriptors[0], right=right.descriptors[0])
    adds = product.replace("setp.ne", "setp.eq")
    reads = product.replace("[ %r42 + 0 ], %rd20", "[ %r42 + 64 ], [ %r42 + 0 ]")
    end = COMMIT + WAITS.replace("], 0", "], 1")
    blackwell(product + adds + COMMIT + WAITS + reads + end, image=image)
    with pytest.raises(Fault, match="asynchronous copy: a matrix instruction reads tensor memory"):
        blackwell(product + COMMIT + reads + end, image=image)


def test_threads_that_do_not_wait_for_a_product_need_a_barrier() -> None:
    a, b = draw(0, 128, 16), draw(1, 16, 16)
    left, right = Operand(a, 32, False, 0, False), Operand(b, 32, False, 6144, False)
    image, how = shared_image((0, left), (6144, right)), descriptor_of(128, 16, "bf16", False, False)
    product = PRODUCT.format(how=how, left=left.descriptors[0], right=right.descriptors[0]) + COMMIT
    one_warp = product + "    @!%p2 bra AFTER;\n" + WAITS + "AFTER:\n"
    blackwell(one_warp + "    bar.sync 0;\n" + LOAD + WAIT_LOAD, image=image)
    with pytest.raises(Fault, match="race: reads what was written there by several warps"):
        blackwell(one_warp + LOAD + WAIT_LOAD, image=image)


def test_threads_that_wait_at_another_mbarrier() -> None:
    """A product in columns from 64 on, which both commits track, and one from 0 on, which the second tracks."""
    a, b = draw(0, 128, 16), draw(1, 16, 16)
    left, right = Operand(a, 32, False, 0, False), Operand(b, 32, False, 6144, False)
    image, how = shared_image((0, left), (6144, right)), descriptor_of(128, 16, "bf16", False, False)
    second = PRODUCT.format(how=how, left=left.descriptors[0], right=right.descriptors[0]) + COMMIT
    first = second.replace("%r42 + 0", "%r42 + 64").replace("%r41", "%r46")
    begin = f"    mov.u32 %r46, {image.numel()};\n    @%p3 mbarrier.init.shared::cta.b64 [%r46], 1;\n    bar.sync 0;\n"
    begin += first + second
    at_first = WAITS.replace("%r41", "%r46")
    load_second = LOAD + WAIT_LOAD
    load_first = load_second.replace("%r43 + 0", "%r43 + 64")
    image = torch.cat([image, torch.zeros(16, dtype=torch.uint8)])

    def one_warp(waits: str) -> str:
        return "    @!%p2 bra AFTER;\n" + waits + "AFTER:\n"

    for body in (
        begin + WAITS + load_first + load_second,
        begin + WAITS + one_warp(at_first) + load_first + load_second,
        begin + one_warp(WAITS) + at_first + load_first,
        begin + one_warp(WAITS) + at_first + "    bar.sync 0;\n" + load_first + load_second,
    ):
        blackwell(body, image=image)
    with pytest.raises(Fault, match="race: reads what was written there by several warps"):
        blackwell(begin + one_warp(WAITS) + at_first + load_second, image=image)
    with pytest.raises(Fault, match="asynchronous copy"):
        blackwell(begin + at_first + load_second, image=image)
    # both products in the same columns
    with pytest.raises(Fault, match="asynchronous copy"):
        blackwell(begin.replace("%r42 + 64", "%r42 + 0") + at_first + load_second, image=image)
    # the operands, which are overwritten after the same wait
    over = "    shr.u32 %r47, %r0, 5;\n    shl.b32 %r47, %r47, 2;\n    st.shared.b32 [%r47], %r0;\n"
    with pytest.raises(Fault, match="overwrites what is read there by several warps"):
        blackwell(begin + one_warp(WAITS) + at_first + over, image=image)


def test_commits_by_several_threads_are_refused() -> None:
    image = torch.zeros(2048, dtype=torch.uint8)
    other = COMMIT.replace("%p3", "%p6")
    for body in ("    setp.eq.s32 %p6, %r0, 32;\n" + COMMIT, "    setp.le.s32 %p6, %r0, 1;\n"):
        with pytest.raises(Unsupported, match="several threads"):
            blackwell(body + other, image=image)


def test_tcgen05_in_two_programs_of_one_warp() -> None:
    body = """
        mov.u32 %r40, 0;
        tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40], 32;
        tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r40+4], 32;
        bar.sync 0;
        ld.shared.b32 %r42, [%r40];
        ld.shared.b32 %r43, [%r40+4];
        tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r42, 32;
        tcgen05.st.sync.aligned.32x32b.x1.b32 [%r43 + 0], {%r1};
        tcgen05.wait::st.sync.aligned;
        tcgen05.ld.sync.aligned.32x32b.x1.b32 {%r44}, [%r43 + 0];
        tcgen05.wait::ld.sync.aligned;
        bar.sync 0;
        tcgen05.dealloc.cta_group::1.sync.aligned.b32 %r43, 32;
    """
    out = torch.zeros(64, dtype=torch.int32)
    run(body + store(["%r44"], "%rd0"), out, programs=2, shared=64, target="sm_100a")
    assert out.tolist() == list(range(64))


@pytest.mark.parametrize("bit", [6, 52])
def test_descriptors_of_another_form(bit: int) -> None:
    a, b = draw(0, 128, 16), draw(1, 16, 16)
    left, right = Operand(a, 32, False, 0, False), Operand(b, 32, False, 6144, False)
    image, how = shared_image((0, left), (6144, right)), descriptor_of(128, 16, "bf16", False, False)
    other = {"how": how | 1 << 6} if bit == 6 else {"left": left.descriptors[0] | 1 << bit}
    right_ones = {"how": how, "left": left.descriptors[0], "right": right.descriptors[0]}
    with pytest.raises(Unsupported, match="descriptor"):
        blackwell(PRODUCT.format(**(right_ones | other)) + COMMIT + WAITS, image=image)


def test_wgmma_needs_warpgroups() -> None:
    with pytest.raises(Unsupported, match="programs of 64 threads"):
        run("    wgmma.fence.sync.aligned;\n", threads=64)
    for target, body in (
        ("sm_100a", "    wgmma.fence.sync.aligned;\n"),
        ("sm_90a", "    tcgen05.wait::ld.sync.aligned;\n"),
    ):
        with pytest.raises(Unsupported, match=f"the program is for {target}"):
            run(body, threads=128, target=target)


def test_layouts_have_every_element_once() -> None:
    for layout, elements, shape in (
        (a_half, 8, (16, 16)),
        (b_half, 4, (16, 8)),
        (a_tf32, 4, (16, 8)),
        (c_float, 4, (16, 8)),
    ):
        found = sorted(layout(lane, i) for lane in range(32) for i in range(elements))
        assert found == list(np.ndindex(*shape))
