"""What all commands share: one way to end, one display of progress, files that are written whole or not at all."""

from __future__ import annotations

import io
import os
import re
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")
main = pytest.importorskip("segattn.cli.main")
from matplotlib.figure import Figure
from rich.console import Console
from typer import Exit
from typer.testing import CliRunner

import segattn
from segattn.cli.adapt import recalled
from segattn.cli.conversions import perplexities
from segattn.cli.progress import Progress, Reading, is_due
from segattn.cli.shell import Command, Ending, counts
from segattn.infini.demo.settings import DemoSettings
from segattn.rmt.runs.settings import TrainSettings
from segattn.runs.checkpoint import replacing
from segattn.runs.errors import SettingError
from segattn.runs.interrupts import InterruptedRunError
from segattn.runs.pictures import save_picture
from segattn.runs.settings import absolute, check_same

TRAIN = Command(
    "rmt train",
    {"task": "TASK", "gates_only": "--freeze-but-gates"},
    "go on with: --resume",
    smaller="a smaller --batch",
)


@pytest.mark.parametrize(
    ("error", "message", "status"),
    [
        (SettingError("segment_len", "must be at least 1, got 0"), "--segment-len must be at least 1, got 0", 2),
        (SettingError("task", "must be given"), "TASK must be given", 2),
        (SettingError("gates_only", "must be left out"), "--freeze-but-gates must be left out", 2),
        (ModuleNotFoundError("no", name="transformers"), "needs transformers: pip install 'segattn[hf]'", 1),
        (ImportError("no", name="datasets"), "needs datasets: pip install 'segattn[data]'", 1),
        (ModuleNotFoundError("no", name="peft"), "needs peft: pip install peft", 1),
        (torch.OutOfMemoryError("no"), "out of memory: try a smaller --batch; go on with: --resume", 1),
        (InterruptedRunError(), "stopped, checkpoint written; go on with: --resume", 130),
        (KeyboardInterrupt(), "stopped; go on with: --resume", 130),
    ],
)
def test_errors_that_a_user_can_mend_end_in_a_line(
    error: BaseException, message: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert TRAIN.ending(error) == Ending(message, status)
    with pytest.raises(Exit) as ended, TRAIN.run():
        raise error
    assert ended.value.exit_code == status
    assert capsys.readouterr().err == f"segattn rmt train: {message}\n"


@pytest.mark.parametrize("error", [ValueError("a fault"), ImportError("no", name="segattn.nowhere"), OSError(5, "x")])
def test_faults_of_the_program_keep_their_traceback(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(type(error)), TRAIN.run():
        raise error
    assert capsys.readouterr().err == ""


def test_a_stop_promises_nothing_where_nothing_is(tmp_path: Path) -> None:
    saved = tmp_path / "checkpoint.pt"
    command = Command("demo", again="go on with: --resume", saved=saved.is_file)
    assert command.ending(KeyboardInterrupt()) == Ending("stopped; there is nothing to go on from yet", 130)
    assert command.ending(torch.OutOfMemoryError()) == Ending("out of memory: try smaller sizes", 1)
    saved.touch()
    assert command.ending(KeyboardInterrupt()) == Ending("stopped; go on with: --resume", 130)
    assert Command("check").ending(KeyboardInterrupt()) == Ending("stopped", 130)


def test_counts() -> None:
    assert counts("length", "4096, 32K,1m,4096", "8") == [4096, 2**15, 2**20, 4096]
    for text in ("", "1,", "0", "-1", "1.5", "K", "²"):
        with pytest.raises(SettingError, match="length must be numbers from 1 on with commas, as 2,8, got "):
            counts("length", text, "2,8")


def test_paths_stay_right_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").touch()
    whole = str(tmp_path.resolve() / "text.txt")
    assert DemoSettings(text="text.txt").text == TrainSettings("detect", book="text.txt").book == whole
    assert absolute("nowhere") == "nowhere"
    assert absolute(None) is None


def test_a_resumed_run_keeps_its_settings() -> None:
    check_same({"steps": 3, "lr": 0.1, "text_sha256": "a"}, {"steps": 2, "lr": 0.1, "text_sha256": "a"}, ("steps",))
    with pytest.raises(SettingError, match="lr must be the checkpoint's with --resume, 1, got 2"):
        check_same({"lr": 2}, {"lr": 1}, ("steps",))


@pytest.mark.parametrize(
    ("name", "file", "got"),
    [
        ("text", "b.txt", "'b.txt', which holds another text"),
        ("text", "a.txt", "'a.txt', which holds another text"),
        ("eval_text", None, "another text"),
    ],
)
def test_a_resumed_run_keeps_its_text_and_speaks_of_no_hash(name: str, file: str | None, got: str) -> None:
    now, before = {name: file, f"{name}_sha256": "38e039"}, {name: "a.txt", f"{name}_sha256": "a097b1"}
    with pytest.raises(SettingError) as refused:
        check_same(now, before, (name,))
    assert str(refused.value) == f"{name} must be the earlier run's with --resume, got {got}"
    check_same(now, now | {name: "elsewhere"}, (name,))


def shown(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=100)


def text_of(console: Console) -> str:
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_bars_on_a_terminal_and_lines_elsewhere(terminal: bool) -> None:
    console = shown(terminal)
    with Progress(console) as progress:
        for step in (1, 2, 3):
            progress.bar("train", step, 3, f"loss {step}")
            progress.line(f"step {step}")
        progress.close("train")
        progress.bar("train", 1, 2)
    tasks = [(task.completed, task.total, task.fields["note"]) for task in progress.bars.tasks]
    assert tasks == [(3, 3, "loss 3"), (1, 2, "")]
    if terminal:
        assert "loss 3" in text_of(console)
        assert "step" not in text_of(console)
    else:
        assert text_of(console) == "step 1\nstep 2\nstep 3\n"


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_known_before_a_bar_begins_is_said_everywhere(terminal: bool) -> None:
    console = shown(terminal)
    with Reading(console, "convert-report") as reading:
        reading.finished("one is left out, and why")
        reading.begin(3)
        reading.read(3)
    assert text_of(console).count("one is left out, and why\n") == 1


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("largest", [29812.3, 1.2346e9])
def test_figures_and_heads_are_never_cut(width: int, largest: float) -> None:
    names = ["full attention", "64 gate=-4 lookback=1 sinks=4 memory_layers=10-20", "256 gate=-20"]
    parts = {"quarters": [largest, 298.44, 17.5, 1e-3], "perplexity": 1234.5, "cache_bytes": 298_000 * 2**10}
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    console.print(perplexities([parts | {"conversion": name} for name in names], "Perplexity"))
    title, first, second, rule, *body = filter(str.strip, text_of(console).splitlines())
    assert max(map(len, (first, second, rule, *body))) <= width
    assert title.split() == ["Perplexity"]
    assert first.split() == [*["quarter"] * 4, "kept,"]
    assert second.split() == ["conversion", *"1234", "all", "KiB"]
    # names fold, and are all there
    figures = f"{largest:.4g} 298.4 17.5 0.001 1234 298,000"
    row = re.compile(r" +".join(map(re.escape, figures.split())) + r" *$")
    assert sum(row.search(line) is not None for line in body) == len(names)
    assert "".join(row.sub("", line) for line in body).replace(" ", "") == "".join(names).replace(" ", "")


@pytest.mark.parametrize("width", [60, 80, 100])
def test_passkeys_of_many_places_are_never_cut(width: int) -> None:
    cells = [
        {"conversion": name, "length": length, "depth": depth, "exact": 1.0, "tokens": 1.0}
        for name in ("full attention", "window alone", "adapted")
        for length in (1500, 131072)
        for depth in (0.125, 0.5, 0.9)
    ]
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    console.print(recalled(cells))
    text = text_of(console)
    assert "…" not in text
    assert text.count("100 / 100") == 18
    assert (text.count("131,072"), text.count("at 12.5 %")) == (3, 2)


def test_what_is_complete_is_said_to_be_done() -> None:
    console = shown(False)
    with Reading(console, "passkey") as reading:
        reading.begin(0)
    assert text_of(console) == "already done: nothing is left to do\n"
    console = shown(False)
    with pytest.raises(KeyboardInterrupt), Progress(console):
        raise KeyboardInterrupt
    assert text_of(console) == ""


def test_due_lines_are_spread_evenly() -> None:
    assert [step for step in range(1, 101) if is_due(step, 100, 6)] == [16, 32, 48, 64, 80, 96, 100]
    assert [step for step in range(1, 4) if is_due(step, 3, 20)] == [1, 2, 3]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text("before")
    with suppress(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half of the")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    mask = os.umask(0o027)
    try:
        with replacing(path) as temporary, replacing(tmp_path / "other") as other:
            temporary.write_text("after")
            temporary.chmod(0o600)
            other.touch()
    finally:
        os.umask(mask)
    assert path.read_text() == "after"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["figures.json", "other"]


def test_a_picture_has_the_format_of_its_name(tmp_path: Path) -> None:
    for suffix, begin in (("png", b"\x89PNG"), ("PDF", b"%PDF"), ("svg", b"<?xml"), ("jpg", b"\xff\xd8")):
        save_picture(Figure(figsize=(1, 1)), tmp_path / f"picture.{suffix}")
        assert (tmp_path / f"picture.{suffix}").read_bytes().startswith(begin)
    for name in ("picture", "picture.json"):
        with pytest.raises(ValueError, match=rf"path must end in one of .*\.png, .*, got .*{name}'"):
            save_picture(Figure(figsize=(1, 1)), tmp_path / name)
        assert not (tmp_path / name).exists()


def test_the_version_is_shown() -> None:
    result = CliRunner().invoke(main.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"segattn {segattn.__version__}\n")


def test_python_m_segattn_is_the_command() -> None:
    def run(*arguments: str, **environment: str) -> str:
        command = [sys.executable, "-m", "segattn", *arguments]
        done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    text = run("--help")
    assert "Usage: segattn [OPTIONS] COMMAND" in text
    for command in ("demo", "check", "config", "finetune", "evaluate", "rmt", "plan", "--install-completion"):
        assert command in text
    # what a shell asks when Tab is pressed
    offered = run(_SEGATTN_COMPLETE="complete_bash", COMP_WORDS="segattn ev", COMP_CWORD="1")
    assert offered.split() == ["evaluate"]
