"""One case on a device: peers are checked against the reference, and those that are right timed side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..planner import floors
from ..planner.floors import Peak, Sizes, Work
from ..speed.correctness import WrongError, at_the_far_end, complaint, errors_in, gated, named, worse
from ..speed.counts import launches
from ..speed.machine import plain
from ..speed.measure import peak_bytes, synchronize
from ..speed.peers import PEERS, Peer
from ..speed.prepared import Drawn, draw, preparation
from ..speed.timing import Times, interleaved
from ..speed.workloads import Case

Note = Callable[[dict[str, Any]], None]


class DeviceLostError(RuntimeError):
    """The device answers nothing more in this process."""


def work_of(peer: Peer, sizes: Sizes, direction: str) -> Work:
    if peer.full:
        sizes = Sizes(**(sizes.__dict__ | {"L": sizes.T}))
    forward, backward = floors.forward(sizes, peer.update), floors.backward(sizes, peer.update)
    return {"forward": forward, "backward": backward, "forward + backward": forward + backward}[direction]


def rounded(number: float) -> float:
    return float(f"{number:.5g}")


def as_record(times: Times, work: Work, peak: Peak | None) -> dict[str, Any]:
    """Times, what they come to per second, and their share of the floor: 1 is as fast as the GPU can be."""
    record = {
        "median_ms": rounded(times.median),
        "low_ms": rounded(times.low),
        "high_ms": rounded(times.high),
        "rounds": times.rounds,
        "operations": work.operations,
        "bytes": work.bytes,
        "tflops": rounded(work.operations / times.median / 1e9),
        "gbytes_per_s": rounded(work.bytes / times.median / 1e6),
    }
    if peak is not None:
        floor = floors.seconds(work, peak) * 1e3
        record |= {"floor_ms": rounded(floor), "floor_share": rounded(floor / times.median)}
    return record


def still_there(device: torch.device) -> None:
    """Raises DeviceLostError where a kernel's fault has taken the process's context with it."""
    try:
        synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(plain(error)) from error
    if device.type == "cuda":
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """A CPU's allocator raises a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def admit(
    peer: Peer, case: Case, drawn: list[Drawn], device: torch.device, excluded: str | None = None
) -> dict[str, Any]:
    """The gate before timing: status "right", or why the peer is not timed; with memory and launches."""
    reason = excluded or peer.refusal(device, case.H != case.G, case.directions)
    if reason is not None:
        return {"status": "skipped" if excluded is None else "failed", "reason": reason}
    record: dict[str, Any] = {}
    try:
        found = gated(peer, case, device, drawn[0], case.directions != ("forward",))
        for direction in case.directions:
            if direction != "backward" and not complaint(found):
                run = preparation(peer, case, drawn, direction)(0)
                peak, result = _peak(run, device)
                found = worse(found, at_the_far_end(peer, case, drawn[0], named(peer, case, result)))
                del result
                record[direction] = {"peak_bytes": peak}
                if case.counted:
                    record[direction]["launches"] = launches(run, device)
        wrong = complaint(found)
        record |= {"errors": errors_in(found), "status": "wrong" if wrong else "right"}
        record |= {"reason": wrong} if wrong else {}
    except WrongError as error:
        record |= {"status": "wrong", "reason": str(error)}
    # others assert
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        record |= {"status": "out of memory" if is_out_of_memory(error) else "failed", "reason": plain(error)}
    still_there(device)
    return record


def _peak(run: Callable[[], object], device: torch.device) -> tuple[int, object]:
    """And what it returned."""
    results: list[object] = []
    return peak_bytes(lambda: results.append(run()), device), results[0]


def measure_case(
    case: Case,
    device: torch.device,
    peak: Peak | None,
    note: Note,
    excluded: Mapping[str, str] | None = None,
    peers: Mapping[str, Peer] = PEERS,
) -> dict[str, Any]:
    """Times of every right peer in every direction. `note` is told which peer is at work, for whoever must end it."""
    try:
        drawn = draw(case, device)
    except torch.OutOfMemoryError:
        return case.as_json() | {"status": "out of memory", "peers": {}}
    found: dict[str, dict[str, Any]] = {}
    for name in case.peers:
        note({"at": name})
        found[name] = admit(peers[name], case, drawn, device, (excluded or {}).get(name))
    note({"at": None})
    record = case.as_json() | {"copies": len(drawn), "peers": found}
    for direction in case.directions:
        right = [name for name in case.peers if found[name]["status"] in ("right", "timed")]
        prepares = {name: preparation(peers[name], case, drawn, direction) for name in right}
        if not prepares:
            continue
        try:
            warm = device.type == "cuda"
            times = interleaved(
                prepares, device, copies=len(drawn), seconds=case.seconds, rounds=case.rounds, warm_up=warm
            )
        except torch.OutOfMemoryError:
            record.setdefault("out of memory", []).append(direction)
            continue
        for name, measured in times.items():
            work = work_of(peers[name], case.sizes(), direction)
            found[name]["status"] = "timed"
            found[name].setdefault(direction, {}).update(as_record(measured, work, peak))
    return record
