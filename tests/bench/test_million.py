"""The demo's passkeys in a million tokens: each cell is measured once, as the demo measures it, and summed by rule."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("rich")

from segattn.bench.experiments.harness import earlier
from segattn.bench.experiments.million.experiment import Setup, experiment, main, summary
from segattn.infini.demo.evaluation import evaluate
from segattn.infini.demo.runs import build
from segattn.infini.demo.settings import DemoSettings
from segattn.infini.demo.training import Recipe

TINY = Setup(seeds=(3,), updates=("linear",), steps=2, lengths=(64, 160), depths=(0.0, 1.0), samples=3)
COMMITTED = Path(__file__).resolve().parents[2] / "bench" / "results" / "demo" / "million.json"


def test_cells_are_those_of_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = experiment(TINY, tmp_path / "million.json")
    trainer, _ = build(DemoSettings(steps=2, update="linear", seed=3))
    while trainer.step < 2:
        trainer.advance()
    found = evaluate(trainer.model.eval(), trainer.task, lengths=(64, 160), depths=(0.0, 1.0), samples=(3, 3), seed=3)
    keys = ("length", "depth", "samples", "digits")
    assert [[cell[key] for key in keys] for cell in figures["cells"]] == [
        [getattr(cell, key) for key in keys] for cell in found.cells
    ]
    assert {cell["state_bytes"] for cell in figures["cells"]} == set(found.state_bytes.values())
    assert capsys.readouterr().out.count("linear, seed 3, ") == 4


def test_what_is_measured_is_kept_and_more_seeds_are_added(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "million.json"
    sizes = ["--steps", "1", "--lengths", "64", "--depths", "0.5", "--samples", "2", "--updates", "delta"]
    assert main(["--out", str(out), *sizes, "--seeds", "0"]) == 0
    first = json.loads(out.read_text())["cells"]
    assert main(["--out", str(out), *sizes, "--seeds", "0", "1"]) == 0
    both = json.loads(out.read_text())["cells"]
    assert both[:1] == first
    assert [cell["seed"] for cell in both] == [0, 1]
    assert capsys.readouterr().out.count(" of 2\n") == 2
    assert main(["--out", str(out), *sizes, "--samples", "3"]) == 2
    assert capsys.readouterr().err.startswith("million: --samples must be 2 as in ")
    assert main(["--out", str(out), "--updates", "sum"]) == 2
    assert capsys.readouterr().err == "million: --updates must be of delta, linear, got sum\n"
    assert main(["--out", str(out), "--depths", "1.5"]) == 2
    assert capsys.readouterr().err == "million: --depths must be from 0 to 1, got [1.5]\n"


def test_seeds_are_summed() -> None:
    cells = [
        {"update": "linear", "length": 64, "depth": 1.0, "right": right, "samples": 3, "seed": seed}
        for seed, right in enumerate((1, 3))
    ]
    rows = summary(TINY, [*cells, {**cells[0], "length": 160}, {**cells[0], "depth": 0.0}])
    assert [(x["length"], x["depth"], x["right"], x["samples"], x["seeds"]) for x in rows] == [
        (64, 0.0, 1, 3, 1),
        (64, 1.0, 4, 6, 2),
        (160, 0.0, 0, 0, 0),
        (160, 1.0, 1, 3, 1),
    ]


def test_the_committed_figures_are_gone_on_with() -> None:
    figures = json.loads(COMMITTED.read_text(encoding="utf-8"))
    setup = {name: x for name, x in json.loads(json.dumps(asdict(Setup()))).items() if name not in ("seeds", "updates")}
    about = {"setup": setup, "recipe": asdict(Recipe(steps=setup["steps"]))}
    assert earlier(COMMITTED, about, "cells") == figures
    assert figures["summary"] == summary(Setup(), figures["cells"])
