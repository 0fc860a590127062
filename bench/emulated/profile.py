"""Write what launches were counted to do: traffic by kernel and call, main loops, waits, and floors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...kernels.check.gates import DTYPES
from .cases import CASES
from .counts import Counts
from .jobs import Job, Row

# an instruction's sectors of global memory over the least for its bytes, and what is marked from there on
MOST = 1.1


class Counted(NamedTuple):
    """All launches of a kernel in a call."""

    job: Job
    kernel: str
    launches: tuple[Counts, ...]

    def __str__(self) -> str:
        return f"{self.job.target:7} {self.job.dtype:9} {self.job.call:17} {self.kernel:19}"

    def sum(self, name: str) -> int:
        """Return the sum of a field."""
        return sum(getattr(counts, name) for counts in self.launches)


def profile(rows: Sequence[Row], kernels: Sequence[str]) -> Iterator[str]:
    """Yield the lines of the tables."""
    counted = [
        Counted(row.job, kernel, tuple(x.counts for x in row.launches if x.kernel == kernel and x.counts is not None))
        for row in sorted(rows, key=lambda row: row.job)
        for kernel in kernels
    ]
    counted = [x for x in counted if x.launches]
    yield from _traffic(counted)
    yield from _loops(counted)
    yield from _waits(counted)
    yield from _floors(rows)


def _head(*columns: str) -> str:
    return f"{'target':7} {'dtype':9} {'call':17} {'kernel':19}" + "".join(f" {x}" for x in columns)


def _traffic(counted: Sequence[Counted]) -> Iterator[str]:
    """Yield what kernels move through global and shared memory; * marks sectors or conflicts that need not be."""
    yield (
        "\nmemory: kB; sectors over the fewest, and over the tensors, each once; passes over those without conflicts\n"
        f"*: more than {MOST} x the fewest sectors, or conflicts in main loops"
    )
    yield _head(f"{'loaded':>9}", f"{'stored':>9}", f"{'sectors':>8}", f"{'repeated':>8}", f"{'shared':>6}", "in loops")
    for x in counted:
        wasted, repeated = x.sum("sectors") / max(x.sum("least"), 1), x.sum("sectors") / max(x.sum("tensors"), 1)
        conflicts = x.sum("passes") / max(x.sum("least_passes"), 1)
        mark = "  *" if wasted > MOST or x.sum("loop_conflicts") else ""
        yield (
            f"{x} {x.sum('loaded') / 1e3:9.1f} {x.sum('stored') / 1e3:9.1f} {wasted:8.2f} {repeated:8.2f} "
            f"{conflicts:6.2f} {x.sum('loop_conflicts'):8}{mark}"
        )


def _loops(counted: Sequence[Counted]) -> Iterator[str]:
    """Yield the instructions of main loops for each pair of a query and a key."""
    loops = [(x, x.launches[0].loop) for x in counted if x.launches[0].loop]
    if not loops:
        return
    classes = list(dict.fromkeys(name for _, loop in loops for name in loop))
    yield "\nmain loops: instructions of threads for each pair of a query and a key, by class"
    yield _head(f"{'all':>8}", *(f"{name:>8}" for name in classes))
    for x, loop in loops:
        yield f"{x} {sum(loop.values()):8.3f}" + "".join(f" {loop.get(name, 0.0):8.3f}" for name in classes)


def _waits(counted: Sequence[Counted]) -> Iterator[str]:
    """Yield how often each warp waits, and for what."""
    yield "\nwaits of each warp"
    for x in counted:
        sums: dict[str, float] = {}
        for counts in x.launches:
            for name, n in counts.waits.items():
                sums[name] = sums.get(name, 0.0) + n / len(x.launches)
        yield f"{x} " + ", ".join(f"{n:.1f} {name}" for name, n in sums.items())


def _floors(rows: Sequence[Row]) -> Iterator[str]:
    """Yield what calls take against what any implementation must spend, with all of memory cached and with none."""
    yield (
        f"\nfloors: operations of matrix instructions; kB of each launch's tensors, each once; kB of all sectors\n"
        f"{'target':7} {'dtype':9} {'call':17} {'10⁶ operations':>14} {'floor':>8} {'ratio':>6} "
        f"{'kB floor':>9} {'tensors':>9} {'ratio':>6} {'sectors':>9} {'ratio':>6}"
    )
    for row in sorted(rows, key=lambda row: row.job):
        floor, counts = CASES[row.job.call].floor, [x.counts for x in row.launches if x.counts is not None]
        if floor is None or not counts:
            continue
        work = floor(DTYPES[row.job.dtype].itemsize)
        operations, tensors, sectors = (
            sum(getattr(x, name) for x in counts) for name in ("operations", "tensors", "sectors")
        )
        yield (
            f"{row.job.target:7} {row.job.dtype:9} {row.job.call:17} {operations / 1e6:14.1f} "
            f"{work.operations / 1e6:8.1f} {operations / work.operations:6.2f} {work.bytes / 1e3:9.1f} "
            f"{tensors / 1e3:9.1f} {tensors / work.bytes:6.2f} {sectors / 1e3:9.1f} {sectors / work.bytes:6.2f}"
        )
