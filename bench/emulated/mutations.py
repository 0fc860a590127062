"""Spoil executed code, one instruction at a time, and count what the checks notice."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...kernels.check.gates import DTYPES, GATES
from ...kernels.check.gates import OUTPUTS as FORWARD
from ...kernels.triton.configs import TARGETS
from .cases import CASES
from .executor import Executable
from .jobs import Job
from .kept import executor
from .launches import emulating
from .mutants import KINDS, Mutant, sample
from .table import OUTPUTS
from .trials import HOLE, NOTICED, REDUNDANT, UNREACHED, Trial

# of what is not redundant or unreached, the share that the checks must notice
GOAL = 0.95


@dataclass(frozen=True)
class Spoilt:
    """Hold a mutant and what became of it; `at` counts the instructions of the program with this `digest`."""

    target: str
    kernel: str
    digest: str
    at: int
    kind: str
    instruction: str
    change: str
    source: str
    what: str
    why: str
    call: str

    @property
    def key(self) -> tuple[object, ...]:
        """Return the fields by which mutants of several calls are the same."""
        return self.digest, self.at, self.kind, self.change

    def as_json(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


class Judged:
    """A file of mutants, a line for some of a launch, that need not be judged again while all code is the same."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[tuple[object, ...], list[Spoilt]] = {}
        for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
            values = json.loads(line)
            self.done.setdefault(tuple(values["launch"]), []).extend(Spoilt(**x) for x in values["spoilt"])

    def add(self, launch: tuple[object, ...], spoilt: list[Spoilt]) -> None:
        """Keep mutants of a launch."""
        self.done.setdefault(launch, []).extend(spoilt)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"launch": launch, "spoilt": [x.as_json() for x in spoilt]}) + "\n")


def spoil_all(
    jobs: Sequence[Job],
    kernels: Collection[str],
    each: int,
    seed: int,
    path: Path,
    folder: Path | None,
    tell: Callable[[], None],
) -> list[Spoilt]:
    """Spoil the launches of kernels in calls, and return every mutant once, with the best that came of it.

    Args:
        each: mutants of a kind in a program, but for those of which all are tried; drawn by `seed`.
        path: where mutants are kept, as `Judged` says.
        folder: where what launches write is kept, as `emulating` takes it.
        tell: is called when a launch is done.
    """
    judged, best = Judged(path), dict[tuple[object, ...], Spoilt]()
    for job in jobs:
        case, numbers = CASES[job.call], itertools.count()

        def spoil(launch: Executable, job: Job = job, numbers: Iterator[int] = numbers) -> None:
            number = next(numbers)
            if launch.kernel in kernels:
                digest, mutants = launch.program.digest, sample(launch.program, each, seed)
                name, keys = (executor("mutants", "trials"), digest, *job, number), [(digest, *x[:3]) for x in mutants]
                known = [x for x in judged.done.get(name, []) if x.key in keys]
                _merge(best, known)
                settled = {x.key for x in known} | {key for key, x in best.items() if x.what == NOTICED}
                left = [mutant for mutant, key in zip(mutants, keys, strict=True) if key not in settled]
                if left:
                    made = _spoil(launch, job, left)
                    judged.add(name, made)
                    _merge(best, made)
            tell()

        with emulating(TARGETS[job.target], kept=folder, before=spoil):
            case.evaluate(case.draw(DTYPES[job.dtype]), "triton")
    return list(best.values())


_BEST = (UNREACHED, REDUNDANT, HOLE, NOTICED)


def _merge(best: dict[tuple[object, ...], Spoilt], spoilt: Sequence[Spoilt]) -> None:
    """Add mutants: what one launch notices is noticed, and what one alone does not explain is a hole."""
    for x in spoilt:
        if x.key not in best or _BEST.index(x.what) > _BEST.index(best[x.key].what):
            best[x.key] = x


def _spoil(launch: Executable, job: Job, mutants: Sequence[Mutant]) -> list[Spoilt]:
    """Judge mutants of a launch."""
    gates = GATES[job.dtype]
    forward = set(OUTPUTS[launch.kernel]) & set(FORWARD)
    trial, found = Trial(launch, gates.outputs if forward else max(gates)), []
    for mutant in mutants:
        x = launch.program.instructions[mutant.at]
        found.append(
            Spoilt(
                job.target, launch.kernel, launch.program.digest, mutant.at, mutant.kind, x.opcode, mutant.change,
                x.source, *trial.judge(mutant), job.call,
            )
        )  # fmt: skip
    return found


@dataclass(frozen=True)
class Tally:
    """The mutants of a kernel, or of a kind: how many there are of each verdict."""

    name: str
    noticed: int
    redundant: int
    unreached: int
    holes: int

    @classmethod
    def of(cls, name: str, spoilt: Sequence[Spoilt]) -> Tally:
        """Count verdicts."""
        counts = Counter(x.what for x in spoilt)
        return cls(name, counts[NOTICED], counts[REDUNDANT], counts[UNREACHED], counts[HOLE])

    @property
    def share(self) -> float:
        """The share noticed of what is neither redundant nor unreached."""
        return self.noticed / max(self.noticed + self.holes, 1)

    def __str__(self) -> str:
        share = f"{self.share:6.1%}" if self.noticed + self.holes else f"{'-':>6}"
        return f"{self.name:26} {self.noticed:7} {share} {self.holes:5} {self.redundant:9} {self.unreached:9}"


def tallies(spoilt: Sequence[Spoilt]) -> list[Tally]:
    """Return the tallies of targets and kernels, of kinds, and of all."""
    kernels = sorted({(x.target, x.kernel) for x in spoilt})
    return [
        *(Tally.of(" ".join(pair), [x for x in spoilt if (x.target, x.kernel) == pair]) for pair in kernels),
        *(Tally.of(kind, [x for x in spoilt if x.kind == kind]) for kind in KINDS),
        Tally.of("all", spoilt),
    ]


def lines(spoilt: Sequence[Spoilt]) -> Iterator[str]:
    """Yield the tables: tallies, which checks noticed what, why the rest was not noticed, and the holes."""
    yield f"{'':26} {'noticed':>7} {'share':>6} {'holes':>5} {'redundant':>9} {'unreached':>9}"
    yield from map(str, tallies(spoilt))
    for what in (NOTICED, REDUNDANT, HOLE):
        yield f"\n{what}"
        counts = Counter((x.kind, x.why) for x in spoilt if x.what == what)
        for (kind, why), n in sorted(counts.items(), key=lambda x: (KINDS.index(x[0][0]), -x[1])):
            yield f"{kind:9} {n:6}  {why}"


def document(spoilt: Sequence[Spoilt], each: int, seed: int) -> dict[str, Any]:
    """Return the tables as plain values, with every hole."""
    reasons = Counter((x.kind, x.what, x.why) for x in spoilt)
    return {
        "each": each,
        "seed": seed,
        "calls": sorted({(x.target, x.call) for x in spoilt}),
        "tallies": [asdict(x) for x in tallies(spoilt)],
        "reasons": [[*key, n] for key, n in sorted(reasons.items())],
        "holes": [x.as_json() for x in spoilt if x.what == HOLE],
    }
