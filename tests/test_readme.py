"""What the README shows runs, and what it says of sizes is so."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import feature_table
import pytest

from segattn.bench.planner.units import in_bytes

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
# without line breaks
PROSE = " ".join(TEXT.split())
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def sizes(text: str) -> list[str]:
    return [re.sub(r"\s", "", size) for size in re.findall(r"\[[\d, ]+\]", text)]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_runs_and_prints_what_it_says(number: int) -> None:
    code = BLOCKS[number]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in code.splitlines() if line.startswith("print(")]
    assert len(said) == 1
    assert sizes(done.stdout) == sizes(said[0].split("#")[1])


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 2


def test_links_lead_somewhere() -> None:
    for path in ROOT.rglob("*.md"):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path}: {target}"


def test_tables_and_plots_are_what_the_results_say() -> None:
    report = pytest.importorskip("segattn.bench.report.main", reason="needs segattn[cli]")
    assert list(report.differences(ROOT / "README.md", ROOT / "bench" / "results")) == []


def test_nothing_is_left_to_fill_in() -> None:
    assert not re.search(r"^[A-Z]+(_[A-Z]+)+$|TODO|TBD", TEXT, re.MULTILINE)


def test_figures_of_the_demo_are_in_the_results() -> None:
    folder = ROOT / "bench" / "results" / "demo"
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    assert all(cell["exact"] == 1 for cell in figures["recall"])
    assert max(cell["length"] for cell in figures["recall"]) == 16384
    assert figures["trained_length"] == 256
    assert len(set(figures["state_bytes"].values())) == 1
    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert "recall falls to 46 %" in TEXT
    assert [run["recall"]["2048"] for run in sweep["ablations"] if run["changed"] == {"stretched": 0.0}] == [0.46]


def test_the_table_of_model_types_is_what_the_tests_say() -> None:
    assert feature_table.table() in TEXT


def test_what_is_said_of_the_book_is_in_the_results() -> None:
    figures = json.loads((ROOT / "bench" / "results" / "book" / "book.json").read_text(encoding="utf-8"))
    assert figures["setup"]["steps"] == 1800
    assert {found["seeds"] for found in figures["summary"].values()} == {5}
    assert "steps, five seeds each" in PROSE


def test_figures_of_the_baselines_are_in_the_results() -> None:
    figures = json.loads((ROOT / "bench" / "results" / "baselines" / "baselines.json").read_text(encoding="utf-8"))
    assert (figures["setup"]["steps"], figures["setup"]["seeds"]) == (600, 3)
    assert all(kept["counted"] == kept["bytes"] for kept in figures["kept"].values())
    infini = figures["papers"][-1]
    assert f"{infini['counted_fewer']:.1f} times fewer numbers than Memorizing Transformers" in PROSE


def test_figures_of_plans_are_in_the_results() -> None:
    folder = ROOT / "bench" / "results" / "plan"
    plan = json.loads((folder / "llama-3-8b.json").read_text(encoding="utf-8"))
    conditions = f"segments of {plan['segment_len']} tokens, {plan['memory']} memory tokens, {plan['dtype']}, "
    conditions += f"batch {plan['batch']}, floors on an {plan['gpu']}, "
    conditions += f"{max(row['length'] for row in plan['estimates']):,} tokens:"
    assert f"Llama 3 8B, {conditions}" in PROSE
    published = json.loads((folder / "published.json").read_text(encoding="utf-8"))["savings"]
    found = {row["shape"]: [row[key][-1] for key in ("saving", "saving_with_memory")] for row in published}
    (small, small_with), (large, large_with) = found["opt-125m"], found["opt-175b"]
    assert f"takes {small:.1f} times RMT's FLOPs for OPT-125M and {large:.1f} times for OPT-175B" in PROSE
    assert f"{small_with:.1f} and {large_with:.1f} times" in PROSE
    sent = {
        (row["length"], row["ranks"]): {name: in_bytes(count) for name, count in row["bytes"].items()}
        for row in json.loads((folder / "exchange.json").read_text(encoding="utf-8"))["exchanges"]
    }
    few, many = sent[2**21, 32], sent[2**21, 1024]
    assert f"sends {few['ring']} a layer and training step in ring attention, {few['ulysses']} by Ulysses" in PROSE
    assert f"{few['linear']} for the linear memory and {few['delta']} for the delta memory" in PROSE
    assert f"at 1024 of them it is {many['linear']} and {many['delta']}, against {many['ring']};" in PROSE
    assert f"would send {many['linear scan']}." in PROSE


def test_figures_of_the_passkey_prompt_are_in_the_results() -> None:
    cells = json.loads((ROOT / "bench" / "results" / "passkey" / "passkey.json").read_text(encoding="utf-8"))["cells"]
    assert {cell["length"] for cell in cells} == {4028, 32700, 131004, 1048508}
    assert {cell["exact"] for cell in cells} == {0.0}
    assert {f"{cell['cache_bytes']:,}" for cell in cells} == {re.search(r"takes ([\d,]+) bytes of cache", TEXT)[1]}


NAMES = {"bert": "BERT", "modernbert": "ModernBERT"}


def _all_steps(figures: dict[str, Any]) -> int:
    """Of a run and of those that it started from."""
    before = figures.get("before")
    return figures["steps"] + (_all_steps(before) if before else 0)


def test_figures_of_the_memory_tasks_are_in_the_results() -> None:
    tasks = ("memorize", "detect", "reasoning")
    folder = ROOT / "bench" / "results" / "rmt"
    assert {path.parent.name for path in folder.glob("*/evaluation.json")} & set(tasks) == {
        task for task in tasks if f"| {task} | " in TEXT
    }
    for task in (task for task in tasks if f"| {task} | " in TEXT):
        figures, evaluation = (
            json.loads((folder / task / f"{name}.json").read_text()) for name in ("figures", "evaluation")
        )
        cells, settings = evaluation["lengths"], figures["settings"]
        assert [cell["segments"] for cell in cells] == [2, 8, 64, 512, 4096]
        sizes = f"{settings['layers']} layers, {settings['width']} wide ({figures['parameters']:,} parameters)"
        assert f"*{task}*: a {NAMES[settings['encoder']]} of {sizes}, {_all_steps(figures):,} steps" in PROSE
        assert (settings["memory"], settings["segment_len"]) == (10, 499)
        assert {cell["state_bytes"] for cell in cells} == {2560}
        assert cells[-1]["tokens"] == 2043904


def test_figures_of_the_pretrained_encoder_are_in_the_results() -> None:
    folder = ROOT / "bench" / "results" / "rmt" / "minilm"
    figures, evaluation = (json.loads((folder / f"{name}.json").read_text()) for name in ("figures", "evaluation"))
    said = f"*{evaluation['task']}* with a MiniLM of {figures['parameters']:,} parameters, segments of "
    said += f"{evaluation['segment_len']} tokens, {figures['steps']} steps on up to {evaluation['trained_segments']} of"
    assert said in PROSE
    cells = evaluation["lengths"]
    assert all(cell["right"] == cell["samples"] for cell in cells)
    samples, segments = ([str(cell[name]) for cell in cells] for name in ("samples", "segments"))
    told = [f"{', '.join(numbers[:-1])} and {numbers[-1]}" for numbers in (samples, segments)]
    assert f"all of {told[0]} answers right at {told[1]} segments" in PROSE
