"""Instructions that compute each lane by itself: a table of names and functions, comparisons, conversions, moves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from inspect import signature
from typing import Any

import numpy as np

from .faults import Unsupported
from .formats import BITS, FLOATS, HALVES, SIGNED, flush, narrow, numpy_type, tf32
from .machine import Machine, Source, Step
from .ptx import Instruction, Operand, elements
from .races import Array
from .registers import HIGH, LOADING, LOW, NEVER_WRITTEN, Mask, checked, flags_of

Function = Callable[..., Any]


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c rounded once (but for the rare float64 sum that lies on a float32's tie)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _divide(a: Array, b: Array) -> Array:
    """Return a / b, of integers towards zero; an integer / 0, which PTX leaves open, is the integer."""
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    b = np.where(b == 0, np.ones_like(b), b)
    quotient = a // b
    return np.asarray(quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype))


def _wide(a: Array, b: Array, c: Array | int = 0) -> Array:
    """Return a b + c in twice the bits of a."""
    double = (SIGNED if a.dtype.kind == "i" else BITS)[2 * a.itemsize]
    return np.asarray(a.astype(double) * b.astype(double) + c)


def _shift(operation: Function) -> Function:
    def shift(a: Array, by: Array) -> Array:
        bits = 8 * a.itemsize
        shifted = operation(a, np.minimum(by, bits - 1).astype(a.dtype))
        filled = a.dtype.kind == "i" and operation is np.right_shift  # with the sign
        return np.where(filled | (by < bits), shifted, np.zeros_like(shifted))

    return shift


def _extract(a: Array, position: Array, length: Array) -> Array:
    """Return `length` bits of a from `position` on, signed ones with their sign."""
    wide = np.int64 if a.dtype.kind == "i" else np.uint64
    above = np.minimum(position & 0xFF, 63).astype(wide)
    unused = (64 - np.clip(length & 0xFF, 1, 64)).astype(wide)
    field = a.astype(wide) >> above << unused >> unused
    return np.where(length & 0xFF, field, np.zeros_like(field)).astype(a.dtype)


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Return four of the eight bytes of b and a, by number; with 8 added to the number, the byte's sign instead."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    numbers = [(selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64) for i in range(4)]
    chosen = [both >> (n & np.uint64(7)) * np.uint64(8) & np.uint64(255) for n in numbers]
    signed = [np.where(n > 7, (x >> np.uint64(7)) * np.uint64(255), x) for n, x in zip(numbers, chosen, strict=True)]
    return np.stack(np.broadcast_arrays(*signed), -1).astype(np.uint8).view(np.uint32)[..., 0]


# name, with .lo, .hi or .wide → what it computes, from values in the instruction's type
FUNCTIONS: dict[str, Function] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "bfe": _extract,
    "div": _divide,
    "ex2": np.exp2,
    "fma": _fma,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": _wide,
    "max": np.fmax,
    "min": np.fmin,
    "mul": np.multiply,
    "mul.hi": lambda a, b: (_wide(a, b) >> 8 * a.itemsize).astype(a.dtype),
    "mul.lo": np.multiply,
    "mul.wide": _wide,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "prmt": _permute,
    "rem": lambda a, b: a - b * _divide(a, b),
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "sub": np.subtract,
    "xor": np.bitwise_xor,
}
# what the functions above are not right for
_REFUSED = {
    *("bfe.u64", "bfe.s64", "mul.hi.u64", "mul.hi.s64"),
    *(f"{name}.{kind}" for name in ("fma", "max", "min") for kind in ("f16", "bf16", "f16x2", "bf16x2")),
}


def _extreme(name: str, function: Function) -> Function:
    """Return the larger or smaller of floats, -0 below +0."""

    def extreme(a: Array, b: Array) -> Array:
        found = np.asarray(function(a, b))
        zero = (found == 0) & (a == b)
        if zero.any():
            negative = (np.logical_and if name == "max" else np.logical_or)(np.signbit(a), np.signbit(b))
            found = np.where(zero, np.where(negative, np.float32(-0.0), np.float32(0)), found)
        return found

    return extreme


# what does not change the result here: approximations are computed in full
_MODIFIERS = {"rn", "approx", "full", "ftz", "lo", "hi", "wide"}


def compute(machine: Machine, instruction: Instruction) -> Step:
    """Bind an instruction of `FUNCTIONS`."""
    name, *modifiers, kind = instruction.words
    target, *operands = instruction.operands
    key = next((f"{name}.{m}" for m in modifiers if m in ("lo", "hi", "wide")), name)
    function, result, types = FUNCTIONS[key], kind, [kind] * len(operands)
    if name in ("bfe", "shl", "shr"):
        types[1:] = ["u32"] * len(types[1:])
    if kind in HALVES and modifiers[-1:] == ["f32"]:  # halves into a sum in float32
        modifiers.pop()
        result = types[-1] = "f32"
    if key.endswith("wide"):
        result = f"{kind[0]}{2 * int(kind[1:])}"
        types[2:] = [result] * len(types[2:])
    if set(modifiers) - _MODIFIERS or (f"{key}.{kind}" in _REFUSED and result == kind):
        raise Unsupported(instruction.opcode)
    if name in ("max", "min"):  # of two numbers or of three
        two = _extreme(name, function) if kind == "f32" else function
        function = two if len(operands) == 2 else lambda a, b, c: two(two(a, b), c)
    _require_taken(function, operands)
    if "ftz" in modifiers:
        exact = function
        function = lambda *values: flush(np.asarray(exact(*map(flush, values)), np.float32))  # noqa: E731
    return lanewise(machine, function, target, result, operands, types)


def _require_taken(function: Function, operands: Sequence[Operand]) -> None:
    """Refuse another number of operands than a function takes."""
    if isinstance(function, np.ufunc):
        fits = len(operands) == function.nin
    else:
        parameters = signature(function).parameters.values()
        fits = sum(p.default is p.empty for p in parameters) <= len(operands) <= len(parameters)
    if not fits:
        raise Unsupported(f"it cannot have {len(operands)} operands")


def lanewise(
    machine: Machine,
    function: Function,
    target: Operand,
    result: str,
    operands: Sequence[Operand],
    types: Sequence[str],
    wide: bool = False,
) -> Step:
    """Return what computes a register of type `result` by a function of operands of `types`.

    wide: the operands may be wider registers.
    """
    sources = [machine.source(o, t, wide) for o, t in zip(operands, types, strict=True)]
    registers = [s.register for s in sources if s.register]
    register = machine.register(target)
    out, half = register.typed(result), result.removesuffix("x2")
    pairs, narrowed = out.ndim == 2, half in HALVES
    gets, arrays = [s.get for s in sources], [s.fixed for s in sources]
    direct = isinstance(function, np.ufunc) and not narrowed and all(a is not None for a in arrays)

    def run(mask: Mask) -> None:
        flags = flags_of(registers, mask, pairs=pairs)
        if flags is not None or register.flags is not None or register.order is not None:
            register.settle(mask, flags)
        where = True if mask is None else mask[:, None] if pairs else mask
        if direct:
            function(*arrays, out=out, where=where)
            return
        values = function(*[get() for get in gets])
        np.copyto(out, narrow(values, half) if narrowed else values, where=where)

    return run


_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINE: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, kind: str) -> Function:
    """Return a comparison by PTX's name: of floats, `ne` is false and what ends in u is true where one is NaN."""
    if kind.removesuffix("x2") not in (*HALVES, "f32"):
        return _COMPARISONS[name]
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    ordered = _COMPARISONS[name.removesuffix("u")]
    return ordered if name in _COMPARISONS else lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)


def compare(machine: Machine, instruction: Instruction) -> Step:
    """Bind setp: a comparison, perhaps combined with a predicate; of pairs, two of them."""
    _, name, *modifiers, kind = instruction.words
    function, combine = _comparison(name, kind), modifiers
    target, *operands = instruction.operands
    types = [kind, kind, *(["pred"] * len(combine))]
    if not isinstance(target, tuple):
        whole = (lambda a, b, c: _COMBINE[combine[0]](function(a, b), c)) if combine else function
        return lanewise(machine, whole, target, "pred", operands, types)
    if not kind.endswith("x2") or combine:
        raise Unsupported(f"{instruction.opcode} to two predicates")
    halves = [
        lanewise(machine, lambda a, b, i=i: function(a, b)[:, i], t, "pred", operands, types)
        for i, t in enumerate(target)
    ]

    def run(mask: Mask) -> None:
        for half in halves:
            half(mask)

    return run


def select(machine: Machine, instruction: Instruction) -> Step:
    """Bind selp: of two values the first where a predicate holds. What is not chosen may be anything."""
    target, *operands = instruction.operands
    bits = f"b{8 * np.dtype(numpy_type(instruction.words[-1])).itemsize}"
    a, b, p = (machine.source(o, kind) for o, kind in zip(operands, (bits, bits, "pred"), strict=True))
    register = machine.register(target)

    def flags(source: Source) -> Array | np.uint8:
        return np.uint8(0) if source.register is None or source.register.flags is None else source.register.flags

    def run(mask: Mask) -> None:
        choice = p.get()
        chosen = None
        if any(s.register is not None and s.register.flags is not None for s in (a, b, p)):
            chosen = checked(np.where(choice, flags(a), flags(b)) | flags(p), mask)
        register.write(np.where(choice, a.get(), b.get()), mask, chosen)

    return run


def convert(machine: Machine, instruction: Instruction) -> Step:
    """Bind cvt: between integers, between floats, of integers to floats; two floats to a pair of halves."""
    _, *modifiers, result, kind = instruction.words
    target, *operands = instruction.operands
    dtype = numpy_type(result)

    def function(*values: Array) -> Array:
        if len(values) == 2:  # the first is the upper half
            return np.stack(np.broadcast_arrays(*values[::-1]), -1)
        if result == "tf32":
            return tf32(values[0])
        if result in (*HALVES, "f32"):
            return values[0].astype(np.float32)
        return values[0].astype(dtype)

    rounded_to_integers = kind in FLOATS and result.removesuffix("x2") not in FLOATS
    if modifiers not in ([["rna"]] if result == "tf32" else [[], ["rn"]]) or rounded_to_integers:
        raise Unsupported(instruction.opcode)
    register = "f32" if result == "tf32" else result
    return lanewise(machine, function, target, register, operands, [kind] * len(operands), wide=True)


def move(machine: Machine, instruction: Instruction) -> Step:
    """Bind mov: of a register, a number, a special register; of a vector into one register, or the other way."""
    kind = instruction.words[-1]
    given, taken = elements(instruction.operands[1]), elements(instruction.operands[0])
    size = 1 if kind == "pred" else int(kind[1:]) // 8
    name = "pred" if kind == "pred" else f"b{8 * size // len(given)}"
    sources = [machine.source(o, name) for o in given]
    outs = [None if t == "_" else machine.register(t) for t in taken]
    dtype = np.dtype(np.bool_ if kind == "pred" else BITS[size // len(taken)])
    copied = len(given) == len(taken) == 1 and sources[0].register is not None

    def run(mask: Mask) -> None:
        # registers that tcgen05.ld has not yet written may be moved, not used
        flags = [flags_of([s.register] if s.register else [], mask, NEVER_WRITTEN | LOADING, True) for s in sources]
        moved = [None] * len(outs) if not any(f is not None for f in flags) else _moved(flags, len(outs))
        columns = [machine.each(s)[:, None] for s in sources]
        values = (columns[0] if len(columns) == 1 else np.concatenate(columns, 1)).view(dtype)
        for register, column, its in zip(outs, values.T, moved, strict=True):
            if register is not None:
                register.write(column, mask, its, copied)
        if any(its is not None and (its & LOADING).any() for its in moved):
            machine.loading.append([register for register in outs if register is not None])

    return run


def _moved(given: Sequence[Array | None], parts: int) -> list[Array]:
    """Return the flags of what is packed from several registers, or unpacked to them: halves have their own."""
    none = np.uint8(0)
    flags = [np.zeros(1, np.uint8) if f is None else f for f in given]
    whole = functools.reduce(np.bitwise_or, flags)
    if len(flags) == 2:
        low, high = (np.where(f & NEVER_WRITTEN, half, none) for f, half in zip(flags, (LOW, HIGH), strict=True))
        return [whole & LOADING | low | high]
    if parts == 2:
        return [whole & LOADING | np.where(whole & half, NEVER_WRITTEN, none) for half in (LOW, HIGH)]
    return [whole if parts == len(flags) else np.where(whole & NEVER_WRITTEN, whole | NEVER_WRITTEN, whole)] * parts
