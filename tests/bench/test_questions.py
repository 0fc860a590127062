"""The experiment on questions about a book: a cache called as a memory, runs that are kept, and settings by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from segattn.bench.experiments.harness import earlier
from segattn.bench.experiments.questions import models
from segattn.bench.experiments.questions.experiment import ask, chance_of, main, task_of
from segattn.bench.experiments.questions.models import MODELS, Kept, build
from segattn.bench.experiments.questions.setup import Setup
from segattn.bench.report.experiments import questions
from segattn.rmt.tasks.answers import answer
from segattn.rmt.tasks.batch import Batch
from segattn.rmt.tasks.books import draw_book
from segattn.runs.text import generate_text

L = 24
SIZES: dict[str, Any] = {"people": 2, "vocabulary": 40, "layers": 2, "width": 16, "heads": 2, "memory_tokens": 2}
SIZES |= {"d_mem": 4, "segment_len": L, "steps": 2, "anneal": 1, "batch": 4, "later_batch": 4, "books": 2}
SETUP = Setup(**SIZES, segments=(1, 2), lengths=(L, 5 * L), full_up_to=L)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(generate_text(2000, 0))
    return path


def model_of(name: str) -> Any:
    model: Any = build(SETUP, name, 50).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", ["full", "delta"])
def test_a_cache_is_called_as_a_memory_is(name: str) -> None:
    model = model_of(name)
    model.stretch = 1.0
    ids = torch.randint(50, (2, 4 * L))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    with torch.no_grad():
        whole = model(ids, labels=labels)
        first = model(ids[:, : 2 * L], output_logits=False)
        kept = [x.clone() for x in first.state]
        again = model(ids[:, 2 * L :], state=first.state)
    assert first.logits is None
    assert (again.logits - whole.logits[:, 2 * L :]).abs().max() < 1e-12
    wanted = torch.nn.functional.cross_entropy(whole.logits[:, -2], ids[:, -1])
    assert abs(whole.loss - wanted) < 1e-12
    # keys and values of each layer: [2, heads, T, K]
    size = {"full": 2 * 2 * 2 * 2 * L * 16}.get(name)
    assert size is None or sum(x.numel() for x in kept) == size
    with torch.no_grad():
        state = model(ids[:1, : 2 * L], output_logits=False).state.select(torch.zeros(3, dtype=torch.long))
        rows = model(ids[:1, 2 * L :].expand(3, -1), state=state).logits
    assert (rows - rows[:1]).abs().max() == 0
    assert (rows[0] - whole.logits[0, 2 * L :]).abs().max() < 1e-12


def test_a_stretched_memory_recalls_the_same_and_weighs_more() -> None:
    model = model_of("delta")
    ids = torch.randint(50, (2, 5 * L))
    with torch.no_grad():
        whole = model(ids).logits

        def after(factor: float) -> torch.Tensor:
            state: Kept = model(ids[:, : 3 * L], output_logits=False).state
            models._multiply(state.cache, factor)
            logits: torch.Tensor = model(ids[:, 3 * L :], state=state).logits
            return logits

        plain, stretched = after(1.0), after(100.0)
    assert (plain - whole[:, 3 * L :]).abs().max() < 1e-12
    # the next segment reads what there was; the one after it reads what was written since too
    assert (stretched - plain)[:, :L].abs().max() < 1e-9
    assert (stretched - plain)[:, L:].abs().max() > 1e-6


def test_half_of_the_training_texts_are_stretched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("delta")
    assert (model.stretch, model_of("full").stretch) == (SETUP.stretch, 1.0)
    factors: list[float] = []
    monkeypatch.setattr(models, "_multiply", lambda cache, factor: factors.append(factor))
    ids = torch.randint(50, (2, 3 * L))
    labels = torch.full_like(ids, -100)
    labels[:, -1] = ids[:, -1]
    torch.manual_seed(0)
    losses = [model(ids, labels=labels).loss for _ in range(40)]
    assert 12 < len(factors) < 28
    assert 1 <= min(factors) < 10
    assert 100 < max(factors) <= SETUP.stretch
    # without the factor both ways of reading are the same, and have gradients
    assert max(losses) - min(losses) < 1e-10
    losses[-1].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    # within a segment there is no memory
    factors.clear()
    for _ in range(20):
        model(ids[:, :L], labels=labels[:, -L:])
    assert not factors


@pytest.mark.parametrize("name", list(MODELS))
def test_asking_counts_what_is_right(name: str, text: Path) -> None:
    task = task_of(SETUP, text)
    model = build(SETUP, name, task.vocab_size).eval()
    found = ask(model, task, SETUP, 5 * L)
    right = []
    for index in range(SETUP.books):
        rows = draw_book(task, 5 * L, seed=0, index=index).endings(0)
        right.append([bool(answer(model, Batch(*(x[i : i + 1] for x in rows)), L).right) for i in range(2)])
    assert found["by_place"] == [sum(place) / 2 for place in zip(*right, strict=True)]
    assert found["right"] == sum(map(sum, right)) / 4
    assert found["questions"] == 4
    assert found["kept_bytes"] > 0


def test_the_experiment_is_kept_and_gone_on_with(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    command = ["--text", str(text), "--out", str(tmp_path / "out"), *options, f"--full-up-to={L}"]
    command += ["--segments", "1", "2", "--lengths", str(L), str(5 * L)]
    assert main([*command, "--models", "full"]) == 0
    assert main(command) == 0
    path = tmp_path / "out" / "questions.json"
    first = json.loads(path.read_text())
    assert [run["model"] for run in first["runs"]] == list(MODELS)
    assert [[cell["length"] for cell in run["lengths"]] for run in first["runs"]] == [[L], *[[L, 5 * L]] * 3]
    assert all([stage["segments"] for stage in run["stages"]] == [1, 2, 2] for run in first["runs"])
    assert first["chance"] == pytest.approx(1 / 6)
    assert (tmp_path / "out" / "questions.png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in path.read_text()
    assert main(command) == 0
    assert json.loads(path.read_text()) == first
    capsys.readouterr()
    assert main([*command, "--width", "24"]) == 2
    assert capsys.readouterr().err.startswith("questions: --width must be 16 as in")
    rows = [row.split("|")[1:-1] for row in questions(first).splitlines()]
    assert [row[0].strip() for row in rows[2:]] == [
        "full attention",
        "Infini-attention, delta",
        "RMT",
        "ARMT",
        "guessing",
    ]
    assert rows[2][2].strip() == ""
    assert [cell.strip() for cell in rows[-1][1:3]] == ["16.7", "16.7"]


def test_what_cannot_be_is_said_in_a_line(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, problem in (
        (["--people", "9"], "--people must be from 1 to 8, got 9"),
        (["--segment-len", "8"], "--lengths must be at least"),
        (["--lengths", "500"], "--lengths must be multiples of segment_len, 64, got (500,)"),
        (["--segments", "2", "1"], "--segments must be positive and go up, got [2, 1]"),
        (["--width", "20"], "--width must be a multiple of 8, twice the heads, got 20"),
        (["--models", "full", "mamba"], "--models must be among full, delta, rmt, armt, got 'mamba'"),
        (["--stretch", "0.5"], "--stretch must be at least 1, got 0.5"),
        (["--text", "nowhere"], "--text must be a text file in UTF-8, got 'nowhere'"),
    ):
        lengths = ["--lengths", "8"] if "--segment-len" in options else []
        assert main(["--text", str(text), "--out", str(tmp_path / "out"), *options, *lengths]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"questions: {problem}"), said
        assert said.count("\n") == 1


def test_the_committed_figures_are_gone_on_with() -> None:
    path = Path(__file__).resolve().parents[2] / "bench" / "results" / "questions" / "questions.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    setup = {name: value for name, value in json.loads(json.dumps(asdict(Setup()))).items() if name != "models"}
    about = {"setup": setup, "text": figures["text"]}
    assert earlier(path, about, "runs")["runs"] == figures["runs"]
    assert chance_of(Setup()) == figures["chance"]
