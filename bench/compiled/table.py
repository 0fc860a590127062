"""Write compiled kernels as a plain-text table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ...kernels.triton.configs import TARGETS
from ..planner import floors
from ..speed.workloads import CASES
from .jobs import Row
from .rules import cost_of

HEAD = (
    f"{'kernel':19} {'case':21} {'dtype':9} {'K':>3} {'target':7} {'regs':>4} {'spill':>6} {'shared':>7} {'limit':>6} "
    f"{'warps':>5}  tensor cores, innermost loops"
)
WORST = 5


def table(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of the table: every row, sorted by kernel and job, then the worst by each measure."""
    yield HEAD
    for row in sorted(rows, key=lambda row: (row.job.kernel, *row.job)):
        yield _line(row)
    yield from _worst("most bytes spilled", rows, lambda row: row.compiled.spilled if row.compiled else 0)
    yield from _worst("most shared memory for the target", rows, _shared_share)
    yield from _worst("fewest resident warps", rows, lambda row: 1 / max(_warps(row), 1) if row.compiled else 0)
    yield from _worst("longest loops", rows, _longest)


def _line(row: Row) -> str:
    """Return a row's line under `HEAD`."""
    job, found = row.job, row.compiled
    name = f"{job.kernel:19} {job.case:21} {job.dtype:9} {job.width:3} {job.target:7}"
    if found is None:
        return f"{name} does not compile: {row.error}"
    limit = TARGETS[job.target].shared
    used = ", ".join(f"{count} {name}" for name, count in found.tensor_core.items()) or (
        "none" if found.products else "-"
    )
    loops = " ".join(str(loop.instructions) for loop in found.loops)
    return (
        f"{name} {found.registers:4} {found.spilled:6} {found.shared:7} {limit:6} {_warps(row):5}  {used}"
        f"{'; ' if loops else ''}{loops}"
    )


def _warps(row: Row) -> int:
    """Return the warps that a multiprocessor holds; 0 for a kernel that did not compile."""
    return row.compiled.resident_warps if row.compiled else 0


def _shared_share(row: Row) -> float:
    """Return the shared memory as a share of the target's limit; 0 for a kernel that did not compile."""
    return row.compiled.shared / TARGETS[row.job.target].shared if row.compiled else 0


def _longest(row: Row) -> int:
    """Return the instructions of the longest loop; 0 where there is none."""
    return max((loop.instructions for loop in row.compiled.loops), default=0) if row.compiled else 0


def _worst(name: str, rows: Sequence[Row], badness: Callable[[Row], float]) -> Iterator[str]:
    """Yield a heading and the `WORST` rows by `badness`, nothing where no row has any."""
    chosen = sorted((row for row in rows if badness(row) > 0), key=badness, reverse=True)[:WORST]
    if chosen:
        yield f"\n{name}"
        yield from map(_line, chosen)


def costs(rows: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of two tables: the cost of main loops for each pair, and what any implementation must spend."""
    yield (
        f"\nloops without masks, for each pair of a query and a key\n{'kernel':19} {'case':21} {'K':>3} {'target':7} "
        f"{'tile':>8} {'instructions':>12} {'operations':>10} {'clocks to issue':>15} {'of products':>11} {'share':>6}"
    )
    for row in sorted(rows, key=lambda row: (row.job.kernel, *row.job)):
        cost = cost_of(row)
        if cost is not None:
            tile = f"{row.tile.BLOCK_M} · {row.tile.BLOCK_N}"
            yield (
                f"{row.job.kernel:19} {row.job.case:21} {row.job.width:3} {row.job.target:7} {tile:>8} "
                f"{cost.instructions:12.2f} {cost.operations:10} {cost.issue:15.3f} {cost.tensor_core:11.3f} "
                f"{cost.share:6.0%}"
            )
    yield f"\nfloors in bfloat16\n{'workload':27} {'update':7} {'direction':9} {'10⁹ operations':>14} {'10⁶ bytes':>10}"
    for case in CASES[:4]:
        sizes = case.sizes()
        for update in (None, "linear", "delta"):
            for direction, count in (("forward", floors.forward), ("backward", floors.backward)):
                work = count(sizes, update)
                yield (
                    f"{case.name:27} {update or 'local':7} {direction:9} {work.operations / 1e9:14.2f} "
                    f"{work.bytes / 1e6:10.2f}"
                )
