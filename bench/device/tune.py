"""`python -m segattn.bench.device.tune --kernel attend_kernel --K 128`: propose rows for the table of tiles.

Every candidate runs a whole forward and backward with one kernel's tile replaced, in a worker, which may die of it. The
results must agree with those of the table's tile; then the time of that kernel alone counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache
from itertools import product
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from ...kernels.check.calls import Call, evaluate, tensors
from ...kernels.check.gates import GATES, relative_error
from ...kernels.triton.configs import Tile, tile_for
from ..speed.counts import kernel_times, recorded
from ..speed.machine import ROOT
from ..speed.timing import time_once
from ..speed.workloads import DTYPES
from .worker import Worker

SIDES = (16, 32, 64, 128)
CHUNKS = (16, 32, 64, 128, 256)
WARPS, STAGES = (4, 8), (1, 2, 3, 4)
TINY = {"SIDES": (16, 32), "WARPS": (4,), "STAGES": (1,)}
# how many tiles of the first round go on into the second
FINALISTS = 3
REPEATS = 7
# after which a worker is given up: describing compiles every kernel of the call, a tile one
DESCRIBING_SECONDS, TILE_SECONDS = 120, 60
# of float32 accumulators [side, width]: 128 numbers for each of eight warps' 256 threads, which have 255 registers
MOST_ACCUMULATED = 128 * 256
# below 16 numbers a thread, eight warps have too little to do; four remain a candidate
LEAST_OF_EIGHT_WARPS = 64 * 64

Values = dict[str, Any]


def call_of(job: Values) -> Call:
    """Return the call that a job is about."""
    sizes = {name: job[name] for name in ("H", "G", "K", "V", "update", "gated")}
    time = {"Tq": job["T"], "Tk": job["T"], "segment_len": job["L"], "remembered": job["L"]}
    return Call(B=1, own_memory_inputs=False, **sizes, **time)


@cache
def _inputs(call: Call, dtype: str, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    made = tensors(call, DTYPES[dtype], device)
    return made, evaluate(call, made, "triton")


def attempt(job: Values, device: torch.device) -> Values:
    """Return the kernel's milliseconds in one forward and backward under the job's tile, and the worst error.

    Without a tile the table's is used. On a CPU the time is that of the whole call.
    """
    from ...kernels.triton.launch import trying

    call = call_of(job)
    made, expected = _inputs(call, job["dtype"], device)
    tiles = {} if job["tile"] is None else {job["kernel"]: Tile(**job["tile"])}
    # a GPU's backward would run in another thread, which does not see what is tried in this one
    with torch.autograd.set_multithreading_enabled(False), trying(tiles):
        found = evaluate(call, made, "triton")
        shares = {
            name: relative_error(found[name], x) / GATES[job["dtype"]].of(name, call)
            for name, x in expected.items()
            if bool(x.any())
        }
        if device.type == "cuda":
            times = [_kernel_ms(job["kernel"], call, made, device) for _ in range(REPEATS)]
        else:
            times = [time_once(lambda _: lambda: evaluate(call, made, "triton"), 0, device)[0]]
    worst = max(shares.values())
    # both results may be a gate away from the truth
    return {"ms": statistics.median(times), "error_share": worst, "right": bool(worst <= 2.0)}


def _kernel_ms(kernel: str, call: Call, made: dict[str, Tensor], device: torch.device) -> float:
    listed = kernel_times(lambda: evaluate(call, made, "triton"), device)
    return sum(float(x["ms"]) for x in listed if x["name"] == kernel)


def describe(job: Values, device: torch.device) -> Values:
    """Return the kernel's tile in the table, the fields that it takes, and the names of all kernels of the call."""
    from ...kernels.triton.launch import constants, target_of

    call, target = call_of(job), target_of(device)
    made = tensors(call, DTYPES[job["dtype"]], device)
    listed = recorded(lambda: evaluate(call, made, "triton"), device)
    names = sorted({launch.kernel.__name__ for launch in listed})
    found = next((x for x in listed if x.kernel.__name__ == job["kernel"]), None)
    if found is None:
        return {"kernels": names, "taken": None}
    tile = tile_for(job["kernel"], target, DTYPES[job["dtype"]], job["K"], job["V"])
    taken = [*constants(found.kernel, tile), "num_warps", "num_stages"]
    return {"kernels": names, "target": target.name, "taken": taken, "tile": tile.__dict__}


def answer(job: Values, device: torch.device) -> Values:
    """Return a worker's answer to a job: a description, or an attempt with one tile."""
    return describe(job, device) if job["describe"] else attempt(job, device)


def sensible(tile: Values, width: int) -> bool:
    """Return whether a tile has work for its warps, chunks within the width, and accumulators within the registers."""
    sides = [tile[name] for name in ("BLOCK_M", "BLOCK_N", "ROWS", "COLUMNS") if name in tile]
    accumulated = max(sides) * width
    return (
        tile.get("CHUNK", 16) <= max(16, width)
        and accumulated <= MOST_ACCUMULATED
        and (tile["num_warps"] == 4 or accumulated >= LEAST_OF_EIGHT_WARPS)
    )


def first_round(taken: Sequence[str], tile: Values, width: int, tiny: bool = False) -> Iterator[Values]:
    """Return tiles of every block size and number of warps, the rest as in `tile`."""
    sides, warps = (TINY["SIDES"], TINY["WARPS"]) if tiny else (SIDES, WARPS)
    varied = [name for name in ("BLOCK_M", "BLOCK_N", "ROWS", "COLUMNS") if name in taken]
    for *values, count in product(*(sides for _ in varied), warps):
        found = tile | dict(zip(varied, values, strict=True)) | {"num_warps": count}
        if sensible({name: found[name] for name in taken}, width):
            yield found


def second_round(taken: Sequence[str], best: Iterable[Values], width: int, tiny: bool = False) -> Iterator[Values]:
    """Return the best tiles with every number of stages and every chunk."""
    stages = TINY["STAGES"] if tiny else STAGES
    chunks = [x for x in CHUNKS if x <= width] if "CHUNK" in taken and not tiny else [None]
    for tile in best:
        for count, chunk in product(stages, chunks):
            yield tile | {"num_stages": count} | ({} if chunk is None else {"CHUNK": chunk})


def as_row(job: Values, target: str, taken: Sequence[str], tile: Values, note: str) -> str:
    """Return one row of the table, as Python source."""
    shown = [f.name for f in fields(Tile) if f.name in taken]
    inside = ", ".join(f"{name}={tile[name]!r}" for name in shown)
    bits = 8 * DTYPES[job["dtype"]].itemsize
    return f'("{job["kernel"]}", "{target}", {bits}, {max(job["K"], job["V"])}): Tile({inside}),  # {note}'


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(prog="python -m segattn.bench.device.tune", description=__doc__)
    parser.add_argument("--kernel", required=True, help="its name, such as attend_kernel")
    parser.add_argument("--K", type=int, default=128)
    parser.add_argument("--V", type=int, help="default: K")
    parser.add_argument("--L", type=int, default=2048)
    parser.add_argument("--T", type=int, default=16384)
    parser.add_argument("--H", type=int, default=16)
    parser.add_argument("--G", type=int, help="default: H")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16")
    parser.add_argument("--update", choices=("delta", "linear"), default="delta")
    parser.add_argument("--local", action="store_true", help="without a memory")
    parser.add_argument("--rows", type=int, default=5, help="how many of the best to print; default 5")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds; default 600")
    parser.add_argument("--tiny", action="store_true", help="a few candidates, to try the path")
    return parser.parse_args(arguments)


def described(job: Values, worker: Worker, width: int) -> Values:
    """Return what `describe` says of the job's kernel, and the milliseconds of the table's tile as "ms".

    Raises:
        ValueError: the kernel has no part in the call.
        RuntimeError: the table's tile does not run.
    """
    outcome = worker.do(job | {"describe": True}, DESCRIBING_SECONDS)
    if outcome.reason is not None:
        raise RuntimeError(outcome.reason)
    about = outcome.record
    if about["taken"] is None:
        raise ValueError(f"--kernel must be one of {', '.join(about['kernels'])}, got {job['kernel']!r}")
    outcome = worker.do(job, DESCRIBING_SECONDS)
    if outcome.reason is not None:
        raise RuntimeError(f"the table's tile: {outcome.reason}")
    about["ms"] = outcome.record["ms"]
    # as launches take it
    about["tile"]["CHUNK"] = min(about["tile"]["CHUNK"], width)
    return about


def time_tiles(
    job: Values, tiles: Iterable[Values], taken: Sequence[str], worker: Worker, end: float
) -> list[tuple[float, Values]]:
    """Run the job with each tile until the clock reaches `end`; return times and tiles whose results are right.

    What became of each tile, failing and wrong ones too, is written to stderr.
    """
    found = []
    for tile in tiles:
        if time.monotonic() > end:
            break
        outcome = worker.do(job | {"tile": tile}, TILE_SECONDS)
        if outcome.reason is not None:
            said = outcome.reason
        elif not outcome.record["right"]:
            said = f"WRONG, {outcome.record['error_share']:.1f} gates from the table's result"
        else:
            said = f"{outcome.record['ms']:.4f} ms"
            found.append((outcome.record["ms"], tile))
        sys.stderr.write(f"{ {name: tile[name] for name in taken} }: {said}\n")
    return found


def search(job: Values, given: argparse.Namespace, worker: Worker) -> tuple[Values, list[tuple[float, Values]]]:
    """Return the kernel's description, with the table's time, and the right candidates, the fastest first.

    Raises:
        ValueError, RuntimeError: as `described`.
    """
    end = time.monotonic() + given.budget
    # the kernels' blocks are powers of two
    width = 1 << (max(job["K"], job["V"]) - 1).bit_length()
    about = described(job, worker, width)
    taken = about["taken"]
    found = time_tiles(job, first_round(taken, about["tile"], width, given.tiny), taken, worker, end)
    best = [tile for _, tile in sorted(found, key=itemgetter(0))[:FINALISTS]]
    others = [tile for tile in second_round(taken, best, width, given.tiny) if tile not in best]
    found += time_tiles(job, others, taken, worker, end)
    if time.monotonic() > end:
        sys.stderr.write("the budget is spent: not every candidate was tried\n")
    return about, sorted(found, key=itemgetter(0))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 1 where there is nothing to propose."""
    given = parse(arguments)
    job: Values = {
        **{name: getattr(given, name) for name in ("kernel", "K", "L", "T", "H", "dtype", "update")},
        **{"V": given.V or given.K, "G": given.G or given.H, "gated": not given.local},
        **{"part": "tune", "tile": None, "describe": False},
    }
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    with Worker(environment) as worker:
        try:
            about, found = search(job, given, worker)
        except (RuntimeError, ValueError) as error:
            sys.stderr.write(f"tune: {error}\n")
            return 1
    row = (job, about["target"], about["taken"])
    sys.stdout.write(f"# the table's: {as_row(*row, about['tile'], format(about['ms'], '.4f') + ' ms')}\n")
    for ms, tile in found[: given.rows]:
        sys.stdout.write(as_row(*row, tile, f"{ms:.4f} ms, {about['ms'] / ms:.2f} times the table's speed") + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
