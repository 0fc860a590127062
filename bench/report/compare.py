"""Has a version become slower? Two result files, or two commits on this machine.

`compare A.json B.json`: how many times A's ratio to its baseline B's is, so that the machine's speed drops out. The
noise is how far each file's baseline is from itself, and the spread of each provider; with --again, another result of
A's version, how far that is from A: for the measurement itself, and for four of five of all. A change of the ratio that
the milliseconds do not share may be the baseline's. Memory is compared too, and has no noise.

`compare --commits REV1 REV2`: fixed calls by each, in processes that take turns round by round; a third process of REV1
again is the noise. What does not give the same outputs is not timed. REV2 may be ".", the files as they lie here.

Exit status: 1 on a regression of this package, 3 where there is none but it cannot be told (too much noise, the
baseline moved, or B lacks it), 2 where nothing can be compared. Other providers are shown, and not judged.
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
from .compare_commits import ROUNDS, CommitError, Measured, measure
from .records import Key, Record, Result, ResultError, read

# a change below this is no regression, however quiet the machine
LEAST = 1.03
# noise beyond this would hide what must not be missed
MOST = 1.25
MEMORY = 1.01
OURS = ("segattn", "torch backend", "compiled torch")
REGRESSIONS = ("SLOWER", "lost", "MORE MEMORY", "DIFFERS")
UNCLEAR = ("cannot tell", "not in B")


@dataclass(frozen=True)
class Change:
    """times: how many times as long it takes as before. noise: how many times may mean nothing, at least 1.

    is_ours: of this package. ms: before and after, where the times are of ratios to a baseline.
    """

    what: str
    times: float
    noise: float
    is_ours: bool = True
    ms: tuple[float, float] | None = None

    @property
    def verdict(self) -> str:
        beyond = max(self.noise, LEAST)
        if 1 / beyond <= self.times <= beyond:
            return "same" if self.noise <= MOST else "cannot tell"
        # without milliseconds the ratio speaks alone
        moved = self.times if self.ms is None else self.ms[1] / self.ms[0]
        if self.times > 1:
            return "SLOWER" if moved > beyond else "cannot tell"
        return "faster" if moved < 1 / beyond else "cannot tell"

    @property
    def is_regression(self) -> bool:
        return self.is_ours and self.verdict in REGRESSIONS

    @property
    def is_unclear(self) -> bool:
        return self.is_ours and self.verdict in UNCLEAR

    @property
    def line(self) -> str:
        times = "" if self.ms is None else f", {self.ms[0]:.4g} → {self.ms[1]:.4g} ms"
        return f"{self.verdict:12} {self.times:7.3f} × (noise {self.noise:5.3f} ×)  {self.what}{times}"


@dataclass(frozen=True)
class Said(Change):
    """What has no times."""

    said: str = ""

    @property
    def verdict(self) -> str:
        return self.said

    @property
    def line(self) -> str:
        return f"{self.verdict:12} {self.what}"


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
    """What the first timed: by both, by the first alone, or not any longer.

    Raises:
        ResultError: they have nothing in common.
    """
    old, new = ({x.key: x for x in result.records} for result in (before, after))
    repeated = {} if again is None else _repetition(old, again)
    shared = [key for key in old if key in new]
    if not any(old[key].ratio for key in shared):
        raise ResultError(f"{before.name} and {after.name} must have measurements in common, got none")
    noises = [_baseline_noise(x) for x in (before, after)]
    groups = {key.group for key in new}
    for key, first in old.items():
        if first.ratio is None:
            continue
        what, is_ours = f"{key.provider}: {key.group}", key.provider.startswith(OURS)
        if key not in new:
            # a provider that is gone, or sizes that were not asked for
            yield Said(what, math.nan, 1.0, is_ours, said="lost" if key.group in groups else "not in B")
            continue
        second = new[key]
        if second.ratio is None:
            yield Said(f"{what}, now {second.status} {second.reason}", math.nan, 1.0, is_ours, said="lost")
            continue
        if key.provider != first.baseline:
            own = [x.get(key.group, 1.0) for x in noises]
            spread = math.prod(max(own, _spread(x)) for own, x in zip(own, (first, second), strict=True))
            ms = None if first.ms is None or second.ms is None else (first.ms[0], second.ms[0])
            yield Change(what, second.ratio[0] / first.ratio[0], repeated.get(key, spread), is_ours, ms)
        if first.memory and second.memory:
            change = Memory(f"memory of {what}", second.memory / first.memory, 1.0, is_ours)
            if change.verdict != "same":
                yield change


def _repetition(old: Mapping[Key, Record], again: Result) -> dict[Key, float]:
    """How far each is from itself; at least what four of five stay within, as one may agree by chance."""
    found = {}
    for record in again.records:
        first = old.get(record.key)
        if first is not None and first.ratio and record.ratio and record.key.provider != record.baseline:
            found[record.key] = away(record.ratio[0] / first.ratio[0])
    values = list(found.values())
    usual = statistics.quantiles(values, n=5, method="inclusive")[-1] if len(values) > 1 else 1.0
    return {key: max(value, usual) for key, value in found.items()}


def unlike(before: Result, after: Result) -> Iterator[str]:
    """Conditions that are not the same."""
    for name, value in before.facts.items():
        if after.facts.get(name, value) != value:
            yield f"{name} {value} → {after.facts[name]}"


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


def changes_of_commits(measured: Measured) -> Iterator[Change]:
    """Calls that no longer give the same, and the times of the others."""
    for what, error in measured.unlike.items():
        yield Said(f"{what}: outputs are {error:.1e} of the largest from before", math.nan, 1.0, said="DIFFERS")
    yield from changes_of_times(measured.times)


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
    """The exit status: 1 on a regression, 3 where it cannot be told, 2 where nothing can be compared."""
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
