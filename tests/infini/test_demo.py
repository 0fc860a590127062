"""The demo: its task, that it learns, that it can be stopped at any step, and that its files agree with each other."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch_defaults import defaults

from segattn.infini.demo.decoder import Decoder, DecoderConfig
from segattn.infini.demo.evaluation import Cell, evaluate, state_bytes, stream
from segattn.infini.demo.passkey import MARKER, PasskeyTask
from segattn.infini.demo.runs import DEPTHS, Outputs, build, finished_figures, run_demo
from segattn.infini.demo.settings import FREE, DemoSettings, doubled
from segattn.infini.demo.training import Recipe, Trainer, stretch
from segattn.runs.checkpoint import load_checkpoint, save_checkpoint
from segattn.runs.errors import SettingError
from segattn.runs.interrupts import InterruptedRunError
from segattn.runs.text import generate_text

pytest.importorskip("matplotlib")
commands = pytest.importorskip("segattn.cli.main")
from matplotlib.axes import Axes
from rich.console import Console
from typer.testing import CliRunner

from segattn.cli import demo
from segattn.runs.heat_maps import plot_recall

SMALL = DemoSettings(steps=6, segments=3, lengths=(96, 192), samples=3)


class Quiet:
    """A listener that hears nothing, but may press Ctrl-C after a step."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.interrupt_after = interrupt_after

    def trained(self, step: int, steps: int, loss: float, accuracy: float) -> None:
        if step == self.interrupt_after:
            signal.raise_signal(signal.SIGINT)

    def evaluated(self, done: int, cells: int, cell: Cell) -> None:
        return None


@pytest.fixture(scope="module")
def task() -> PasskeyTask:
    return PasskeyTask(generate_text(5000, seed=0))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def places(tokens: Tensor, phrase: Tensor) -> list[int]:
    """Return where `phrase` begins in tokens [T]."""
    windows = tokens.unfold(0, len(phrase), 1)
    return windows.eq(phrase).all(dim=1).nonzero().flatten().tolist()


def decoder(task: PasskeyTask, update: str = "delta") -> Decoder:
    attention = {"write_bias": -2.0, "rope_base": 30.0}
    return Decoder(
        DecoderConfig(len(task.words), segment_len=16, width=16, neighbours=5, update=update, attention=attention)
    )


def test_samples_state_their_key_once(task: PasskeyTask) -> None:
    for length in (task.shortest, task.shortest + 1, 96, 1000):
        tokens, key, start = task.sample(20, length, generator())
        assert tokens.shape == (20, length)
        for row, digits, begin in zip(tokens, key, start.tolist(), strict=True):
            number = task.decode(digits)
            assert torch.equal(row[-task.digits :], digits)
            assert task.decode(row).endswith(f"what is the {MARKER} ? the {MARKER} is {number}")
            statement = f"the {MARKER} is {number} . remember it . {number} is the {MARKER} ."
            assert places(row, task.encode(statement.split())) == [begin]
            # once in the statement's end, twice each in its beginning and in the question's
            assert (row == task.ids[MARKER]).sum() == 4


def test_samples_are_reproducible_and_differ(task: PasskeyTask) -> None:
    first, again = (task.sample(8, 64, generator(3)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    other = task.sample(8, 64, generator(4))
    assert not torch.equal(first.tokens, other.tokens)
    assert len(set(map(tuple, first.key.tolist()))) == 8
    assert generate_text(500, 1) == generate_text(500, 1) != generate_text(500, 2)


@pytest.mark.parametrize("other", [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device": "meta"}], ids=str)
def test_the_default_dtype_and_device_change_no_text_and_no_sample(other: dict[str, Any]) -> None:
    def drawn() -> list[Tensor]:
        task = PasskeyTask(generate_text(2000, seed=3))
        trainer = Trainer(model, task, Recipe(steps=4, segments=6, stretched=1.0), seed=0)
        trainer.losses = [0.0] * 3
        batches = [trainer._batch()[0] for _ in range(3)]
        anywhere, deep = task.sample(3, 96, generator()), task.sample(3, 96, generator(), depth=0.5, jitter=4)
        return [*batches, *anywhere, *deep, task.filler(2, 50, generator())]

    model = decoder(PasskeyTask(generate_text(2000, seed=3)))
    wanted = drawn()
    with defaults(**other):
        mine = drawn()
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(mine, wanted, strict=True))


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_last_positions_are_those_of_all(task: PasskeyTask, update: str) -> None:
    model = decoder(task, update).double()
    tokens = task.sample(2, 75, generator()).tokens
    whole, state = model(tokens)
    for last in (1, 5, 75):
        logits, after = model(tokens, last=last)
        assert logits.shape[1] == last
        assert (logits - whole[:, -last:]).abs().max() < 1e-12
        assert torch.equal(after.layers[1].memory.memory, state.layers[1].memory.memory)


def test_statements_stand_at_their_depth(task: PasskeyTask) -> None:
    room = 200 - task.shortest
    assert task.sample(4, 200, generator(), depth=0).start.tolist() == [0] * 4
    assert task.sample(4, 200, generator(), depth=1).start.tolist() == [room] * 4
    jittered = task.sample(200, 200, generator(), depth=0.5, jitter=8).start
    assert sorted(set(jittered.tolist())) == list(range(round(room / 2) - 8, round(room / 2) + 9))
    assert set(task.sample(3000, 60, generator()).start.tolist()) == set(range(60 - task.shortest + 1))


def test_text_is_read_as_it_stands(tmp_path: Path) -> None:
    words = [f"word{'abcdefghij'[i // 10 % 10]}{'abcdefghij'[i % 10]}" for i in range(1000)]
    path = tmp_path / "text.txt"
    path.write_text(f"The Passkey, 42! {' '.join(words)}", encoding="utf-8")
    task = PasskeyTask(path.read_text(encoding="utf-8"), held_out=0.5)
    assert task.decode(task.filler(1, 1, generator())[0]) in task.words
    both = [task.filler(50, 400, generator(), held_out=held_out) for held_out in (False, True)]
    train, test = (" ".join(task.decode(row) for row in rows) for rows in both)
    assert "the <unk> , 4 2 ! wordaa wordab" in train
    assert MARKER not in train + test
    assert "!" not in test


def test_task_names_what_is_wrong(task: PasskeyTask) -> None:
    with pytest.raises(ValueError, match="text must hold at least 1000 words and marks, got 0"):
        PasskeyTask("")
    with pytest.raises(ValueError, match="text must hold at least 1000 words and marks, got 3"):
        PasskeyTask("far too short")
    with pytest.raises(ValueError, match="digits must be at least 1, got 0"):
        PasskeyTask(generate_text(2000, 0), digits=0)
    with pytest.raises(ValueError, match=f"length must be at least {task.shortest}, .*, got {task.shortest - 1}"):
        task.sample(1, task.shortest - 1, generator())
    with pytest.raises(ValueError, match=r"depth must be between 0 and 1, got 1\.5"):
        task.sample(1, 100, generator(), depth=1.5)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        task.sample(0, 100, generator())


@pytest.mark.parametrize("update", ["delta", "linear"])
def test_streaming_equals_reading_whole(task: PasskeyTask, update: str) -> None:
    model = decoder(task, update).double()
    tokens = task.sample(3, 150, generator()).tokens
    whole, state = model(tokens)
    for piece in (1, 7, 16, 64):
        logits, streamed = stream(model, tokens, last=5, piece=piece)
        assert (logits - whole[:, -5:]).abs().max() < 1e-10
        assert torch.equal(streamed.tokens, state.tokens)
        assert (streamed.layers[1].memory.memory - state.layers[1].memory.memory).abs().max() < 1e-10


def test_evaluation_is_of_constant_memory_and_reproducible(task: PasskeyTask) -> None:
    model = decoder(task)
    options: dict[str, Any] = {"depths": (0.0, 1.0), "seed": 0}
    first = evaluate(model, task, lengths=(64, 512), samples=(3, 4), **options)
    cells = [(cell.length, cell.depth, cell.samples) for cell in first.cells]
    assert cells == [(64, 0.0, 3), (64, 1.0, 3), (512, 0.0, 4), (512, 1.0, 4)]
    assert len(set(first.state_bytes.values())) == 1
    again = evaluate(model, task, lengths=(512,), samples=(4,), **options | {"depths": (1.0,)})
    assert again.cells == first.cells[3:]


def test_state_bytes_are_per_text(task: PasskeyTask) -> None:
    model = decoder(task)
    sizes = {state_bytes(model(torch.zeros(batch, 20, dtype=torch.long))[1]) for batch in (1, 3)}
    # per layer M [4, 4, 4], z [4, 4], keys and values [4, 4, 4] of the unfinished segment; and five tokens
    assert sizes == {2 * (64 + 16 + 64 + 64) * 4 + 5 * 8}


def test_stretched_memory_recalls_the_same_and_outweighs(task: PasskeyTask) -> None:
    model = decoder(task, "linear").double()
    tokens = task.filler(1, 48, generator())
    _, state = model(tokens[:, :32])
    near, _ = model(tokens[:, 32:], state)
    far, after = model(tokens[:, 32:], stretch(state, 100.0))
    assert (near - far).abs().max() < 1e-10
    added = after.layers[0].memory.normalizer - 100 * state.layers[0].memory.normalizer
    _, plain = model(tokens[:, 32:], state)
    assert (added - (plain.layers[0].memory.normalizer - state.layers[0].memory.normalizer)).abs().max() < 1e-9


def test_a_short_run_learns() -> None:
    settings = DemoSettings(steps=300, segments=3, seed=1)
    trainer, _ = build(settings)
    trainer.recipe = replace(trainer.recipe, batch_tokens=2048)
    while trainer.step < settings.steps:
        trainer.advance()
    assert trainer.losses[0] > 6
    assert sum(trainer.losses[-20:]) / 20 < 0.3
    trainer.model.eval()
    cells = evaluate(trainer.model, trainer.task, lengths=(96,), depths=DEPTHS, samples=(40,), seed=0).cells
    # chance is 1e-5
    assert sum(cell.exact for cell in cells) / len(cells) > 0.7


def test_training_goes_on_exactly(task: PasskeyTask, tmp_path: Path) -> None:
    recipe = Recipe(steps=8, segments=6, batch_tokens=256, curriculum=0.1)

    def fresh(seed: int) -> Trainer:
        torch.manual_seed(seed)
        return Trainer(decoder(task), task, recipe, seed)

    whole = fresh(0)
    for _ in range(8):
        whole.advance()
    part = fresh(0)
    for _ in range(3):
        part.advance()
    save_checkpoint(tmp_path / "checkpoint.pt", part.state_dict())
    resumed = fresh(1)
    resumed.load_state_dict(load_checkpoint(tmp_path / "checkpoint.pt"))
    for _ in range(5):
        resumed.advance()
    assert resumed.losses == whole.losses
    assert all(torch.equal(a, b) for a, b in zip(resumed.model.parameters(), whole.model.parameters(), strict=True))
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_finished_run_is_not_overwritten(tmp_path: Path) -> None:
    arguments = ["demo", "--steps", "2", "--segments", "2", "--reach", "2", "--samples", "3", "--out", str(tmp_path)]
    first = CliRunner().invoke(commands.app, arguments)
    assert first.exit_code == 0, first.output
    before = files(tmp_path)
    for again in (arguments, [*arguments, "--resume"], ["demo", "--resume", "--out", str(tmp_path)]):
        result = CliRunner().invoke(commands.app, again)
        assert result.exit_code == 0, result.output
        line, _, rest = result.stdout.partition("\n")
        assert line == f"already done, in {tmp_path}; to train anew, choose another --out or delete it"
        # the same table and files
        assert first.stdout.endswith(rest)
        assert "recalled whole" in rest
        assert files(tmp_path) == before
    other = CliRunner().invoke(commands.app, [*arguments, "--seed", "7"])
    assert other.exit_code == 2
    assert other.stderr.startswith(
        f"segattn demo: --out must not hold figures of an earlier run, got '{tmp_path}' with "
    )
    assert other.stderr.endswith("go on with them by --resume, choose another folder, or delete them\n")
    assert files(tmp_path) == before


def test_a_finished_run_of_another_text_is_another_run(tmp_path: Path) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text(generate_text(2000, 5), encoding="utf-8")
    settings = replace(SMALL, text=str(text))
    figures = run_demo(settings, out, Quiet())
    assert finished_figures(settings, out) == figures
    text.write_text(generate_text(2000, 6), encoding="utf-8")
    assert finished_figures(settings, out) is None
    with pytest.raises(SettingError, match="out must not hold figures of an earlier run"):
        run_demo(settings, out, Quiet())
    Outputs.of(out).figures.write_text("[]", encoding="utf-8")
    assert finished_figures(settings, out) is None


def test_lengths_and_their_texts() -> None:
    usual = DemoSettings()
    assert dict(zip(usual.lengths, usual.texts(), strict=True)) == {
        **dict.fromkeys((256, 1024, 4096), 40),
        16384: 32,
        131072: 4,
        1048576: 2,
    }
    assert DemoSettings(samples=20).texts() == [20] * 6
    assert doubled(96, 1) == (96,)
    assert doubled(96, 7) == (96, 192, 384)
    with pytest.raises(SettingError, match=r"lengths must be numbers from 1 on, at least one, got \[\]"):
        DemoSettings(lengths=())


def test_interrupted_run_goes_on_to_the_same_figures(tmp_path: Path) -> None:
    whole = run_demo(SMALL, tmp_path / "whole", Quiet())
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(InterruptedRunError):
        run_demo(SMALL, tmp_path / "part", Quiet(interrupt_after=4))
    assert signal.getsignal(signal.SIGINT) is handler
    outputs = Outputs.of(tmp_path / "part")
    assert len(load_checkpoint(outputs.checkpoint)["trainer"]["losses"]) == 4
    assert not outputs.figures.exists()
    resumed = run_demo(SMALL, tmp_path / "part", Quiet(), resume=True)
    for name in ("loss", "training_recall", "gates", "recall", "state_bytes"):
        assert resumed[name] == whole[name], name
    assert json.loads(outputs.figures.read_text()) == resumed
    for path in (outputs.recall, outputs.gates):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_resume_holds_to_the_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="resume needs a checkpoint"):
        run_demo(SMALL, tmp_path, Quiet(), resume=True)
    with pytest.raises(InterruptedRunError):
        run_demo(SMALL, tmp_path, Quiet(interrupt_after=1))
    text = tmp_path / "text.txt"
    text.write_text(generate_text(2000, 5), encoding="utf-8")
    with pytest.raises(SettingError, match="text must be a file of the checkpoint's text with --resume"):
        run_demo(replace(SMALL, text=str(text)), tmp_path, Quiet(), resume=True)


@pytest.mark.parametrize("name", sorted(DemoSettings.__dataclass_fields__.keys() - set(FREE)))
def test_resume_refuses_another_run(name: str, tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run_demo(SMALL, tmp_path, Quiet(interrupt_after=1))
    changed = "linear" if name == "update" else getattr(SMALL, name) + 1
    problem = f"{name} must be the checkpoint's with --resume, {getattr(SMALL, name)!r}, got {changed!r}"
    with pytest.raises(SettingError, match=problem):
        run_demo(replace(SMALL, **{name: changed}), tmp_path, Quiet(), resume=True)


def test_a_stopped_run_is_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(InterruptedRunError):
        run_demo(SMALL, tmp_path, Quiet(interrupt_after=2))
    before = Outputs.of(tmp_path).checkpoint.read_bytes()
    with pytest.raises(
        SettingError, match=r"out must not hold figures of an earlier run, .* go on with them by --resume"
    ):
        run_demo(replace(SMALL, seed=7), tmp_path, Quiet())
    assert Outputs.of(tmp_path).checkpoint.read_bytes() == before


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04"])
def test_damaged_checkpoints_are_named(content: bytes, tmp_path: Path) -> None:
    Outputs.of(tmp_path).checkpoint.write_bytes(content)
    with pytest.raises(SettingError, match="is another file, or damaged"):
        run_demo(SMALL, tmp_path, Quiet(), resume=True)


def test_other_checkpoints_are_named(tmp_path: Path) -> None:
    torch.save({"weights": torch.zeros(2)}, Outputs.of(tmp_path).checkpoint)
    with pytest.raises(SettingError, match="is another file, or damaged"):
        run_demo(SMALL, tmp_path, Quiet(), resume=True)


def test_evaluation_asks_for_each_depth_in_unread_text(task: PasskeyTask, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    sample = task.sample

    def spy(*arguments: Any, **options: Any) -> Any:
        asked.append((arguments[1], options["depth"], options["held_out"]))
        return sample(*arguments, **options)

    monkeypatch.setattr(task, "sample", spy)
    torch.manual_seed(0)
    model = Decoder(DecoderConfig(vocabulary=len(task.words), segment_len=16))
    evaluate(model, task, lengths=[64, 128], depths=[0.0, 0.5, 1.0], samples=[2, 2], seed=0)
    assert asked == [(length, depth, True) for length in (64, 128) for depth in (0.0, 0.5, 1.0)]


def distinct_cells() -> list[Cell]:
    return [
        Cell(length, depth, 10, (3 * i + j) / 10, 0.0)
        for i, length in enumerate((96, 192))
        for j, depth in enumerate((0.0, 0.5, 1.0))
    ]


def test_table_and_picture_show_each_cell_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = distinct_cells()
    console = Console(file=io.StringIO(), width=80)
    console.print(demo._table({"trained_length": 96, "recall": [cell._asdict() for cell in cells]}))
    lines = [
        line.replace("│", " ").split() for line in console.file.getvalue().splitlines() if " % " in line and "│" in line
    ]
    assert lines == [["0", "%", "0.0", "30.0"], ["50", "%", "10.0", "40.0"], ["100", "%", "20.0", "50.0"]]
    drawn = []
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: (drawn.append((x, y, s)), text(self, x, y, s, **k))[1])
    plot_recall(tmp_path / "recall.png", {(x.depth, x.length): x.exact for x in cells}, "title", "recalled, %", 96)
    assert drawn == [(x, y, str(30 * x + 10 * y)) for y in range(3) for x in range(2)]


def test_bars_follow_a_run(tmp_path: Path) -> None:
    """A terminal shows both bars, to their ends."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with demo.Training(console) as bars:
        run_demo(SMALL, tmp_path, bars)
        assert all(task.finished for task in bars.bars.tasks)
        assert [task.description for task in bars.bars.tasks] == ["train", "evaluate"]
    assert "recall" in console.file.getvalue()


def test_command_shows_what_it_writes(tmp_path: Path) -> None:
    arguments = ["demo", "--steps", "2", "--segments", "2", "--reach", "2", "--samples", "3", "--update", "linear"]
    result = CliRunner().invoke(commands.app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["settings"]["update"] == "linear"
    assert len(figures["loss"]) == 2
    rows = [line.replace("│", " ").split() for line in result.stdout.splitlines() if " % " in line and "│" in line]
    assert len(rows) == len(DEPTHS)
    for row, depth in zip(rows, DEPTHS, strict=True):
        cells = [cell for cell in figures["recall"] if cell["depth"] == depth]
        assert row == [f"{100 * depth:.0f}", "%", *(f"{100 * cell['exact']:.1f}" for cell in cells)]
    for path in Outputs.of(tmp_path):
        assert str(path) in result.stdout
        assert path.is_file()
    for option, value, changed in (
        ("samples", "2", 2),
        ("lengths", "1K,64", [64, 1024]),
        ("reach", "4", [64, 128, 256]),
    ):
        again = CliRunner().invoke(commands.app, ["demo", "--resume", f"--{option}", value, "--out", str(tmp_path)])
        assert again.exit_code == 0, again.output
        resumed = json.loads((tmp_path / "figures.json").read_text())
        name = "samples" if option == "samples" else "lengths"
        assert resumed["settings"] == figures["settings"] | {name: changed}
        assert resumed["loss"] == figures["loss"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--update", "sum"], "--update must be one of 'delta', 'linear', got 'sum'"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--segment-len", "0"], "--segment-len must be at least 1, got 0"),
        (["--segment-len", "4"], "--segment-len must be at least 5, so that 8 segments hold a sample, got 4"),
        (["--lengths", "10"], "--lengths must be at least 34, so that they hold a sample, got 10"),
        (["--lengths", "1K,,2K"], "--lengths must be numbers from 1 on with commas, as 256,16K,1M, got '1K,,2K'"),
        (["--lengths", "1K", "--reach", "2"], "--reach cannot go with --lengths, got both"),
        (["--reach", "0"], "--reach must be at least 1, got 0"),
        (["--samples", "0"], "--samples must be at least 1, got 0"),
        (["--device", "abacus"], "--device must be one that PyTorch can use here, such as 'cpu', got 'abacus'"),
        (["--text", "no-such-file"], "--text must be a file that can be read, got 'no-such-file'"),
        (["--seed", str(2**64)], f"--seed must be below 2**32, got {2**64}"),
        (["--device", "meta"], "--device must be one that PyTorch can use here, such as 'cpu', got 'meta'"),
        (["--resume"], "--resume needs a checkpoint in the output folder, and there is no"),
    ],
)
def test_command_names_what_is_wrong(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(commands.app, ["demo", *arguments, "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"segattn demo: {message}")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "segattn", "demo", "--steps", "60", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    # the first of the plain lines, after a sixth of the steps
    assert process.stdout.readline().startswith("step 10 of 60")
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert (
        stderr.strip()
        == f"segattn demo: stopped, checkpoint written; go on with: segattn demo --resume --out {tmp_path}"
    )
    assert len(load_checkpoint(tmp_path / "checkpoint.pt")["trainer"]["losses"]) >= 10


def test_config_command() -> None:
    result = CliRunner().invoke(commands.app, ["config"])
    assert result.exit_code == 0
    assert result.stdout.startswith("backend")


def test_entry_point_says_what_to_install() -> None:
    hide = "import sys; sys.modules['typer'] = None; from segattn.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", hide], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == "segattn: the commands need typer: pip install 'segattn[cli]'\n"
