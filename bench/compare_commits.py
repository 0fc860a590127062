"""Times of two commits, and of the first once more, in processes that take turns."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from .device_worker import Worker

ROUNDS = 15
SECONDS = 300.0
MEASURING = Path(__file__).resolve().with_name("compare_calls.py")
HERE = "."

Times = tuple[list[float], list[float], list[float]]


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
def checkout(root: Path, revision: str, folder: Path) -> Iterator[Path]:
    """The commit's files in `folder`, for as long as they are needed; "." is the files as they lie in `root`."""
    if revision == HERE:
        yield root
        return
    commit = _git(root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    _git(root, "worktree", "add", "--detach", "--quiet", str(folder), commit)
    try:
        yield folder
    finally:
        _git(root, "worktree", "remove", "--force", str(folder))


def measure(root: Path, before: str, after: str, rounds: int) -> dict[str, Times]:
    """Milliseconds of every call of `compare_calls` by `before`, `after`, and `before` again, round by round.

    Raises:
        CommitError: one of them is no commit, or does not run.
    """
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="segattn-compare-")))
        folders = [
            stack.enter_context(checkout(root, revision, temporary / name))
            for revision, name in ((before, "before"), (after, "after"))
        ]
        names = (before, after, f"{before} again")
        workers = [stack.enter_context(_process(folder)) for folder in (*folders, folders[0])]
        calls = [_ask(worker, name, {"do": "calls"}) for worker, name in zip(workers, names, strict=True)]
        shared = [call for call in calls[0] if call in calls[1]]
        if not shared:
            raise CommitError(f"{before} and {after} must run a call in common, got none")
        found: dict[str, Times] = {call: ([], [], []) for call in shared}
        for number in range(rounds):
            for call in shared:
                # each round begins with another
                for i in [(number + i) % 3 for i in range(3)]:
                    found[call][i].append(_ask(workers[i], names[i], {"do": "time", "call": call}))
    return found


def _process(folder: Path) -> Worker:
    # the folder of the measuring file has modules of this commit
    own = {"PYTHONPATH": str(folder / "src"), "PYTHONSAFEPATH": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    environment = os.environ | own
    return Worker(environment, (sys.executable, str(MEASURING), str(folder / "src")))


def _ask(worker: Worker, name: str, job: dict[str, str]) -> Any:
    outcome = worker.do(job, SECONDS)
    if outcome.record is None:
        raise CommitError(f"{name} must run, got: {outcome.reason}")
    return outcome.record
