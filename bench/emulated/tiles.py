"""Operands of matrix instructions that stand in shared memory: descriptors, swizzles, transposed tiles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from .faults import Fault, Unsupported
from .formats import HALVES, widen
from .memory import Shared
from .races import Array

# the widths in bytes of rows that are swizzled, with the bits of the address that turn 16 bytes about
SWIZZLES = {128: 7, 64: 3, 32: 1, 16: 0}


class Tile(NamedTuple):
    """An operand in shared memory, from a descriptor: offsets in bytes, and the width of its swizzle.

    A core matrix is 8 rows of 16 bytes, or of the swizzle's width. leading: if K lies along the rows, from one core
    matrix to the next along K, where nothing is swizzled; if M or N does (transposed), from one to the next along M or
    N, without a swizzle along K. stride: to the next along the other dimension.
    """

    start: int
    leading: int
    stride: int
    swizzle: int

    @classmethod
    def of(cls, descriptor: int, swizzles: dict[int, int], shift: int) -> Tile:
        """Read a descriptor whose swizzle stands above bit `shift`, by its code."""
        start, leading, stride = ((descriptor >> bit & 0x3FFF) << 4 for bit in (0, 16, 32))
        code, fields = descriptor >> shift, 0x3FFF << 32 | 0x3FFF << 16 | 0x3FFF
        if code not in swizzles or descriptor & (1 << shift) - 1 & ~fields:
            raise Unsupported(f"matrix descriptor {descriptor:#x}")
        return cls(start, leading, stride, swizzles[code])

    def chunks(self, rows: int, row_bytes: int, transposed: bool, itemsize: int) -> Array:
        """Return the addresses of the operand's pieces of 16 bytes.

        They are [rows, row_bytes / 16] of a tile whose K lies along the row; transposed, [K, rows × itemsize / 16].
        """
        S = self.swizzle
        if transposed:
            k, piece = np.arange(row_bytes // itemsize)[:, None], np.arange(rows * itemsize // 16)
            along, groups = (self.leading, self.stride) if S > 16 else (self.stride, self.leading)
            at = self.start + piece // (S // 16) * along + piece % (S // 16) * 16 + k // 8 * groups + k % 8 * S
        else:
            row, piece = np.arange(rows)[:, None], np.arange(row_bytes // 16)
            at = self.start + row // 8 * self.stride + row % 8 * S + piece * (16 if S > 16 else self.leading)
        return np.asarray(at ^ (at >> 7 & SWIZZLES[S]) << 4)


class Operands:
    """Tiles of shared memory that matrix instructions read by the asynchronous proxy."""

    def __init__(self, shared: Shared) -> None:
        self.shared = shared
        self.known: dict[tuple[Any, ...], Array] = {}
        self.reads: list[int] = []  # the stamps of the latest

    def read(
        self, tiles: Sequence[Tile], program: Array, rows: int, kind: str, transposed: bool, lanes: Array
    ) -> Array:
        """Return tiles as float32, [tiles, rows, K], of the programs; 32 bytes along K.

        lanes: [tiles, threads], those that execute the instruction together.
        """
        itemsize = 2 if kind in HALVES else 4
        shared = self.shared
        at = np.stack([self._chunks(tile, rows, transposed, itemsize) for tile in tiles])
        if at.min() < 0 or at.max() + 16 > shared.size:
            raise Fault("bounds", f"a matrix operand outside the {shared.size} bytes of shared memory")
        chunks = (at + (program * shared.pitch)[:, None, None]) // 16
        self.reads = shared.ledger.note_matrix_read(chunks.reshape(len(tiles), -1), lanes)
        data = shared.bytes.view(np.uint64).reshape(-1, 2)[chunks]
        data = data.reshape(*chunks.shape[:2], -1).view(np.uint16 if itemsize == 2 else np.uint32)
        values = widen(data, kind)
        return values.swapaxes(1, 2) if transposed else values

    def _chunks(self, tile: Tile, *how: Any) -> Array:
        key = (tile, *how)
        if key not in self.known:
            rows, transposed, itemsize = how
            self.known[key] = tile.chunks(rows, 32, transposed, itemsize)
        return self.known[key]
