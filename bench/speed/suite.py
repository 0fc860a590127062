"""What `pytest bench/` and `bench/on_device` both do with a case: the gate, the turns with a baseline, the rows.

The clock is a library, and pytest-benchmark's fixture is handed what it has taken: a machine with a GPU may have no
pytest, and a fixture that times one function at a time knows neither pairs nor a GPU's events. `bench/on_device` calls
the same functions in a process that may die, and writes the same JSON.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from ..planner import floors
from ..planner.floors import Peak, Sizes, Work
from .admission import Admission, is_out_of_memory
from .correctness import WrongError, at_the_far_end, complaint, named
from .decode_calls import Decoder, allowed_in_decoding
from .peers import BASELINE, PEERS, Peer
from .prepared import Drawn, preparation
from .rows import Row
from .timing import Prepare, take_turns
from .workloads import BOTH, Case, DecodeCase

# the turns of the baseline, the denominator of all ratios
BESIDE = "beside"


def by_turns(
    rows: Mapping[str, Row],
    prepares: Mapping[str, Prepare],
    baseline: Prepare,
    device: torch.device,
    *,
    wrong: Callable[[str, int, object], str] = lambda name, copy, result: "",
    alter: Callable[[str, int], object] = lambda name, copy: None,
    added: Mapping[str, float] | None = None,
    **clock: Any,
) -> list[Row]:
    """Return the rows with the times of `prepares`, which take turns with the baseline.

    Args:
        wrong: From a name, a copy of the inputs and the result of the last round to what is wrong with that result.
        alter: Changes a copy's inputs before a function's last round, so that a remembered result is seen.
        added: Milliseconds to add to every round, by name.
        clock: `copies`, `seconds`, `rounds` and `warm_up` of `take_turns`.
    """
    complaints: dict[str, str] = {}

    def look(name: str, copy: int, result: object) -> None:
        if name != BESIDE:
            complaints[name] = wrong(name, copy, result)

    try:
        times = take_turns({BESIDE: baseline, **prepares}, device, before_last=alter, after_last=look, **clock)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return [row.refused("out of memory") if name in prepares else row for name, row in rows.items()]
    timed = []
    for name, row in rows.items():
        if name not in prepares:
            timed.append(row)
        elif complaints[name]:
            timed.append(row.refused("wrong", f"in the last timed round: {complaints[name]}"))
        else:
            more = (added or {}).get(name, 0.0)
            timed.append(row.timed([x + more for x in times[name]], times[BESIDE]))
    return timed


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


def call_row(case: Case, direction: str, name: str) -> Row:
    """Return the row of a peer before anything is known of it."""
    return Row(f"{case.name} {case.dtype}, {direction}", name, BASELINE, direction, case.as_json())


def time_calls(
    case: Case,
    direction: str,
    admissions: Mapping[str, Admission],
    drawn: list[Drawn],
    device: torch.device,
    *,
    peak: Peak | None = None,
    peers: Mapping[str, Peer] = PEERS,
    **clock: Any,
) -> list[Row]:
    """Return a row for each peer in `admissions`: its times by turns with the baseline's, or why it has none.

    Args:
        peak: The device's, for shares of the floor.
        clock: `seconds`, `rounds` and `warm_up` of `take_turns`.
    """
    rows = {name: admitted_row(call_row(case, direction, name), x) for name, x in admissions.items()}
    right = [name for name, admission in admissions.items() if admission.status == "right"]
    if not right:
        return list(rows.values())

    def wrong(name: str, copy: int, result: object) -> str:
        peer = peers[name]
        try:
            return complaint(at_the_far_end(peer, case, drawn[copy], named(peer, case, result)))
        except WrongError as error:
            return str(error)

    timed = by_turns(
        rows,
        {name: preparation(peers[name], case, drawn, direction) for name in right},
        preparation(PEERS[BASELINE], case, drawn, direction),
        device,
        wrong=wrong,
        alter=lambda name, copy: drawn[copy].v.neg_(),
        copies=len(drawn),
        **clock,
    )
    works = {name: work_of(peers[name], case.sizes(), direction) for name in right}
    return [replace(x, facts={**x.facts, **floor_facts(works.get(x.provider), x, peak)}) for x in timed]


def admitted_row(row: Row, admission: Admission) -> Row:
    """Return the row with what the gate says of it."""
    facts = dict(admission.measured.get(row.direction, {}))
    memory = facts.pop("peak_bytes", row.memory)
    row = replace(row, errors=admission.errors, facts={**row.facts, **facts}, memory=memory)
    return row if admission.status == "right" else row.refused(admission.status, admission.reason)


def step_row(case: DecodeCase, name: str, baseline: str) -> Row:
    """Return the row of a decoder before anything is known of it."""
    return Row(f"{case.name} {case.dtype}", name, baseline, "decode", case.as_json())


def time_steps(
    case: DecodeCase,
    decoders: Mapping[str, Decoder],
    admissions: Mapping[str, Admission],
    baseline: tuple[str, Decoder],
    device: torch.device,
    *,
    peak: Peak | None = None,
    **clock: Any,
) -> list[Row]:
    """Return a row for each decoder in `admissions`, its part of writing a segment into the memory included.

    Args:
        decoders: At least those that are right.
        baseline: The decoder that all take turns with, and its name.
        peak, clock: As of `time_calls`.
    """
    rows = {name: admitted_row(step_row(case, name, baseline[0]), x) for name, x in admissions.items()}
    right = {name: decoders[name] for name, admission in admissions.items() if admission.status == "right"}
    if not right:
        return list(rows.values())

    def prepare(decoder: Decoder) -> Prepare:
        return lambda copy: functools.partial(decoder.run, copy % decoder.copies)

    def alter(name: str, copy: int) -> None:
        decoder = right.get(name, baseline[1])
        decoder.alter(copy % decoder.copies)

    def wrong(name: str, copy: int, result: object) -> str:
        error = right[name].error(copy % right[name].copies, result)
        allowed = allowed_in_decoding(name, case.dtype)
        return "" if error <= allowed else f"relative error of {error:.1e} (at most {allowed:.1e})"

    with torch.no_grad():
        folds = {name: decoder.fold_ms(case.L, device) for name, decoder in right.items()}
        rows |= {
            name: replace(rows[name], memory=x.kept_bytes, facts={**rows[name].facts, "fold_ms": folds[name]})
            for name, x in right.items()
        }
        timed = by_turns(
            rows,
            {name: prepare(decoder) for name, decoder in right.items()},
            prepare(baseline[1]),
            device,
            wrong=wrong,
            alter=alter,
            added=folds,
            copies=max(x.copies for x in (*right.values(), baseline[1])),
            **clock,
        )
    works = {name: decoder.work for name, decoder in right.items()}
    return [replace(x, facts={**x.facts, **floor_facts(works.get(x.provider), x, peak)}) for x in timed]
