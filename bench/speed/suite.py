"""What `pytest bench/` and `bench/on_device` both do with a case: the gate, the turns with a baseline, the rows.

The clock is a library, and pytest-benchmark's fixture is handed what it has taken: a machine with a GPU may have no
pytest, and a fixture that times one function at a time knows neither pairs nor a GPU's events. `bench/on_device` calls
the same functions in a process that may die, and writes the same JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from ..planner import floors
from ..planner.floors import Peak, Sizes, Work
from .admission import Admission, is_out_of_memory
from .correctness import WrongError, at_the_far_end, complaint, named
from .decode_calls import Decoder
from .peers import BASELINE, PEERS, Peer
from .prepared import Drawn, preparation
from .rows import Row
from .timing import Prepare, take_turns
from .workloads import BOTH, Case, DecodeCase

# the turns of the baseline, the denominator of all ratios
BESIDE = "beside"


class TimedPeer(NamedTuple):
    """A peer that takes turns with a baseline, on the inputs of one case.

    row: its row, without times yet.
    prepare: makes the call that is timed, from the number of the copy of the inputs.
    alter: changes a copy's inputs before the last round, so that a remembered result is seen.
    wrong: from a copy and the last round's result to what is wrong with the result; empty where it is right.
    work: what a run must spend, for its share of the floor; None: unknown.
    added: milliseconds to add to every round.
    """

    row: Row
    prepare: Prepare
    alter: Callable[[int], object] = lambda copy: None
    wrong: Callable[[int, object], str] = lambda copy, result: ""
    work: Work | None = None
    added: float = 0.0


def by_turns(
    peers: Sequence[TimedPeer], baseline: Prepare, device: torch.device, *, peak: Peak | None = None, **clock: Any
) -> list[Row]:
    """Return the peers' rows with their times, by turns with the baseline's, or why they have none.

    Args:
        peak: The device's, for shares of the floor.
        clock: `copies`, `seconds`, `rounds` and `warm_up` of `take_turns`.
    """
    known = {x.row.peer: x for x in peers}
    complaints: dict[str, str] = {}

    def alter(name: str, copy: int) -> None:
        if name in known:
            known[name].alter(copy)

    def look(name: str, copy: int, result: object) -> None:
        if name in known:
            complaints[name] = known[name].wrong(copy, result)

    prepares = {BESIDE: baseline} | {name: x.prepare for name, x in known.items()}
    try:
        times = take_turns(prepares, device, before_last=alter, after_last=look, **clock)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return [x.row.refused("out of memory") for x in peers]
    rows = []
    for name, timed_peer in known.items():
        if complaints[name]:
            rows.append(timed_peer.row.refused("wrong", f"in the last timed round: {complaints[name]}"))
            continue
        row = timed_peer.row.timed([x + timed_peer.added for x in times[name]], times[BESIDE])
        rows.append(replace(row, facts={**row.facts, **floor_facts(timed_peer.work, row, peak)}))
    return rows


def floor_facts(work: Work | None, row: Row, peak: Peak | None) -> dict[str, Any]:
    """Return what a row's time comes to per second, and its share of the floor: 1 is as fast as the GPU can be."""
    if work is None or row.ms is None:
        return {}
    ms = row.ms.median
    facts = {
        "operations": work.operations,
        "bytes": work.bytes,
        "tflops": _rounded(work.operations / ms / 1e9),
        "gbytes_per_s": _rounded(work.bytes / ms / 1e6),
    }
    if peak is not None:
        floor = floors.seconds(work, peak) * 1e3
        facts |= {"floor_ms": _rounded(floor), "floor_share": _rounded(floor / ms)}
    return facts


def _rounded(number: float) -> float:
    return float(f"{number:.5g}")


def work_of(peer: Peer, sizes: Sizes, direction: str) -> Work | None:
    """Return what a peer must spend; None where it computes something else."""
    if peer.definition is not None:
        return None
    sizes = replace(sizes, L=sizes.T) if peer.full else sizes
    forward, backward = floors.forward(sizes, peer.update), floors.backward(sizes, peer.update)
    return {"forward": forward, "backward": backward, BOTH: forward + backward}[direction]


def admitted_row(row: Row, admission: Admission) -> Row:
    """Return the row with what the gate says of it; refused, where the gate does not say that it is right."""
    facts = dict(admission.measured.get(row.direction, {}))
    memory = facts.pop("peak_bytes", row.memory)
    row = replace(row, errors=admission.errors, facts={**row.facts, **facts}, memory=memory)
    return row if admission.status == "right" else row.refused(admission.status, admission.reason)


def baseline_of(admissions: Mapping[str, Admission], usual: str) -> str:
    """Return the usual baseline; where the gate refuses it, the first peer that the gate does not refuse."""
    right = [name for name, admission in admissions.items() if admission.status == "right"]
    return right[0] if right and usual in admissions and usual not in right else usual


def call_row(case: Case, direction: str, name: str, baseline: str = BASELINE) -> Row:
    """Return the row of a peer before anything is known of it."""
    return Row(f"{case.name} {case.dtype}, {direction}", name, baseline, direction, case.as_json())


def time_calls(
    case: Case,
    direction: str,
    admissions: Mapping[str, Admission],
    drawn: list[Drawn],
    device: torch.device,
    **clock: Any,
) -> list[Row]:
    """Return a row for each peer in `admissions`: its times by turns with the baseline's, or why it has none.

    Args:
        clock: `peak`, and all but the copies of what `by_turns` takes.
    """

    def timed_peer(row: Row) -> TimedPeer:
        peer = PEERS[row.peer]

        def wrong(copy: int, result: object) -> str:
            try:
                return complaint(at_the_far_end(peer, case, drawn[copy], named(peer, case, result)))
            except WrongError as error:
                return str(error)

        prepare, work = preparation(peer, case, drawn, direction), work_of(peer, case.sizes(), direction)
        return TimedPeer(row, prepare, lambda copy: drawn[copy].v.neg_(), wrong, work)

    baseline = baseline_of(admissions, BASELINE)
    rows = [admitted_row(call_row(case, direction, name, baseline), x) for name, x in admissions.items()]
    beside = preparation(PEERS[baseline], case, drawn, direction)
    return _with_times(rows, timed_peer, beside, device, copies=len(drawn), **clock)


def step_row(case: DecodeCase, name: str, baseline: str) -> Row:
    """Return the row of a decoder before anything is known of it."""
    return Row(f"{case.name} {case.dtype}", name, baseline, "decode", case.as_json())


@torch.no_grad()
def time_steps(
    case: DecodeCase,
    decoders: Mapping[str, Decoder],
    admissions: Mapping[str, Admission],
    baseline: str,
    device: torch.device,
    **clock: Any,
) -> list[Row]:
    """Return a row for each decoder in `admissions`, its part of writing a segment into the memory included.

    Args:
        decoders: The usual baseline, and at least those that are right.
        clock: As of `time_calls`.
    """

    def prepare(decoder: Decoder) -> Prepare:
        return lambda copy: functools.partial(decoder.run, copy % decoder.copies)

    def timed_peer(row: Row) -> TimedPeer:
        decoder = decoders[row.peer]

        def wrong(copy: int, result: object) -> str:
            return decoder.complaint(decoder.error(copy % decoder.copies, result))

        fold = decoder.fold_ms(case.L, device)
        row = replace(row, memory=decoder.kept_bytes, facts={**row.facts, "fold_ms": fold})
        alter = lambda copy: decoder.alter(copy % decoder.copies)  # noqa: E731
        return TimedPeer(row, prepare(decoder), alter, wrong, decoder.work, fold)

    baseline = baseline_of(admissions, baseline)
    rows = [admitted_row(step_row(case, name, baseline), x) for name, x in admissions.items()]
    copies = max(x.copies for x in decoders.values())
    return _with_times(rows, timed_peer, prepare(decoders[baseline]), device, copies=copies, **clock)


def _with_times(
    rows: Sequence[Row], timed_peer: Callable[[Row], TimedPeer], baseline: Prepare, device: torch.device, **clock: Any
) -> list[Row]:
    """Return the rows, those that are not refused with their times."""
    refused = [row for row in rows if row.status != "timed"]
    peers = [timed_peer(row) for row in rows if row.status == "timed"]
    return refused + (by_turns(peers, baseline, device, **clock) if peers else [])
