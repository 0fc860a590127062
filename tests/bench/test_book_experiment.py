"""The book experiment compares like with like, measures what it says, and keeps the runs that it has."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from segattn.bench.experiments.book.experiment import (
    VARIANTS,
    build,
    by_position,
    gates_of,
    main,
    nats,
    run,
    summary,
    train,
)
from segattn.bench.experiments.book.setup import Setup, text_of
from segattn.bench.experiments.harness import earlier
from segattn.runs.errors import SettingError
from segattn.runs.text import generate_text

SIZES = {"segment_len": 8, "row": 32, "batch": 2, "steps": 3, "width": 16, "hidden": 24, "warm_up": 1, "reach": 2}
SETUP = Setup(**SIZES)
COUNTS = ("segment-len", "row", "batch", "steps", "seeds", "width", "layers", "heads", "warm-up", "reach")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.tensor(list(generate_text(400, 0).encode()), dtype=torch.uint8)


def test_variants_begin_with_the_same_weights() -> None:
    models = [build(SETUP, variant, 3) for variant in VARIANTS]
    wanted = models[0].state_dict()
    for model in models[1:]:
        held = {name: value for name, value in model.state_dict().items() if "segattn_gate" not in name}
        assert held.keys() == wanted.keys()
        assert all(torch.equal(held[name], wanted[name]) for name in wanted)
    assert not torch.equal(build(SETUP, "full", 4).lm_head.weight, models[0].lm_head.weight)
    assert [[gate.bias.requires_grad for gate in gates_of(model)] for model in models[1:]] == [
        [False, False],
        [True, True],
        [True, True],
    ]


@pytest.mark.parametrize(("variant", "seen"), [("full", True), ("local", False), ("linear", True), ("delta", True)])
def test_only_local_attention_forgets_earlier_segments(variant: str, seen: bool, text: torch.Tensor) -> None:
    model = build(SETUP, variant, 0).eval()
    rows = text[:33].long()[None]
    changed = rows.clone()
    changed[0, 3] = 255
    # the fourth byte stands in the first segment
    differs = (nats(model, rows) != nats(model, changed))[0]
    assert bool(differs[8:].any()) is seen
    assert differs[3:8].any()


def test_positions_are_averaged_over_rows(text: torch.Tensor) -> None:
    model = build(SETUP, "delta", 0).eval()
    sums, count = torch.zeros(32, dtype=torch.double), 0
    for start in range(0, len(text) - 32, 17):
        row = text[start : start + 33].long()
        with torch.no_grad():
            logits = model(row[None, :-1], use_cache=False).logits[0]
        sums += F.cross_entropy(logits, row[1:], reduction="none").double()
        count += 1
    torch.testing.assert_close(by_position(model, text, 32), sums / count, rtol=1e-5, atol=1e-6)


def test_training_learns_and_repeats(text: torch.Tensor) -> None:
    setup = Setup(**SIZES | {"steps": 30})
    losses = [train(build(setup, "linear", 0), text, setup, seed) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert sum(losses[0][-5:]) < 0.8 * sum(losses[0][:5])
    assert [round(Setup(steps=10, warm_up=2).rate(step), 3) for step in (0, 1, 10)] == [0.5, 0.978, 0.1]


def test_a_run_averages_over_segments_and_places(text: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []

    def positions(model: Any, held: torch.Tensor, row: int) -> torch.Tensor:
        lengths.append((len(held), row))
        return torch.arange(row).double()

    monkeypatch.setattr("segattn.bench.experiments.book.experiment.by_position", positions)
    found = run(SETUP, "delta", 0, text, lambda loss: None)
    assert lengths == [(len(text) - round(0.9 * len(text)), 32), (len(text) - round(0.9 * len(text)), 64)]
    assert found["nats"] == 15.5
    assert found["by_segment"] == [3.5, 11.5, 19.5, 27.5]
    assert found["by_place_in_segment"] == [16.0 + place for place in range(8)]
    assert found["longer_by_position"] == [7.5, 23.5, 39.5, 55.5]
    assert [len(gates) for gates in found["gates"]] == [2, 2]


def test_summary_compares_seed_by_seed() -> None:
    values = {("local", 0): 2.0, ("local", 1): 3.0, ("delta", 0): 1.5, ("delta", 1): 2.5, ("delta", 2): 9.0}
    table = summary({"variant": variant, "seed": seed, "nats": value} for (variant, seed), value in values.items())
    assert table["delta"]["nats_less_local"] == [-0.5, 0.0]
    assert table["delta"]["seeds"] == 3
    mean = (math.exp(2) + math.exp(3)) / 2
    assert table["local"]["perplexity"] == pytest.approx([mean, (math.exp(3) - math.exp(2)) / math.sqrt(2)], abs=1e-5)


def test_what_is_there_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book, out = tmp_path / "book.txt", tmp_path / "out"
    book.write_text(generate_text(400, 0))
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    command = ["--text", str(book), "--out", str(out), *options]
    assert main([*command, "--seeds", "1"]) == 0
    first = json.loads((out / "book.json").read_text())
    assert [(run["variant"], run["seed"]) for run in first["runs"]] == [(variant, 0) for variant in VARIANTS]
    assert (out / "book.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out.count("perplexity") == 4
    assert main([*command, "--seeds", "2"]) == 0
    assert capsys.readouterr().out.count("perplexity") == 4
    second = json.loads((out / "book.json").read_text())
    assert second["runs"][:4] == first["runs"]
    assert [run["seed"] for run in second["runs"]] == [0] * 4 + [1] * 4
    assert second["setup"]["seeds"] == 2
    made = [found["made"] for found in second["runs"]]
    # a checkout's commit, or none, and the machine
    assert all(set(x) == {"commit", "dirty", "name", "threads", "processor", "capability"} for x in made)
    assert {x["threads"] for x in made} == {torch.get_num_threads()}
    assert main([*command, "--steps", "4"]) == 2
    said = f"--steps must be 3 as in {out / 'book.json'}, got 4: or choose another --out\n"
    assert capsys.readouterr().err == f"book: {said}"
    book.write_text(generate_text(400, 1))
    assert main(command) == 2
    assert "--text must be the one of" in capsys.readouterr().err
    assert main([*command, "--row", "33"]) == 2
    assert "--row must be a multiple of segment_len, 8, got 33" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        *((f"--{name}=0", f"--{name} must be at least 1, got 0") for name in COUNTS),
        ("--heads=3", "--width must be a multiple of 6, twice the heads, got 16"),
        ("--held-out=2", "--held-out must be between 0 and 1, got 2.0"),
        ("--held-out=0", "--held-out must be between 0 and 1, got 0.0"),
        ("--lr=0", "--lr must be positive, got 0.0"),
        ("--lr=nan", "--lr must not be negative, and finite, got nan"),
        ("--weight-decay=-1", "--weight-decay must not be negative, and finite, got -1.0"),
        ("--floor=2", "--floor must be at most 1, got 2.0"),
        ("--row=10000", "--text must have at least 10001 bytes for training, got"),
        ("--reach=30", "--text must have at least 961 bytes for evaluation, got"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: str, said: str
) -> None:
    book = tmp_path / "book.txt"
    book.write_text(generate_text(400, 0))
    command = ["--text", str(book), "--out", str(tmp_path / "out")]
    sizes = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    assert main([*command, *sizes, options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"book: {said}")
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_figures_of_something_else_are_not_gone_on_with(tmp_path: Path) -> None:
    path, about = tmp_path / "book.json", {"setup": {"seeds": 1, "steps": 3}, "text": {"bytes": 5}}
    for content in ("{", "[]", '{"setup": 1}', '{"setup": {}, "text": {}}'):
        path.write_text(content)
        with pytest.raises(SettingError, match=r"out must hold figures of this command or none; .* is damaged"):
            earlier(path, about, "runs", ("seeds",))
    path.write_text(json.dumps({"setup": {"seeds": 2}, "text": {"bytes": 5}, "runs": []}))
    with pytest.raises(SettingError, match=r"out must be another: .* is of another version"):
        earlier(path, about, "runs", ("seeds",))


def test_the_committed_figures_are_gone_on_with() -> None:
    """They are older than what is kept of machines."""
    path = Path(__file__).resolve().parents[2] / "bench" / "results" / "book" / "book.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    about = {"setup": figures["setup"] | {"seeds": 9}, "text": figures["text"]}
    assert earlier(path, about, "runs", ("seeds",)) == figures | about


def test_a_text_is_told_by_its_bytes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a\xff")
    text, about = text_of(tmp_path / "a")
    assert text.tolist() == [97, 255]
    assert about["bytes"] == 2
