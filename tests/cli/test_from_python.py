"""What the commands do, called from Python with the same settings: equal figures, equal weights, and not a word."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
typer_testing = pytest.importorskip("typer.testing")

from segattn.cli.main import app
from segattn.infini.evaluate.runs import run_passkey, run_perplexity
from segattn.infini.evaluate.settings import Books, Conversions, Grid, Positions, Source, Tasks
from segattn.infini.train.run import finetune
from segattn.infini.train.settings import TrainSettings
from segattn.rmt.runs.evaluation import Grid as Lengths
from segattn.rmt.runs.evaluation import run_evaluation
from segattn.rmt.runs.settings import TrainSettings as MemorySettings
from segattn.rmt.runs.training import run_training
from segattn.runs.errors import SettingError
from segattn.runs.text import generate_text

# what two runs of the same may differ in
TIMES = ("seconds", "peak", "tokens_per_second", "device", "out", "model", "created")


def command(*arguments: Any) -> None:
    result = typer_testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output


def lasting(figures: Any) -> Any:
    """Return the figures of a JSON file without times and places."""
    if isinstance(figures, dict):
        return {name: lasting(x) for name, x in figures.items() if not name.startswith(TIMES)}
    return [lasting(x) for x in figures] if isinstance(figures, list) else figures


def read(path: Path) -> Any:
    return lasting(json.loads(path.read_text()))


def test_finetune_and_evaluate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text(generate_text(300, seed=2), encoding="utf-8")
    options = {"layers": 1, "width": 16, "heads": 2, "segment_len": 16, "length": 48, "piece": 48, "steps": 2}
    options |= {"batch": 2, "warmup": 1}
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    command("finetune", *flags, "--text", text, "--tokenizer", "bytes", "--device", "cpu", "--out", theirs)
    command("evaluate", "passkey", theirs, "--tokenizer", "bytes", "--lengths", "300", "--depths", "0,1",
            "--samples", 1, "--device", "cpu", "--out", theirs)  # fmt: skip
    command("evaluate", "perplexity", theirs, "--tokenizer", "bytes", "--text", text, "--limit", 200,
            "--device", "cpu", "--out", theirs)  # fmt: skip
    capsys.readouterr()

    settings = TrainSettings(text=str(text), tokenizer="bytes", **options)
    figures = finetune(settings, mine, device="cpu")
    source = Source(str(mine), tokenizer="bytes", device="cpu")
    recall = run_passkey(source, Grid((300,), (0.0, 1.0), samples=1), mine)
    by_position = run_perplexity(source, Positions(str(text), limit=200), mine)
    assert capsys.readouterr().out == ""
    for name, returned in {"figures": figures, "passkey": recall, "perplexity": by_position}.items():
        assert read(mine / f"{name}.json") == read(theirs / f"{name}.json")
        assert lasting(json.loads(json.dumps(returned))) == read(mine / f"{name}.json")
    assert (mine / "model" / "model.safetensors").read_bytes() == (theirs / "model" / "model.safetensors").read_bytes()


def test_memory_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"width": 16, "layers": 1, "heads": 2, "memory": 2, "segments": (1,), "steps": 2, "test_samples": 3}
    settings = MemorySettings("copy", short=(), device="cpu", **options)
    figures = run_training(settings, tmp_path)
    lengths = run_evaluation(tmp_path, Lengths((1,), (3,), (3,)), device="cpu")
    assert capsys.readouterr().out == ""
    assert [stage["steps"] for stage in figures["stages"]] == [2]
    assert [(cell["segments"], cell["samples"]) for cell in lengths["lengths"]] == [(1, 3)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grid("4K", (0.5,)), "lengths must be a tuple of integers, got '4K'"),
        (lambda: Grid((4096,), 0.5), "depths must be a tuple of numbers, got 0.5"),
        (lambda: Grid((), (0.5,)), "lengths must name at least one, got none"),
        (lambda: Grid((4096,), (0.5,), samples="2"), "samples must be a number, got '2'"),
        (lambda: Tasks("qa1", (4096,)), "tasks must be a tuple of strings, got 'qa1'"),
        (lambda: Tasks(("qa1",), (4096.0,)), r"lengths must be a tuple of integers, got \(4096.0,\)"),
        (lambda: Tasks(("qa1",), (4096,), batch=0), "batch must be auto or at least 1, got 0"),
        (lambda: Books(4096), "lengths must be a tuple of integers, got 4096"),
        (lambda: Conversions("book.txt", "256"), "conversions must be a tuple of strings, got '256'"),
        (lambda: MemorySettings("copy", steps=True), "steps must be a number, got True"),
    ],
)
def test_settings_of_other_types_are_named(make: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        make()
