"""What `segattn rmt` shows of a run, on a terminal and in a file, and what it says when Ctrl-C comes early."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from rich.console import Console
from typer.testing import CliRunner

from segattn.cli import rmt as command
from segattn.cli import shell
from segattn.rmt.runs import attention_maps, evaluation, plots, training
from segattn.rmt.runs import folder as run_folder
from segattn.rmt.runs.curriculum import Stage, Step
from segattn.rmt.runs.plots import Panel
from segattn.rmt.runs.settings import TrainSettings
from segattn.rmt.tasks import make as tasks
from segattn.runs.errors import SettingError
from segattn.runs.text import generate_text

ROOT = Path(__file__).resolve().parents[2]
SMALL = "--vocabulary 0 --layers 1 --width 16 --heads 2 --memory 3 --segment-len 19 --batch 4 --device cpu".split()
TRAIN = ["detect", *SMALL, "--test-samples", "7", "--steps", "50", "--threshold", "1"]


@pytest.fixture(scope="module", autouse=True)
def little_text() -> Iterator[None]:
    """Less generated text, since every run makes it again."""
    with pytest.MonkeyPatch.context() as patch:
        text = generate_text(6000, seed=0)
        patch.setattr(tasks, "generate_text", lambda words, seed: text)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The folder of a run with short segments, and the lines that it showed."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    stages = ["--short", "17", "--short-segments", "2", "--segments", "1,2", "--anneal", "50"]
    result = invoke("train", *TRAIN, *stages, "--out", str(folder))
    assert result.exit_code == 0, result.output
    return folder, result.stdout.splitlines()


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(commands.app, ["rmt", *arguments])


def pressed(*arguments: Any, **options: Any) -> Any:
    raise KeyboardInterrupt


def terminal() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def shown(call: Callable[[Console], None], width: int = 80) -> list[str]:
    """Lines in a file, as the commands print them."""
    console = Console(file=io.StringIO(), width=width, soft_wrap=True, highlight=False)
    call(console)
    written: Any = console.file
    return list(written.getvalue().splitlines())


def test_a_run_killed_in_a_stages_test_goes_on_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["train", *TRAIN, "--short", "none", "--segments", "1,2", "--out", str(tmp_path)]
    with monkeypatch.context() as patch:
        # the checkpoint of step 50 is written, and the stage's test is not done
        patch.setattr(training, "count_right", pressed)
        assert invoke(*given).exit_code == 130
    made: list[command.Stages] = []

    class Seen(command.Stages):
        def __init__(self, console: Console) -> None:
            super().__init__(console)
            made.append(self)

    monkeypatch.setattr(command, "Stages", Seen)
    monkeypatch.setattr(shell, "Console", lambda **options: terminal())
    result = invoke("train", "--resume", "--out", str(tmp_path))
    assert result.exit_code == 0, result.exception
    bars = [(task.description, task.completed, task.total, task.fields["note"]) for task in made[0].bars.tasks]
    stages = json.loads((tmp_path / "figures.json").read_text())["stages"]
    notes = [f"test {100 * stage['test_accuracy']:.1f} %, {shortfall(stage)}" for stage in stages]
    assert bars == [("19 tokens", 50, 50, notes[0]), ("2 × 19 tokens", 50, 50, notes[1])]


def test_a_stage_closes_no_other_stages_bar() -> None:
    step = Step(34, 0.5, 0.25, 0.25)
    stage = Stage(34, 2, 17, 40, 1e-3, 0.9)
    figures = {"segments": 2, "tokens": 34, "segment_len": 17, "annealed": False, "steps": 11}
    figures |= {"seconds": 1.0, "test_accuracy": 0.5, "converged": True}
    with command.Stages(terminal()) as bars:
        bars.trained(stage, 11, step)
        # killed in the test of another one
        bars.finished(figures | {"segment_len": 19, "tokens": 38, "steps": 7})
        assert [(task.completed, task.total) for task in bars.bars.tasks] == [(11, 40), (7, 7)]
        bars.finished(figures)
        assert [(task.completed, task.total) for task in bars.bars.tasks] == [(11, 11), (7, 7)]
        # one just like it has a bar of its own
        bars.trained(stage, 3, step)
        assert [(task.completed, task.total) for task in bars.bars.tasks] == [(11, 11), (7, 7), (3, 40)]


def test_losses_shown_are_of_batches_as_long_as_the_stage_says() -> None:
    stage = Stage(34, 2, 17, 100, 1e-3, 0.9)
    steps = [Step(34, 0.25, 1.0, 1.0) if done % 2 else Step(17, 0.125, 1.0, 1.0) for done in range(1, 51)]
    with command.Stages(terminal()) as bars:
        for done, step in enumerate(steps, 1):
            bars.trained(stage, done, step)
        assert bars.bars.tasks[0].completed == 50
        assert bars.bars.tasks[0].fields["note"] == "loss 0.250  right 100.0 %"

    def printed(console: Console) -> None:
        lines = command.Stages(console)
        for done, step in enumerate(steps, 1):
            lines.trained(stage, done, step)

    assert shown(printed) == ["2 × 17 tokens, step 50: loss 0.2500, 100.0 % right"]


def shortfall(stage: dict[str, Any]) -> str:
    return f"not converged (training {100 * stage['training_accuracy']:.1f} % < {100 * stage['threshold']:g} %)"


def test_a_stage_that_is_not_learnt_is_said_to_be(trained: tuple[Path, list[str]]) -> None:
    folder, lines = trained
    stages = json.loads((folder / "figures.json").read_text())["stages"]
    assert [(stage["converged"], stage["threshold"]) for stage in stages] == [(False, 1.0)] * 4 + [(False, None)]
    done = [line for line in lines if " done after " in line]
    for stage, line in zip(stages[:4], done[:4], strict=True):
        assert line.endswith(f"test {100 * stage['test_accuracy']:.1f} %, {shortfall(stage)}")
    # an annealed stage has no threshold
    assert "not converged" not in done[4]
    assert any(line.strip().startswith("* not converged: not 100 %") for line in lines)
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[4].endswith("*") for row in cells] == [True] * 4 + [False]
    [remedy] = [line for line in lines if line.startswith("not converged: ")]
    assert remedy.startswith("not converged: 17 tokens, 2 × 17 tokens, 19 tokens, 2 × 19 tokens; ")
    again = f"segattn rmt train --start {folder} --out ANOTHER --steps MORE"
    assert remedy.endswith(f"{again}, and the other options of the curriculum")
    for name in ("figures.json", "model.safetensors"):
        assert lines[-2 + (name == "model.safetensors")].endswith(str(folder / name))


def test_a_stage_that_is_learnt_needs_no_remedy() -> None:
    stage = {"segments": 1, "tokens": 17, "segment_len": 17, "annealed": False, "steps": 40, "seconds": 1.0}
    stage |= {"converged": True, "training_accuracy": 1.0, "test_accuracy": 1.0, "test_interval": [0.9, 1.0]}
    assert shown(lambda console: command.Stages(console).finished(stage)) == [
        "17 tokens done after 40 steps, 1 s: test 100.0 %"
    ]
    few = stage | {"converged": False, "threshold": 0.99}
    assert shown(lambda console: command.Stages(console).finished(few)) == [
        "17 tokens done after 40 steps, 1 s: test 100.0 %, not converged (too few steps to tell)"
    ]


def test_a_stage_has_one_name(trained: tuple[Path, list[str]]) -> None:
    _, lines = trained
    names = ["17 tokens", "2 × 17 tokens", "19 tokens", "2 × 19 tokens", "2 × 19 tokens annealed"]
    assert [line.split(", step 50: loss ")[0] for line in lines if ", step " in line] == names
    assert [line.split(" done after 50 steps, ")[0] for line in lines if " done after " in line] == names
    rows = [[cell.strip() for cell in line.split("│")[1:3]] for line in lines if line.startswith("│")]
    assert rows == [["1", "17"], ["2 × 17", "34"], ["1", "19"], ["2 × 19", "38"], ["2 × 19 annealed", "38"]]


@pytest.mark.parametrize("heads", [2, 8, 9, 12, 16])
def test_attention_tables_keep_every_digit(heads: int) -> None:
    shares = [[(layer * heads + head) / (6 * heads - 1) for head in range(heads)] for layer in range(6)]
    part = {"segment": 1, "what": "attention of the written memory that falls on facts", "share": shares, "even": 0.1}
    lines = shown(lambda console: console.print(command.attention_tables({"parts": [part]})[0]))
    rows = [line.strip("│").replace("│", " ").split() for line in lines if line.startswith("│")]
    assert rows == [[str(n), *(f"{100 * share:.1f}" for share in row)] for n, row in enumerate(shares)]
    assert rows[-1][-1] == "100.0"
    assert heads > 12 or max(map(len, lines)) <= 80
    assert "…" not in "".join(lines)


def test_attention_pictures_of_many_heads_are_as_wide_as_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_picture", lambda figure, path: drawn.append(figure))

    def size(layers: int, heads: int) -> list[float]:
        maps = np.full((layers, heads, 9, 9), 1 / 9)
        panels = [Panel(f"segment {n}", maps, [(1, 3)], [(4, 6)]) for n in (1, 3)]
        plots.plot_attention(Path("picture.png"), panels, "detect")
        return list(drawn[-1].bbox.size)

    width, height = size(6, 12)
    assert 3000 < width < 4000
    assert 3000 < height < 4000
    # segments below each other, each with its layers, heads across
    *maps, bar = drawn[-1].axes
    assert len(maps) == 2 * 6 * 12
    assert [axes.get_ylabel() for axes in maps[::12]] == [f"segment {n}\nlayer {m}" for n in (1, 3) for m in range(6)]
    assert [axes.get_title() for axes in maps[:13]] == [*(f"head {n}" for n in range(12)), ""]
    assert bar.get_ylabel()
    assert max(size(1, 2)) < 1000


def test_ctrl_c_promises_nothing_where_nothing_is(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = str(trained[0]), tmp_path / "a folder"
    monkeypatch.setattr(training, "build", pressed)
    monkeypatch.setattr(attention_maps, "load_run", pressed)
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "answer", pressed)
        early = [invoke("evaluate", folder, "--segments", "2", "--device", "cpu", "--out", str(out))]
    early += [invoke("train", *TRAIN, "--out", str(out)), invoke("attention", folder, "--out", str(out))]
    assert [result.exit_code for result in early] == [130] * 3
    assert [result.stderr for result in early] == [
        "segattn rmt evaluate: stopped; there is nothing to go on from yet\n",
        "segattn rmt train: stopped; there is nothing to go on from yet\n",
        "segattn rmt attention: stopped\n",
    ]
    resumed = invoke("train", "--resume", "--out", folder)
    assert resumed.stderr == f"segattn rmt train: stopped; go on with: segattn rmt train --resume --out {folder}\n"


def test_ctrl_c_in_an_evaluation_says_how_to_go_on(
    trained: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["evaluate", str(trained[0]), "--segments", "2", "--samples", "4", "--batch", "2", "--device", "cpu"]
    given += ["--out", str(tmp_path)]
    answer, calls = evaluation.answer, []

    def second(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return pressed() if len(calls) == 2 else answer(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "answer", second)
        result = invoke(*given)
    assert result.exit_code == 130
    assert result.stderr == "segattn rmt evaluate: stopped; go on with the same command and --resume\n"
    result = invoke(*given, "--resume")
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "evaluation.json").read_text())["lengths"][0]["samples"] == 4


def documented() -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The arguments of each `segattn rmt train` in docs/results.md, and the settings in the figures that it made."""
    text = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("\\\n", " ")
    results = ROOT / "bench" / "results" / "rmt"
    runs = re.findall(r"^ *segattn rmt train (.*)$", text, re.MULTILINE)
    made = {run.split("--out ")[1].split()[0]: shlex.split(run) for run in runs}
    for name in ("memorize", "detect", "minilm"):
        yield made.pop(name), json.loads((results / name / "figures.json").read_text())["settings"]
    loop = made.pop("retrieval/d_mem-$d")
    for width in (4, 8, 32):
        arguments = [word.replace("$d", str(width)) for word in loop] + ["--steps", "800"] * (width == 32)
        figures = json.loads((results / "retrieval" / f"d_mem-{width}" / "figures.json").read_text())
        yield arguments, figures["settings"]
    figures = json.loads((results / "reasoning" / "figures.json").read_text())
    for number in range(6, 0, -1):
        yield made.pop(f"reasoning-{number}"), figures["settings"]
        figures = figures.get("before")
    assert figures is None
    assert not made


def test_documented_commands_have_the_settings_of_the_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[dict[str, Any]] = []

    def take(settings: TrainSettings, *arguments: Any, **options: Any) -> None:
        taken.append(json.loads(json.dumps(asdict(settings))))
        raise SettingError("out", "is not wanted")

    monkeypatch.setattr(training, "run_training", take)
    for arguments, settings in documented():
        monkeypatch.setattr(run_folder, "settings_of", lambda folder, name, earlier=settings: earlier)
        result = invoke("train", *arguments)
        assert result.stderr == "segattn rmt train: --out is not wanted\n"
        [got] = taken
        if got["short"] is None:
            # what a run makes of it
            got["short"] = list(run_folder.SHORT) if got["babi"] else []
        # paths are of the machine
        names = settings.keys() - {"babi", "book", "pretrained", "start"}
        assert {name: got[name] for name in names} == {name: settings[name] for name in names}, arguments
        taken.clear()
