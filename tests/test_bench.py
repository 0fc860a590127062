"""The benchmark's providers all compute the same, its measure of memory is right, and its whole path runs."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("infini_transformer_pytorch", reason="needs segattn[bench]")

from segattn.bench.measure import DIRECTIONS, peak_bytes, step
from segattn.bench.providers import PROVIDERS, check, eager_loop
from segattn.bench.workloads import WORKLOADS, Workload

ROOT = Path(__file__).resolve().parents[1]
SMALL = Workload(B=2, H=3, T=48, K=8, V=8, L=16)


@pytest.mark.parametrize("name", PROVIDERS)
def test_providers_agree_with_the_reference(name: str) -> None:
    assert check(PROVIDERS[name], SMALL.inputs("cpu", torch.float64), SMALL.L) < 1e-5


@pytest.mark.parametrize("name", [name for name, provider in PROVIDERS.items() if provider.update])
def test_providers_agree_on_gradients(name: str) -> None:
    inputs = SMALL.inputs("cpu")
    direction = torch.randn(2, 3, 48, 8)
    expected = torch.autograd.grad(eager_loop(inputs, 16, update=PROVIDERS[name].update), inputs, direction)
    found = torch.autograd.grad(PROVIDERS[name].run(inputs, 16), inputs, direction)
    for got, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_a_wrong_provider_is_found() -> None:
    wrong = dataclasses.replace(PROVIDERS["segattn linear"], update="delta")
    assert check(wrong, SMALL.inputs("cpu"), SMALL.L) > 1e-2


def test_peak_memory_is_counted() -> None:
    def run() -> None:
        first = torch.zeros(1024, 256)
        second = first + 1
        del first
        second.clone()

    expected = 2 * 1024 * 256 * 4
    # scalars come on top
    assert expected <= peak_bytes(run, torch.device("cpu")) <= expected + 256


def test_ours_holds_less_than_the_loop() -> None:
    inputs = Workload(B=1, H=2, T=65536, K=32, V=32, L=256).inputs("cpu")
    peaks = {
        name: peak_bytes(step(PROVIDERS[name], inputs, 256, DIRECTIONS[1]), torch.device("cpu"))
        for name in ("segattn delta", "eager loop delta")
    }
    assert peaks["segattn delta"] < peaks["eager loop delta"]


def test_the_whole_path(tmp_path: Path) -> None:
    """`pytest bench/` with a tiny workload: a JSON with a ratio for every provider, and the table."""
    file = tmp_path / "bench_small.py"
    source = (ROOT / "bench" / "bench_segment_attention.py").read_text()
    assert "WORKLOADS" in source
    file.write_text(
        source.replace("import WORKLOADS, Workload", "import Workload\nWORKLOADS = [Workload(1, 2, 32, 8, 8, 8)]")
    )
    (tmp_path / "conftest.py").write_text((ROOT / "bench" / "conftest.py").read_text())
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--rounds=2",
        f"--benchmark-json={out}",
        "-o",
        "python_files=bench_*.py",
    ]
    done = subprocess.run([*command, str(tmp_path)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {b["extra_info"]["provider"]: b["extra_info"] for b in json.loads(out.read_text())["benchmarks"]}
    assert found.keys() == PROVIDERS.keys()
    assert all(info["ratio"] > 0 and info["peak_bytes"] > 0 for info in found.values())
    for name in PROVIDERS:
        assert name in done.stdout
    assert len(WORKLOADS) == 2
