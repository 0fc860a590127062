"""What README.md and docs/ show runs, their links lead somewhere, and what they say of figures is in the results."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import feature_table
import pytest

import segattn
from segattn.bench.planner.units import in_bytes

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in DOCUMENTS}
# without line breaks
PROSE = {name: " ".join(text.split()) for name, text in TEXTS.items()}
BLOCKS = [
    pytest.param(code, id=f"{name}-{number}")
    for name, text in TEXTS.items()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
]
RESULTS = ROOT / "bench" / "results"


def sizes(text: str) -> list[str]:
    return [re.sub(r"\s", "", size) for size in re.findall(r"\[[\d, ]+\]", text)]


@pytest.mark.parametrize("code", BLOCKS)
def test_code_runs_and_prints_what_it_says(
    code: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # what it writes goes to the folder that it runs in
    monkeypatch.chdir(tmp_path)
    if "init_process_group" in code:
        # process groups are of a whole process
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        printed = done.stdout
    else:
        exec(compile(code, "a block of code", "exec"), {"__name__": "__main__"})
        printed = capsys.readouterr().out
    said = [line for line in code.splitlines() if line.startswith("print(")]
    assert len(said) == 1
    # the Trainer prints its log too
    assert sizes(printed.splitlines()[-1]) == sizes(said[0].split("#")[1])


def test_there_is_code() -> None:
    assert len(BLOCKS) >= 9


def test_the_front_page_is_one_page() -> None:
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 170
    assert "Triton" in " ".join(lines[:5])


def anchors(path: Path) -> set[str]:
    """Anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def assert_leads_somewhere(target: Path, anchor: str, source: Path) -> None:
    assert target.exists(), f"{source}: {target}"
    if anchor:
        assert anchor in anchors(target), f"{source}: {target}#{anchor}"


def test_links_lead_somewhere() -> None:
    for path in ROOT.rglob("*.md"):
        if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            continue
        for target in re.findall(r"\]\(([^)]+)\)", path.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                name, _, anchor = target.partition("#")
                assert_leads_somewhere(path.parent / name if name else path, anchor, path)


def test_commands_are_there() -> None:
    for path in (*DOCUMENTS, ROOT / "CONTRIBUTING.md"):
        for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
            for module in re.findall(r"-m (segattn[\w.]*)", block):
                assert importlib.util.find_spec(module) is not None, f"{path}: {module}"
            for script in re.findall(r"^((?:ci|bench)/\w+)", block, re.MULTILINE):
                assert (ROOT / script).is_file(), f"{path}: {script}"


def test_contributing_leads_to_names_that_are_there() -> None:
    rows = re.findall(r"^\| .* \| \[(.*?)\]\(.*?\) \| (.*) \|$", (ROOT / "CONTRIBUTING.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    for file, names in rows:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in re.findall(r"`(\w+)`", names):
            assert re.search(rf"^(def|class) {name}\b", text, re.MULTILINE), f"{file}: {name}"


def test_links_of_the_front_page_work_on_the_package_index() -> None:
    repository = re.search(r'^Repository = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert repository is not None
    targets = re.findall(r"\]\(([^)]+)\)", TEXTS["README.md"])
    assert len(targets) > 10
    for target in targets:
        inside = re.fullmatch(re.escape(repository[1]) + r"/(?:blob|raw)/main/([^#]+)#?(.*)", target)
        assert inside is not None, target
        assert_leads_somewhere(ROOT / inside[1], inside[2], README)
    assert f"git+{repository[1]}" in TEXTS["README.md"]


def messages() -> set[str]:
    """Every string of the package, with … where one is formatted into it."""
    found = set()
    for room in ("kernels", "infini", "rmt", "src/segattn"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(x.value if isinstance(x, ast.Constant) else "…" for x in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_errors_are_quoted_as_they_are_raised() -> None:
    known = messages()
    headings = re.findall(r"^### (`.*)$", TEXTS["troubleshooting.md"], re.MULTILINE)
    quoted = [words for heading in headings for words in re.findall(r"`([^`]+)`", heading)]
    assert len(quoted) > 20
    # of PyTorch and transformers
    others = {
        "FSDP expects uniform original parameter dtype",
        "Passing optimizers is not allowed if PyTorch FSDP is enabled",
        "out of bounds for storage of size 0",
        "derivative for aten::_scaled_dot_product_flash_attention_for_cpu_backward is not implemented",
        "it must override the setup_context staticmethod",
    }
    assert [words for words in quoted if words not in others and not any(words in message for message in known)] == []


def loaded(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_its_script_draws() -> None:
    drawn = loaded("picture").picture()
    assert (ROOT / "docs" / "operation.svg").read_text(encoding="utf-8") == drawn
    assert "prefers-color-scheme: dark" in drawn


def test_the_reference_has_every_public_name(tmp_path: Path) -> None:
    pytest.importorskip("pdoc", reason="needs segattn[docs]")
    page = loaded("reference").build(tmp_path).read_text(encoding="utf-8")
    assert [name for name in segattn.__all__ if f'<section id="{name}">' not in page] == []


def test_tables_and_plots_are_what_the_results_say() -> None:
    report = pytest.importorskip("segattn.bench.report.main", reason="needs segattn[cli]")
    assert list(report.differences(report.documents(), RESULTS)) == []


def test_nothing_is_left_to_fill_in() -> None:
    for text in TEXTS.values():
        assert not re.search(r"^[A-Z]+(_[A-Z]+)+$|TODO|TBD", text, re.MULTILINE)


def test_figures_of_the_demo_are_in_the_results() -> None:
    folder = RESULTS / "demo"
    figures = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
    missed = [(cell["length"], round((1 - cell["exact"]) * cell["samples"])) for cell in figures["recall"]]
    assert [(length, count) for length, count in missed if count] == [(256, 1)]
    assert "misses one passkey, in a text of 256 tokens" in PROSE["results.md"]
    samples = {cell["length"]: cell["samples"] for cell in figures["recall"]}
    assert samples == {256: 40, 1024: 40, 4096: 40, 16384: 32, 131072: 4, 1048576: 2}
    assert figures["trained_length"] == 256
    assert len(set(figures["state_bytes"].values())) == 1
    sweep = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    assert "recall falls to 46 %" in TEXTS["results.md"]
    assert [run["recall"]["2048"] for run in sweep["ablations"] if run["changed"] == {"stretched": 0.0}] == [0.46]


def test_the_table_of_model_types_is_what_the_tests_say() -> None:
    table = feature_table.table()
    assert table in TEXTS["huggingface.md"]
    converted = re.findall(r"^\| [^|]+ \| ✓ ", table, re.MULTILINE)
    assert f"[{len(converted)} model types]" in TEXTS["README.md"]


def test_what_is_said_of_the_book_is_in_the_results() -> None:
    figures = json.loads((RESULTS / "book" / "book.json").read_text(encoding="utf-8"))
    assert figures["setup"]["steps"] == 1800
    assert {found["seeds"] for found in figures["summary"].values()} == {5}
    assert "steps, five seeds each" in PROSE["results.md"]


def test_figures_of_the_baselines_are_in_the_results() -> None:
    figures = json.loads((RESULTS / "baselines" / "baselines.json").read_text(encoding="utf-8"))
    assert (figures["setup"]["steps"], figures["setup"]["seeds"]) == (1000, 5)
    assert all(kept["counted"] == kept["bytes"] for kept in figures["kept"].values())
    infini = figures["papers"][-1]
    assert f"{infini['counted_fewer']:.1f} times fewer numbers than Memorizing Transformers" in PROSE["results.md"]


def test_what_is_said_of_the_fitted_gates_is_in_the_results() -> None:
    figures = json.loads((RESULTS / "pretrained" / "smollm2-delta" / "adapt.json").read_text(encoding="utf-8"))
    shares = [share for layer in figures["layers"] for share in layer["gates"]]
    assert f"between 0 and {max(shares):.2f} in all {len(shares)} heads" in PROSE["results.md"]
    assert f"at {statistics.median(shares):.3f} in the median" in PROSE["results.md"]
    above, most, below = (sum(test) for test in zip(*((x > 0.1, x > 0.5, x < 0.005) for x in shares), strict=True))
    assert f"in {above} above 0.1, in none above 0.5, and in {below} below 0.005" in PROSE["results.md"]
    assert most == 0
    shut = {layer["layer"]: sum(share < 0.005 for share in layer["gates"]) for layer in figures["layers"]}
    named = re.search(r"several of these \(([\d, ]+)\)", PROSE["results.md"])
    assert named is not None
    assert {int(x) for x in named[1].split(", ")} == {layer for layer, count in shut.items() if count > 1}


def test_figures_of_plans_are_in_the_results() -> None:
    folder = RESULTS / "plan"
    plan = json.loads((folder / "llama-3-8b.json").read_text(encoding="utf-8"))
    conditions = f"segments of {plan['segment_len']} tokens, {plan['memory']} memory tokens, {plan['dtype']}, "
    conditions += f"batch {plan['batch']}, floors on an {plan['gpu']}, "
    conditions += f"{max(row['length'] for row in plan['estimates']):,} tokens:"
    assert f"Llama 3 8B, {conditions}" in PROSE["results.md"]
    published = json.loads((folder / "published.json").read_text(encoding="utf-8"))["savings"]
    found = {row["shape"]: [row[key][-1] for key in ("saving", "saving_with_memory")] for row in published}
    (small, small_with), (large, large_with) = found["opt-125m"], found["opt-175b"]
    assert f"takes {small:.1f} times RMT's FLOPs for OPT-125M and {large:.1f} times for OPT-175B" in PROSE["results.md"]
    assert f"{small_with:.1f} and {large_with:.1f} times" in PROSE["results.md"]
    sent = {
        (row["length"], row["ranks"]): {name: in_bytes(count) for name, count in row["bytes"].items()}
        for row in json.loads((folder / "exchange.json").read_text(encoding="utf-8"))["exchanges"]
    }
    few, many = sent[2**21, 32], sent[2**21, 1024]
    assert (
        f"sends {few['ring']} a layer and training step in ring attention, {few['ulysses']} by Ulysses"
        in PROSE["distributed.md"]
    )
    assert f"{few['linear']} for the linear memory and {few['delta']} for the delta memory" in PROSE["distributed.md"]
    assert (
        f"at 1024 of them it is {many['linear']} and {many['delta']}, against {many['ring']};"
        in PROSE["distributed.md"]
    )
    assert f"would send {many['linear scan']}." in PROSE["distributed.md"]


NAMES = {"bert": "BERT", "modernbert": "ModernBERT"}


def _all_steps(figures: dict[str, Any]) -> int:
    """Of a run and of those that it started from."""
    before = figures.get("before")
    return figures["steps"] + (_all_steps(before) if before else 0)


def test_figures_of_the_memory_tasks_are_in_the_results() -> None:
    tasks = ("memorize", "detect", "reasoning")
    folder = RESULTS / "rmt"
    assert {path.parent.name for path in folder.glob("*/evaluation.json")} & set(tasks) == {
        task for task in tasks if f"| {task} | " in TEXTS["results.md"]
    }
    for task in (task for task in tasks if f"| {task} | " in TEXTS["results.md"]):
        figures, evaluation = (
            json.loads((folder / task / f"{name}.json").read_text()) for name in ("figures", "evaluation")
        )
        cells, settings = evaluation["lengths"], figures["settings"]
        assert [cell["segments"] for cell in cells] == [2, 8, 64, 512, 4096]
        sizes = f"{settings['layers']} layers, {settings['width']} wide ({figures['parameters']:,} parameters)"
        assert (
            f"*{task}*: a {NAMES[settings['encoder']]} of {sizes}, {_all_steps(figures):,} steps" in PROSE["results.md"]
        )
        assert (settings["memory"], settings["segment_len"]) == (10, 499)
        assert {cell["state_bytes"] for cell in cells} == {2560}
        assert cells[-1]["tokens"] == 2043904


def test_figures_of_the_pretrained_encoder_are_in_the_results() -> None:
    folder = RESULTS / "rmt" / "minilm"
    figures, evaluation = (json.loads((folder / f"{name}.json").read_text()) for name in ("figures", "evaluation"))
    said = f"*{evaluation['task']}* with a MiniLM of {figures['parameters']:,} parameters, segments of "
    said += f"{evaluation['segment_len']} tokens, {figures['steps']} steps on up to {evaluation['trained_segments']} of"
    assert said in PROSE["results.md"]
    cells = evaluation["lengths"]
    assert all(cell["right"] == cell["samples"] for cell in cells)
    samples, segments = ([str(cell[name]) for cell in cells] for name in ("samples", "segments"))
    told = [f"{', '.join(numbers[:-1])} and {numbers[-1]}" for numbers in (samples, segments)]
    assert f"all of {told[0]} answers right at {told[1]} segments" in PROSE["results.md"]
