"""The gate before timing: nothing is timed that fails, or that disagrees with the float64 reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .correctness import WrongError, at_the_far_end, complaint, errors_in, gated, named, worse
from .counts import launches
from .decode_calls import Decoder
from .machine import plain
from .measure import peak_bytes, synchronize
from .peers import Peer
from .prepared import Drawn, preparation
from .workloads import BOTH, Case

NOTHING: Mapping[str, Any] = MappingProxyType({})


class DeviceLostError(RuntimeError):
    """The device answers nothing more in this process."""


class Admission(NamedTuple):
    """Say whether a peer may be timed.

    status: "right", or why not: "skipped", "failed", "wrong", "out of memory"; reason: in words.
    errors: Relative RMS errors, by output.
    measured: `peak_bytes`, and `launches` where they are counted, by direction.
    """

    status: str
    reason: str = ""
    errors: Mapping[str, float] = NOTHING
    measured: Mapping[str, Mapping[str, Any]] = NOTHING


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory did not suffice; a CPU's allocator raises a RuntimeError like any other."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def check_device(device: torch.device) -> None:
    """Check that the device still answers, and free what it has cached.

    Raises:
        DeviceLostError: A kernel's fault has taken the process's context with it.
    """
    try:
        synchronize(device)
    except RuntimeError as error:
        raise DeviceLostError(plain(error)) from error
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _admitting(measure: Callable[[], Admission], device: torch.device) -> Admission:
    """Return what `measure` returns, or what it fails with."""
    try:
        admission = measure()
    except WrongError as error:
        admission = Admission("wrong", str(error))
    # other people's code asserts
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        admission = Admission("out of memory" if is_out_of_memory(error) else "failed", plain(error))
    check_device(device)
    return admission


def admit(peer: Peer, case: Case, drawn: list[Drawn], device: torch.device) -> Admission:
    """Return whether a peer may be timed in the case's directions.

    Raises:
        DeviceLostError: The device did not outlive it.
    """
    refusal = peer.refusal(device, case.H != case.G, case.directions)
    if refusal is not None:
        return Admission("skipped", refusal)
    return _admitting(lambda: _admission_of(peer, case, drawn, device), device)


def _admission_of(peer: Peer, case: Case, drawn: list[Drawn], device: torch.device) -> Admission:
    deviations = gated(peer, case, device, drawn[0], case.directions != ("forward",))
    measured: dict[str, dict[str, Any]] = {}
    for direction in case.directions:
        # the backward alone is a part of both
        if direction == "backward" or complaint(deviations):
            continue
        run = preparation(peer, case, drawn, direction)(0)
        results: list[object] = []
        peak = peak_bytes(lambda run=run, results=results: results.append(run()), device)  # type: ignore[misc]
        deviations = worse(deviations, at_the_far_end(peer, case, drawn[0], named(peer, case, results.pop())))
        measured[direction] = {"peak_bytes": peak} | ({"launches": launches(run, device)} if case.counted else {})
    if "backward" in case.directions and BOTH in measured:
        measured["backward"] = {"peak_bytes": measured[BOTH]["peak_bytes"]}
    wrong = complaint(deviations)
    return Admission("wrong" if wrong else "right", wrong, errors_in(deviations), measured)


def admit_step(decoder: Decoder, device: torch.device, counted: bool = False) -> Admission:
    """Return whether a decoder may be timed; its errors are those of a step, and of a segment's fold into the memory.

    Args:
        counted: Count the launches of a step too.

    Raises:
        DeviceLostError: The device did not outlive it.
    """

    def measure() -> Admission:
        error = max(decoder.error(0, decoder.run(0)), decoder.fold_error())
        if wrong := decoder.complaint(error):
            return Admission("wrong", wrong, {"out": error})
        count = {"launches": launches(functools.partial(decoder.run, 0), device)} if counted else {}
        return Admission("right", "", {"out": error}, {"decode": count})

    with torch.no_grad():
        return _admitting(measure, device)
