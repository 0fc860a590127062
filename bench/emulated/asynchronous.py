"""What goes on beside the threads: copies into shared memory, fences between proxies, groups of matrix instructions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from .memory import Shared
from .races import Array
from .registers import IN_USE, NEVER_WRITTEN, NOT_ARRIVED, Register


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
    """A wgmma under way: its lanes, the group that each commits next, the registers it writes and those it reads."""

    lanes: Array
    group: Array
    results: list[Register]
    inputs: list[Register]
    stamp: int


class Warpgroups:
    """The wgmma of every lane under way. Their registers are not to be touched, nor their tiles, before the wait."""

    def __init__(self, shared: Shared, lanes: int) -> None:
        self.shared = shared
        self.committed = np.zeros(lanes, np.int64)
        self.flights: list[Flight] = []

    def start(self, lanes: Array, results: list[Register], inputs: list[Register], stamp: int) -> None:
        """Note a wgmma of lanes."""
        self.flights.append(Flight(lanes, self.committed.copy(), results, inputs, stamp))
        self._mark(self.flights[-1])

    def finish(self, here: Array, later: int) -> None:
        """End the wgmma of lanes but for those of each lane's latest groups."""
        left, ended = [], []
        for flight in self.flights:
            now = flight.lanes & here & (flight.group < self.committed - later)
            if now.any():
                ended.append(flight)
                self.shared.ledger.end_matrix_reads(flight.stamp)
            if (rest := flight.lanes & ~now).any():
                left.append(flight._replace(lanes=rest))
        self.flights = left
        for registers in {id(f.results): f.results + f.inputs for f in ended}.values():
            _alter(registers, lambda flags: flags & NEVER_WRITTEN)
        for flight in left:
            self._mark(flight)

    def _mark(self, flight: Flight) -> None:
        _alter(flight.results, lambda flags: flags | flight.lanes * NOT_ARRIVED)
        _alter(flight.inputs, lambda flags: flags | flight.lanes * IN_USE)


def _alter(registers: Sequence[Register], change: Callable[[Array], Array]) -> None:
    """Change the flags of registers, which often share them."""
    changed: dict[int, Array | None] = {}
    kept = [r.flags for r in registers]  # so that no id is used again
    for register, flags in zip(registers, kept, strict=True):
        if id(flags) not in changed:
            new = change(np.zeros(1, np.uint8) if flags is None else flags)
            changed[id(flags)] = new if new.any() else None
        register.flags = changed[id(flags)]
