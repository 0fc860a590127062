"""A process that does jobs one after another: ended where a job takes too long, started again where it died."""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import IO, Any, NamedTuple

from ..speed.machine import ROOT, plain

COMMAND = (sys.executable, "-m", "segattn.bench.device.jobs")


class Outcome(NamedTuple):
    """A job's record, or why there is none, and the name of what was running then."""

    record: Any = None
    reason: str | None = None
    at: str | None = None


class Worker:
    """A process that does jobs; as a context manager, none is left behind."""

    def __init__(self, environment: dict[str, str], command: Sequence[str] = COMMAND) -> None:
        self.environment, self.command = environment, command
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str | None] = queue.Queue()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End the process, if there is one."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def _begin(self) -> subprocess.Popen[str]:
        if self.process is None or self.process.poll() is not None:
            self.end()
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                env=self.environment,
            )
            self.answers = queue.Queue()
            threading.Thread(target=_read, args=(self.process.stdout, self.answers), daemon=True).start()
        return self.process

    def do(self, job: dict[str, Any], seconds: float) -> Outcome:
        """Return the outcome of a job, within `seconds`."""
        end = time.monotonic() + seconds
        process = self._begin()
        assert process.stdin is not None
        at = None
        try:
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            while True:
                line = self.answers.get(timeout=max(0.0, end - time.monotonic()))
                if line is None:
                    status = process.wait(5)
                    self.end()
                    return Outcome(reason=f"its process ended with status {status}", at=at)
                answer = json.loads(line)
                if "at" in answer:
                    at = answer["at"]
                    continue
                if answer.get("lost"):
                    self.end()
                return Outcome(answer.get("record"), answer.get("error"), at if answer.get("lost") else None)
        except queue.Empty:
            self.end()
            return Outcome(reason=f"ended after {seconds:.0f} s", at=at)
        except (BrokenPipeError, subprocess.TimeoutExpired) as error:
            self.end()
            return Outcome(reason=plain(error), at=at)


def _read(stream: IO[str], answers: queue.Queue[str | None]) -> None:
    for line in stream:
        answers.put(line)
    answers.put(None)
