"""Find races: who touched each place of a program's memory, when, and what orders the accesses.

Every access leaves a stamp: the machine's clock, the warp and the lane. Two accesses, one of them a write, are ordered
if a barrier of the whole program lies between them, or, within a warp, one of the warp. What tcgen05.mma did is stamped
with the tcgen05.commit that tracks it: a thread's accesses come after it if the thread has waited for this commit or a
later one, at whichever mbarrier that arrived.

wgmma and tcgen05.mma read shared memory by the asynchronous proxy. What the generic proxy wrote they see behind a
fence.proxy.async alone: of the writer between the write and the barrier, or of every reading thread after the barrier
(PTX ISA, "Async proxy"); a third thread's, between two barriers, would do but does not count here. The copies of
cp.async belong to the generic proxy too, only those of cp.async.bulk to the asynchronous one, and a copy is written
when its wait has ended, so a fence before the wait does not count. Triton takes it so (ProxyFenceInsertion.cpp, pull
requests 9610 and 10552), after a B200 gave wrong results without the fence (pytorch/pytorch issue 181248).

Programs are ordered by atomics that release and acquire, with a barrier before the one and after the other.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .faults import Fault, Unsupported
from .ptx import Instruction

Array = NDArray[Any]
Lanes = Any  # indices of lanes, or slice(None) for all of them

# a stamp: bits 0 to 5 the lane, 6 to 13 the warp, above 16 the clock; 0: never
_LANE, _WARP = 0x3F, 0x3FC0
ANYONE = _WARP | _LANE
_CLOCK = 16
# stamps of what has not ended: writes by cp.async before their wait, reads by matrix instructions before theirs
IN_FLIGHT = 1 << 62
# in the stamp of what tcgen05.mma did, with the number of a commit in place of the warp and the lane
COMMITTED = 1 << 15
_START = 1 << _CLOCK | 0xFFFF


class Order:
    """Hold what the accesses of each lane come after: `synced` its program's last barrier, `warp_synced` its warp's.

    who: the lane's own part of its stamps. fenced: the clock of its last fence between proxies, and passed: of the last
    one before its program's last barrier. commits: how many tcgen05.commit there were, waited: the last that the lane
    has waited for. instructions: of the program, and executed: the index of the one at each time of the clock.
    """

    def __init__(self, lanes: int, threads: int, instructions: Sequence[Instruction]) -> None:
        thread = np.arange(lanes, dtype=np.int64) % threads
        self.now, self.threads = 2, threads
        self.instructions, self.executed = instructions, array("i", (0, 0, 0))
        self.who = (thread // 32 << 6) | thread % 32
        self.synced, self.warp_synced = (np.full(lanes, _START) for _ in range(2))
        self.commits, self.waited = 0, np.zeros(lanes, np.int64)
        self.program = np.arange(lanes) // threads
        # by an address, then a program: up to which stamp its accesses are visible to who acquires there
        self.released: dict[int, dict[int, int]] = {}
        # by a program, then another: up to which stamp the other's are visible to it, and since when
        self.acquired: dict[int, dict[int, tuple[int, int]]] = {}
        self.fenced, self.passed = np.zeros(lanes, np.int64), np.zeros(lanes, np.int64)

    def advance(self, at: int) -> None:
        """Let the clock go on by one, for the instruction of an index."""
        self.now += 1
        self.executed.append(at)

    def place(self, stamp: int) -> str:
        """Return the line of PTX, and its source, of the access that left a stamp."""
        instruction = self.instructions[self.executed[stamp >> _CLOCK]]
        return f"line {instruction.line} ({instruction.source})"

    def stamp(self, lanes: Lanes) -> Array:
        """Return the stamp of an access now."""
        return self.who[lanes] | self.now << _CLOCK

    def end(self, commit: int = 0) -> int:
        """Return the stamp of matrix instructions that end now; commit: which tracks them, 0: a barrier is due."""
        return (COMMITTED | commit if commit else ANYONE) | self.now << _CLOCK

    def commit(self) -> int:
        """Return the number of a tcgen05.commit that is executed now."""
        self.commits += 1
        if self.commits > ANYONE:
            raise Unsupported(f"more than {ANYONE} tcgen05.commit of a program")
        return self.commits

    def wait(self, lanes: Lanes, commits: Array) -> None:
        """Order all later accesses of the lanes after what their commits track."""
        self.waited[lanes] = np.maximum(self.waited[lanes], commits)

    def meet(self, at: Array, lanes: Lanes, acquires: bool, releases: bool) -> None:
        """Let lanes, one after the other, order programs by atomics at places of global memory.

        A release is of what the program did before its last barrier, and of what was acquired; what is acquired counts
        from the program's next barrier on. The PTX ISA has more for the lane itself, which compilers do not use.
        """
        for place, lane in zip(at.tolist(), np.arange(self.who.size)[lanes].tolist(), strict=True):
            released = self.released.setdefault(place, {})
            acquired = self.acquired.setdefault(lane // self.threads, {})
            if acquires:
                acquired |= {other: (until, self.now) for other, until in released.items()}
            if releases:
                released |= {other: until for other, (until, _) in acquired.items()}
                released[lane // self.threads] = int(self.synced[lane])

    def visible(self, program: int, other: int) -> int:
        """Return up to which stamp a program sees the accesses of another."""
        until, since = self.acquired.get(program, {}).get(other, (0, 0))
        return until if since << _CLOCK <= self.synced[program * self.threads] else 0

    def barrier(self, lanes: Lanes, whole: bool) -> None:
        """Order all later accesses of the lanes after all earlier ones: of their programs, or only of their warps."""
        self.warp_synced[lanes] = self.now << _CLOCK | 0xFFFF
        if whole:
            self.synced[lanes] = self.now << _CLOCK | 0xFFFF
            self.passed[lanes] = self.fenced[lanes]


class Ledger:
    """The last write and the last reads of every granule of memory."""

    def __init__(self, order: Order, granules: int) -> None:
        self.order = order
        self.written = np.zeros(granules, np.int64)
        self.read = np.zeros(granules, np.int64)
        # of every eight granules: the matrix instructions that are reading them, and the stamp of the last one's end
        self.reading, self.ended = np.zeros(granules // 8, np.int32), np.zeros(granules // 8, np.int64)
        # what matrix instructions under way read, by their stamps
        self.flights: dict[int, list[Array]] = {}
        self.multiplies = False

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
        fresh = self.since(order.synced, before, lanes)
        if fresh.any():  # of its own warp before the warp's barrier, a read is as good as one now
            mine = (before ^ order.who[lanes][:, None]) & _WARP == 0
            fresh &= ~mine | self.since(order.warp_synced, before, lanes)
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
        if self.multiplies:
            chunks = (rows * width // 8)[:, None] + np.arange(max(width // 8, 1))
            if self.reading[chunks].any():
                raise Fault("asynchronous copy", "overwrites what a matrix instruction reads before the wait for it")
            self._check(self.ended[chunks], lanes, "overwrites what is read there by")
        stamps = self.order.stamp(lanes) if not stamp else self.order.who[lanes] | stamp
        if flagged is not None:
            stamps = np.where(flagged, 0, stamps)
        written[rows] = stamps[:, None]

    def written_by_others(self, rows: Array, width: int, lanes: Lanes) -> Array:
        """Return where another warp than a lane's wrote last."""
        written = self.written.reshape(-1, width)[rows, 0]
        return np.asarray((written ^ self.order.who[lanes]) & _WARP != 0)

    def note_matrix_read(self, chunks: Array, lanes: Array) -> list[int]:
        """Note that matrix instructions read pieces of 16 bytes, [instructions, pieces], executed by [.., threads].

        Return a stamp of the reads of each instruction, which last until `end_matrix_reads`.

        Raises:
            Fault: a warp wrote there since the last barrier, or nothing ever did, or a copy is under way, or there is
                no fence between what wrote there and the instruction.
        """
        order, first = self.order, lanes[:, 0]
        prior = self.written.reshape(-1, 8)[chunks].reshape(len(lanes), -1)
        if (prior == 0).any():
            raise Fault("uninitialised shared memory", "a matrix instruction reads what was never written")
        if (prior >= IN_FLIGHT).any():
            raise Fault("asynchronous copy", "a matrix instruction reads a copy before the wait for it")
        recent = prior > order.synced[first][:, None]
        if recent.any():
            where = order.place(int(prior[recent].max()))
            raise Fault("race", f"a matrix instruction reads what was written since the last barrier, at {where}")
        unfenced = np.asarray((order.fenced[lanes] << _CLOCK <= order.synced[lanes]).any(1))
        if unfenced.any():
            program = first // order.threads * order.threads
            writer = program[:, None] + ((prior & _WARP) >> 6) * 32 + (prior & _LANE)
            if ((order.passed[writer] <= prior >> _CLOCK) & unfenced[:, None]).any():
                raise Fault("proxy fence", "a matrix instruction reads what was written without a fence.proxy.async")
        self.multiplies = True
        stamps: list[int] = (order.now * order.who.size + first).tolist()
        for stamp, pieces in zip(stamps, chunks, strict=True):
            np.add.at(self.reading, pieces, 1)
            self.flights.setdefault(stamp, []).append(pieces)
        return stamps

    def end_matrix_reads(self, stamp: int, ended: int) -> None:
        """Note that the reads of a stamp have ended, by the stamp of that end."""
        for chunks in self.flights.pop(stamp, []):
            np.subtract.at(self.reading, chunks, 1)
            self.ended[chunks] = ended

    def since(self, synced: Array, prior: Array, lanes: Lanes) -> Array:
        """Return which earlier accesses come after the lanes' last barriers, and after all commits they waited for."""
        recent = prior > synced[lanes][:, None]
        if recent.any():
            recent &= (prior & COMMITTED == 0) | (prior & ANYONE > self.order.waited[lanes][:, None])
        return np.asarray(recent)

    def _check(self, prior: Array, lanes: Lanes, what: str) -> None:
        """Raise a fault where an earlier access is not ordered before one of the lanes now."""
        order = self.order
        recent = self.since(order.warp_synced, prior, lanes)
        if not recent.any():
            return
        other = (prior ^ order.who[lanes][:, None]) | np.where(prior & COMMITTED, ANYONE, 0)
        bad = (recent & (other & _LANE != 0)) | (self.since(order.synced, prior, lanes) & (other & _WARP != 0))
        bad |= prior >= IN_FLIGHT
        if not bad.any():
            return
        first = int(prior[bad].max())
        if first >= IN_FLIGHT:
            raise Fault("asynchronous copy", f"{what} an asynchronous access before the wait for it")
        several = first & COMMITTED or first & _WARP == _WARP
        who = "several warps" if several else f"warp {(first & _WARP) >> 6}"
        raise Fault("race", f"{what} {who} since the last barrier, at {order.place(first)}")


class Programs(Ledger):
    """The ledger of memory that all programs share: who wrote and read each granule last, as a program's number + 1."""

    SEVERAL = -1

    def __init__(self, order: Order, granules: int) -> None:
        super().__init__(order, granules)
        self.writer, self.reader = np.zeros(granules, np.int32), np.zeros(granules, np.int32)

    def note_read(self, rows: Array, width: int, lanes: Lanes) -> Array:
        """Note a read as `Ledger` does; other programs must have released what they wrote there, and this acquired."""
        self._require_visible(self.written, self.writer, rows, width, lanes, "reads what was written there by")
        never = super().note_read(rows, width, lanes)
        reader, mine = self.reader.reshape(-1, width), self.order.program[lanes][:, None] + 1
        reader[rows] = np.where((reader[rows] == 0) | (reader[rows] == mine), mine, self.SEVERAL)
        several = np.asarray(reader[rows] != mine)
        if several.any():  # those of this instruction too
            reader[rows[several.any(1)]] = self.SEVERAL
        return never

    def note_write(self, rows: Array, width: int, lanes: Lanes, flagged: Array | None = None, stamp: int = 0) -> None:
        """Note a write as `Ledger` does; no other program may have written there, or read without an order."""
        before = self.writer.reshape(-1, width)[rows]
        mine = self.order.program[lanes][:, None] + 1
        self.writer.reshape(-1, width)[rows] = mine
        if ((before != mine) & (before != 0)).any() or (self.writer.reshape(-1, width)[rows] != mine).any():
            raise Fault("two writers", "another program wrote to the same address")
        self._require_visible(self.read, self.reader, rows, width, lanes, "overwrites what is read there by")
        super().note_write(rows, width, lanes, flagged, stamp)

    def note_atomic(self, rows: Array, width: int, lanes: Lanes) -> None:
        """Note lanes as the last writers of rows, by atomics: nothing need order these."""
        self.writer.reshape(-1, width)[rows] = self.order.program[lanes][:, None] + 1
        self.written.reshape(-1, width)[rows] = self.order.stamp(lanes)[:, None]

    def _require_visible(self, stamps: Array, owners: Array, rows: Array, width: int, lanes: Lanes, what: str) -> None:
        """Raise a fault where another program's access is not ordered before one of the lanes now."""
        owner, mine = owners.reshape(-1, width)[rows], self.order.program[lanes]
        i, j = np.nonzero((owner != 0) & (owner != mine[:, None] + 1))
        if not i.size:
            return
        prior = stamps.reshape(-1, width)[rows[i], j]
        for program, other in np.unique(np.stack([mine[i], owner[i, j] - 1], 1), axis=0).tolist():
            of_both = (mine[i] == program) & (owner[i, j] == other + 1)
            if other < 0 or (prior[of_both] > self.order.visible(program, other)).any():
                who = f"program {other}" if other >= 0 else "several programs"
                raise Fault("race", f"{what} {who}, without a release and an acquire between")


def _several(new: Array, before: Array, where: Array) -> Array:
    """Return stamps of `new`, several lanes' or several warps' where `before` is another's."""
    other = (new ^ before) & ANYONE
    merged = new | np.where(other & _WARP != 0, ANYONE, np.where(other != 0, _LANE, 0))
    return np.where(where, merged, new)
