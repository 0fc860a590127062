"""A command of `bench/` whose packages are missing says in one line what to install."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import python

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "compiled": ("rich", "cli"),
    "report": ("matplotlib", "cli"),
    "experiments.book": ("rich, matplotlib", "cli,hf"),
    "experiments.baselines": ("rich, matplotlib", "cli,hf"),
    "experiments.lengths": ("rich, matplotlib", "cli,hf"),
    "experiments.million": ("rich", "cli"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_missing_is_said_in_a_line(name: str) -> None:
    pytest.importorskip("transformers")
    module, (missing, extras) = f"segattn.bench.{name}", COMMANDS[name]
    blocked = "import sys, runpy; sys.modules.update(dict.fromkeys(('rich', 'typer', 'matplotlib')))"
    command = f"{blocked}; runpy.run_module({module!r}, run_name='__main__')"
    done = python("-c", command)
    assert done.returncode == 1
    assert done.stderr == f"python -m {module} needs {missing}: pip install 'segattn[{extras}]'\n"


def test_the_suite_without_pytest_benchmark_is_a_usage_error() -> None:
    options = ["-p", "no:benchmark", "-p", "no:cacheprovider", "--collect-only"]
    done = python("-m", "pytest", "bench/", *options, cwd=ROOT)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "pytest bench/ needs pytest-benchmark: pip install 'segattn[bench]'" in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
