"""Compile every kernel for GPUs that are not here: a table of what the code needs, and what breaks a rule.

A whole run also predicts how long kernels take, and fails where one has become slower than the committed table says;
`ci/compile model` prints these predictions. Exit status: 0 where nothing breaks a rule, 1 where something does, 2 where
nothing can be compiled.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from ...kernels.backends import HAS_TRITON, takes_width
from ...kernels.check.check import interpreted
from ...kernels.triton.configs import TARGETS
from ..choices import choices, listed
from ..choices import kernels as choose_kernels
from ..outcome import finish, refused
from ..speed.workloads import DTYPES

WIDTHS = ("64", "128", "256")
# beside them in one dtype: narrower than a tile's columns, and than the power of two that holds it
EDGES = ("24", "80")
EDGES_DTYPE = "bfloat16"
# one of every kind for --every: up to a power of two and one short of it, multiples of 16 and of 8 alone
EVERY = ("16", "24", "32", "48", "64", "80", "128", "136", "192", "200", "256")
KNOWN_WIDTHS = tuple(str(width) for width in range(1024) if takes_width(width))
# dtypes and widths of --quick
QUICK = (("bfloat16",), ("64",))


def _parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    found = argparse.ArgumentParser(
        prog="ci/compile",
        description=__doc__,
        epilog="Lists are separated by commas.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument("--targets", metavar="LIST", help=f"default: {listed(TARGETS)}")
    found.add_argument("--dtypes", metavar="LIST", help=f"default: {listed(DTYPES)}")
    found.add_argument(
        "--widths", metavar="LIST", help=f"K = V, default: {listed(WIDTHS)}, and {listed(EDGES)} in {EDGES_DTYPE}"
    )
    found.add_argument("--kernels", metavar="LIST", help="such as attend or write_grad, default: all")
    found.add_argument("--quick", action="store_true", help="unless said otherwise, one dtype and one width")
    found.add_argument(
        "--every",
        action="store_true",
        help=f"every kind of call in every dtype, and unless said otherwise K = V of {listed(EVERY)}: hours of a core",
    )
    found.add_argument("--floors", action="store_true", help="also what main loops cost, and what any call must")
    found.add_argument("--json", type=Path, metavar="FILE", help="write the table as data too")
    found.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes, default: one per core")
    found.add_argument("--here", action="store_true", help="use the environment that is active, make none")
    return found


def _refused(why: str) -> int:
    """Say why nothing can be compiled, and return the exit status."""
    return refused("ci/compile", why)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status."""
    typed = list(sys.argv[1:] if arguments is None else arguments)
    predicting = typed[:1] == ["model"]
    given = None if predicting else _parser().parse_args(typed)
    if not HAS_TRITON:
        return _refused("Triton is not installed")
    if interpreted():
        return _refused("TRITON_INTERPRET is set, by which kernels are not compiled: unset it")
    # these need Triton
    from . import predict
    from .jobs import KERNELS, Row, compile_all, plan
    from .rules import failures
    from .table import costs, table

    if given is None:
        return predict.main(typed[1:])
    usual_dtypes, usual_widths = QUICK if given.quick else (tuple(DTYPES), EVERY if given.every else WIDTHS)
    begin = time.monotonic()
    try:
        if given.jobs < 1:
            raise ValueError(f"--jobs must be positive, got {given.jobs}")
        targets = choices("targets", given.targets, tuple(TARGETS), tuple(TARGETS))
        dtypes = choices("dtypes", given.dtypes, usual_dtypes, tuple(DTYPES))
        kernels = choose_kernels(given.kernels, KERNELS)
        sizes = [int(x) for x in choices("widths", given.widths, usual_widths, KNOWN_WIDTHS)]
        jobs = plan(targets, dtypes, sizes, kernels, given.every)
        if given.widths is None and not (given.quick or given.every) and EDGES_DTYPE in dtypes:
            jobs += plan(targets, [EDGES_DTYPE], [int(x) for x in EDGES], kernels)
    except ValueError as error:
        return _refused(str(error))
    console = Console(stderr=True)
    rows: list[Row] = list(
        track(compile_all(jobs, given.jobs), "compiling", len(jobs), console=console, disable=not console.is_terminal)
    )
    for line in table(rows):
        sys.stdout.write(f"{line}\n")
    if given.floors:
        for line in costs(rows):
            sys.stdout.write(f"{line}\n")
    broken = failures(rows)
    if not given.quick and kernels == KERNELS and predict.Workload.target in targets and predict.DTYPE in dtypes:
        broken += predict.slower(given.jobs)
    done_in = f"{len(rows)} compiled in {time.monotonic() - begin:.0f} s"
    return finish(done_in, rows, broken, given.json)
