"""What goes on beside the threads: copies into shared memory, fences between proxies, groups of matrix instructions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .faults import Fault
from .memory import Shared
from .races import Array, Lanes
from .registers import NEVER_WRITTEN, NOT_ARRIVED, Register, alter


class Copy(NamedTuple):
    """Data of lanes on their way to places in shared memory, in the group that each lane commits next."""

    lanes: Array
    group: Array
    at: Array
    data: Array


class Copies:
    """The copies of every lane under way. They land as late as they may: when their lane waits for them."""

    def __init__(self, shared: Shared, lanes: int) -> None:
        self.shared = shared
        self.committed = np.zeros(lanes, np.int64)
        self.pending: list[Copy] = []

    def commit(self, lanes: Lanes) -> None:
        """End the group that each lane's next copies would join."""
        self.committed[lanes] += 1

    def land(self, here: Array, later: int) -> None:
        """Land the copies of lanes but for those of each lane's latest groups."""
        left = []
        for copy in self.pending:
            now = here[copy.lanes] & (copy.group < self.committed[copy.lanes] - later)
            if now.any():
                self.shared.land(copy.at[now], copy.data[now], copy.lanes[now])
            if not now.all():
                left.append(Copy(*(field[~now] for field in copy)))
        self.pending = left


class Flight(NamedTuple):
    """A wgmma under way: its lanes, the group that each commits next, the registers that it writes.

    reads: by the first lane of each warpgroup, the stamp of what it reads in shared memory.
    """

    lanes: Array
    group: Array
    results: list[Register]
    reads: dict[int, int]


class Warpgroups:
    """The wgmma of every lane under way. Their results are not to be touched, nor their tiles, before the wait.

    The PTX ISA says so of A's registers too, but compilers write these anew before the wait, and leave it to ptxas.
    """

    def __init__(self, shared: Shared, lanes: int) -> None:
        self.shared = shared
        self.committed = np.zeros(lanes, np.int64)
        self.fenced = np.zeros(lanes, np.int64)  # by wgmma.fence, when
        self.flights: list[Flight] = []

    def require_fenced(self, registers: Sequence[Register], lanes: Array) -> None:
        """Raise a fault if accumulators were written since the last wgmma.fence."""
        for register in registers:
            if (register.changed[lanes] > self.fenced[lanes]).any():
                raise Fault("register fence", "an accumulator was written since the last wgmma.fence")

    def start(self, lanes: Array, results: list[Register], reads: dict[int, int]) -> None:
        """Note a wgmma of lanes."""
        self.flights.append(Flight(lanes, self.committed.copy(), results, reads))
        self._mark(self.flights[-1])

    def finish(self, here: Array, later: int) -> None:
        """End the wgmma of lanes but for those of each lane's latest groups."""
        left, ended = [], []
        for flight in self.flights:
            now = flight.lanes & here & (flight.group < self.committed - later)
            if now.any():
                ended.append(flight)
                for leader in [leader for leader in flight.reads if now[leader]]:
                    self.shared.ledger.end_matrix_reads(flight.reads[leader], self.shared.ledger.order.end())
            if (rest := flight.lanes & ~now).any():
                left.append(flight._replace(lanes=rest))
        self.flights = left
        for registers in {id(f.results): f.results for f in ended}.values():
            alter(registers, lambda flags: np.where(here, flags & NEVER_WRITTEN, flags))
        for flight in left:
            self._mark(flight)

    def _mark(self, flight: Flight) -> None:
        alter(flight.results, lambda flags: flags | flight.lanes * NOT_ARRIVED)


class Product:
    """A tcgen05.mma under way: the stamp of its reads of shared memory, and where it writes tensor memory.

    commit: the first that tracks it, 0: none has yet.
    """

    def __init__(self, reads: int, places: Array) -> None:
        self.reads, self.places, self.commit, self.done = reads, places, 0, False


class Mbarrier:
    """A barrier in shared memory at which matrix instructions arrive: each phase ends after `count` arrivals.

    phase: how many have ended, and commit: the last that arrived in one of those. arriving: the products of the phase
    under way; arrived: of earlier ones, until a thread waits for them.
    """

    def __init__(self, count: int) -> None:
        self.count, self.left, self.phase, self.commit = count, count, 0, 0
        self.arriving: list[Product] = []
        self.arrived: list[Product] = []

    def arrive(self, commit: int, products: Sequence[Product]) -> None:
        """Arrive once, by a commit that tracks products."""
        for product in products:
            product.commit = product.commit or commit
        self.arriving += products
        self.left -= 1
        if self.left == 0:
            self.left, self.phase, self.commit = self.count, self.phase + 1, commit
            self.arrived, self.arriving = self.arrived + self.arriving, []
