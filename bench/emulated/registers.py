"""Registers: the bits of every lane, and flags where they are not to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from .faults import Fault, Unsupported
from .formats import BITS, SIGNED, numpy_type
from .races import Array, Lanes, Order

Mask = Array | None  # of lanes; None: all

LOW, HIGH = np.uint8(1), np.uint8(16)  # that half of the bits was never written, of pairs one without the other
NEVER_WRITTEN = LOW | HIGH
NOT_ARRIVED = np.uint8(2)  # an asynchronous instruction will write it
LOADING = np.uint8(8)  # tcgen05.ld will write it, or what it is copied from


class Register:
    """A register of every lane: its bits, and flags where a lane's are not to be read; flags are None where all are."""

    __slots__ = ("bits", "changed", "flags", "order")

    def __init__(self, bits: Array, flags: Array) -> None:
        self.bits = bits
        self.flags: Array | None = flags
        # of registers that wgmma uses: when lanes were last written
        self.order: Order | None = None
        self.changed = bits[:0]

    def watch(self, order: Order) -> None:
        """Note from now on when lanes are written."""
        if self.order is None:
            self.order, self.changed = order, np.ones(self.bits.size, np.int64)

    def typed(self, name: str) -> Array:
        """Return a view of the bits as PTX's type `name`: [lanes], pairs as [lanes, 2].

        Raises:
            Unsupported: the type has another size.
        """
        dtype, pair = np.dtype(numpy_type(name)), name.endswith("x2")
        if (dtype == np.bool_) != (self.bits.dtype == np.bool_) or dtype.itemsize << pair != self.bits.itemsize:
            raise Unsupported(f".{name} of a register of {self.bits.itemsize} bytes")
        return self.bits.view(dtype).reshape(-1, 2) if pair else self.bits.view(dtype)

    def low(self, name: str) -> Array:
        """Return a view of the bits as `typed` does, of wider registers the low bits."""
        itemsize = np.dtype(numpy_type(name)).itemsize
        if name.endswith("x2") or self.bits.itemsize <= itemsize:
            return self.typed(name)
        return self.bits.view(numpy_type(name))[:: self.bits.itemsize // itemsize]

    def settle(self, mask: Mask, flags: Array | None, copied: bool = False) -> None:
        """Set the flags of lanes that are written; copied: with what another register holds.

        Raises:
            Fault: the register waits for an asynchronous instruction.
        """
        if self.flags is not None:
            _require_arrived(self.flags & (NOT_ARRIVED | LOADING), mask, "writes")
        if self.order is not None and not copied:
            # compilers name accumulators anew behind wgmma.fence, and ptxas gives both names one register
            np.copyto(self.changed, self.order.now, where=True if mask is None else mask)
        if mask is None:
            self.flags = flags if flags is None or flags.any() else None
        elif self.flags is not None or flags is not None:
            none = np.uint8(0)
            merged = np.where(mask, none if flags is None else flags, none if self.flags is None else self.flags)
            self.flags = merged if merged.any() else None

    def write(self, values: Array, mask: Mask, flags: Array | None, copied: bool = False) -> None:
        """Write the bits of all lanes, or of those in the mask, and their flags, as `settle` does."""
        self.settle(mask, flags, copied)
        np.copyto(self.bits, values, where=True if mask is None else mask)

    def fill(self, values: Array, lanes: Lanes, mask: Mask, never: Array | None) -> None:
        """Write the values of `lanes`, those of the mask; never: of which lanes they were never written themselves."""
        flags = None
        if never is not None:
            flags = np.zeros(self.bits.size, np.uint8)
            flags[lanes] = never * NEVER_WRITTEN
        self.settle(mask, flags)
        self.bits[lanes] = self.fit(values)

    def fit(self, values: Array) -> Array:
        """Return values as bits of the register's size, signed ones with their sign."""
        size = self.bits.itemsize
        if values.itemsize != size:
            values = values.astype(SIGNED[size] if values.dtype.kind == "i" else BITS[size])
        return values.view(self.bits.dtype)


def alter(registers: Sequence[Register], change: Callable[[Array], Array]) -> None:
    """Change the flags of registers, once where they share them."""
    before = [r.flags for r in registers]
    changed: dict[int, Array | None] = {}
    for register, flags in zip(registers, before, strict=True):
        if id(flags) not in changed:
            new = change(np.zeros(1, np.uint8) if flags is None else flags)
            changed[id(flags)] = new if new.any() else None
        register.flags = changed[id(flags)]


def _require_arrived(flags: Array, mask: Mask, what: str) -> None:
    """Raise a fault if lanes have flags of an asynchronous instruction."""
    if (flags if mask is None else flags[mask]).any():
        raise Fault("asynchronous result", f"{what} a register of an asynchronous instruction before the wait for it")


def flags_of(
    registers: Iterable[Register], mask: Mask, carry: np.uint8 = NEVER_WRITTEN, pairs: bool = False
) -> Array | None:
    """Return the flags in `carry` of several registers together, None where all lanes may be read.

    pairs: the halves of the registers are computed apart.

    Raises:
        Fault: one of them waits for an asynchronous instruction.
    """
    flags: Array | None = None
    for register in registers:
        if register.flags is not None:
            flags = register.flags if flags is None else flags | register.flags
    return None if flags is None else checked(flags, mask, carry, pairs)


def checked(flags: Array, mask: Mask, carry: np.uint8 = NEVER_WRITTEN, pairs: bool = False) -> Array | None:
    """Return those flags in `carry` that lanes have, as `flags_of` does."""
    _require_arrived(flags & (NOT_ARRIVED | LOADING) & ~carry, mask, "reads")
    live = flags & carry
    if not pairs:
        live = np.where(live & NEVER_WRITTEN, live | NEVER_WRITTEN, live)
    live = live if mask is None else live * mask
    return live if live.any() else None


def require_written(registers: Iterable[Register], mask: Mask, use: str) -> None:
    """Raise a fault if what lanes use depends on a register, or on memory, that was never written."""
    flags = flags_of(registers, mask)
    if flags is not None:
        raise Fault("uninitialised register", f"{use} of {np.count_nonzero(flags)} threads was never written")
