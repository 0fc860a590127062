"""Executed PTX against NumPy and Python's integers, instruction by instruction, on random bits."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from small_ptx import TEMPLATE, place, program, random_bits, run

from segattn.bench.emulated.executor import execute
from segattn.bench.emulated.faults import Fault, LocatedError, Unsupported
from segattn.bench.emulated.ptx import parse

COUNT = 64
SIZES = {"pred": 4, "b16": 2, "b32": 4, "b64": 8}
REGISTERS = {2: "%rs", 4: "%r", 8: "%rd"}


def size_of(kind: str) -> int:
    return {"f16x2": 4, "bf16x2": 4, "f32x2": 8, "bf16": 2, "tf32": 4}.get(kind) or int(kind[1:]) // 8


def compute(instruction: str, operands: list[torch.Tensor], size: int) -> np.ndarray[Any, Any]:
    """Return what an instruction makes of operands, one for each thread, as unsigned integers of `size` bytes."""
    body, names = "", []
    for i, x in enumerate(operands):
        names.append(f"{REGISTERS[x.itemsize]}{20 + i}")
        body += place("%rd40", f"%rd{i}", x.itemsize) + f"    ld.global.b{8 * x.itemsize} {names[-1]}, [%rd40];\n"
    out = torch.zeros(COUNT, dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[size])
    target = f"{REGISTERS[size]}30"
    body += "    " + instruction.format(target, *names) + "\n"
    body += place("%rd40", f"%rd{len(operands)}", size) + f"    st.global.b{8 * size} [%rd40], {target};"
    run(body, *operands, out, programs=COUNT // 32, outputs=[out])
    return out.numpy().view(f"u{size}")


def signed(x: int, bits: int) -> int:
    return x - (1 << bits) if x >> (bits - 1) else x


def permuted(a: int, b: int, selector: int) -> int:
    """Return four bytes of eight, or of their signs."""
    eight, chosen = a.to_bytes(4, "little") + b.to_bytes(4, "little"), []
    for i in range(4):
        number = selector >> 4 * i & 15
        byte = eight[number & 7]
        chosen.append(byte if number < 8 else 255 * (byte >> 7))
    return int.from_bytes(chosen, "little")


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def extract(x: int, position: int, length: int, sign: bool) -> int:
    """Return bits of 32, bit by bit: beyond the last there are zeros, or signs."""
    length, last = min(length & 255, 32), position + (length & 255) - 1
    bits = [x >> min(position + i, 31) & 1 if sign or position + i < 32 else 0 for i in range(length)]
    fill = x >> min(last, 31) & 1 if sign and length else 0
    return sum(bit << i for i, bit in enumerate(bits + [fill] * (32 - length)))


# instruction, the bytes of its operands, the bytes of its result, what it is of Python's integers
INTEGERS: list[tuple[str, tuple[int, ...], int, Callable[..., int]]] = [
    ("add.s32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: a + b),
    ("add.s64 {0}, {1}, {2};", (8, 8), 8, lambda a, b: a + b),
    ("sub.s16 {0}, {1}, {2};", (2, 2), 2, lambda a, b: a - b),
    ("sub.s32 {0}, {1}, 7;", (4,), 4, lambda a: a - 7),
    ("mul.lo.s16 {0}, {1}, {2};", (2, 2), 2, lambda a, b: a * b),
    ("mul.lo.s32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: a * b),
    ("mul.lo.s64 {0}, {1}, {2};", (8, 8), 8, lambda a, b: a * b),
    ("mul.hi.u32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: a * b >> 32),
    ("mul.hi.s32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: signed(a, 32) * signed(b, 32) >> 32),
    ("mul.wide.u16 {0}, {1}, {2};", (2, 2), 4, lambda a, b: a * b),
    ("mul.wide.u32 {0}, {1}, {2};", (4, 4), 8, lambda a, b: a * b),
    ("mul.wide.s32 {0}, {1}, {2};", (4, 4), 8, lambda a, b: signed(a, 32) * signed(b, 32)),
    ("mad.lo.s32 {0}, {1}, {2}, {3};", (4, 4, 4), 4, lambda a, b, c: a * b + c),
    ("mad.lo.s64 {0}, {1}, {2}, {3};", (8, 8, 8), 8, lambda a, b, c: a * b + c),
    ("mad.wide.s32 {0}, {1}, {2}, {3};", (4, 4, 8), 8, lambda a, b, c: signed(a, 32) * signed(b, 32) + c),
    ("mad.wide.u32 {0}, {1}, {2}, {3};", (4, 4, 8), 8, lambda a, b, c: a * b + c),
    ("neg.s32 {0}, {1};", (4,), 4, lambda a: -a),
    ("neg.s64 {0}, {1};", (8,), 8, lambda a: -a),
    ("abs.s32 {0}, {1};", (4,), 4, lambda a: abs(signed(a, 32))),
    ("not.b32 {0}, {1};", (4,), 4, lambda a: ~a),
    ("and.b16 {0}, {1}, {2};", (2, 2), 2, lambda a, b: a & b),
    ("and.b32 {0}, {1}, -2;", (4,), 4, lambda a: a & ~1),
    ("and.b64 {0}, {1}, {2};", (8, 8), 8, lambda a, b: a & b),
    ("or.b32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: a | b),
    ("xor.b32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: a ^ b),
    ("min.s32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: min(signed(a, 32), signed(b, 32))),
    ("min.u32 {0}, {1}, {2};", (4, 4), 4, min),
    ("max.s32 {0}, {1}, {2};", (4, 4), 4, lambda a, b: max(signed(a, 32), signed(b, 32))),
    ("max.u32 {0}, {1}, {2};", (4, 4), 4, max),
    ("shl.b16 {0}, {1}, 3;", (2,), 2, lambda a: a << 3),
    ("shl.b32 {0}, {1}, 31;", (4,), 4, lambda a: a << 31),
    ("shl.b32 {0}, {1}, {2};", (4, 4), 4, lambda a, n: a << n if n < 32 else 0),
    ("shl.b64 {0}, {1}, {2};", (8, 4), 8, lambda a, n: a << n if n < 64 else 0),
    ("shr.u16 {0}, {1}, 9;", (2,), 2, lambda a: a >> 9),
    ("shr.u32 {0}, {1}, {2};", (4, 4), 4, lambda a, n: a >> n),
    ("shr.s32 {0}, {1}, {2};", (4, 4), 4, lambda a, n: signed(a, 32) >> n),
    ("shr.u64 {0}, {1}, 31;", (8,), 8, lambda a: a >> 31),
    ("bfe.u32 {0}, {1}, 5, 2;", (4,), 4, lambda a: extract(a, 5, 2, False)),
    ("bfe.u32 {0}, {1}, {2}, {3};", (4, 4, 4), 4, lambda a, p, n: extract(a, p, n, False)),
    ("bfe.s32 {0}, {1}, 6, 1;", (4,), 4, lambda a: extract(a, 6, 1, True)),
    ("bfe.s32 {0}, {1}, 28, 9;", (4,), 4, lambda a: signed(a, 32) >> 28),
    ("prmt.b32 {0}, {1}, {2}, 0x5410U;", (4, 4), 4, lambda a, b: permuted(a, b, 0x5410)),
    ("prmt.b32 {0}, {1}, {2}, {3};", (4, 4, 4), 4, lambda a, b, s: permuted(a, b, s)),
    ("div.s32 {0}, {1}, 7;", (4,), 4, lambda a: truncated(signed(a, 32), 7)),
    ("div.s32 {0}, {1}, -7;", (4,), 4, lambda a: truncated(signed(a, 32), -7)),
    ("rem.s32 {0}, {1}, 7;", (4,), 4, lambda a: signed(a, 32) - 7 * truncated(signed(a, 32), 7)),
    ("div.u32 {0}, {1}, 7;", (4,), 4, lambda a: a // 7),
    ("rem.u32 {0}, {1}, 7;", (4,), 4, lambda a: a % 7),
    ("cvt.u16.u32 {0}, {1};", (4,), 2, lambda a: a),
    ("cvt.u32.u16 {0}, {1};", (2,), 4, lambda a: a),
    ("cvt.s32.s16 {0}, {1};", (2,), 4, lambda a: signed(a, 16)),
    ("cvt.s64.s32 {0}, {1};", (4,), 8, lambda a: signed(a, 32)),
    ("cvt.u64.u32 {0}, {1};", (4,), 8, lambda a: a),
    ("cvt.u32.u64 {0}, {1};", (8,), 4, lambda a: a),
    ("cvt.s64.s32 {0}, {1};", (8,), 8, lambda a: signed(a & 0xFFFF_FFFF, 32)),
    ("mov.b64 {0}, {{{1}, {2}}};", (4, 4), 8, lambda a, b: a | b << 32),
    ("mov.b32 {0}, {{{1}, {2}}};", (2, 2), 4, lambda a, b: a | b << 16),
    ("mov.b64 {{_, {0}}}, {1};", (8,), 4, lambda a: a >> 32),
    ("mov.b64 {{{0}, _}}, {1};", (8,), 4, lambda a: a),
    ("mov.u32 {0}, {1};", (4,), 4, lambda a: a),
    ("setp.lt.s32 %p1, {1}, {2}; selp.b32 {0}, 1, 0, %p1;", (4, 4), 4, lambda a, b: signed(a, 32) < signed(b, 32)),
    ("setp.gt.u32 %p1, {1}, {2}; selp.b32 {0}, 1, 0, %p1;", (4, 4), 4, lambda a, b: a > b),
    ("setp.ne.b64 %p1, {1}, 0; selp.b32 {0}, {2}, 5, %p1;", (8, 4), 4, lambda a, b: b if a else 5),
    (
        "setp.le.s64 %p1, {1}, {2}; @!%p1 mov.u32 {0}, 3; @%p1 mov.u32 {0}, 4;",
        (8, 8),
        4,
        lambda a, b: 4 if signed(a, 64) <= signed(b, 64) else 3,
    ),
    (
        "setp.eq.s32 %p1, {1}, {2}; setp.ge.and.s32 %p2, {1}, 0, %p1; selp.b32 {0}, 1, 0, %p2;",
        (4, 4),
        4,
        lambda a, b: a == b and a < 1 << 31,
    ),
    (
        "setp.lt.s32 %p1, {1}, 0; setp.lt.s32 %p2, {2}, 0; xor.pred %p3, %p1, %p2; not.pred %p4, %p3; "
        "selp.b32 {0}, 1, 0, %p4;",
        (4, 4),
        4,
        lambda a, b: (a >> 31) == (b >> 31),
    ),
]


@pytest.mark.parametrize(("instruction", "sizes", "result", "expected"), INTEGERS, ids=[x[0] for x in INTEGERS])
def test_integers(instruction: str, sizes: tuple[int, ...], result: int, expected: Callable[..., int]) -> None:
    operands = [random_bits(i, COUNT, size) for i, size in enumerate(sizes)]
    if instruction.startswith(("shl", "shr")) and len(sizes) == 2:
        operands[1] = torch.arange(COUNT, dtype=torch.int32)
    if instruction.startswith("bfe") and len(sizes) == 3:
        operands[1:] = [torch.arange(COUNT, dtype=torch.int32) * 5 % 41, torch.arange(COUNT, dtype=torch.int32) % 35]
    values = [[int(x) for x in o.numpy().view(f"u{o.itemsize}")] for o in operands]
    mask = (1 << 8 * result) - 1
    want = [int(expected(*row)) & mask for row in zip(*values, strict=True)]
    assert compute(instruction, operands, result).tolist() == want


def halves(bits: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return float64 values of 16-bit numbers, by PyTorch."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    return torch.from_numpy(bits.astype(np.int32).astype(np.int16)).view(dtype).double().numpy()


def round_to(values: np.ndarray[Any, Any], kind: str) -> np.ndarray[Any, Any]:
    """Return the bits of float32 values rounded to halves, by PyTorch."""
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    return torch.from_numpy(values.astype(np.float32)).to(dtype).view(torch.int16).numpy().view(np.uint16)


def fused(a: Any, b: Any, c: Any) -> Any:
    return (a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)).astype(np.float32)


FLOATS: list[tuple[str, int, Callable[..., Any]]] = [
    ("add.f32 {0}, {1}, {2};", 2, lambda a, b: a + b),
    ("add.rn.f32 {0}, {1}, 0f3F800000;", 1, lambda a: a + np.float32(1)),
    ("sub.f32 {0}, {1}, {2};", 2, lambda a, b: a - b),
    ("mul.f32 {0}, {1}, {2};", 2, lambda a, b: a * b),
    ("fma.rn.f32 {0}, {1}, {2}, {3};", 3, fused),
    ("div.full.f32 {0}, {1}, {2};", 2, lambda a, b: a / b),
    ("neg.f32 {0}, {1};", 1, lambda a: -a),
    ("abs.f32 {0}, {1};", 1, abs),
    ("min.f32 {0}, {1}, {2};", 2, np.fmin),
    ("max.f32 {0}, {1}, {2};", 2, np.fmax),
    ("max.f32 {0}, {1}, {2}, {3};", 3, lambda a, b, c: np.fmax(np.fmax(a, b), c)),
    ("ex2.approx.f32 {0}, {1};", 1, np.exp2),
    ("cvt.rn.f32.s32 {0}, {1};", 1, lambda a: a.view(np.int32).astype(np.float32)),
]


def float_bits(seed: int) -> torch.Tensor:
    """Return random float32 bits, half of them of ordinary sizes."""
    bits = random_bits(seed, COUNT, 4)
    ordinary = torch.randn(COUNT // 2, generator=torch.Generator().manual_seed(seed)) * 4
    bits[COUNT // 2 :] = ordinary.view(torch.int32)
    return bits


@pytest.mark.parametrize(("instruction", "count", "expected"), FLOATS, ids=[x[0] for x in FLOATS])
def test_floats(instruction: str, count: int, expected: Callable[..., Any]) -> None:
    operands = [float_bits(i) for i in range(count)]
    with np.errstate(all="ignore"):
        want = expected(*(o.numpy().view(np.float32) for o in operands))
    np.testing.assert_array_equal(compute(instruction, operands, 4).view(np.float32), want)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lt", lambda a, b: a < b),
        ("ge", lambda a, b: a >= b),
        ("eq", lambda a, b: a == b),
        ("ne", lambda a, b: a != b and not math.isnan(a) and not math.isnan(b)),
        ("neu", lambda a, b: a != b),
        ("gtu", lambda a, b: not a <= b),
        ("num", lambda a, b: not math.isnan(a) and not math.isnan(b)),
        ("nan", lambda a, b: math.isnan(a) or math.isnan(b)),
    ],
)
def test_float_comparisons(name: str, expected: Callable[[float, float], bool]) -> None:
    a, b = float_bits(0), float_bits(1)
    a[8:12] = b[8:12]
    a[20:24], b[22:26] = torch.tensor([float("nan")]).view(torch.int32), torch.tensor([float("nan")]).view(torch.int32)
    found = compute(f"setp.{name}.f32 %p1, {{1}}, {{2}}; selp.b32 {{0}}, 1, 0, %p1;", [a, b], 4)
    pairs = zip(a.view(torch.float32).tolist(), b.view(torch.float32).tolist(), strict=True)
    assert found.tolist() == [int(expected(x, y)) for x, y in pairs]


def test_flushed_subnormals() -> None:
    a = torch.tensor([1e-40, -1e-40, 1e-30, 2e-38] * 16).view(torch.int32)
    found = compute("mul.ftz.f32 {0}, {1}, 0f3F000000;", [a], 4).view(np.float32)
    np.testing.assert_array_equal(found[:4], np.array([0, -0.0, 5e-31, 0], np.float32))
    assert np.signbit(found[1])


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves(kind: str) -> None:
    a, b, c = random_bits(0, COUNT, 2), random_bits(1, COUNT, 2), float_bits(2)
    wide = halves(a.numpy(), kind).astype(np.float32)
    np.testing.assert_array_equal(compute(f"cvt.f32.{kind} {{0}}, {{1}};", [a], 4).view(np.float32), wide)
    numbers = c.numpy().view(np.float32)
    finite = ~np.isnan(numbers)
    narrow = compute(f"cvt.rn.{kind}.f32 {{0}}, {{1}};", [c], 2)
    np.testing.assert_array_equal(narrow[finite], round_to(numbers, kind)[finite])
    assert np.isnan(halves(narrow[~finite], kind)).all()
    pair = compute(f"cvt.rn.{kind}x2.f32 {{0}}, {{1}}, {{2}};", [c, c.roll(1)], 4)
    both = finite & np.roll(finite, 1)
    want = round_to(numbers, kind).astype(np.uint32) << 16 | round_to(np.roll(numbers, 1), kind)
    np.testing.assert_array_equal(pair[both], want[both])
    greater = compute(f"setp.gt.{kind} %p1, {{1}}, {{2}}; selp.b32 {{0}}, 1, 0, %p1;", [a, b], 4)
    np.testing.assert_array_equal(greater, halves(a.numpy(), kind) > halves(b.numpy(), kind))


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_compares_pairs_of_halves(kind: str) -> None:
    a, b = random_bits(0, COUNT, 4), random_bits(1, COUNT, 4)
    instruction = f"setp.gt.{kind}x2 %p1|%p2, {{1}}, {{2}}; selp.b32 {{0}}, 1, 0, %p1; @%p2 or.b32 {{0}}, {{0}}, 2;"
    low, high = (
        halves(a.numpy().view(np.uint16)[i::2], kind) > halves(b.numpy().view(np.uint16)[i::2], kind) for i in (0, 1)
    )
    np.testing.assert_array_equal(compute(instruction, [a, b], 4), low + 2 * high)


def test_adds_halves_in_float32() -> None:
    a, b, c = random_bits(0, COUNT, 2), random_bits(1, COUNT, 2), float_bits(2)
    x, y, z = halves(a.numpy(), "bf16"), halves(b.numpy(), "bf16"), c.numpy().view(np.float32)
    with np.errstate(all="ignore"):
        added, product = (x + z).astype(np.float32), (x * y + z).astype(np.float32)
    np.testing.assert_array_equal(compute("add.rn.f32.bf16 {0}, {1}, {2};", [a, c], 4).view(np.float32), added)
    np.testing.assert_array_equal(
        compute("fma.rn.f32.bf16 {0}, {1}, {2}, {3};", [a, b, c], 4).view(np.float32), product
    )


def test_pairs_of_float32() -> None:
    a, b, c = (torch.randn(2 * COUNT, generator=torch.Generator().manual_seed(i)) for i in range(3))
    operands = [x.view(torch.int64) for x in (a, b, c)]
    product = compute("fma.rn.f32x2 {0}, {1}, {2}, {3};", operands, 8).view(np.float32)
    np.testing.assert_array_equal(product, fused(a.numpy(), b.numpy(), c.numpy()))
    difference = compute("sub.f32x2 {0}, {1}, {2};", operands[:2], 8).view(np.float32)
    np.testing.assert_array_equal(difference, (a - b).numpy())


def test_rounds_to_tf32() -> None:
    a = float_bits(0)
    numbers = a.numpy().view(np.float32)
    finite = np.isfinite(numbers)
    found = compute("cvt.rna.tf32.f32 {0}, {1};", [a], 4).view(np.float32).astype(np.float64)[finite]
    mantissa, exponent = np.frexp(numbers.astype(np.float64)[finite])
    exponent = np.maximum(exponent, -125)  # subnormal numbers have fewer bits
    scaled = numbers.astype(np.float64)[finite] * 2.0 ** (11 - exponent)
    away = np.copysign(np.floor(np.abs(scaled) + 0.5), scaled) * 2.0 ** (exponent - 11)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, away.astype(np.float32))
    assert mantissa.size > COUNT // 2


@pytest.mark.parametrize(
    ("mode", "by", "clamp"),
    [
        ("bfly", 5, 31),
        ("up", 3, 0),
        ("down", 7, 31),
        ("idx", 9, 31),
        ("bfly", 2, 0x181F),
        ("idx", 3, 0x181F),
        ("down", 1, 0x181F),
    ],
)
def test_shuffles(mode: str, by: int, clamp: int) -> None:
    a = random_bits(0, COUNT, 4)
    found = compute(f"shfl.sync.{mode}.b32 {{0}}|%p1, {{1}}, {by}, {clamp}, -1; @!%p1 mov.b32 {{0}}, 0;", [a], 4)
    values, want = a.numpy().view(np.uint32), []
    for thread in range(COUNT):
        lane, first = thread % 32, thread // 32 * 32
        segment = clamp >> 8 & 31
        low, high = lane & segment, (lane & segment) | (clamp & 31 & ~segment)
        other = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | (by & ~segment)}[mode]
        inside = other >= high if mode == "up" else other <= high
        want.append(int(values[first + other]) if inside else 0)
    assert found.tolist() == want


def test_reductions_and_election() -> None:
    a = random_bits(0, COUNT, 4)
    numbers = float_bits(1)
    numbers[1::32] = torch.tensor(float("nan")).view(torch.int32)
    greatest = compute("redux.sync.max.f32 {0}, {1}, -1;", [numbers], 4).view(np.float32)
    np.testing.assert_array_equal(greatest[::32], np.nanmax(numbers.numpy().view(np.float32).reshape(-1, 32), 1))
    assert (greatest.reshape(-1, 32) == greatest.reshape(-1, 32)[:, :1]).all()
    elected = compute("mov.b32 {0}, 0; elect.sync _|%p1, -1; @%p1 mov.b32 {0}, 1;", [a], 4)
    assert elected.tolist() == ([1] + [0] * 31) * (COUNT // 32)


def test_zeros_of_either_sign_are_ordered() -> None:
    zeros = torch.tensor([0.0, -0.0]).repeat(COUNT // 2).view(torch.int32)
    others = torch.tensor([0.0, 0.0, -0.0, -0.0]).repeat(COUNT // 4).view(torch.int32)
    for name, want in (
        ("max", [0, 0, 0, 1]),
        ("min", [0, 1, 1, 1]),
    ):
        signs = compute(name + ".f32 {0}, {1}, {2};", [zeros, others], 4) >> 31
        assert signs[:4].tolist() == want, name


def test_shuffles_take_five_bits_of_the_distance() -> None:
    x = torch.arange(COUNT, dtype=torch.int32)
    far, near = (compute(f"shfl.sync.bfly.b32 {{0}}, {{1}}, {d}, 31, -1;", [x], 4) for d in (33, 1))
    np.testing.assert_array_equal(far, near)
    assert (near != x.numpy()).all()


def test_vectors_in_memory() -> None:
    x, out = random_bits(0, 4 * COUNT, 4), torch.zeros(4 * COUNT, dtype=torch.int32)
    body = place("%rd10", "%rd0", 16) + place("%rd11", "%rd1", 16)
    body += """
    ld.global.v4.b32 {%r10, %r11, %r12, %r13}, [%rd10];
    mad.lo.s32 %r20, %r0, 16, 32;
    st.shared.v2.b32 [%r20], {%r11, %r10};
    st.shared.b16 [%r20+8], %rs0;
    cvt.u16.u32 %rs1, %r12;
    st.shared.v2.b16 [%r20+8], {%rs1, %rs1};
    ld.shared.v2.b16 {%rs2, %rs3}, [%r20+8];
    cvt.u32.u16 %r14, %rs3;
    ld.shared.v2.b32 {%r15, %r16}, [%r20+0];
    st.global.v4.b32 [%rd11], {%r15, %r16, %r14, %r13};
    """.replace("st.shared.b16 [%r20+8], %rs0;\n", "")
    run(body, x, out, programs=2, shared=544, outputs=[out])
    want = x.reshape(-1, 4)[:, [1, 0, 2, 3]].clone()
    want[:, 2] &= 0xFFFF
    assert torch.equal(out.reshape(-1, 4), want)


def test_loads_extend_the_sign() -> None:
    body = (
        "    ld.param.s32 %rd10, [kernel_param_1];\n" + place("%rd11", "%rd0", 8) + "    st.global.b64 [%rd11], %rd10;"
    )
    out = torch.zeros(32, dtype=torch.int64)
    run(body, out, -5, outputs=[out])
    assert out.tolist() == [-5] * 32


def test_a_loop_that_each_lane_leaves_at_another_time() -> None:
    """Collatz: odd and even lanes part ways in every round, and the rounds differ."""
    start = torch.arange(1, COUNT + 1, dtype=torch.int32)
    steps = torch.zeros(COUNT, dtype=torch.int32)
    body = place("%rd10", "%rd0", 4) + place("%rd11", "%rd1", 4)
    body += """
    ld.global.b32 %r10, [%rd10];
    mov.u32 %r11, 0;
LOOP:
    setp.eq.s32 %p1, %r10, 1;
    @%p1 bra DONE;
    add.s32 %r11, %r11, 1;
    and.b32 %r12, %r10, 1;
    setp.eq.s32 %p2, %r12, 0;
    @%p2 bra EVEN;
    mad.lo.s32 %r10, %r10, 3, 1;
    bra.uni LOOP;
EVEN:
    shr.u32 %r10, %r10, 1;
    bra LOOP;
DONE:
    st.global.b32 [%rd11], %r11;
    """
    done = run(body, start, steps, programs=2, outputs=[steps])

    def collatz(n: int) -> int:
        return 0 if n == 1 else 1 + collatz(n // 2 if n % 2 == 0 else 3 * n + 1)

    assert steps.tolist() == [collatz(n) for n in range(1, COUNT + 1)]
    assert done.by_opcode()["mad.lo.s32"] > 2 * max(steps.tolist()) // 3  # a warp at a time, not a lane


def test_special_registers() -> None:
    body = "    mov.u32 %r20, %tid.x;\n    mov.u32 %r21, %ctaid.x;\n" + place("%rd10", "%rd0", 8)
    out = torch.zeros(2 * 64, 2, dtype=torch.int32)
    run(body + "    st.global.v2.b32 [%rd10], {%r20, %r21};\n", out, threads=64, programs=2, outputs=[out])
    assert out.tolist() == [[t, p] for p in range(2) for t in range(64)]


def test_atomics_go_one_after_the_other() -> None:
    counter, out = torch.zeros(1, dtype=torch.int32), torch.zeros(COUNT, dtype=torch.int32)
    body = "    atom.global.gpu.acq_rel.add.u32 %r10, [%rd0], 3;\n" + place("%rd11", "%rd1", 4)
    run(body + "    st.global.b32 [%rd11], %r10;", counter, out, programs=2, outputs=[out])
    assert counter.item() == 3 * COUNT
    assert sorted(out.tolist()) == list(range(0, 3 * COUNT, 3))


@pytest.mark.parametrize(
    ("stride", "kind", "bytes_of_lanes", "sectors", "least"),
    [
        (4, "b32", 128, 4, 4),
        (64, "b32", 128, 32, 4),  # every lane in a sector of its own
        (8, "b32", 128, 8, 4),
        (0, "b32", 128, 1, 1),  # the same for all
        (16, "v4.b32", 512, 16, 16),
        (36, "b32", 128, 32, 4),
    ],
)
def test_counts_sectors(stride: int, kind: str, bytes_of_lanes: int, sectors: int, least: int) -> None:
    x = torch.zeros(4096, dtype=torch.uint8)
    target = "{%r10, %r11, %r12, %r13}" if kind[0] == "v" else "%r10"
    body = place("%rd10", "%rd0", stride, "%r0") + f"    ld.global.{kind} {target}, [%rd10];\n"
    done = run(body, x, programs=2, counting=True)
    ((_, space), traffic), *others = done.traffic.items()
    assert space == "global"
    assert not others
    assert traffic[1:] == (2, 2 * bytes_of_lanes, 2 * sectors, 2 * least)


@pytest.mark.parametrize(
    ("stride", "kind", "passes", "least"),
    [
        (4, "b32", 1, 1),
        (8, "b32", 2, 1),
        (128, "b32", 32, 1),
        (132, "b32", 1, 1),
        (0, "b32", 1, 1),  # one word for all
        (2, "b16", 1, 1),
        (8, "b64", 2, 2),
        (16, "v4.b32", 4, 4),
        (128, "v4.b32", 32, 4),
        (144, "v4.b32", 4, 4),
    ],
)
def test_counts_passes_over_the_banks(stride: int, kind: str, passes: int, least: int) -> None:
    source = {"v4.b32": "{%r10, %r10, %r10, %r10}", "b64": "%rd10", "b16": "%rs10", "b32": "%r10"}[kind]
    body = f"    mul.lo.s32 %r11, %r0, {stride};\n    mov.u32 %r10, 0;\n    mov.u64 %rd10, 0;\n    mov.u16 %rs10, 0;\n"
    done = run(body + f"    st.shared.{kind} [%r11], {source};\n", shared=8192, counting=True)
    (traffic,) = done.traffic.values()
    assert (traffic.space, traffic.accesses, traffic.moved, traffic.least) == ("shared", 1, passes, least)


def test_counts_what_warps_execute() -> None:
    done = run(
        "    setp.lt.u32 %p1, %r0, 32;\n    @%p1 bra END;\n    add.s32 %r10, %r0, 1;\nEND:", threads=96, programs=5
    )
    assert done.by_opcode()["bra"] == 15
    assert done.by_opcode()["add.s32"] == 10
    assert not done.traffic


def test_inline_labels_and_registers_belong_to_their_braces() -> None:
    out = torch.zeros(32, dtype=torch.int32)
    block = """
    {{
    .reg .pred again;
    setp.lt.s32 again, %r10, {0};
    @!again bra skip;
    add.s32 %r10, %r10, 100;
    skip:
    }}
    """
    body = "    mov.u32 %r10, %r0;\n" + block.format(16) + block.format(8) + place("%rd10", "%rd0", 4)
    run(body + "    st.global.b32 [%rd10], %r10;", out, outputs=[out])
    assert out.tolist() == [i + 100 if i < 16 else i for i in range(32)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((".version 8.7", ".version 6.0"), "version"),
        ((".version 8.7", ".version 8.x"), "version"),
        ((".target sm_90a", ".target sm_70"), "sm_80"),
        ((".reqntid 32", ".reqntid 32, 2, 1"), "one dimension"),
        ((".reqntid 32", ".reqntid 24"), "whole warps"),
        ((".reqntid 32", ".reqntid 2048"), "at most 1024"),
        ((".reqntid 32", ""), "reqntid"),
        (("    ret;", "    bra nowhere;"), "no label nowhere"),
        (("    ret;", "    bra;"), r"line \d+: no label"),
        (("    ret;", "    .reg .f128 %q1;"), "f128"),
        (("    ret;", "    mov.b32 %r1, 12ab;"), r"line \d+: mov\.b32 %r1, 12ab"),
        (("    ret;", "    .reg .f64 %q1;"), "f64"),
    ],
)
def test_refuses_other_ptx(change: tuple[str, str], message: str) -> None:
    text = TEMPLATE.format(target="sm_90a", source="x", name="k", parameters="", threads=32, loads="", body="")
    parse(text)
    with pytest.raises(Unsupported, match=message):
        parse(text.replace(*change))


@pytest.mark.parametrize(
    "instruction",
    [
        "sin.approx.f32 %r10, %r11;",
        "tex.2d.v4.f32.f32 {%r10, %r11, %r12, %r13}, [x, {%r1, %r2}];",
        "cp.async.bulk.shared::cluster.global [%r10], [%rd0], 16, [%r11];",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r10, %r11}, {%r10, %r11}, {%r10}, {%r10, %r11};",
        "bar.sync 1, 64;",
        "add.sat.s32 %r10, %r11, %r12;",
        "mov.u32 %r10, %clock;",
        "mov.u32 %r10, %ctaid.y;",
        "ld.local.b32 %r10, [%r11];",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16.b6x16_p32 {%r10}, [%r11];",
        "add.s32 %r10, %rd0, %r12;",
        # forms of known instructions that no kernel has and the functions are not right for
        "fma.rn.f64 %rd10, %rd11, %rd12, %rd13;",
        "fma.rn.bf16 %rs10, %rs11, %rs12, %rs13;",
        "cvt.rn.f32.f64 %r10, %rd10;",
        "cvt.rn.tf32.f32 %r10, %r11;",
        "cvt.rna.bf16.f32 %rs10, %r11;",
        "cvt.rzi.s64.f32 %rd10, %r11;",
        "setp.gt.ftz.f32 %p1, %r10, %r11;",
        "redux.sync.max.abs.f32 %r10, %r11, -1;",
        "redux.sync.add.u32 %r10, %r11, -1;",
        "vote.sync.ballot.b32 %r10, %p1, -1;",
        "cvt.rzi.s32.f32 %r10, %r11;",
        "cvt.s32.bf16 %r10, %rs11;",
        "max.NaN.f32 %r10, %r11, %r12;",
        "max.bf16 %rs10, %rs11, %rs12;",
        "lg2.approx.f32 %r10, %r11;",
        "atom.global.gpu.acq_rel.max.u32 %r10, [%rd0], 3;",
        "red.global.gpu.relaxed.add.u32 [%rd0], 3;",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6}, {%r8}, "
        "{%r1, %r2, %r3, %r4};",
        "bfe.u64 %rd10, %rd11, 70, 4;",
        "mul.hi.u64 %rd10, %rd11, %rd12;",
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%r5, %r6, %r7}, {%r8, %r9}, "
        "{%r1, %r2, %r3, %r4};",
        "ld.acquire.gpu.global.b32 %r10, [%rd0];",
        "fence.acq_rel.gpu ;",
        "mov.u32 %r10, %nctaid.z;",
        "shfl.sync.bfly.b32 %r10, %r1, 1, 31, 15;",
        "redux.sync.max.f32 %r10, %r1, 0xFFFF;",
        "elect.sync _|%p1, 1;",
        "bar.warp.sync 1;",
        "add.f32 %r10, %r11;",
        "mul.wide.s32 %rd10, %r11;",
    ],
)
def test_refuses_unknown_instructions_before_anything_runs(instruction: str) -> None:
    out = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(Unsupported, match=rf"kernel, line \d+ of its PTX \(hand.py:20\): {instruction.split()[0]}"):
        run(f"    mov.u32 %r13, 7;\n    st.global.b32 [%rd0], %r13;\n    {instruction}", out)
    assert out.item() == 0


def test_spoilt_text_is_refused_or_faults() -> None:
    body = """    setp.lt.s32 %p1, %r0, 20;
    mul.wide.s32 %rd10, %r0, 4;
    add.s64 %rd10, %rd0, %rd10;
    @%p1 ld.global.b32 { %r10 }, [ %rd10 + 0 ];
    add.f32 %r11, %r10, 0f3F800000;
    shfl.sync.bfly.b32 %r12, %r11, 1, 31, -1;
    @!%p1 bra $END;
    st.global.b32 [%rd10], %r12;
$END:
"""
    tokens, draw = re.findall(r"\s+|[\w$%]+|.", body), random.Random(0)
    refused = 0
    for _ in range(200):
        spoilt = list(tokens)
        at, other = draw.randrange(len(tokens)), draw.choice(tokens)
        spoilt[at : at + draw.randrange(2)] = [other] if draw.randrange(3) else []
        try:
            run("".join(spoilt), torch.zeros(32, dtype=torch.int32), limit=2000)
        except LocatedError:
            refused += 1
    assert refused > 50


def test_refuses_a_predicate_of_another_type() -> None:
    with pytest.raises(Unsupported, match=r"mov\.b32 is not supported: %r1 is not a predicate"):
        run("    @%r1 mov.b32 %r10, %r11;\n")


def test_refuses_octal_numbers() -> None:
    with pytest.raises(Unsupported, match="octal number 010"):
        run("    mov.u32 %r10, 010;\n")


def test_refuses_at_its_line_what_only_running_shows() -> None:
    x, out = torch.ones(8, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    body = "    mov.u32 %r10, 8;\n    mov.u32 %r11, 0;\n    st.global.b32 [%rd1], %r10;\n"
    body += "    setp.eq.s32 %p1, %r0, 0;\n    @%p1 cp.async.cg.shared.global [%r11], [%rd0], 16, %r10;\n"
    with pytest.raises(Unsupported, match=r"hand.py:20\): cp.async.cg.shared.global of part"):
        run(body, x, out, shared=16)
    assert out.item() == 0


def test_refuses_tensors_that_overlap() -> None:
    x = torch.zeros(64, dtype=torch.int32)
    body = place("%rd10", "%rd1", 4) + "    st.global.b32 [%rd10], %r1;"
    with pytest.raises(Unsupported, match="overlap"):
        run(body, x[:48], x[16:48], outputs=[x[16:48]])
    with pytest.raises(Unsupported, match="overlap"):
        run(body, x[:32], x[:1].expand(32), outputs=[x[:1].expand(32)])
    with pytest.raises(Unsupported, match="overlap"):  # one tensor, read and written
        run(body, x[:32], x[:32], outputs=[x[:32]])
    run(body, x[:32], x[32:], outputs=[x[32:]])
    assert x[32:].tolist() == list(range(32))
    with pytest.raises(Unsupported, match="among the arguments"):
        run(body, x[:32], x[32:], outputs=[torch.zeros(32)])


def test_refuses_what_is_too_large() -> None:
    with pytest.raises(Unsupported, match="memory must fit"):
        run("", programs=1 << 14, shared=1 << 17)
    with pytest.raises(Unsupported, match="registers must fit"):
        run("", programs=1 << 20)
    with pytest.raises(Unsupported, match="tensors must fit"):
        run("", torch.empty(256 << 20, dtype=torch.uint8))
    with pytest.raises(Unsupported, match="tensor memory must be of"):
        run("    tcgen05.wait::ld.sync.aligned;", programs=1 << 12, target="sm_100a")


@pytest.mark.parametrize("programs", [0, -1, (2, 2)])
def test_refuses_other_grids(programs: Any) -> None:
    with pytest.raises(Unsupported, match="kernel must be started as programs in one dimension, got"):
        execute(program(""), programs, [], 0)


def test_refuses_other_arguments() -> None:
    takes_one = program("", ["u64"])
    with pytest.raises(Unsupported, match="1 parameters, got 2"):
        execute(takes_one, 1, [torch.zeros(1), 3], 0)
    for kind, argument in (("u64", 1.0), ("u64", 1 << 64), ("u32", 1 << 32), ("u32", torch.zeros(1))):
        with pytest.raises(Unsupported, match=r"kernel_param_0, of \d bytes, cannot hold"):
            execute(program("", [kind]), 1, [argument], 0)


def test_a_loop_without_end() -> None:
    with pytest.raises(Fault, match="no end") as caught:
        run("LOOP:\n    bra LOOP;", limit=1000)
    assert caught.value.kind == "deadlock"
