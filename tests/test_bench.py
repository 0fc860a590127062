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
from segattn.bench.workloads import Workload

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
    out = tmp_path / "result.json"
    options = ["--workload=1,2,32,8,8", "--rounds=2", f"--benchmark-json={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "bench", *options], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    found = [(b["group"], b["extra_info"]["provider"]) for b in result["benchmarks"]]
    assert found == [(f"B1-H2-T32-K8-L8, {direction}", name) for direction in DIRECTIONS for name in PROVIDERS]
    assert all(b["extra_info"]["ratio"] > 0 and b["extra_info"]["peak_bytes"] > 0 for b in result["benchmarks"])
    assert "node" not in result["machine_info"]
    for name in PROVIDERS:
        assert name in done.stdout


@pytest.mark.parametrize("sizes", ["1,2,3", "1,2,32,8,0", "1,2,33,8,8", "1,2,x,8,8", ""])
def test_bad_workloads_are_named(sizes: str) -> None:
    with pytest.raises(ValueError, match=f"five positive integers B,H,T,K,L, T a multiple of L, got '{sizes}'"):
        Workload.parse(sizes)
