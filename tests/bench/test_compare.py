"""A regression is told from noise, in result files and in commits."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from segattn.bench.report.compare import Change, away, change_of_time, changes, changes_of_times, main, unlike
from segattn.bench.report.compare_commits import error_of
from segattn.bench.report.records import Result
from segattn.bench.speed.rows import ResultError, Row, as_json
from segattn.bench.speed.timing import Times

BASE = "SDPA flash local"


def record(peer: str, ratio: tuple[float, float, float] | None, memory: int = 1000, group: str = "g") -> Row:
    row = Row(group, peer, BASE, "forward", memory=memory, device="cpu")
    return row.refused("wrong") if ratio is None else dataclasses.replace(row, ratio=Times(*ratio))


def result(name: str, *rows: Row) -> Result:
    return Result(name, rows, "")


def verdicts(found: list[Change]) -> dict[str, str]:
    return {change.what: change.verdict for change in found}


def test_noise_is_of_both_baselines_or_of_the_peer() -> None:
    before = result("a", record(BASE, (1.0, 0.8, 1.1)), record("segattn", (2.0, 1.9, 2.1)))
    after = result("b", record(BASE, (1.05, 1.0, 1.1)), record("segattn", (3.0, 2.0, 3.6)))
    (change,) = changes(before, after)
    assert change.times == pytest.approx(1.5)
    # 1 / 0.8 of the first's baseline; 3 / 2 of the second's peer
    assert change.noise == pytest.approx(1.25 * 1.5)
    # so much would hide a regression
    assert change.verdict == "cannot tell"
    assert (change.is_regression, change.is_unclear) == (False, True)


def ours(times: float, noise: float, ms: tuple[float, float] | None = None) -> Change:
    return change_of_time("segattn delta: g", times, noise, True, ms)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        (ours(1.0, 1.24), "same"),
        (ours(1.0, 1.26), "cannot tell"),
        (ours(1.02, 1.0), "same"),
        (ours(1.5, 1.26), "SLOWER"),
        (ours(1.5, 1.6), "cannot tell"),
        (ours(1 / 1.5, 1.26), "faster"),
        # the baseline alone took twice as long, or half
        (ours(0.5, 1.1, (10.0, 10.2)), "cannot tell"),
        (ours(2.0, 1.1, (10.0, 10.2)), "cannot tell"),
        # the machine is half as fast
        (ours(1.0, 1.1, (10.0, 20.0)), "same"),
        (ours(0.5, 1.1, (10.0, 5.0)), "faster"),
        (ours(2.0, 1.1, (10.0, 20.0)), "SLOWER"),
    ],
)
def test_verdicts(change: Change, verdict: str) -> None:
    assert change.verdict == verdict
    theirs = dataclasses.replace(change, is_ours=False)
    assert (theirs.is_regression, theirs.is_unclear) == (False, False)
    assert change.is_regression == (verdict == "SLOWER")
    assert change.is_unclear == (verdict == "cannot tell")


def test_slower_beyond_the_noise_is_a_regression() -> None:
    quiet = (1.0, 0.99, 1.01)
    old, new = (2.0, 1.99, 2.01), (2.2, 2.19, 2.21)
    before = result("a", record(BASE, quiet), record("segattn", old), record("theirs", (4.0, 3.9, 4.1)))
    after = result("b", record(BASE, quiet), record("segattn", new), record("theirs", (2.0, 1.9, 2.1)))
    found = list(changes(before, after))
    assert verdicts(found) == {"segattn: g": "SLOWER", "theirs: g": "faster"}
    assert [x.is_regression for x in found] == [True, False]
    # the same the other way round; what others have lost is not ours
    found = list(changes(after, before))
    assert verdicts(found) == {"segattn: g": "faster", "theirs: g": "SLOWER"}
    assert [x.is_regression for x in found] == [False, False]


def test_a_repetition_is_the_noise_where_there_is_one() -> None:
    quiet = (1.0, 1.0, 1.0)
    before, after, again = (
        result(name, record(BASE, quiet), record("segattn", (x, x, x)))
        for name, x in (("a", 2.0), ("b", 2.4), ("a again", 1.61))
    )
    assert verdicts(list(changes(before, after))) == {"segattn: g": "SLOWER"}
    (change,) = changes(before, after, again)
    assert change.noise == pytest.approx(2 / 1.61)
    assert change.verdict == "same"


def test_one_repetition_that_agrees_is_no_silence() -> None:
    names = [f"segattn {i}" for i in range(6)]

    def of(name: str, ratios: list[float]) -> Result:
        pairs = zip(names, ratios, strict=True)
        return result(name, record(BASE, (1.0, 1.0, 1.0)), *(record(own, (x, x, x)) for own, x in pairs))

    before, after = of("a", [1.0] * 6), of("b", [1.1] + [1.0] * 5)
    found = list(changes(before, after, of("a again", [1.0, 1.2, 0.8, 1.15, 1.2, 1.0])))
    # of 1, 1, 1.15, 1.2, 1.2, 1.25 four of five
    assert [x.noise for x in found] == pytest.approx([1.2, 1.2, 1.25, 1.2, 1.2, 1.2])
    assert {x.verdict for x in found} == {"same"}
    assert next(changes(before, after, of("a again", [1.0] * 6))).verdict == "SLOWER"


def test_what_is_no_longer_timed_and_memory_are_regressions() -> None:
    quiet = (1.0, 1.0, 1.0)
    wide = "torch backend"
    before = result("a", record(BASE, quiet), record("segattn", quiet), record(wide, quiet, 1000))
    after = result("b", record(BASE, quiet), record("segattn", None), record(wide, quiet, 1100))
    found = list(changes(before, after))
    assert found[0].times is None
    said = {"segattn: g, now wrong ": "lost", f"{wide}: g": "same", f"memory of {wide}: g": "MORE MEMORY"}
    assert verdicts(found) == said
    assert [x.is_regression for x in found] == [True, False, True]


def test_what_is_gone_is_said() -> None:
    quiet = (1.0, 1.0, 1.0)
    names = ("segattn", "theirs")
    before = result("a", *(record(name, quiet, group=group) for group in "gh" for name in (BASE, *names)))
    after = result("b", record(BASE, quiet))
    found = list(changes(before, after))
    assert verdicts(found) == {
        "segattn: g": "lost", "theirs: g": "lost",
        f"{BASE}: h": "not in B", "segattn: h": "not in B", "theirs: h": "not in B",
    }  # fmt: skip
    assert [x.what for x in found if x.is_regression] == ["segattn: g"]
    assert [x.what for x in found if x.is_unclear] == ["segattn: h"]


def test_conditions_that_differ_are_said() -> None:
    before, after = (
        Result(name, (), "", {"threads": threads, "torch": "2.13", **more})
        for name, threads, more in (("a", 1, {}), ("b", 2, {"python": "3.11"}))
    )
    assert list(unlike(before, after)) == ["threads 1 → 2"]
    assert list(unlike(before, before)) == []


def test_nothing_in_common_is_said() -> None:
    before, after = (result(x, record("ours", (1.0, 1.0, 1.0), group=x)) for x in "ab")
    with pytest.raises(ResultError, match="a and b must have measurements in common, got none"):
        list(changes(before, after))


def test_commits_are_held_to_the_first_against_itself() -> None:
    first = [10.0, 20.0, 10.0, 20.0, 10.0]
    drifting = [x * y for x, y in zip(first, (1.0, 1.5, 1.0, 0.7, 1.4), strict=True)]
    slower = [1.2 * x for x in first]
    found = list(changes_of_times({"steady": (first, slower, first), "drifting": (first, slower, drifting)}))
    assert verdicts(found) == {"steady": "SLOWER", "drifting": "cannot tell"}
    # of 0.7, 1, 1, 1.4, 1.5 the first fifth is 0.94 and the last 1.42
    assert found[1].noise == pytest.approx(1.42)
    assert found[0].times == pytest.approx(1.2)


def test_away() -> None:
    assert away(0.8) == away(1.25) == pytest.approx(1.25)


def suite() -> dict[str, Any]:
    """As `pytest bench/ --benchmark-json` writes it."""

    known: dict[str, Any] = {"ms": Times(3.0, 2.9, 3.1), "errors": {"out": 1e-7}, "seconds": [3e-3] * 3}
    known |= {"case": {"T": 32, "dtype": "float32"}}
    rows = [
        dataclasses.replace(record(provider, (x, 0.99 * x, 1.01 * x), group="small, forward"), **known)
        for provider, x in ((BASE, 1.0), ("segattn delta", 3.0))
    ]
    machine = {"device": "cpu", "cpu_capability": "AVX2", "threads": 2, "torch": "2.13.0", "python": "3.11"}
    commit = {"id": "0123456789abcdef", "dirty": False}
    return {"machine_info": machine, "commit_info": commit} | as_json(rows)


def test_files_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, other = tmp_path / "a.json", tmp_path / "b.json"
    document = suite()
    file.write_text(json.dumps(document), encoding="utf-8")
    assert main([str(file), str(file)]) == 0
    document["machine_info"]["threads"] = 1
    info = document["benchmarks"][1]["extra_info"]
    for name, value in (("ratio", 9.0), ("ratio_fifths", [8.9, 9.1]), ("ms", 27.0), ("ms_fifths", [26.0, 28.0])):
        info[name] = value
    other.write_text(json.dumps(document), encoding="utf-8")
    capsys.readouterr()
    assert main([str(file), str(other)]) == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("SLOWER")]
    assert "segattn delta: small, forward" in line
    assert " 3.000 ×" in line
    assert "3 → 27 ms" in line
    assert "1 regressions in 1 comparisons, 0 cannot be told" in out
    assert "conditions differ: threads 2 → 1\n" in out
    # so wide that nothing can be told
    info["ratio_fifths"] = [1.0, 30.0]
    other.write_text(json.dumps(document), encoding="utf-8")
    assert main([str(other), str(other)]) == 3
    out = capsys.readouterr().out
    assert out.startswith("cannot tell    1.000 × (noise")
    assert "0 regressions in 1 comparisons, 1 cannot be told" in out
    other.write_text("{}", encoding="utf-8")
    assert main([str(file), str(other)]) == 2
    assert "must be a result of pytest bench/ or bench/on_device" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a.json"], ["a.json", "b.json", "--commits", "x", "y"], ["--rounds", "1"]])
def test_unclear_commands_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2


# a stand-in for the package, whose calls take time by a clock of its own
STAND_IN = """
import time
from typing import NamedTuple
import torch

now = 0.0
time.perf_counter = lambda: now

class Output(NamedTuple):
    out: torch.Tensor

def segment_attention(q, k, v, *, segment_len, gate=None, update="delta"):
    global now
    now += {seconds} if gate is None else 0.002
    return Output(q + k + {weight} * v)
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Three commits: at the second, calls without a memory take ten times as long; the third gives other outputs."""
    root = tmp_path / "repository"
    package = root / "src" / "segattn"
    package.mkdir(parents=True)

    def git(*arguments: str) -> None:
        own = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(root), *own, *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    for name, seconds, weight in (("fast", 0.005, 1), ("slow", 0.05, 1), ("wrong", 0.001, 1.01)):
        (package / "__init__.py").write_text(STAND_IN.format(seconds=seconds, weight=weight))
        git("add", ".")
        git("commit", "--quiet", "--no-verify", "-m", name)
        git("tag", name)
    return root


def test_commits_take_turns(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(repository), "--rounds", "3", "--commits", "fast", "slow"]) == 1
    out = capsys.readouterr().out
    found = {line.rpartition(")  ")[2]: line[:35] for line in out.splitlines() if " × " in line}
    slower = {name for name, line in found.items() if line.startswith("SLOWER        10.000 × (noise 1.000")}
    assert slower == {"local, forward", "local, forward + backward"}
    assert {line.split()[0] for name, line in found.items() if name not in slower} == {"same"}
    # the stand-in has no decoding
    assert "decode" not in out
    listed = subprocess.run(["git", "-C", str(repository), "worktree", "list"], capture_output=True, text=True)
    assert len(listed.stdout.splitlines()) == 1


def test_a_commit_that_is_wrong_is_not_timed(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--root", str(repository), "--rounds", "3", "--commits", "slow", "."]) == 1
    out = capsys.readouterr().out
    assert "faster" not in out
    assert "DIFFERS      local, forward: outputs are " in out
    assert "6 regressions in 6 comparisons" in out


def test_what_is_no_commit_is_named(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--root", str(repository), "--rounds", "3", "--commits"]
    assert main([*command, "fast", "nowhere"]) == 2
    assert capsys.readouterr().err == "REV2 must be a commit, got 'nowhere'\n"
    assert main([*command, "nosuch", "."]) == 2
    assert capsys.readouterr().err == "REV1 must be a commit, got 'nosuch'\n"
    assert main(["--root", str(tmp_path), "--commits", "a", "b"]) == 2
    assert "not a git repository" in capsys.readouterr().err


def test_errors_of_outputs() -> None:
    x = torch.tensor([1.0, -4.0])
    assert error_of([x, x], [x, x + torch.tensor([0.0, 0.02])]) == pytest.approx(0.005)
    for other in (x[:1], x.double(), torch.tensor([1.0, math.nan])):
        assert error_of([x], [other]) == math.inf
    assert error_of([x], []) == math.inf
