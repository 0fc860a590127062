"""One case of the run on a device, as rows of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..planner.floors import Peak
from ..speed.admission import NOTHING, Admission, admit, admit_step, check_device
from ..speed.attention_calls import backend_here
from ..speed.decode_calls import DECODERS, Decoder, in_graphs, names_of
from ..speed.machine import plain
from ..speed.peers import PEERS
from ..speed.prepared import draw
from ..speed.rows import Row, as_json, marked
from ..speed.suite import call_row, time_calls, time_steps
from ..speed.workloads import Case, DecodeCase

# gets {"at": NAME} before a peer runs, so that whoever ends the process is known, and {"at": None} last
Note = Callable[[dict[str, Any]], None]
Rows = dict[str, list[dict[str, Any]]]

NO_KERNELS = "the kernels need a GPU, or TRITON_INTERPRET=1 before Python starts"
NO_GRAPHS = Admission("skipped", "no GPU")


def measure_case(
    case: Case,
    device: torch.device,
    peak: Peak | None,
    note: Note,
    excluded: Mapping[str, str] = NOTHING,
) -> Rows:
    """Return the rows of every peer in every direction.

    Args:
        excluded: Why a peer must not be tried, by name.
    """
    try:
        drawn = draw(case, device)
    except torch.OutOfMemoryError:
        rows = [call_row(case, direction, name) for direction in case.directions for name in case.peers]
        return as_json(row.refused("out of memory") for row in rows)
    admissions = {}
    for name in case.peers:
        note({"at": name})
        if name in excluded:
            admissions[name] = Admission("failed", excluded[name])
        else:
            admissions[name] = admit(PEERS[name], case, drawn, device)
    note({"at": None})
    timed: list[Row] = []
    for direction in case.directions:
        timed += time_calls(
            case,
            direction,
            admissions,
            drawn,
            device,
            peak=peak,
            seconds=case.seconds,
            rounds=case.rounds,
            # the gate has run them
            warm_up=device.type == "cuda",
        )
    return as_json(marked(timed))


def measure_decode(
    case: DecodeCase, device: torch.device, peak: Peak | None, note: Note, excluded: Mapping[str, str] = NOTHING
) -> Rows:
    """Return the rows of one step by each decoder, as it is called and replayed from CUDA graphs."""
    names = names_of(case)
    decoders = {name: DECODERS[name](case, device) for name in names}
    admissions: dict[str, Admission] = {}
    for name in names:
        note({"at": name})
        if name.startswith("segattn") and backend_here(device) != "triton":
            admissions[name] = Admission("skipped", NO_KERNELS)
        elif name in excluded:
            admissions[name] = Admission("failed", excluded[name])
        else:
            admissions[name] = admit_step(decoders[name], device, counted=True)
        if admissions[name].status == "right":
            graph, admissions[f"{name} graph"] = _graphs(decoders[name], device, admissions[name])
            decoders |= {f"{name} graph": graph} if graph else {}
    note({"at": None})
    clock: dict[str, Any] = {"rounds": (3, 100) if device.type == "cuda" else (1, 1), "seconds": 1.0}
    rows = time_steps(case, decoders, admissions, names[0], device, peak=peak, **clock)
    return as_json(marked(rows))


@torch.no_grad()
def _graphs(decoder: Decoder, device: torch.device, admission: Admission) -> tuple[Decoder | None, Admission]:
    if device.type != "cuda":
        return None, NO_GRAPHS
    try:
        return in_graphs(decoder, device), admission
    except RuntimeError as error:
        check_device(device)
        return None, Admission("failed", plain(error))
