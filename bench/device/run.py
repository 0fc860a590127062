"""`bench/on_device`: check the kernels on a GPU, time them, and profile them, into one JSON and one table.

Parts run in the order of importance until the budget is spent, and the parts that were not reached are named. The JSON,
pytest-benchmark's with parts of its own, is written anew after every record, so that an interruption loses nothing.
"""

from __future__ import annotations

import argparse
import os
import queue
import sys
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from ...kernels.check.check import default_device
from ...runs.figures import write_figures
from ..emulated.cases import RECORDED
from ..speed.machine import ROOT, commit, device_facts, gpu_limits, machine_info
from ..speed.workloads import BOTH, CASES, DECODES, DTYPES, MAIN, TINY_CASES, TINY_DECODES, TINY_MAIN
from .goals import judge
from .table import table
from .worker import Outcome, Worker

# seconds kept back for the profile and the summary, and the least that a job is begun with
RESERVE, LEAST = 25.0, 4.0
# share of the budget that checks may take, side by side
CHECKS_SHARE = 0.4
# how often a job is begun again without the peer that ended it
RETRIES = 2
SHARES = 4
WIDTHS = (128, 64, 16, 32, 256)
BAD = ("wrong", "failed")
TINY_RECORDED = "decode"
COMPILED = ("FlexAttention local", "compiled torch delta", "compiled torch linear", "compiled eager loop delta")

# pytest-benchmark's version whose JSON this is
FORMAT = "5.3.1"

Job = dict[str, Any]


class Settings(NamedTuple):
    """Settings of the command. budget: seconds; workers: processes that check side by side."""

    out: Path
    budget: float
    tiny: bool
    workers: int
    commit: str | None


class Run:
    """A run's document and budget."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.begin = time.monotonic()
        self.lock = threading.Lock()
        known = commit()
        self.document: dict[str, Any] = {
            "machine_info": machine_info(default_device()),
            "commit_info": {"id": settings.commit or known["commit"], "dirty": known["dirty"]},
            "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "version": FORMAT,
            "tiny": settings.tiny,
            "budget_s": settings.budget,
            "ceilings": None,
            "check": [],
            "tiles": [],
            "bits": [],
            "benchmarks": [],
            "not_timed": [],
            "profile": [],
            "goals": [],
            "skipped": [],
        }

    def left(self) -> float:
        """Return the seconds that are left of the budget."""
        return self.settings.budget - (time.monotonic() - self.begin)

    def keep(self, part: str, record: Any) -> None:
        """Add a job's record to the document, and write that."""
        with self.lock:
            if part in ("timings", "decode"):
                for name, rows in record.items():
                    self.document[name] += rows
            elif isinstance(self.document[part], list):
                self.document[part].append(record)
            else:
                self.document[part] = record
            self.write()

    def write(self) -> None:
        """Write the document, whole or not at all."""
        self.document["spent_s"] = round(time.monotonic() - self.begin, 1)
        self.settings.out.parent.mkdir(parents=True, exist_ok=True)
        write_figures(self.settings.out, self.document)

    def skip(self, job: Job, reason: str) -> None:
        """Keep why a job has no record."""
        self.keep("skipped", {"part": job["part"], "job": title(job), "reason": reason})

    def do(self, worker: Worker, job: Job, seconds: float) -> None:
        """Have a job done, and again without the peer that ended it; all attempts together take at most `seconds`."""
        end = time.monotonic() + seconds
        outcome = Outcome(reason="not begun")
        for _ in range(RETRIES + 1):
            rest = min(end - time.monotonic(), job["limit"])
            if rest < LEAST:
                break
            say(f"{self.settings.budget - self.left():5.0f} s  {job['part']}: {title(job)}")
            outcome = worker.do(job, rest)
            if outcome.at is None:
                break
            job["excluded"][outcome.at] = outcome.reason
        if outcome.reason is not None:
            self.skip(job, "the budget is spent" if outcome.reason == "not begun" else outcome.reason)
        elif outcome.record is not None:
            self.keep(job["part"], outcome.record)


def title(job: Job) -> str:
    """Return what tells a job from the others of its part."""
    return " ".join(
        str(job[key]) for key in ("dtype", "width", "number", "share", "name", "peer", "direction") if key in job
    )


def say(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def make_job(part: str, tiny: bool, limit: float, **about: Any) -> Job:
    """Return a job of a part; limit: seconds."""
    return {"part": part, "tiny": tiny, "excluded": {}, "limit": limit} | about


def check_jobs(tiny: bool) -> list[Job]:
    """Return the checks, each twice, the tiles, the bits, and the jobs that fill the compilers' caches beside them."""
    if tiny:
        checks = [make_job("check", True, 60, dtype="float32", number=n, share=0) for n in (1, 2)]
        return [
            *checks,
            make_job("tiles", True, 60, dtype="float32", width=16),
            make_job("bits", True, 60, name=TINY_RECORDED),
        ]
    first, second = (
        [
            make_job("check", False, 200, dtype=d, number=n, share=i, shares=SHARES)
            for d in DTYPES
            for i in range(SHARES)
        ]
        for n in (1, 2)
    )
    tiles = [make_job("tiles", False, 120, width=width, dtype=dtype) for width in WIDTHS for dtype in DTYPES]
    slow = [c.name for c in CASES if set(c.peers) & set(COMPILED)]
    others = [c.name for c in CASES if c.T == MAIN.T and (c.K == 64 or c.dtype == "float16" or c.G != c.H)]
    warm = [make_job("warm", False, 150, name=name) for name in dict.fromkeys((*slow, MAIN.name, *others))]
    soon, common = len(slow) + 1, 2 * len(DTYPES)
    kept = [make_job("bits", False, 60, name=name) for name in RECORDED]
    return [*warm[:soon], *first, *kept, *tiles[:common], *warm[soon:], *second, *tiles[common:]]


def timing_jobs(tiny: bool) -> list[Job]:
    """Return the cases in their order, decoding behind the first two of them."""
    cases, decodes = (TINY_CASES, TINY_DECODES) if tiny else (CASES, DECODES)
    timings = [make_job("timings", tiny, case.limit, name=case.name) for case in cases]
    steps = [make_job("decode", tiny, case.limit, name=case.name) for case in decodes]
    return [make_job("ceilings", tiny, 30), *timings[:2], *steps, *timings[2:]]


def profile_jobs(document: dict[str, Any], tiny: bool) -> list[Job]:
    """Return the profiles of the cases that miss a goal, and of the main case."""
    main = (TINY_MAIN if tiny else MAIN).name
    behind = [
        c.name for c in CASES for g in document["goals"] if g["met"] is False and g["goal"].startswith(f"{c.name}:")
    ]
    peers = ("segattn delta",) if tiny else ("segattn delta", "segattn linear", "SDPA flash local")
    return [
        make_job("profile", tiny, 20, name=name, peer=peer, direction=BOTH)
        for name in dict.fromkeys((main, *behind))
        for peer in peers
    ]


def side_by_side(run: Run, jobs: Sequence[Job], seconds: float, environment: dict[str, str]) -> None:
    """Have jobs that are not timed done by several processes at once."""
    end = time.monotonic() + seconds
    waiting: queue.Queue[Job] = queue.Queue()
    for job in jobs:
        waiting.put(job)

    def work(worker: Worker) -> None:
        while True:
            try:
                job = waiting.get_nowait()
            except queue.Empty:
                return
            run.do(worker, job, min(end - time.monotonic(), run.left() - RESERVE))

    workers = [Worker(environment) for _ in range(min(run.settings.workers, len(jobs)))]
    threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in workers]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for worker in workers:
            worker.end()


def same_twice(records: Sequence[dict[str, Any]]) -> dict[str, bool]:
    """Return, for every dtype that was checked twice, whether all errors are the same to the last digit kept."""
    found: dict[tuple[str, int], list[Any]] = {}
    for record in records:
        found.setdefault((record["dtype"], record["share"]), []).append(record["errors"])
    same: dict[str, bool] = {}
    for (dtype, _), errors in found.items():
        if len(errors) == 2:
            same[dtype] = same.get(dtype, True) and errors[0] == errors[1]
    return same


def whole_run(run: Run) -> None:
    """Check, time, judge and profile, as far as the budget reaches."""
    tiny = run.settings.tiny
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}
    # the profiler says each time that it starts and stops
    environment.setdefault("KINETO_LOG_LEVEL", "99")
    environment["OMP_NUM_THREADS"] = environment.get("OMP_NUM_THREADS", "1")
    share = 1.0 if tiny else CHECKS_SHARE
    side_by_side(run, check_jobs(tiny), share * run.settings.budget, environment)
    run.document["same_twice"] = same_twice(run.document["check"])
    with Worker(environment) as worker:
        for job in timing_jobs(tiny):
            run.do(worker, job, run.left() - RESERVE)
        run.document["goals"] = judge(run.document, tiny)
        for job in profile_jobs(run.document, tiny):
            run.do(worker, job, run.left() - LEAST)
    run.document["machine_info"]["limits_after"] = gpu_limits()


def failed(document: dict[str, Any]) -> bool:
    """Return whether anything of ours is wrong, or nothing was checked."""
    checks = [*document["check"], *document["tiles"]]
    return (
        not document["check"]
        or not all(record["passed"] for record in checks)
        or not all(document.get("same_twice", {}).values())
        or any(x["provider"].startswith("segattn") and x["status"] in BAD for x in document["not_timed"])
    )


def parse(arguments: Sequence[str] | None) -> Settings:
    """Return the settings of a command line."""
    parser = argparse.ArgumentParser(prog="bench/on_device", description=__doc__)
    parser.add_argument("--out", type=Path, help="the JSON; default: bench/results/GPU-DATE.json")
    parser.add_argument("--budget", type=float, default=450.0, help="seconds; default 450")
    parser.add_argument("--tiny", action="store_true", help="a few small shapes, on any machine")
    parser.add_argument("--workers", type=int, help="processes that check side by side; default 12 on a GPU, else 1")
    parser.add_argument("--commit", help="to be written into the JSON where there is no git")
    given = parser.parse_args(arguments)
    device = default_device()
    if device.type != "cuda" and not given.tiny:
        parser.error("there is no GPU here; --tiny runs the whole path on small shapes")
    name = "-".join(device_facts(device)["name"].replace("/", " ").split())
    default = ROOT / "bench" / "results" / f"{name}-{datetime.now(timezone.utc):%Y%m%d-%H%M}.json"
    workers = given.workers or (min(12, os.cpu_count() or 1) if device.type == "cuda" else 1)
    return Settings((given.out or default).resolve(), given.budget, given.tiny, workers, given.commit)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 1 where anything of ours is wrong, 130 where it was interrupted."""
    run = Run(parse(arguments))
    run.write()
    try:
        whole_run(run)
    except KeyboardInterrupt:
        run.document["interrupted"] = True
        return 130
    finally:
        run.document["goals"] = judge(run.document, run.settings.tiny)
        run.write()
        say(table(run.document))
        say(f"written to {run.settings.out}")
    return int(failed(run.document))
