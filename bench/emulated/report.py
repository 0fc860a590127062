"""Execute every kernel's code for GPUs that are not here, on the CPU, and compare it with the float64 reference.

Exit status: 0 where all is right, 1 where something is not, 2 where nothing can be executed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import Progress, track

from ...kernels.backends import HAS_TRITON
from ...kernels.check.check import interpreted
from ...kernels.check.gates import DTYPES
from ..choices import choices, listed
from ..choices import kernels as choose_kernels
from ..outcome import finish, refused

if TYPE_CHECKING:  # it needs Triton
    from .jobs import Job

KEPT = Path("build/emulated")
# by which mutants are drawn
SEED = 0
# targets and dtypes of --quick, whose calls launch every kernel
QUICK = (("sm_80", "sm_90"), ("bfloat16",))


def _parser(targets: Sequence[str]) -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="ci/emulate",
        description=__doc__,
        epilog="Lists are separated by commas.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--targets", metavar="LIST", help=f"default: {listed(targets)}")
    found.add_argument("--dtypes", metavar="LIST", help=f"default: {listed(DTYPES)}")
    found.add_argument("--kernels", metavar="LIST", help="such as attend or write_grad, default: all")
    found.add_argument("--calls", metavar="LIST", help="by name, of bench/emulated/cases.py, default: all")
    one = found.add_mutually_exclusive_group()
    one.add_argument(
        "--counts", action="store_true",
        help="also what the code of calls with whole tiles moves and issues, unless --calls says which",
    )  # fmt: skip
    one.add_argument(
        "--mutations", type=int, metavar="N",
        help="spoil the code instead, one instruction at a time, and say what the checks notice: every barrier, fence "
        "and wait of a kernel, and N each of its masks, bounds, fragments and offsets",
    )  # fmt: skip
    found.add_argument("--quick", action="store_true", help="unless said otherwise, two targets, one dtype, few calls")
    one.add_argument(
        "--against", type=Path, metavar="FILE",
        help="a result of bench/on_device: compare with the bits that it holds, and nothing else",
    )  # fmt: skip
    found.add_argument("--json", type=Path, metavar="FILE", help="write the rows as data too")
    found.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default: one per core")
    found.add_argument(
        "--kept", type=Path, default=KEPT, metavar="FOLDER",
        help="what launches write is kept there: code that has not changed is not executed again from the same memory, "
        "default: %(default)s",
    )  # fmt: skip
    found.add_argument("--here", action="store_true", help="use the environment that is active, make none")
    return found


def _require_places(kept: Path, file: Path | None) -> None:
    """Raise a ValueError unless what comes of a run can be kept, before it begins."""
    try:
        kept.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--kept must be a folder, or where one can be made, got {kept} ({error.strerror})") from None
    if file is not None and (file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK)):
        raise ValueError(f"--json must be a file that can be written, got {file}")


def _refused(why: str) -> int:
    """Say why nothing can be executed, and return the exit status."""
    return refused("ci/emulate", why)


def _against(path: Path) -> int:
    """Compare the executor with a device's bits; return the exit status."""
    from ..compiled.ahead_of_time import CompileError
    from .bits import differences
    from .faults import Fault, Unsupported

    try:
        records = json.loads(path.read_text(encoding="utf-8"))["bits"]
        found = list(differences(records))
    except (OSError, ValueError, KeyError, TypeError) as error:
        return _refused(f"--against must be a result of bench/on_device whose code can be executed: {error}")
    except (Fault, Unsupported, CompileError) as error:
        sys.stdout.write(f"{error}\n")
        return 1
    wrong = [x for x in found if not x.error <= x.gate]
    for x in found:
        sys.stdout.write(f"{x}\n")
    sys.stdout.write(f"\n{len(records)} calls, {len(wrong)} of {len(found)} outputs too far apart\n")
    for x in wrong:
        sys.stdout.write(f"  {x}\n")
    return 1 if wrong or not found else 0


def _mutations(jobs: Sequence[Job], kernels: Sequence[str], given: argparse.Namespace) -> int:
    """Spoil the code of kernels in calls; return the exit status: 0 where the checks notice as much as they must."""
    from .jobs import launches_of
    from .mutations import GOAL, document, lines, spoil_all, tallies

    console, each, file = Console(stderr=True), given.mutations, given.json
    with Progress(console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("spoiling", total=sum(len(launches_of(job.call)) for job in jobs))
        spoilt = spoil_all(
            jobs, kernels, each, SEED, given.kept, given.jobs, lambda job: bar.advance(task, len(launches_of(job.call)))
        )
    for line in lines(spoilt):
        sys.stdout.write(f"{line}\n")
    if file is not None:
        file.write_text(json.dumps(document(spoilt, each, SEED), indent=1) + "\n", encoding="utf-8")
    return 0 if tallies(spoilt)[-1].share >= GOAL else 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    if not HAS_TRITON:
        return _refused("Triton is not installed")
    # these need Triton
    from ..compiled.jobs import KERNELS
    from .cases import CASES, COUNTED, SPOILT
    from .cases import QUICK as QUICK_CALLS
    from .jobs import Row, execute_all, plan
    from .launches import EMULATED
    from .profile import profile
    from .table import failures, table

    given = _parser(EMULATED).parse_args(arguments)
    if interpreted():
        return _refused("TRITON_INTERPRET is set, by which kernels are not compiled: unset it")
    if given.against is not None:
        return _against(given.against)
    usual = (*QUICK, QUICK_CALLS) if given.quick else (EMULATED, tuple(DTYPES), tuple(CASES))
    if given.mutations is not None:
        usual = (("sm_80", "sm_90", "sm_100"), ("bfloat16",), SPOILT)
    if given.counts:
        usual = (*usual[:2], COUNTED)
    begin = time.monotonic()
    try:
        if given.jobs < 1:
            raise ValueError(f"--jobs must be positive, got {given.jobs}")
        if given.mutations is not None and given.mutations < 1:
            raise ValueError(f"--mutations must be positive, got {given.mutations}")
        targets = choices("targets", given.targets, usual[0], EMULATED)
        dtypes = choices("dtypes", given.dtypes, usual[1], tuple(DTYPES))
        calls = choices("calls", given.calls, usual[2], tuple(CASES))
        kernels = choose_kernels(given.kernels, KERNELS)
        _require_places(given.kept, given.json)
        jobs = plan(targets, dtypes, calls, kernels, given.counts)
        if not jobs:
            raise ValueError(f"--kernels must be launched by one of the calls {listed(calls)}, got {given.kernels}")
    except ValueError as error:
        return _refused(str(error))
    if given.mutations is not None:
        return _mutations(jobs, kernels, given)
    console = Console(stderr=True)
    done = execute_all(jobs, given.jobs, given.kept)
    rows: list[Row] = list(track(done, "executing", len(jobs), console=console, disable=not console.is_terminal))
    for line in table(rows, kernels):
        sys.stdout.write(f"{line}\n")
    if given.counts:
        for line in profile(rows, kernels):
            sys.stdout.write(f"{line}\n")
    done_in = f"{len(rows)} calls in {time.monotonic() - begin:.0f} s"
    return finish(done_in, rows, failures(rows), given.json)
