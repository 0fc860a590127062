"""The memory of executed kernels: the tensors that they are called with, and what every program has to itself."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .faults import Fault, Unsupported
from .races import IN_FLIGHT, Array, Lanes, Ledger, Order, Programs

BASE = 0x7F00_0000_0000  # the first made-up address
WINDOW = 40  # bits of the addresses that a storage has to itself
LIMIT = 4 << 30  # bytes of each kind of memory, with what is noted of it
# bytes that are held, or noted on the way, for each byte of tensors, and of shared memory
OF_TENSORS, OF_SHARED = 24, 10


class Global:
    """Global memory: the storages of tensors, far apart, of which only the tensors' elements may be touched.

    Tensors that share a storage, such as packed q, k and v, have its elements in common: no access by the pointer of
    one to another is found. `outputs` are poisoned with NaN, or the integers of the same bits; what else was never
    written is not told from what was.

    Raises:
        Unsupported: an output is no argument, or shares elements with another tensor, or all is too large.
    """

    def __init__(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        self.storages = {t.untyped_storage().data_ptr(): t for t in tensors}
        self.windows = {pointer: i for i, pointer in enumerate(self.storages)}
        self.sizes = np.array([t.untyped_storage().nbytes() for t in self.storages.values()], np.int64)
        ends = np.cumsum(-(-self.sizes // 256) * 256)
        self.starts, end = ends - -(-self.sizes // 256) * 256, int(ends[-1]) if ends.size else 0
        if end * OF_TENSORS > LIMIT:
            raise Unsupported(f"tensors must fit {LIMIT // OF_TENSORS} bytes of memory, got {end}")
        if any(t.untyped_storage().data_ptr() not in self.windows for t in outputs):
            raise Unsupported("outputs must be among the arguments")
        self.bytes = np.zeros(end, np.uint8)
        for start, tensor in zip(self.starts, self.storages.values(), strict=True):
            self.bytes[start : start + tensor.untyped_storage().nbytes()] = bytes_of(tensor)
        self.outputs = list(outputs)
        self._refuse_overlaps(tensors)
        valid = np.zeros(end, np.bool_)
        for tensor in tensors:
            self._elements(valid, tensor)[...] = True
        self.holes = np.append(0, np.cumsum(~valid)).astype(np.uint32)  # bytes before each that are no element's
        for tensor in outputs:
            self._elements(self.bytes, tensor)[...] = 0xFF

    def follow(self, order: Order) -> None:
        """Note from now on who touches what."""
        self.ledger = Programs(order, self.bytes.size // 2)

    def address(self, tensor: Tensor) -> int:
        """Return the address of a tensor's first element."""
        storage = tensor.untyped_storage().data_ptr()
        return BASE + (self.windows[storage] << WINDOW) + tensor.data_ptr() - storage

    def _elements(self, memory: Array, tensor: Tensor) -> Array:
        """Return a view of what `memory`, one value a byte, has for a tensor's elements: its shape, and their bytes."""
        strides = tuple(stride * tensor.itemsize for stride in tensor.stride())
        storage = tensor.untyped_storage().data_ptr()
        start = memory[self.starts[self.windows[storage]] + tensor.data_ptr() - storage :]
        return np.lib.stride_tricks.as_strided(start, (*tensor.shape, tensor.itemsize), (*strides, 1))

    def values(self, tensor: Tensor, memory: Array | None = None) -> Tensor:
        """Return a tensor with the elements that it has here, or in a copy of `bytes`."""
        data = np.array(self._elements(self.bytes if memory is None else memory, tensor))
        return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)

    def _refuse_overlaps(self, tensors: Sequence[Tensor]) -> None:
        """Refuse outputs that share elements with themselves or another tensor."""
        taken = np.zeros(self.bytes.size, np.bool_)
        for tensor in self.outputs:
            before = np.count_nonzero(taken)
            self._elements(taken, tensor)[...] = True
            if np.count_nonzero(taken) != before + tensor.numel() * tensor.itemsize:
                raise Unsupported("tensors must not overlap: an output shares elements with itself or another output")
        outputs = {_identity(t) for t in self.outputs}
        others = [t for t in tensors if _identity(t) not in outputs]
        if len(tensors) - len(others) > len(outputs) or any(self._elements(taken, t).any() for t in others):
            raise Unsupported("tensors must not overlap: an output shares elements with another argument")

    def places(self, addresses: Array, width: int) -> Array:
        """Return where `width` bytes from each address are.

        Raises:
            Fault: an address outside the tensors' elements, or not a multiple of the width.
        """
        if not addresses.size:
            return addresses
        window, at = (addresses - BASE) >> WINDOW, (addresses - BASE) & (1 << WINDOW) - 1
        inside = (window >= 0) & (window < self.sizes.size)
        window = np.where(inside, window, 0)
        inside &= at + width <= self.sizes[window]
        at = np.where(inside, at + self.starts[window], 0)
        if inside.any():
            inside &= self.holes[np.where(inside, at + width, 0)] == self.holes[at]
        if not inside.all():
            bad = int(addresses[~inside][0])
            raise Fault("bounds", f"{width} bytes at {bad:#x} are outside every tensor: {self._nearest(bad)}")
        if (at % width).any():
            raise Fault("alignment", f"{width} bytes at {int(addresses[at % width != 0][0]):#x}")
        return at

    def _nearest(self, address: int) -> str:
        """Say where an address is from the start of the storage whose it could be."""
        index = min(max((address - BASE + (1 << WINDOW - 1)) >> WINDOW, 0), self.sizes.size - 1)
        if index < 0:
            return "there is none"
        away = address - BASE - (index << WINDOW)
        return f"{away} bytes after the start of storage {index}, of {self.sizes[index]} bytes"

    def load(self, at: Array, width: int, lanes: Lanes) -> Array:
        """Return `width` bytes from each place, [lanes, width].

        Raises:
            Fault: another thread wrote there, and nothing orders that before the load.
        """
        self.ledger.note_read(*_granules(at, width), lanes)
        return _rows(self.bytes, width)[at // width]

    def store(self, at: Array, data: Array, lanes: Lanes) -> None:
        """Write the rows of `data`.

        Raises:
            Fault: another program wrote to one of the places, or several warps at once and not the same, or another
                thread wrote or read there and nothing orders that before the store.
        """
        _store(self.ledger, self.bytes, at, data, lanes)

    def cells(self, dtype: np.dtype[Any]) -> Array:
        """Return all of memory as values of a type."""
        return self.bytes[: self.bytes.size // 8 * 8].view(dtype)

    def mark(self, at: Array, width: int, lanes: Lanes) -> None:
        """Note the lanes as the last writers of `width` bytes at each place, by atomics: nothing need order these."""
        self.ledger.note_atomic(*_granules(at, width), lanes)

    def write_back(self) -> None:
        """Write everything into the tensors."""
        for start, tensor in zip(self.starts, self.storages.values(), strict=True):
            bytes_of(tensor)[:] = self.bytes[start : start + tensor.untyped_storage().nbytes()]

    def require_outputs(self) -> None:
        """Raise a fault if an element of an output was not written."""
        for i, tensor in enumerate(self.outputs):
            written = self._elements(np.repeat(self.ledger.written != 0, 2), tensor).all(-1)
            if not written.all():
                first, missing = np.argwhere(~written)[0].tolist(), written.size - np.count_nonzero(written)
                raise Fault("unwritten output", f"{missing} of {written.size} elements of output {i}, first {first}")


class Shared:
    """Shared memory of every program, one after the other, with the order of accesses to every two bytes.

    size: bytes of one program, of which each has `pitch`.
    """

    def __init__(self, order: Order, programs: int, size: int) -> None:
        self.size, self.pitch = size, max(-(-size // 1024) * 1024, 1024)
        if programs * self.pitch * OF_SHARED > LIMIT:
            fit = LIMIT // OF_SHARED
            raise Unsupported(f"shared memory must fit {fit} bytes, got {programs} programs of {size} bytes")
        self.bytes = np.zeros(programs * self.pitch, np.uint8)
        self.ledger = Ledger(order, programs * self.pitch // 2)
        self.guarded: Collection[int] = ()  # the places of mbarriers

    def places(self, addresses: Array, width: int, program: Array) -> Array:
        """Return where `width` bytes from each address of a program are.

        Raises:
            Fault: an address outside shared memory, or not a multiple of the width.
        """
        if addresses.size and (addresses.min() < 0 or addresses.max() + width > self.size):
            bad = addresses[(addresses < 0) | (addresses + width > self.size)][0]
            raise Fault("bounds", f"{width} bytes at {int(bad):#x} are outside the {self.size} of shared memory")
        if (addresses % width).any():
            raise Fault("alignment", f"{width} bytes at {int(addresses[addresses % width != 0][0]):#x}")
        return addresses + program * self.pitch

    def load(self, at: Array, width: int, lanes: Lanes) -> tuple[Array, Array | None]:
        """Return `width` bytes from each place, [lanes, width], and which lanes' were never initialised, if any."""
        never = np.asarray(self.ledger.note_read(*_granules(at, width), lanes).any(1))
        return _rows(self.bytes, width)[at // width], never if never.any() else None

    def store(self, at: Array, data: Array, lanes: Lanes, flagged: Array | None = None) -> None:
        """Write the rows of `data`; flagged: the lanes whose data were never initialised.

        Raises:
            Fault: several warps write to the same place, and not the same. Of one warp's lanes any may win: compilers
                let those that compute the same row each store it, where the last bit may differ.
        """
        self._require_no_mbarrier(at, data.shape[1])
        _store(self.ledger, self.bytes, at, data, lanes, flagged)

    def announce(self, at: Array, data: Array, lanes: Lanes) -> None:
        """Note that the rows of `data` will be written by an asynchronous copy."""
        rows, granules = _granules(at, data.shape[1])
        self._require_no_mbarrier(at, data.shape[1])
        self.ledger.note_write(rows, granules, lanes, stamp=IN_FLIGHT)
        if self.ledger.written_by_others(rows, granules, lanes).any():
            _, first, which = np.unique(at, return_index=True, return_inverse=True)
            if (data[first][which] != data).any():
                raise Fault("race", "several warps copy different values to the same address")

    def _require_no_mbarrier(self, at: Array, width: int) -> None:
        """Raise a fault if one of the places is an mbarrier's that was not invalidated."""
        if self.guarded and np.isin(_rows_of_eight(at, width), list(self.guarded)).any():
            raise Fault("mbarrier", "overwritten before mbarrier.inval")

    def land(self, at: Array, data: Array, lanes: Lanes) -> None:
        """Write the rows of `data` that were announced."""
        width = data.shape[1]
        rows, granules = _granules(at, width)
        self.ledger.written.reshape(-1, granules)[rows] = self.ledger.order.stamp(lanes)[:, None]
        _rows(self.bytes, width)[at // width] = data


def _store(ledger: Ledger, memory: Array, at: Array, data: Array, lanes: Lanes, flagged: Array | None = None) -> None:
    """Write the rows of `data`, of which all that several warps write to the same place must be the same."""
    width = data.shape[1]
    ledger.note_write(*_granules(at, width), lanes, flagged)
    rows = _rows(memory, width)
    rows[at // width] = data
    lost = (rows[at // width] != data).any(1)
    if lost.any() and (lost & ledger.written_by_others(*_granules(at, width), lanes)).any():
        raise Fault("race", "several warps write different values to the same address")


def _rows_of_eight(at: Array, width: int) -> Array:
    """Return the places of the words of eight bytes that accesses touch."""
    return at[:, None] // 8 * 8 + np.arange(0, max(width, 8), 8)


def _granules(at: Array, width: int) -> tuple[Array, int]:
    """Return which rows of granules of two bytes an access of `width` bytes touches, and the granules of a row."""
    return (at // width, width // 2) if width > 1 else (at // 2, 1)


def _rows(memory: NDArray[Any], width: int) -> Array:
    """Return memory as rows of `width`, without what is over."""
    return memory[: memory.size // width * width].reshape(-1, width)


def _identity(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def bytes_of(tensor: Tensor) -> Array:
    """Return the bytes of a tensor's storage."""
    flat = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    return np.asarray(flat.numpy())
