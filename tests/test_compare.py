"""A regression is told from noise, in result files and in commits."""

from __future__ import annotations

import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest

from segattn.bench.compare import Change, away, changes, changes_of_times, main
from segattn.bench.records import Key, Record, Result, ResultError

BASE = "SDPA flash local"


def record(provider: str, ratio: tuple[float, float, float] | None, memory: int = 1000, group: str = "g") -> Record:
    status = "timed" if ratio else "wrong"
    return Record(Key("cpu", group, provider), "forward", BASE, status, ratio=ratio, memory=memory)


def result(name: str, *records: Record) -> Result:
    return Result(name, records, "")


def verdicts(found: list[Change]) -> dict[str, str]:
    return {change.what: change.verdict for change in found}


def test_noise_is_of_both_baselines_or_of_the_provider() -> None:
    before = result("a", record(BASE, (1.0, 0.8, 1.1)), record("ours", (2.0, 1.9, 2.1)))
    after = result("b", record(BASE, (1.05, 1.0, 1.1)), record("ours", (3.0, 2.0, 3.6)))
    (change,) = changes(before, after)
    assert change.times == pytest.approx(1.5)
    # 1 / 0.8 of the first's baseline; 3 / 2 of the second's provider
    assert change.noise == pytest.approx(1.25 * 1.5)
    assert change.verdict == "same"


def test_slower_beyond_the_noise_is_a_regression() -> None:
    quiet = (1.0, 0.99, 1.01)
    before = result("a", record(BASE, quiet), record("ours", (2.0, 1.99, 2.01)), record("theirs", (4.0, 3.9, 4.1)))
    after = result("b", record(BASE, quiet), record("ours", (2.2, 2.19, 2.21)), record("theirs", (2.0, 1.9, 2.1)))
    found = list(changes(before, after))
    assert verdicts(found) == {"ours: g": "SLOWER", "theirs: g": "faster"}
    assert [x.is_regression for x in found] == [True, False]
    # the same the other way round
    assert verdicts(list(changes(after, before))) == {"ours: g": "faster", "theirs: g": "SLOWER"}


def test_a_repetition_is_the_noise_where_there_is_one() -> None:
    quiet = (1.0, 1.0, 1.0)
    before, after, again = (
        result(name, record(BASE, quiet), record("ours", (x, x, x)))
        for name, x in (("a", 2.0), ("b", 2.4), ("a again", 1.6))
    )
    assert verdicts(list(changes(before, after))) == {"ours: g": "SLOWER"}
    (change,) = changes(before, after, again)
    assert change.noise == pytest.approx(1.25)
    assert change.verdict == "same"


def test_what_is_no_longer_timed_and_memory_are_regressions() -> None:
    quiet = (1.0, 1.0, 1.0)
    before = result("a", record(BASE, quiet), record("ours", quiet), record("wide", quiet, 1000))
    after = result("b", record(BASE, quiet), record("ours", None), record("wide", quiet, 1100))
    found = list(changes(before, after))
    assert math.isnan(found[0].times)
    assert verdicts(found) == {"ours: g, now wrong ": "lost", "wide: g": "same", "memory of wide: g": "MORE MEMORY"}
    assert [x.is_regression for x in found] == [True, False, True]


def test_nothing_in_common_is_said() -> None:
    before, after = (result(x, record("ours", (1.0, 1.0, 1.0), group=x)) for x in "ab")
    with pytest.raises(ResultError, match="a and b must have measurements in common, got none"):
        list(changes(before, after))


def test_commits_are_held_to_the_first_against_itself() -> None:
    first = [10.0, 20.0, 10.0, 20.0, 10.0]
    drifting = [x * y for x, y in zip(first, (1.0, 1.5, 1.0, 0.7, 1.4), strict=True)]
    slower = [1.2 * x for x in first]
    found = list(changes_of_times({"steady": (first, slower, first), "drifting": (first, slower, drifting)}))
    assert verdicts(found) == {"steady": "SLOWER", "drifting": "same"}
    # of 0.7, 1, 1, 1.4, 1.5 the first fifth is 0.94 and the last 1.42
    assert found[1].noise == pytest.approx(1.42)
    assert found[0].times == pytest.approx(1.2)


def test_away() -> None:
    assert away(0.8) == away(1.25) == pytest.approx(1.25)


def test_files_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = Path(__file__).resolve().parents[1]
    file = next((root / "bench" / "results").glob("cpu*.json"))
    assert main([str(file), str(file)]) == 0
    document: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    changed = next(row for row in document["benchmarks"] if row["extra_info"]["provider"] == "segattn delta")
    info = changed["extra_info"]
    for name in ("ratio", "ratio_fifths"):
        if name in info:
            info[name] = [9 * x for x in info[name]] if isinstance(info[name], list) else 9 * info[name]
    other = tmp_path / "b.json"
    other.write_text(json.dumps(document), encoding="utf-8")
    capsys.readouterr()
    assert main([str(file), str(other)]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("SLOWER")]
    assert f"segattn delta: {changed['group']}" in line
    assert " 9.000 ×" in line
    assert "1 regressions in" in out
    other.write_text("{}", encoding="utf-8")
    assert main([str(file), str(other)]) == 2
    assert "must be a result of pytest bench/ or bench/on_device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a.json"], ["a.json", "b.json", "--commits", "x", "y"], ["--rounds", "1"]])
def test_unclear_commands_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


# a stand-in for the package, which sleeps
STAND_IN = """
import time
from typing import NamedTuple
import torch

class Output(NamedTuple):
    out: torch.Tensor

def segment_attention(q, k, v, *, segment_len, gate=None, update="delta"):
    time.sleep({seconds} if gate is None else 0.002)
    return Output(q + k + v)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two commits: at the second, calls without a memory take ten times as long."""
    root = tmp_path / "repository"
    package = root / "src" / "segattn"
    package.mkdir(parents=True)

    def git(*arguments: str) -> None:
        own = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(root), *own, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    for name, seconds in (("fast", 0.02), ("slow", 0.2)):
        (package / "__init__.py").write_text(STAND_IN.format(seconds=seconds))
        git("add", ".")
        git("commit", "--quiet", "--no-verify", "-m", name)
        git("tag", name)
    return root


def test_commits_take_turns(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(repository), "--rounds", "3", "--commits", "fast", "."]) == 1
    out = capsys.readouterr().out
    slower = {line.rpartition(")  ")[2] for line in out.splitlines() if line.startswith("SLOWER")}
    assert {"local, forward", "local, forward + backward"} <= slower
    # the stand-in has no decoding
    assert "decode" not in out
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1
    assert main(["--root", str(repository), "--rounds", "3", "--commits", "fast", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err
