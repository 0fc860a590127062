"""Times of two commits, and of the first once more, in processes that take turns."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..device.worker import Worker

ROUNDS = 15
SECONDS = 300.0
MEASURING = Path(__file__).resolve().with_name("compare_calls.py")
HERE = "."

# the largest difference that is no error, as a share of the largest number
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}

Times = tuple[list[float], list[float], list[float]]


class Measured(NamedTuple):
    """The times of calls with the same outputs, by REV1, REV2, and REV1 again; the errors of the other calls."""

    times: dict[str, Times]
    unlike: dict[str, float]


class CommitError(ValueError):
    """A commit that is not there, or does not run."""


def _git(root: Path, *arguments: str) -> str:
    if shutil.which("git") is None:
        raise CommitError("comparing commits needs git")
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise CommitError(f"git {' '.join(arguments)} must succeed, got: {done.stderr.strip()}")
    return done.stdout.strip()


@contextmanager
def checkout(root: Path, name: str, revision: str, folder: Path) -> Iterator[Path]:
    """Put the commit's files into `folder` for as long as the block runs; "." is the files as they lie in `root`.

    Raises:
        CommitError: The revision is no commit.
    """
    if revision == HERE:
        yield root
        return
    _git(root, "rev-parse", "--git-dir")
    try:
        commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    except CommitError:
        raise CommitError(f"{name} must be a commit, got {revision!r}") from None
    _git(root, "worktree", "add", "--detach", "--quiet", str(folder), commit)
    try:
        yield folder
    finally:
        _git(root, "worktree", "remove", "--force", str(folder))


def measure(root: Path, before: str, after: str, rounds: int) -> Measured:
    """Return the milliseconds of every call by `before`, `after`, and `before` again, round by round.

    A call with other outputs is not timed.

    Raises:
        CommitError: One of them is no commit, or does not run.
    """
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="segattn-compare-")))
        folders = [
            stack.enter_context(checkout(root, name, revision, temporary / name))
            for revision, name in ((before, "REV1"), (after, "REV2"))
        ]
        names = (before, after, f"{before} again")
        workers = [stack.enter_context(_process(folder)) for folder in (*folders, folders[0])]
        calls = [_ask(worker, name, {"do": "calls"}) for worker, name in zip(workers, names, strict=True)]
        shared = [call for call in calls[0] if call in calls[1]]
        if not shared:
            raise CommitError(f"{before} and {after} must run a call in common, got none")
        unlike = {}
        for call in shared:
            one, other = (_outputs(workers[i], names[i], call, temporary / f"{i}.pt") for i in range(2))
            error = error_of(one, other)
            if error > TOLERANCES[one[0].dtype]:
                unlike[call] = error
        found: dict[str, Times] = {call: ([], [], []) for call in shared if call not in unlike}
        for number in range(rounds):
            for call in found:
                # each round begins with another
                for i in [(number + i) % 3 for i in range(3)]:
                    found[call][i].append(_ask(workers[i], names[i], {"do": "time", "call": call}))
    return Measured(found, unlike)


def _outputs(worker: Worker, name: str, call: str, path: Path) -> list[Tensor]:
    _ask(worker, name, {"do": "outputs", "call": call, "path": str(path)})
    outputs: list[Tensor] = torch.load(path, weights_only=True)
    return outputs


def error_of(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Return the largest difference as a share of the largest number; infinite where they cannot be compared."""
    if len(before) != len(after):
        return math.inf
    errors = [0.0]
    for x, y in zip(before, after, strict=True):
        if x.shape != y.shape or x.dtype != y.dtype or not y.isfinite().all():
            return math.inf
        errors.append(((x.double() - y.double()).abs().max() / x.double().abs().max().clamp(min=1e-30)).item())
    return max(errors)


def _process(folder: Path) -> Worker:
    # the folder of the script has modules of this commit
    own = {"PYTHONPATH": str(folder / "src"), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = os.environ | own
    return Worker(environment, (sys.executable, str(MEASURING), str(folder / "src")))


def _ask(worker: Worker, name: str, job: dict[str, str]) -> Any:
    outcome = worker.do(job, SECONDS)
    if outcome.record is None:
        raise CommitError(f"{name} must run, got: {outcome.reason}")
    return outcome.record
