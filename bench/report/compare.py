"""Has a version become slower? Two result files, or two commits on this machine.

`compare A.json B.json`: how many times A's ratio to its baseline B's is, so that the machine's speed drops out. The
noise is how far each file's baseline is from itself, and the spread of each peer; with --again, another result of
A's version, how far that is from A: for the measurement itself, and for four of five of all. A change of the ratio that
the milliseconds do not share may be the baseline's. Memory is compared too, and has no noise.

`compare --commits REV1 REV2`: fixed calls by each, in processes that take turns round by round; a third process of REV1
again is the noise. Calls with other outputs are not timed. REV2 may be ".", the files as they lie here.

Exit status: 1 on a regression of this package, 3 where there is none but it cannot be told (too much noise, the
baseline moved, or B lacks it), 2 where nothing can be compared. Other peers are shown, and not judged.

`pytest-benchmark compare` reads the same files and shows their times side by side. What this adds is a verdict: three
measurements of one version, on a machine with other work, make 60 pairs of this package's rows. By their medians 14 are
more than 10 % slower; by this rule 1 is, and 42 cannot be told (with --again 3 are, and 8 cannot be told).
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..speed.machine import ROOT
from ..speed.rows import ResultError, Row
from ..speed.timing import Times
from .compare_commits import ROUNDS, CommitError, Measured, measure
from .records import Key, Result, read

# a smaller change is no regression, however quiet the machine
LEAST = 1.03
# more noise would hide a regression that must not be missed
MOST = 1.25
MEMORY = 1.01
REGRESSIONS = ("SLOWER", "lost", "MORE MEMORY", "DIFFERS")
UNCLEAR = ("cannot tell", "not in B")


@dataclass(frozen=True)
class Change:
    """Hold what became of one measurement.

    verdict: One of `REGRESSIONS`, of `UNCLEAR`, or "same", "faster", "less memory".
    is_ours: Of this package.
    times: How many times as long it takes, or as many bytes; None where it is not known.
    noise: How many times may mean nothing, at least 1.
    ms: Milliseconds before and after, where `times` is of ratios to a baseline.
    """

    what: str
    verdict: str
    is_ours: bool = True
    times: float | None = None
    noise: float = 1.0
    ms: tuple[float, float] | None = None

    @property
    def is_regression(self) -> bool:
        """Return whether this package has become worse."""
        return self.is_ours and self.verdict in REGRESSIONS

    @property
    def is_unclear(self) -> bool:
        """Return whether this package may have become worse."""
        return self.is_ours and self.verdict in UNCLEAR

    @property
    def line(self) -> str:
        """The change as a line of the output."""
        figures = "" if self.times is None else f"{self.times:7.3f} × (noise {self.noise:5.3f} ×)  "
        after = "" if self.ms is None else f", {self.ms[0]:.4g} → {self.ms[1]:.4g} ms"
        return f"{self.verdict:12} {figures}{self.what}{after}"


def verdict_on(times: float, noise: float, ms: tuple[float, float] | None = None) -> str:
    """Return whether something takes longer, with the figures of a `Change`."""
    beyond = max(noise, LEAST)
    if 1 / beyond <= times <= beyond:
        return "same" if noise <= MOST else "cannot tell"
    # without milliseconds the ratio speaks alone
    moved = times if ms is None else ms[1] / ms[0]
    if times > 1:
        return "SLOWER" if moved > beyond else "cannot tell"
    return "faster" if moved < 1 / beyond else "cannot tell"


def change_of_time(
    what: str, times: float, noise: float, is_ours: bool = True, ms: tuple[float, float] | None = None
) -> Change:
    """Return the change of a time, with the figures of a `Change`."""
    return Change(what, verdict_on(times, noise, ms), is_ours, times, noise, ms)


def change_of_memory(what: str, before: int | None, after: int | None, is_ours: bool = True) -> Change | None:
    """Return the change of a number of bytes; None where it is the same, or not known."""
    times = after / before if before and after else 1.0
    if 1 / MEMORY <= times <= MEMORY:
        return None
    return Change(f"memory of {what}", "MORE MEMORY" if times > 1 else "less memory", is_ours, times)


def away(ratio: float) -> float:
    """Return how far a ratio is from 1, either way, as a factor of at least 1."""
    return max(ratio, 1 / ratio)


def changes(before: Result, after: Result, again: Result | None = None) -> Iterator[Change]:
    """Return a change for each row that `before` has times of: in both, in the first alone, or no longer timed.

    Raises:
        ResultError: The results have nothing in common.
    """
    old, new = ({Key.of(x): x for x in result.rows} for result in (before, after))
    repeated = {} if again is None else _repetition(old, again)
    if not any(old[key].ratio for key in old if key in new):
        raise ResultError(f"{before.name} and {after.name} must have measurements in common, got none")
    noises = [_baseline_noise(x) for x in (before, after)]
    groups = {key.group for key in new}
    for key, first in old.items():
        if first.ratio is None:
            continue
        what, is_ours = f"{key.peer}: {key.group}", first.is_ours
        second = new.get(key)
        if second is None:
            # a peer that is gone, or sizes that were not measured
            yield Change(what, "lost" if key.group in groups else "not in B", is_ours)
        elif second.ratio is None:
            yield Change(f"{what}, now {second.status} {second.reason}", "lost", is_ours)
        else:
            if key.peer != first.baseline:
                noise = math.prod(
                    max(baselines.get(key.group, 1.0), _spread(x.ratio))
                    for baselines, x in zip(noises, (first, second), strict=True)
                    if x.ratio is not None
                )
                ms = None if first.ms is None or second.ms is None else (first.ms.median, second.ms.median)
                times = second.ratio.median / first.ratio.median
                yield change_of_time(what, times, repeated.get(key, noise), is_ours, ms)
            change = change_of_memory(what, first.memory, second.memory, is_ours)
            if change is not None:
                yield change


def _repetition(old: Mapping[Key, Row], again: Result) -> dict[Key, float]:
    """Return how far each row is from itself; at least what four of five stay within, as one may agree by chance."""
    noise = {}
    for row in again.rows:
        first = old.get(Key.of(row))
        if first is not None and first.ratio and row.ratio and row.peer != row.baseline:
            noise[Key.of(row)] = away(row.ratio.median / first.ratio.median)
    values = list(noise.values())
    usual = statistics.quantiles(values, n=5, method="inclusive")[-1] if len(values) > 1 else 1.0
    return {key: max(value, usual) for key, value in noise.items()}


def unlike(before: Result, after: Result) -> Iterator[str]:
    """Return the conditions that are not the same."""
    for name, value in before.facts.items():
        if after.facts.get(name, value) != value:
            yield f"{name} {value} → {after.facts[name]}"


def _baseline_noise(result: Result) -> dict[str, float]:
    """Return, for each group, how far the baseline's ratio to itself is from 1, percentiles included."""
    rows = (row for row in result.rows if row.peer == row.baseline and row.ratio is not None)
    return {row.group: max(map(away, row.ratio or ())) for row in rows}


def _spread(times: Times) -> float:
    return max(times.high / times.median, times.median / times.low)


def changes_of_commits(measured: Measured) -> Iterator[Change]:
    """Return the calls that no longer give the same outputs, and the times of the others."""
    for what, error in measured.unlike.items():
        yield Change(f"{what}: outputs are {error:.1e} of the largest from before", "DIFFERS")
    yield from changes_of_times(measured.times)


def changes_of_times(times: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]) -> Iterator[Change]:
    """Return each call's change, from the times of REV1, REV2 and REV1 again, round by round.

    The noise is how far REV1 is from itself, in its median and in its 20th and 80th percentile, which a median of as
    many rounds seldom leaves.
    """
    for what, (first, second, again) in times.items():
        change = statistics.median(y / x for x, y in zip(first, second, strict=True))
        itself = Times.of([y / x for x, y in zip(first, again, strict=True)])
        yield change_of_time(what, change, max(map(away, itself)))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(
        prog="python -m segattn.bench.report.compare",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("results", nargs="*", type=Path, help="A.json and B.json, before and after")
    parser.add_argument("--again", type=Path, help="a result of A's version, measured once more: the noise")
    parser.add_argument("--commits", nargs=2, metavar=("REV1", "REV2"), help="before and after")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"of each commit, at least 3; default {ROUNDS}")
    parser.add_argument("--root", type=Path, default=ROOT, help="of the git repository; default: this checkout")
    given = parser.parse_args(arguments)
    if (given.commits is None) != (len(given.results) == 2) or (given.commits and (given.results or given.again)):
        parser.error("two result files, or --commits REV1 REV2")
    if given.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {given.rounds}")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return the exit status: 1 on a regression, 3 where it is unclear, 2 where nothing compares."""
    given = parse(arguments)
    conditions: list[str] = []
    try:
        if given.commits:
            found = list(changes_of_commits(measure(given.root, given.commits[0], given.commits[1], given.rounds)))
        else:
            again = None if given.again is None else read(given.again)
            before, after = map(read, given.results)
            found = list(changes(before, after, again))
            conditions = list(unlike(before, after))
    except (ResultError, CommitError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for change in found:
        sys.stdout.write(f"{change.line}\n")
    if conditions:
        sys.stdout.write(f"conditions differ: {', '.join(conditions)}\n")
    worse, unclear = (sum(getattr(x, name) for x in found) for name in ("is_regression", "is_unclear"))
    sys.stdout.write(f"{worse} regressions in {len(found)} comparisons, {unclear} cannot be told\n")
    return 1 if worse else 3 if unclear else 0


if __name__ == "__main__":
    sys.exit(main())
