"""What the experiment on lengths cannot measure it says in a line, and a profiler says nothing in between."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from processes import python

from segattn.bench.experiments.harness import earlier
from segattn.bench.experiments.lengths.experiment import Setup, main

TINY = ["--sizes", "1,1,8,2,1,1,8", "--least", "1", "--rounds", "1", "--lengths", "1", "--full-up-to", "1"]


def test_progress_is_of_readings(tmp_path: Path) -> None:
    done = python("-m", "segattn.bench.experiments.lengths", "--out", str(tmp_path / "a.json"), *TINY)
    assert done.returncode == 0, done.stderr
    assert "profiler_start" not in done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["RMT", "ARMT", "full"]
    # two memory tokens of eight numbers
    assert " 64 B kept" in lines[0]
    assert "0.000" not in done.stdout


@pytest.mark.parametrize("device", ["foo", "meta", "cuda"])
def test_devices_that_cannot_be_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str], device: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["--out", str(tmp_path / "a.json"), *TINY, "--device", device]) == 2
    err = capsys.readouterr().err
    assert err.startswith("lengths: --device must be cpu")
    assert err.endswith(f"got {device!r}\n")


def test_the_committed_figures_are_gone_on_with() -> None:
    path = Path(__file__).resolve().parents[2] / "bench" / "results" / "rmt" / "lengths.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    setup = {name: value for name, value in json.loads(json.dumps(asdict(Setup()))).items() if name != "rounds"}
    assert earlier(path, {"setup": setup}, "readings") == figures
