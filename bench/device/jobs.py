"""The part of the run on a device that computes: a process that reads jobs, one JSON a line, and answers with records.

A fault of the device ends it, and nothing else: `run` starts another and goes on.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import product
from typing import Any, TextIO

import torch

from ...kernels.check.calls import Call, evaluate, tensors
from ...kernels.check.check import default_device, run_check
from ...kernels.check.table import calls_of
from ..speed import workloads
from ..speed.admission import DeviceLostError, admit, check_device
from ..speed.counts import profile_of, recorded
from ..speed.machine import peak_here, plain
from ..speed.peers import PEERS
from ..speed.prepared import draw, preparation
from ..speed.timing import Prepare, Times, take_turns
from ..speed.workloads import DTYPES, Case, DecodeCase
from .cases import Note, measure_case, measure_decode

LOST = 3
TINY_CALL = "shared memory inputs"


def ceilings(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Return what this device reaches: bytes per second of a copy, read and write, and operations of a product."""
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    side, count = (8192, 1 << 28) if on_gpu else (256, 1 << 20)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.zeros(count, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    runs: dict[str, Prepare] = {"copy": lambda i: lambda: target.copy_(source), "product": lambda i: lambda: a @ b}
    times = take_turns(runs, device, seconds=1.0, rounds=(5, 20))
    copy, product = (Times.of(times[name]).median for name in ("copy", "product"))
    return {
        "copy_bytes_per_s": 2 * source.nbytes / copy * 1e3,
        "product_operations_per_s": 2 * side**3 / product * 1e3,
    }


def check(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Run a share of `segattn check` in one dtype; of a tiny run, one call."""
    table = calls_of("small" if job["tiny"] else "full")
    names = [TINY_CALL] if job["tiny"] else list(table)[job["share"] :: job["shares"]]
    calls = {name: table[name] for name in names}
    found = run_check(device, backends=["triton"], dtypes=[job["dtype"]], calls=calls).as_json()
    return {name: job[name] for name in ("dtype", "number", "share")} | {
        name: found[name] for name in ("size", "calls", "compared", "passed", "failures", "worst", "errors")
    }


def tiles(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Check every kernel under the table's tiles for one dtype and width, by both rules."""
    from ...kernels.triton.launch import trying

    width, dtype = job["width"], job["dtype"]
    heads, time, segment_len = (2, 20, 16) if job["tiny"] else (4, 1111, 256)
    sizes = {"H": heads, "G": heads // 2, "Tq": time, "Tk": time, "K": width, "V": width, "segment_len": segment_len}
    base = Call(B=1, remembered=3 * segment_len, **sizes)
    calls = {
        f"{update}{', own inputs' if own else ''}": replace(base, update=update, own_memory_inputs=own)
        for update, own in product(("delta", "linear"), (False,) if job["tiny"] else (False, True))
    }
    forced: dict[str, Any] = {}
    for call in calls.values():
        made = tensors(call, DTYPES[dtype], device)
        listed = recorded(functools.partial(evaluate, call, made, "triton"), device)
        forced |= {launch.kernel.__name__: launch.tile for launch in listed}
    with torch.autograd.set_multithreading_enabled(False), trying(forced):
        found = run_check(device, backends=["triton"], dtypes=[dtype], calls=calls).as_json()
    return {"dtype": dtype, "width": width, "tiles": {name: asdict(tile) for name, tile in forced.items()}} | {
        name: found[name] for name in ("passed", "failures", "errors")
    }


def bits(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Return the bits of a call's outputs, for `ci/emulate --against`."""
    from ...kernels.triton.launch import target_of
    from ..emulated.bits import record

    return record(job["name"], target_of(device).name, device)


def case_of(name: str) -> Case:
    """Return the case of that name."""
    return next(x for x in (*workloads.CASES, *workloads.TINY_CASES) if x.name == name)


def decode_of(name: str) -> DecodeCase:
    """Return the decoding case of that name."""
    return next(x for x in (*workloads.DECODES, *workloads.TINY_DECODES) if x.name == name)


def warm(job: dict[str, Any], device: torch.device, note: Note) -> None:
    """Fill the compilers' caches on disk with what the timings of a case will need."""
    case = case_of(job["name"])
    drawn = draw(case, device, copies=1)
    for name in case.peers:
        note({"at": name})
        if name not in job["excluded"]:
            admit(PEERS[name], case, drawn, device)


def time_case(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Return the rows of a case."""
    return measure_case(case_of(job["name"]), device, peak_here(device), note, job["excluded"])


def decode(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Return the rows of a decoding case."""
    return measure_decode(decode_of(job["name"]), device, peak_here(device), note, job["excluded"])


def profile(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Return the kernels of one peer's forward and backward, with their times."""
    case, peer = case_of(job["name"]), PEERS[job["peer"]]
    run = preparation(peer, case, draw(case, device, copies=1), job["direction"])(0)
    found = profile_of(run, device, peer.ours)
    return {"case": case.name, "peer": job["peer"], "direction": job["direction"]} | found


def tune(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Return one step of the search for tiles."""
    from .tune import answer

    return answer(job, device)


JOBS: dict[str, Callable[[dict[str, Any], torch.device, Note], dict[str, Any] | None]] = {
    "ceilings": ceilings,
    "check": check,
    "tiles": tiles,
    "bits": bits,
    "warm": warm,
    "timings": time_case,
    "decode": decode,
    "profile": profile,
    "tune": tune,
}


def answer_to(job: dict[str, Any], device: torch.device, note: Note) -> dict[str, Any]:
    """Return the job's record or error; "lost" where this process can do no more."""
    try:
        answer: dict[str, Any] = {"record": JOBS[job["part"]](job, device, note)}
    except torch.OutOfMemoryError:
        answer = {"error": "out of memory"}
    except (RuntimeError, ValueError, TypeError, ImportError) as error:
        answer = {"error": plain(error)}
    try:
        check_device(device)
    except DeviceLostError:
        answer["lost"] = True
    return answer


def serve(requests: TextIO, answers: TextIO) -> None:
    """Answer each job with lines of notes, and a last line: its record, or its error."""

    def note(line: dict[str, Any]) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    device = default_device()
    for line in requests:
        answer = answer_to(json.loads(line), device, note)
        note(answer)
        if answer.get("lost"):
            # the context is gone, and tearing it down may hang
            os._exit(LOST)


if __name__ == "__main__":
    # compilers print, and must not do so between the answers
    own = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(sys.stdin, own)
