"""Find races: who touched each place of a program's memory, when, and what orders the accesses.

Every access leaves a stamp: the machine's clock, the warp and the lane. Two accesses, one of them a write, are ordered
if a barrier of the whole program lies between them, or, within a warp, one of the warp.

wgmma and tcgen05.mma read shared memory by the asynchronous proxy. What the generic proxy wrote they see behind a
fence.proxy.async alone: of the writer after the write, or of the reader after the barrier (PTX ISA, "Async proxy"). The
copies of cp.async belong to the generic proxy too, only those of cp.async.bulk to the asynchronous one, and a copy is
written when its wait has ended, so a fence before the wait does not count. Triton takes it so (ProxyFenceInsertion.cpp,
pull requests 9610 and 10552), after a B200 gave wrong results without the fence (pytorch/pytorch issue 181248).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Fault

Array = NDArray[Any]
Lanes = Any  # indices of lanes, or slice(None) for all of them

# a stamp: bits 0 to 5 the lane, 6 to 13 the warp, above 16 the clock; 0: never
_LANE, _WARP = 0x3F, 0x3FC0
ANYONE = _WARP | _LANE
_CLOCK = 16
# stamps of what has not ended: writes by cp.async before their wait, reads by matrix instructions before theirs
IN_FLIGHT = 1 << 62
# in the stamp of what tcgen05.mma did: who has waited for it since is ordered after it
WAITED = 1 << 15
_START = 1 << _CLOCK | 0xFFFF


class Order:
    """Hold what the accesses of each lane come after: `synced` its program's last barrier, `warp_synced` its warp's.

    who: the lane's own part of its stamps. waited: its last wait at an mbarrier. fenced: the clock of its last fence
    between proxies.
    """

    def __init__(self, lanes: int, threads: int) -> None:
        thread = np.arange(lanes, dtype=np.int64) % threads
        self.now, self.threads = 2, threads
        self.who = (thread // 32 << 6) | thread % 32
        self.synced, self.warp_synced, self.waited = (np.full(lanes, _START) for _ in range(3))
        self.fenced = np.zeros(lanes, np.int64)

    def stamp(self, lanes: Lanes) -> Array:
        """Return the stamp of an access now."""
        return self.who[lanes] | self.now << _CLOCK

    def end(self, waited: bool) -> int:
        """Return the stamp of matrix instructions that end now; waited: at an mbarrier, else a barrier is due."""
        return ANYONE | WAITED * waited | self.now << _CLOCK

    def wait(self, lanes: Lanes) -> None:
        """Order all later accesses of the lanes after what they have waited for."""
        self.waited[lanes] = self.now << _CLOCK | 0xFFFF

    def barrier(self, lanes: Lanes, whole: bool) -> None:
        """Order all later accesses of the lanes after all earlier ones: of their programs, or only of their warps."""
        self.warp_synced[lanes] = self.now << _CLOCK | 0xFFFF
        if whole:
            self.synced[lanes] = self.now << _CLOCK | 0xFFFF


class Ledger:
    """The last write and the last reads of every granule of memory."""

    def __init__(self, order: Order, granules: int) -> None:
        self.order = order
        self.written = np.zeros(granules, np.int64)
        self.read = np.zeros(granules, np.int64)
        # the rows of eight granules that matrix instructions read, by the stamp of the reads
        self.flights: dict[int, list[Array]] = {}

    def note_read(self, rows: Array, width: int, lanes: Lanes) -> Array:
        """Note that lanes read rows of `width` granules, and return which [lanes, width] were never written.

        Raises:
            Fault: another warp wrote there since the last barrier, or a copy is under way.
        """
        order = self.order
        prior = self.written.reshape(-1, width)[rows]
        self._check(prior, lanes, "reads what was written there by")
        read = self.read.reshape(-1, width)
        stamps = np.broadcast_to(order.stamp(lanes)[:, None], prior.shape)
        before = read[rows]
        fresh = self._since(order.synced, before, lanes)
        if fresh.any():
            stamps = np.where(before >= IN_FLIGHT, before, _several(stamps, before, fresh))
        read[rows] = stamps
        after = read[rows]
        if (after != stamps).any():  # several lanes of this instruction read the same place
            mixed = _several(stamps, after, after != stamps)
            for warps in (False, True):
                i, j = np.nonzero((mixed != after) & ((mixed & _WARP == _WARP) == warps))
                read[rows[i], j] = mixed[i, j]
        never: Array = prior == 0
        return never

    def note_write(self, rows: Array, width: int, lanes: Lanes, flagged: Array | None = None, stamp: int = 0) -> None:
        """Note that lanes write rows of `width` granules; flagged: [lanes], what they write was never initialised.

        stamp: IN_FLIGHT for a copy under way.

        Raises:
            Fault: another warp wrote or read there since the last barrier, or a copy or read is under way.
        """
        written = self.written.reshape(-1, width)
        self._check(written[rows], lanes, "overwrites what was written there by")
        self._check(self.read.reshape(-1, width)[rows], lanes, "overwrites what is read there by")
        stamps = self.order.stamp(lanes) if not stamp else self.order.who[lanes] | stamp
        if flagged is not None:
            stamps = np.where(flagged, 0, stamps)
        written[rows] = stamps[:, None]

    def written_by_others(self, rows: Array, width: int, lanes: Lanes) -> Array:
        """Return where another warp than a lane's wrote last."""
        written = self.written.reshape(-1, width)[rows, 0]
        return np.asarray((written ^ self.order.who[lanes]) & _WARP != 0)

    def note_matrix_read(self, chunks: Array, lanes: Array) -> int:
        """Note that matrix instructions read pieces of 16 bytes, [instructions, pieces], issued by `lanes`.

        Return the stamp of the reads, which last until `end_matrix_reads`.

        Raises:
            Fault: a warp wrote there since the last barrier, or nothing ever did, or a copy is under way, or there is
                no fence between what wrote there and the instruction.
        """
        order, stamp = self.order, IN_FLIGHT | self.order.now << _CLOCK | ANYONE
        prior = self.written.reshape(-1, 8)[chunks].reshape(len(lanes), -1)
        if (prior == 0).any():
            raise Fault("uninitialised shared memory", "a matrix instruction reads what was never written")
        if (prior >= IN_FLIGHT).any():
            raise Fault("asynchronous copy", "a matrix instruction reads a copy before the wait for it")
        if (prior > order.synced[lanes][:, None]).any():
            raise Fault("race", "a matrix instruction reads what was written since the last barrier")
        unfenced = order.fenced[lanes] << _CLOCK <= order.synced[lanes]
        if unfenced.any():
            first = lanes // order.threads * order.threads
            writer = first[:, None] + ((prior & _WARP) >> 6) * 32 + (prior & _LANE)
            if ((order.fenced[writer] <= prior >> _CLOCK) & unfenced[:, None]).any():
                raise Fault("proxy fence", "a matrix instruction reads what was written without a fence.proxy.async")
        self.read.reshape(-1, 8)[chunks] = stamp
        self.flights.setdefault(stamp, []).append(chunks)
        return stamp

    def end_matrix_reads(self, stamp: int, ended: int) -> None:
        """Note that the reads of a stamp have ended, by the stamp of that end."""
        for chunks in self.flights.pop(stamp, []):
            read = self.read.reshape(-1, 8)
            before = read[chunks]
            read[chunks] = np.where(before == stamp, ended, before)

    def _since(self, synced: Array, prior: Array, lanes: Lanes) -> Array:
        """Return which earlier accesses come after the lanes' last barriers, and their waits where these count."""
        recent = prior > synced[lanes][:, None]
        if recent.any():
            recent &= (prior & WAITED == 0) | (prior > self.order.waited[lanes][:, None])
        return np.asarray(recent)

    def _check(self, prior: Array, lanes: Lanes, what: str) -> None:
        """Raise a fault where an earlier access is not ordered before one of the lanes now."""
        order = self.order
        recent = self._since(order.warp_synced, prior, lanes)
        if not recent.any():
            return
        other = prior ^ order.who[lanes][:, None]
        bad = (recent & (other & _LANE != 0)) | (self._since(order.synced, prior, lanes) & (other & _WARP != 0))
        bad |= prior >= IN_FLIGHT
        if not bad.any():
            return
        first = int(prior[bad].max())
        if first >= IN_FLIGHT:
            raise Fault("asynchronous copy", f"{what} an asynchronous access before the wait for it")
        warp = (first & _WARP) >> 6
        raise Fault("race", f"{what} {'several warps' if warp == 255 else f'warp {warp}'} since the last barrier")


def _several(new: Array, before: Array, where: Array) -> Array:
    """Return stamps of `new`, several lanes' or several warps' where `before` is another's."""
    other = (new ^ before) & ANYONE
    merged = new | np.where(other & _WARP != 0, ANYONE, np.where(other != 0, _LANE, 0))
    return np.where(where, merged, new)
