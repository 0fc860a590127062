"""mbarriers, at which matrix instructions of tcgen05 arrive: begun, invalidated, waited for."""

from __future__ import annotations

from typing import Any

import numpy as np

from .asynchronous import Mbarrier
from .faults import Fault, Unsupported
from .machine import Machine, Step
from .ptx import Instruction, number
from .races import Array
from .registers import Mask


def mbarriers_at(machine: Machine, addresses: Array, lanes: Array) -> tuple[list[Mbarrier], Array]:
    """Return the mbarriers at addresses, each once, and which of them is each lane's. The lanes read them.

    Raises:
        Fault: there is none.
    """
    at = machine.shared.places(addresses, 8, machine.program_of[lanes])
    machine.shared.load(at, 8, lanes)
    places, which = np.unique(at, return_inverse=True)
    if not set(places.tolist()) <= set(machine.mbarriers):
        raise Fault("mbarrier", "there is none at this address")
    return [machine.mbarriers[place] for place in places.tolist()], which


def mbarrier(machine: Machine, instruction: Instruction) -> Step:
    """Bind mbarrier.init, .inval and .try_wait.parity, for the arrivals of tcgen05.commit."""
    name, operands = instruction.words[1], instruction.operands
    if name == "try_wait" and instruction.words[2] == "parity":
        return _try_wait(machine, instruction)
    if name not in ("init", "inval"):
        raise Unsupported(instruction.opcode)
    address = machine.address(operands[0], 4)

    def run(mask: Mask) -> None:
        lanes = np.flatnonzero(machine.full(mask))
        at = machine.shared.places(address(mask), 8, machine.program_of[lanes])
        if name == "inval":
            mbarriers_at(machine, address(mask), lanes)
            for place in at.tolist():
                machine.mbarriers.pop(place, None)
        machine.shared.store(at, np.zeros((lanes.size, 8), np.uint8), lanes)
        if name == "init":
            machine.mbarriers |= {place: Mbarrier(number(operands[1])) for place in at.tolist()}

    return run


def _try_wait(machine: Machine, instruction: Instruction) -> Step:
    """Bind a wait for the end of a phase of some parity: it says "not yet" once, as it may, then lanes sleep in it."""
    done, parity = machine.register(instruction.operands[0]), machine.source(instruction.operands[2], "u32")
    address = machine.address(instruction.operands[1], 4)
    again = np.zeros(machine.count, np.bool_)

    def run(mask: Mask) -> Mask:
        lanes = np.flatnonzero(machine.full(mask))
        barriers, which = mbarriers_at(machine, address(mask), lanes)
        ended = np.array([barrier.phase & 1 for barrier in barriers])[which] != machine.each(parity, lanes)
        ended &= again[lanes]
        for i in np.unique(which[ended]).tolist():
            _end(machine, barriers[i])
        machine.order.wait(lanes[ended], np.array([barrier.commit for barrier in barriers])[which[ended]])
        done.write(again, mask, None)
        waiting = np.zeros(machine.count, np.bool_)
        waiting[lanes] = again[lanes] & ~ended
        again[lanes] = ~ended
        if not waiting.any():
            return None
        machine.wait("mbarrier", machine.at, waiting)
        return waiting

    return run


def _end(machine: Machine, barrier: Mbarrier) -> None:
    """End the matrix instructions that arrived at an mbarrier."""
    if not barrier.arrived:
        return
    memory: Any = machine.tensor
    for product in barrier.arrived:
        if not product.done:
            product.done, end = True, machine.order.end(product.commit)
            machine.shared.ledger.end_matrix_reads(product.reads, end)
            memory.end(product, end)
    barrier.arrived = []
    memory.products = {lane: [p for p in products if not p.done] for lane, products in memory.products.items()}
