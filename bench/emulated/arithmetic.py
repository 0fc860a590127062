"""Instructions that compute each lane by itself: a table of names and functions, comparisons, conversions, moves."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .faults import Unsupported
from .formats import BITS, HALVES, SIGNED, flush, narrow, numpy_type, tf32
from .machine import Machine, Source, Step
from .ptx import Instruction, Operand
from .races import Array
from .registers import HIGH, LOADING, LOW, NEVER_WRITTEN, Mask, flags_of

Function = Callable[..., Any]


def _fma(a: Array, b: Array, c: Array) -> Array:
    """Return a b + c rounded once (but for the rare float64 sum that lies on a float32's tie)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


def _divide(a: Array, b: Array) -> Array:
    """Return a / b, of integers towards zero."""
    if a.dtype.kind == "f":
        return np.asarray(a / b)
    b = np.where(b == 0, np.ones_like(b), b)
    quotient = a // b
    return np.asarray(quotient + ((quotient * b != a) & ((a < 0) != (b < 0))).astype(a.dtype))


def _remainder(a: Array, b: Array) -> Array:
    return np.asarray(a - b * _divide(a, b))


def _wide(a: Array, b: Array, c: Array | int = 0) -> Array:
    """Return a b + c in twice the bits of a."""
    double = (SIGNED if a.dtype.kind == "i" else BITS)[2 * a.itemsize]
    return np.asarray(a.astype(double) * b.astype(double) + c)


def _high(a: Array, b: Array) -> Array:
    """Return the upper half of the bits of a b."""
    if a.itemsize < 8:
        return (_wide(a, b) >> 8 * a.itemsize).astype(a.dtype)
    if a.dtype.kind == "i":
        raise Unsupported("mul.hi.s64")
    low = np.uint64(0xFFFF_FFFF)
    half = np.uint64(32)
    a1, a0, b1, b0 = a >> half, a & low, b >> half, b & low
    middle = a1 * b0 + (a0 * b0 >> half)
    return np.asarray(a1 * b1 + (middle >> half) + ((a0 * b1 + (middle & low)) >> half))


def _shift(operation: Function) -> Function:
    def shift(a: Array, by: Array) -> Array:
        bits = 8 * a.itemsize
        shifted = operation(a, np.minimum(by, bits - 1).astype(a.dtype))
        if a.dtype.kind == "i" and operation is np.right_shift:
            return np.asarray(shifted)
        return np.where(by < bits, shifted, np.zeros_like(shifted))

    return shift


def _bfe(a: Array, position: Array, length: Array) -> Array:
    """Return `length` bits of a from `position` on, signed ones with their sign."""
    position, length = position & 0xFF, length & 0xFF
    bits = 8 * a.itemsize
    wide = a.astype(np.int64)
    field = np.where(position < bits, wide >> np.minimum(position, bits - 1), -(wide < 0).astype(np.int64))
    kept = np.minimum(length, bits)
    mask = (np.int64(1) << kept.astype(np.int64)) - 1
    field = field & mask
    if a.dtype.kind == "i":
        negative = (kept > 0) & (field >> np.maximum(kept.astype(np.int64) - 1, 0) & 1 == 1)
        field = np.where(negative, field - mask - 1, field)
    return np.asarray(field.astype(a.dtype))


def _permute(a: Array, b: Array, selector: Array) -> Array:
    """Return four bytes of a and b, each chosen by four bits of the selector: a byte, or its sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(a)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i)).astype(np.uint64)
        byte = both >> ((choice & np.uint64(7)) << np.uint64(3)) & np.uint64(0xFF)
        byte = np.where(choice & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(0xFF), byte)
        result = result | byte.astype(np.uint32) << np.uint32(8 * i)
    return result


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    """Return for each bit of a, b and c the bit of the table of which they are the index."""
    terms = (
        (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if int(table[0]) >> i & 1
    )
    return functools.reduce(np.bitwise_or, terms, np.zeros_like(a))


def _extreme(ordinary: Function, of_nan: Function, words: Sequence[str]) -> Function:
    """Return the least or greatest of two or three numbers; .NaN: NaN if one is."""
    two = of_nan if "NaN" in words else ordinary
    return lambda a, b, *c: functools.reduce(two, c, two(a, b))


# name, with .lo, .hi or .wide → what it computes, from values in the instruction's type
FUNCTIONS: dict[str, Function] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "bfe": _bfe,
    "cvta": np.positive,
    "div": _divide,
    "ex2": np.exp2,
    "fma": _fma,
    "lg2": np.log2,
    "lop3": _logic,
    "mad.lo": lambda a, b, c: a * b + c,
    "mad.wide": _wide,
    "max": np.fmax,
    "min": np.fmin,
    "mul": np.multiply,
    "mul.hi": _high,
    "mul.lo": np.multiply,
    "mul.wide": _wide,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "prmt": _permute,
    "rcp": np.reciprocal,
    "rem": _remainder,
    "rsqrt": lambda a: np.reciprocal(np.sqrt(a)),
    "shl": _shift(np.left_shift),
    "shr": _shift(np.right_shift),
    "sqrt": np.sqrt,
    "sub": np.subtract,
    "tanh": np.tanh,
    "xor": np.bitwise_xor,
}
# those whose operands are not all of the instruction's type
_OTHER_TYPES = {"bfe": ("", "u32", "u32"), "shl": ("", "u32"), "shr": ("", "u32"), "lop3": ("", "", "", "u32")}
# what does not change the result here: approximations are computed in full
_MODIFIERS = {"rn", "approx", "full", "ftz", "lo", "hi", "wide", "NaN", "to", "global"}


def compute(machine: Machine, instruction: Instruction) -> Step:
    """Bind an instruction of `FUNCTIONS`."""
    name, *modifiers, kind = instruction.words
    key = next((f"{name}.{m}" for m in modifiers if m in ("lo", "hi", "wide")), name)
    function = FUNCTIONS[key]
    operands = instruction.operands[1:]
    types = [t or kind for t in _OTHER_TYPES.get(name, ())] or [kind] * len(operands)
    result = kind
    if modifiers and kind in HALVES and modifiers[-1] == "f32":  # halves into a sum in float32
        modifiers.pop()
        result = types[-1] = "f32"
    if key.endswith("wide"):
        result = f"{kind[0]}{2 * int(kind[1:])}"
        types[2:] = [result] * len(types[2:])
    if set(modifiers) - _MODIFIERS or len(types) != len(operands):
        raise Unsupported(instruction.opcode)
    if name in ("min", "max") and ("NaN" in modifiers or len(operands) > 2):
        function = _extreme(function, np.maximum if name == "max" else np.minimum, modifiers)
    if "ftz" in modifiers:
        function = _flushing(function)
    return lanewise(machine, function, instruction.operands[0], result, operands, types)


def _flushing(function: Function) -> Function:
    return lambda *values: flush(np.asarray(function(*map(flush, values)), np.float32))


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
    pairs = out.ndim == 2

    def settle(mask: Mask) -> None:
        flags = None
        for r in registers:
            if r.flags is not None:
                flags = flags_of(registers, mask, pairs=pairs)
                break
        if flags is not None or register.flags is not None:
            register.settle(mask, flags)

    if isinstance(function, np.ufunc) and half not in HALVES and all(s.fixed is not None for s in sources):
        arrays = [s.fixed for s in sources]

        def direct(mask: Mask) -> None:
            settle(mask)
            if mask is None:
                function(*arrays, out=out)
            else:
                function(*arrays, out=out, where=mask[:, None] if pairs else mask)

        return direct

    gets = [s.get for s in sources]

    def general(mask: Mask) -> None:
        settle(mask)
        values = function(*[get() for get in gets])
        if half in HALVES:
            values = narrow(values, half)
        if mask is None:
            out[...] = values
        else:
            np.copyto(out, values, where=mask[:, None] if pairs else mask)

    return general


_COMPARISONS: dict[str, Function] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_COMBINE: dict[str, Function] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, kind: str) -> Function:
    """Return a comparison by PTX's name: of floats, `ne` is false and what ends in u is true where one is NaN."""
    floating = kind.removesuffix("x2") in (*HALVES, "f32", "f64")
    if floating and name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if floating and name.endswith("u") and name[:-1] in _COMPARISONS:
        ordered = _COMPARISONS[name[:-1]]
        return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
    if name not in _COMPARISONS:
        raise Unsupported(f"comparison .{name}")
    return _COMPARISONS[name]


def compare(machine: Machine, instruction: Instruction) -> Step:
    """Bind setp: a comparison, perhaps combined with a predicate; of pairs, two of them; p|q, its opposite too."""
    _, name, *modifiers, kind = instruction.words
    modifiers = [m for m in modifiers if m != "ftz"]
    function = _comparison(name, kind)
    target, *operands = instruction.operands
    types = [kind, kind, *(["pred"] * len(modifiers))]
    if modifiers and modifiers[0] in _COMBINE:
        with_predicate, plain = _COMBINE[modifiers[0]], function
        function = lambda a, b, c: with_predicate(plain(a, b), c)  # noqa: E731
    elif modifiers:
        raise Unsupported(instruction.opcode)
    if not isinstance(target, tuple):
        return lanewise(machine, function, target, "pred", operands, types)
    if kind.endswith("x2"):
        return _both(
            lanewise(machine, lambda a, b, i=i: function(a, b)[:, i], target[i], "pred", operands, types)
            for i in range(2)
        )
    raise Unsupported(f"{instruction.opcode} to two predicates")


def _both(steps: Any) -> Step:
    first, second = steps

    def run(mask: Mask) -> None:
        first(mask)
        return second(mask)  # type: ignore[no-any-return]

    return run


def select(machine: Machine, instruction: Instruction) -> Step:
    """Bind selp: of two values the first where a predicate holds. What is not chosen may be anything."""
    kind = instruction.words[-1]
    target, *operands = instruction.operands
    a, b, p = (
        machine.source(o, t)
        for o, t in zip(operands, (f"b{8 * np.dtype(numpy_type(kind)).itemsize}",) * 2 + ("pred",), strict=True)
    )
    register = machine.register(target)
    out = register.bits

    def run(mask: Mask) -> None:
        choice = p.get()
        flags = None
        if any(s.register is not None and s.register.flags is not None for s in (a, b, p)):
            flags = _chosen_flags(a, b, p, choice, mask)
        if flags is not None or register.flags is not None:
            register.settle(mask, flags)
        values = np.where(choice, a.get(), b.get())
        if mask is None:
            out[...] = values
        else:
            np.copyto(out, values, where=mask)

    return run


def _chosen_flags(a: Source, b: Source, p: Source, choice: Array, mask: Mask) -> Array | None:
    """Return the flags of the chosen values and of the predicate."""
    everywhere = np.ones_like(choice) if mask is None else mask
    chosen = (
        flags_of([s.register] if s.register else [], where)
        for s, where in ((a, choice & everywhere), (b, ~choice & everywhere), (p, mask))
    )
    parts = [flags for flags in chosen if flags is not None]
    return functools.reduce(np.bitwise_or, parts) if parts else None


def _stacked(high: Array, low: Array) -> Array:
    """Return pairs, the lower half first."""
    return np.stack(np.broadcast_arrays(low, high), -1)


_ROUND: dict[str, Function] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def convert(machine: Machine, instruction: Instruction) -> Step:
    """Bind cvt: between integers, between floats, from one to the other; two floats to a pair of halves."""
    _, *modifiers, result, kind = instruction.words
    target, *operands = instruction.operands
    rounding = set(modifiers) - {"rn", "rna", *_ROUND}
    dtype = numpy_type(result)
    if rounding:
        raise Unsupported(instruction.opcode)
    if result.endswith("x2"):  # the first operand is the upper half
        return lanewise(machine, _stacked, target, result, operands, [kind, kind], wide=True)
    if result == "tf32":
        function: Function = tf32
        result = "f32"
    elif result in (*HALVES, "f32"):
        function = lambda a: a.astype(np.float32)  # noqa: E731
    elif kind in (*HALVES, "f32", "f64"):
        if not modifiers:
            raise Unsupported(instruction.opcode)
        to_integer, limits = _ROUND[modifiers[0]], (np.iinfo(dtype).min, np.iinfo(dtype).max)
        function = lambda a: np.clip(np.nan_to_num(to_integer(a.astype(np.float64))), *limits).astype(dtype)  # noqa: E731
    else:
        function = lambda a: a.astype(dtype)  # noqa: E731
    return lanewise(machine, function, target, result, operands, [kind], wide=True)


def move(machine: Machine, instruction: Instruction) -> Step:
    """Bind mov: of a register, a number, a special register; of a vector into one register, or the other way."""
    kind = instruction.words[-1]
    target, operand = instruction.operands
    many = operand if isinstance(operand, tuple) else target if isinstance(target, tuple) else (operand,)
    bits = kind if kind == "pred" else f"b{kind[1:]}"
    part = bits if len(many) == 1 else f"b{int(kind[1:]) // len(many)}"
    targets = target if isinstance(target, tuple) else (target,)
    sources = [machine.source(o, part if many is operand else bits) for o in (many if many is operand else (operand,))]
    outs = [None if t == "_" else machine.register(t) for t in targets]
    registers = [[s.register] if s.register else [] for s in sources]
    written = [r for r in outs if r is not None]

    def run(mask: Mask) -> None:
        # registers that tcgen05.ld has not yet written may be moved, not used
        given = [flags_of(r, mask, NEVER_WRITTEN | LOADING, pairs=True) for r in registers]
        if len(many) == 1:
            values = sources[0].get()[:, None]
        elif many is operand:
            parts = np.empty((machine.count, len(many)), numpy_type(part))
            for i, source in enumerate(sources):
                parts[:, i] = source.get()
            values = parts.view(numpy_type(bits))
        else:
            whole = np.ascontiguousarray(np.broadcast_to(sources[0].get(), machine.count))
            values = whole[:, None].view(numpy_type(part)).copy()
        moved: list[Array | None] = [None] * len(outs)
        if any(f is not None for f in given):
            moved = _moved_flags(given, len(outs))
        for i, register in enumerate(outs):
            if register is not None:
                register.write(values[:, i], mask, moved[i])
        if any(flags is not None and (flags & LOADING).any() for flags in moved):
            machine.loading.append(written)

    return run


def _moved_flags(given: Sequence[Array | None], parts: int) -> list[Array | None]:
    """Return the flags of what is packed or unpacked: halves of pairs have their own."""
    none = np.uint8(0)
    flags = [none if f is None else f for f in given]
    if len(flags) == 2 and parts == 1:
        low, high = (np.where(f & NEVER_WRITTEN, half, none) for f, half in zip(flags, (LOW, HIGH), strict=True))
        return [low | high | (flags[0] | flags[1]) & LOADING]
    if len(flags) == 1 and parts == 2:
        return [np.where(flags[0] & half, NEVER_WRITTEN, none) | flags[0] & LOADING for half in (LOW, HIGH)]
    whole = functools.reduce(np.bitwise_or, flags)
    return [whole if parts == len(flags) else np.where(whole & NEVER_WRITTEN, whole | NEVER_WRITTEN, whole)] * parts
