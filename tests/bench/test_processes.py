"""Jobs in processes: what ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from segattn.bench.processes import each

# the first job is done at once, the others would take minutes
SCRIPT = """
import time
from segattn.bench.processes import each
if __name__ == "__main__":
    for _ in each(time.sleep, [0.0, *map(float, range(100, 110))], 2, print):
        print("begun", flush=True)
"""


def test_an_interrupt_ends_all_jobs() -> None:
    """As Ctrl-C in a terminal, which every process gets; and the first alone."""
    for whole in (True, False):
        with subprocess.Popen(
            [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler){SCRIPT}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as ran:
            assert ran.stdout is not None
            assert ran.stdout.readline() == "begun\n"
            (os.killpg if whole else os.kill)(ran.pid, signal.SIGINT)
            _, said = ran.communicate(timeout=60)
        assert ran.returncode != 0
        assert "KeyboardInterrupt" in said


def test_an_error_of_a_job_ends_the_others() -> None:
    begin = time.monotonic()
    with pytest.raises(ValueError, match="must be non-negative"):
        list(each(time.sleep, [-1.0, *map(float, range(100, 110))], 1, lambda job: None))
    assert time.monotonic() - begin < 60
