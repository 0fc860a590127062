"""Spoil executed code, one instruction at a time, and count what the checks notice."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...kernels.check.gates import DTYPES, GATES
from ...kernels.check.gates import OUTPUTS as FORWARD
from ...kernels.triton.configs import TARGETS
from ..processes import each as each_of
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
    """A folder of mutants, a file for each launch, that need not be judged again while all code is the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / executor("mutants", "trials")
        self.folder.mkdir(parents=True, exist_ok=True)

    def of(self, digest: str, job: Job, number: int) -> list[Spoilt]:
        """Return the mutants of one launch, by its number in the call."""
        return [x for _, x in _read(self._place(digest, job, number))]

    def noticed(self, digest: str, jobs: Collection[Job]) -> set[tuple[object, ...]]:
        """Return the keys of a program's mutants that a launch of some calls notices."""
        spoilt = (pair for place in self.folder.glob(f"{digest}-*.jsonl") for pair in _read(place))
        return {x.key for job, x in spoilt if job in jobs and x.what == NOTICED}

    def add(self, digest: str, job: Job, number: int, spoilt: Spoilt) -> None:
        """Keep a mutant of a launch."""
        with self._place(digest, job, number).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"job": job, "spoilt": spoilt.as_json()}) + "\n")

    def _place(self, digest: str, job: Job, number: int) -> Path:
        name = hashlib.blake2b(repr((job, number)).encode(), digest_size=8).hexdigest()
        return self.folder / f"{digest}-{name}.jsonl"


def _read(place: Path) -> Iterator[tuple[Job, Spoilt]]:
    """Yield the mutants of a file, but for a line that is still written; none if there is no file."""
    text = place.read_text(encoding="utf-8") if place.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        values = json.loads(line)
        yield Job(*values["job"]), Spoilt(**values["spoilt"])


def spoil_all(
    jobs: Sequence[Job],
    kernels: Collection[str],
    each: int,
    seed: int,
    folder: Path,
    workers: int,
    tell: Callable[[Job], None],
) -> list[Spoilt]:
    """Spoil the launches of kernels in calls, and return every mutant once, with the best that came of it.

    Args:
        each: mutants of a kind in a program, but for those of which all are tried; drawn by `seed`.
        folder: where mutants are kept, and what launches write, as `emulating` takes it.
        workers: processes.
        tell: is called when a call is done.

    Raises:
        RuntimeError: a process ended.
    """
    spoil = partial(_spoil_call, jobs=jobs, kernels=kernels, each=each, seed=seed, folder=folder)
    done: dict[Job, list[Spoilt]] = {}
    for job, spoilt in map(spoil, jobs) if workers == 1 else each_of(spoil, jobs, workers, _ended):
        done[job] = spoilt
        tell(job)
    return _best(x for job in jobs for x in done[job])


def _ended(job: Job) -> tuple[Job, list[Spoilt]]:
    raise RuntimeError(f"{job}: its process ended, perhaps for want of memory: try fewer --jobs")


def _spoil_call(
    job: Job, jobs: Sequence[Job], kernels: Collection[str], each: int, seed: int, folder: Path
) -> tuple[Job, list[Spoilt]]:
    """Spoil the launches of kernels in a call, and return it with the mutants.

    Left out is what an earlier launch, or one of the calls before this among `jobs`, has been seen to notice.
    """
    case, numbers, judged = CASES[job.call], itertools.count(), Judged(folder / "mutations")
    before, done = jobs[: jobs.index(job)], list[Spoilt]()

    def spoil(launch: Executable) -> None:
        number, digest = next(numbers), launch.program.digest
        if launch.kernel not in kernels:
            return
        mutants = {(digest, *x[:3]): x for x in sample(launch.program, each, seed)}
        known = [x for x in judged.of(digest, job, number) if x.key in mutants]
        settled = {x.key for x in known} | {x.key for x in done if x.what == NOTICED} | judged.noticed(digest, before)
        done.extend(known)
        for made in _spoil(launch, job, [mutant for key, mutant in mutants.items() if key not in settled]):
            judged.add(digest, job, number, made)
            done.append(made)

    with emulating(TARGETS[job.target], kept=folder, before=spoil):
        case.evaluate(case.draw(DTYPES[job.dtype]), "triton")
    return job, done


_ORDER = (UNREACHED, REDUNDANT, HOLE, NOTICED)


def _best(spoilt: Iterable[Spoilt]) -> list[Spoilt]:
    """Return every mutant once: what one launch notices is noticed, and what one alone does not explain is a hole."""
    best: dict[tuple[object, ...], Spoilt] = {}
    for x in spoilt:
        if x.key not in best or _ORDER.index(x.what) > _ORDER.index(best[x.key].what):
            best[x.key] = x
    return list(best.values())


def _spoil(launch: Executable, job: Job, mutants: Sequence[Mutant]) -> Iterator[Spoilt]:
    """Judge mutants of a launch."""
    gates = GATES[job.dtype]
    forward = set(OUTPUTS[launch.kernel]) & set(FORWARD)
    if not mutants:
        return
    trial = Trial(launch, gates.outputs if forward else max(gates))
    for mutant in mutants:
        x = launch.program.instructions[mutant.at]
        yield Spoilt(
            job.target, launch.kernel, launch.program.digest, mutant.at, mutant.kind, x.opcode, mutant.change,
            x.source, *trial.judge(mutant), job.call,
        )  # fmt: skip


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
    """Yield the tables: tallies, which checks noticed what, why the rest was not noticed, and where each hole is."""
    yield f"{'':26} {'noticed':>7} {'share':>6} {'holes':>5} {'redundant':>9} {'unreached':>9}"
    yield from map(str, tallies(spoilt))
    for what in (NOTICED, REDUNDANT, HOLE):
        yield f"\n{what}"
        counts = Counter((x.kind, x.why) for x in spoilt if x.what == what)
        for (kind, why), n in sorted(counts.items(), key=lambda x: (KINDS.index(x[0][0]), -x[1])):
            yield f"{kind:9} {n:6}  {why}"
    for x in (x for x in spoilt if x.what == HOLE):
        yield f"  {x.target} {x.kernel} ({x.source}): {x.instruction}, {x.change}; {x.call}"


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
