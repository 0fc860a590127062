"""Has a version become slower? Two result files, or two commits on this machine; exit status 1 on a regression.

`compare A.json B.json`: how many times A's ratio to its baseline B's is, so that the machine's speed drops out. The
noise is how far each file's baseline is from itself, and the spread of each provider; with --again, another result of
A's version, how far that is from A. Memory is compared too, and has no noise.

`compare --commits REV1 REV2`: fixed calls by each, in processes that take turns round by round; a third process of REV1
again is the noise. REV2 may be ".", the files as they lie here.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .compare_commits import ROUNDS, CommitError, measure
from .machine import ROOT
from .records import Record, Result, ResultError, read

# a change below this is no regression, however quiet the machine
LEAST = 1.03
MEMORY = 1.01


@dataclass(frozen=True)
class Change:
    """times: how many times as long it takes as before. noise: how many times may mean nothing, at least 1."""

    what: str
    times: float
    noise: float

    @property
    def verdict(self) -> str:
        beyond = max(self.noise, LEAST)
        if math.isnan(self.times):
            return "lost"
        return "SLOWER" if self.times > beyond else "faster" if self.times < 1 / beyond else "same"

    @property
    def is_regression(self) -> bool:
        return self.verdict in ("SLOWER", "lost", "MORE MEMORY")

    @property
    def line(self) -> str:
        return f"{self.verdict:12} {self.times:7.3f} × (noise {self.noise:5.3f} ×)  {self.what}"


@dataclass(frozen=True)
class Memory(Change):
    """Of bytes."""

    @property
    def verdict(self) -> str:
        return "MORE MEMORY" if self.times > MEMORY else "less memory" if self.times < 1 / MEMORY else "same"


def away(ratio: float) -> float:
    """How far from 1, either way, as a factor of at least 1."""
    return max(ratio, 1 / ratio)


def changes(before: Result, after: Result, again: Result | None = None) -> Iterator[Change]:
    """What both measured, and what the first timed and the second could not.

    Raises:
        ResultError: they have nothing in common.
    """
    old, new = ({x.key: x for x in result.records} for result in (before, after))
    repeated = {} if again is None else {x.key: x for x in again.records}
    shared = [key for key in old if key in new]
    if not any(old[key].ratio for key in shared):
        raise ResultError(f"{before.name} and {after.name} must have measurements in common, got none")
    noises = [_baseline_noise(x) for x in (before, after)]
    for key in shared:
        first, second = old[key], new[key]
        what = f"{key.provider}: {key.group}"
        if first.ratio is None:
            continue
        if second.ratio is None:
            yield Change(f"{what}, now {second.status} {second.reason}", math.nan, 1.0)
            continue
        if key.provider != first.baseline:
            itself = repeated.get(key)
            if itself is not None and itself.ratio is not None:
                noise = away(itself.ratio[0] / first.ratio[0])
            else:
                groups = [x.get(key.group, 1.0) for x in noises]
                noise = math.prod(max(own, _spread(x)) for own, x in zip(groups, (first, second), strict=True))
            yield Change(what, second.ratio[0] / first.ratio[0], noise)
        if first.memory and second.memory:
            change = Memory(f"memory of {what}", second.memory / first.memory, 1.0)
            if change.verdict != "same":
                yield change


def _baseline_noise(result: Result) -> dict[str, float]:
    """For each group, how far from 1 the baseline's ratio to itself is, its 20th and 80th percentiles included."""
    found = {}
    for record in result.records:
        if record.key.provider == record.baseline and record.ratio is not None:
            found[record.key.group] = max(map(away, record.ratio))
    return found


def _spread(record: Record) -> float:
    assert record.ratio is not None
    median, low, high = record.ratio
    return max(high / median, median / low)


def changes_of_times(times: Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]) -> Iterator[Change]:
    """For each call the times of REV1, REV2 and REV1 again, round by round.

    The noise is how far REV1 is from itself, in its median and in its 20th and 80th percentile, which a median of as
    many rounds seldom leaves.
    """
    for what, (first, second, again) in times.items():
        change = statistics.median(y / x for x, y in zip(first, second, strict=True))
        itself = [y / x for x, y in zip(first, again, strict=True)]
        fifths = statistics.quantiles(itself, n=5, method="inclusive")
        yield Change(what, change, max(map(away, (fifths[0], statistics.median(itself), fifths[-1]))))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m segattn.bench.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
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
    """The exit status: 1 on a regression, 2 where nothing can be compared."""
    given = parse(arguments)
    try:
        if given.commits:
            found = list(changes_of_times(measure(given.root, given.commits[0], given.commits[1], given.rounds)))
        else:
            again = None if given.again is None else read(given.again)
            before, after = map(read, given.results)
            found = list(changes(before, after, again))
    except (ResultError, CommitError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for change in found:
        sys.stdout.write(f"{change.line}\n")
    worse = [change for change in found if change.is_regression]
    sys.stdout.write(f"{len(worse)} regressions in {len(found)} comparisons\n")
    return int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
