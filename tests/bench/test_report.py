"""The report says what the results say, and finds where a README or a plot does not."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="needs segattn[cli]")

from segattn.bench.report import plots as report_plots
from segattn.bench.report.main import check_required, differences, made_of, main, rewritten
from segattn.bench.report.records import read, read_all
from segattn.bench.speed.rows import ResultError, Row, as_json
from segattn.bench.speed.timing import Times

ROOT = Path(__file__).resolve().parents[2]
README = """# A text

<!-- report: speed -->
<!-- /report -->

Words.

<!-- report: lengths -->
old
<!-- /report -->
"""


DOCUMENT = Path("README.md")


def case(time: int, name: str = "small", dtype: str = "float32") -> dict[str, Any]:
    return {"name": name, "T": time, "L": 16, "K": 8, "H": 2, "G": 2, "B": 1, "dtype": dtype}


def row(name: str, peer: str, direction: str, ratio: float, ms: float, **about: Any) -> Row:
    known = Row(f"{name}, {direction}", peer, "SDPA flash local", direction, case(32), seconds=[ms / 1e3] * 5)
    ratios, times = (Times(x, 0.9 * x, 1.1 * x) for x in (ratio, ms))
    errors = {"out": 2e-7, "dq": 4e-7, "dk": 3e-7}
    return dataclasses.replace(known, **({"ratio": ratios, "ms": times, "memory": 3 << 20, "errors": errors} | about))


def suite(*more: Row) -> dict[str, Any]:
    long = [
        row(f"T{time} by length", name, "forward + backward", 1.5, ms * time, case=case(time))
        for time in (32, 64)
        for name, ms in (("SDPA flash local", 1.0), ("segattn delta", 1.5))
    ]
    too_long = row("T128 by length", "SDPA flash full", "forward + backward", 1.0, 1.0, case=case(128))
    rows = [
        row("small", "SDPA flash local", "forward", 1.0, 2.0),
        row("small", "segattn delta", "forward", 1.25, 2.5),
        row("small", "segattn delta", "forward + backward", 1.4, 7.0, memory=150 << 20),
        *long,
        row("decode, 64 behind", "segattn delta", "decode", 0.25, 0.1, memory=5 << 20),
        row("small", "theirs", "forward", 1.0, 1.0, errors={}).refused("wrong", "errors beyond the gate"),
        dataclasses.replace(too_long, errors={}).refused("out of memory"),
        *more,
    ]
    machine = {"device": "cpu x86_64", "cpu_capability": "AVX2", "threads": 2, "torch": "2.13.0", "python": "3.11.7"}
    commit = {"id": "0123456789abcdef", "dirty": False}
    return {"machine_info": machine, "commit_info": commit} | as_json(rows)


def device() -> dict[str, Any]:
    """As `bench/on_device` writes it."""

    def on_device(peer: str, ms: float, share: float, errors: dict[str, float]) -> Row:
        long = case(4096, "main", "bfloat16")
        found = row("main bfloat16", peer, "forward", 1.0, ms, case=long, memory=1 << 20, errors=errors)
        times = {"ratio": Times(ms / 2, 0.45 * ms, 0.6 * ms), "ms": Times(ms, 0.9 * ms, 1.2 * ms)}
        return dataclasses.replace(found, **times, facts={"floor_share": share}, seconds=[ms / 1e3] * 9)

    rows = [
        on_device("SDPA flash local", 2.0, 0.6, {"out": 1e-3}),
        on_device("segattn delta", 3.0, 0.4, {"out": 2e-3, "dq": 3e-3}),
        dataclasses.replace(on_device("SDPA flash full", 1.0, 1.0, {}), facts={}).refused("out of memory"),
    ]
    limits = {"power.limit": "700 W", "driver_version": "1.2"}
    machine = {"device": "NVIDIA H100", "limits": limits, "torch": "2.13.0", "python": "3.12.1"}
    commit = {"id": "fedcba9876543210", "dirty": True}
    return {"machine_info": machine, "commit_info": commit, "goals": []} | as_json(rows)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = tmp_path / "results"
    folder.mkdir()
    for name, document in (("cpu", suite()), ("gpu", device())):
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    path = tmp_path / "README.md"
    path.write_text(README, encoding="utf-8")
    return path


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def table(name: str, folder: Path) -> str | None:
    return made_of(name, read_all(folder), folder)


def test_the_speed_table(results: Path) -> None:
    text = table("speed", results)
    assert text is not None
    assert cells(text) == [
        ["small, ÷ SDPA flash local", "forward", "forward + backward", "peak MiB"],
        ["---"] * 4,
        ["SDPA flash local", "1.00 (0.90-1.10)", "-", "3"],
        ["segattn delta", "1.25 (1.12-1.38)", "1.40 (1.26-1.54)", "150"],
        ["theirs", "wrong: errors beyond the gate", "", ""],
        ["main bfloat16, ÷ SDPA flash local", "forward", "peak MiB"],
        ["---"] * 3,
        ["SDPA flash local", "1.00 (0.90-1.20)", "1"],
        ["segattn delta", "1.50 (1.35-1.80)", "1"],
        ["SDPA flash full", "out of memory", ""],
    ]
    for condition in (
        "cpu x86_64 (AVX2), 2 threads",
        "PyTorch 2.13.0",
        "median (and p20-p80) of 5 rounds",
        "commit 0123456789ab;",
    ):
        assert condition in text
    assert "NVIDIA H100, 700 W, driver 1.2, PyTorch 2.13.0, Python 3.12.1, median (and p20-p80) of 9 rounds" in text
    assert "commit fedcba987654 with changes" in text


def test_what_is_noisy_is_marked_and_who_was_wrong_is_shown(results: Path) -> None:
    model = {"B": 1, "S": 2, "L": 8, "dtype": "float32"}
    ours = row("tiny", "segattn", "reading", 0.5, 2.0, case=model, facts={"tokens_per_second": 800.0})
    theirs = row("tiny", "theirs", "reading", 1.0, 1.0, case=model).refused("wrong", "relative error 1")
    document = suite(ours, theirs)
    document["benchmarks"][1]["extra_info"]["noisy"] = "spread of 40 %"
    (results / "cpu.json").write_text(json.dumps(document), encoding="utf-8")
    assert cells(table("speed", results) or "")[3][1] == "1.25 (1.12-1.38), noisy"
    assert cells(table("recurrent", results) or "")[2:] == [
        ["segattn", "0.50 (0.45-0.55)", "3"],
        ["theirs", "wrong: relative error 1", ""],
    ]


def test_other_tables(results: Path) -> None:
    assert cells(table("lengths", results) or "")[2:] == [
        ["SDPA flash local", "32", "64", "-"],
        ["segattn delta", "48", "96", "-"],
        ["SDPA flash full", "-", "-", "out of memory"],
    ]
    assert cells(table("decode", results) or "")[2:] == [["segattn delta", "0.25 (0.23-0.28)", "5"]]
    assert table("recurrent", results) is None


def test_data_of_plots(results: Path) -> None:
    found = read_all(results)
    lengths = report_plots.by_length(found)
    assert lengths is not None
    (lines,) = lengths.values()
    assert lines["segattn delta"] == {"points": [[32, 48.0, 3 << 20], [64, 96.0, 3 << 20]], "out_of_memory": []}
    assert lines["SDPA flash full"] == {"points": [], "out_of_memory": [128]}
    assert report_plots.floor_shares(found) == {
        "NVIDIA H100, forward": {
            "SDPA flash local": [["main bfloat16", 0.6]],
            "segattn delta": [["main bfloat16", 0.4]],
        }
    }
    errors = report_plots.errors(found)
    assert errors is not None
    assert errors["bfloat16"]["segattn delta"] == {"output": 2e-3, "gradients": 3e-3}
    assert errors["float32"]["segattn delta"] == {"output": 2e-7, "gradients": 4e-7}


def test_lengths_are_drawn_on_logarithmic_axes_with_what_did_not_fit(results: Path) -> None:
    data = report_plots.by_length(read_all(results))
    assert data is not None
    times, memory = report_plots.draw_lengths(data).axes
    assert {times.get_xscale(), times.get_yscale(), memory.get_xscale(), memory.get_yscale()} == {"log"}
    drawn = {line.get_label(): [list(x) for x in line.get_data()] for line in times.lines}
    assert drawn["segattn delta"] == [[32, 64], [48.0, 96.0]]
    crosses = [list(line.get_xdata()) for line in times.lines if line.get_marker() == "x"]
    assert crosses == [[128]]
    assert [list(line.get_ydata()) for line in memory.lines][1] == [3.0, 3.0]


def test_written_once_it_is_in_line(results: Path, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [f"--document={readme}", f"--results={results}"]
    assert main([*command, "--check"]) == 1
    out = capsys.readouterr().out
    for what in ("the table speed", "the table lengths", "lengths.png", "floor-shares.png", "errors.png"):
        assert f"{what} is not what the results say" in out
    assert main(command) == 0
    assert main([*command, "--check"]) == 0
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("# A text\n\n<!-- report: speed -->\n\n| small")
    assert "\n\nWords.\n\n" in text
    assert "old" not in text
    # again changes nothing
    capsys.readouterr()
    assert main(command) == 0
    assert capsys.readouterr().out == ""
    assert readme.read_text(encoding="utf-8") == text


def test_a_changed_figure_is_found(results: Path, readme: Path) -> None:
    main([f"--document={readme}", f"--results={results}"])
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace("1.25 (1.12", "1.05 (1.12"), encoding="utf-8")
    assert list(differences([readme], results)) == [f"{readme}: the table speed is not what the results say"]
    readme.write_text(text, encoding="utf-8")
    other = suite()
    other["benchmarks"][0]["extra_info"]["errors"]["dk"] = 5e-6
    (results / "cpu.json").write_text(json.dumps(other), encoding="utf-8")
    plot = results / "plots" / "errors.png"
    assert list(differences([readme], results)) == [f"{plot} is not what the results say"]
    # nor is a plot of what was measured once
    (results / "gpu.json").unlink()
    assert f"{results / 'plots' / 'floor-shares.png'} is not what the results say" in list(
        differences([readme], results)
    )
    main([f"--document={readme}", f"--results={results}"])
    assert {path.name for path in (results / "plots").iterdir()} == {"errors.png", "lengths.png"}


def test_a_table_of_one_file(results: Path) -> None:
    text = rewritten("<!-- report: speed gpu.json -->\n<!-- /report -->\n", read_all(results), results, DOCUMENT)
    assert "NVIDIA H100" in text
    assert "cpu.json" not in text


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            "<!-- report: fast -->\n<!-- /report -->\n",
            "report must name one of headline, speed, lengths, .* got 'fast'",
        ),
        ("<!-- report: recurrent -->\n<!-- /report -->\n", "report 'recurrent' must have results, got none"),
        ("<!-- report: decode gpu.json -->\n<!-- /report -->\n", "report 'decode gpu.json' must have results"),
        ("<!-- report: book cpu.json -->\n<!-- /report -->\n", "report 'book' must name no file, got 'cpu.json'"),
        ("<!-- report: speed -->\n", "each <!-- report: NAME --> must have its <!-- /report -->"),
        ("<!-- report: speed -->\n<!-- report: decode -->\n<!-- /report -->\n", "each <!-- report: NAME -->"),
    ],
)
def test_bad_markers_are_named(results: Path, text: str, problem: str) -> None:
    with pytest.raises(ResultError, match=rf"^README\.md: {problem}"):
        rewritten(text, read_all(results), results, DOCUMENT)


def test_a_required_table_stands_in_one_of_the_documents(results: Path) -> None:
    words, table = "Words.\n", "<!-- report: speed -->\n<!-- /report -->\n"
    other = Path("docs/results.md")
    problem = r"one of README\.md, docs/results\.md must have <!-- report: speed --> .*: there are results of it"
    with pytest.raises(ResultError, match=problem):
        check_required({DOCUMENT: words, other: words}, read_all(results), results)
    check_required({DOCUMENT: words, other: table}, read_all(results), results)


def test_links_lead_from_the_document_to_the_results(results: Path, readme: Path, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    other = tmp_path / "docs" / "results.md"
    other.write_text("<!-- report: decode -->\n<!-- /report -->\n", encoding="utf-8")
    assert main([f"--document={readme}", f"--document={other}", f"--results={results}"]) == 0
    assert "[cpu.json](results/cpu.json)" in readme.read_text(encoding="utf-8")
    assert "[cpu.json](../results/cpu.json)" in other.read_text(encoding="utf-8")
    other.write_text(other.read_text(encoding="utf-8").replace("0.25", "0.15"), encoding="utf-8")
    assert list(differences([readme, other], results)) == [f"{other}: the table decode is not what the results say"]


def test_bad_results_are_named(results: Path, readme: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (results / "copy.json").write_text((results / "cpu.json").read_text(encoding="utf-8"), encoding="utf-8")
    with pytest.raises(ResultError, match=r"copy\.json and cpu\.json in .* must not both have .*: delete one file"):
        read_all(results)
    (results / "copy.json").write_text("{", encoding="utf-8")
    with pytest.raises(ResultError, match=r"copy\.json must be a result of"):
        read(results / "copy.json")
    assert main([f"--document={readme}", f"--results={results}", "--check"]) == 2
    assert "copy.json must be a result of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"ratio": "1.5"}, "ratio of segattn delta, small, forward, must be positive numbers, .* got ('1.5', "),
        ({"ratio": -1.0}, "ratio of .* must be positive"),
        ({"ratio": math.nan}, "ratio of .* must be positive"),
        ({"ratio": True}, "ratio of .* must be positive"),
        ({"ratio": 9.0}, "the median between its quantiles"),
        ({"ratio_fifths": [1.0]}, "ratio of .* must be positive"),
        ({"ms": math.inf}, "ms of .* must be positive"),
        ({"peak_bytes": "much"}, "memory of .* must be a finite number, not negative, got 'much'"),
        ({"tokens_per_second": -5}, "tokens_per_second of .* must be a positive number, got -5"),
        ({"errors": {"dq": math.nan}}, "error of dq of .* must be a finite number, not negative, got nan"),
        ({"errors": {"dq": "small"}}, "error of dq of .* must be a finite"),
    ],
)
def test_figures_that_cannot_be_are_named(
    results: Path, readme: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], said: str
) -> None:
    document = suite()
    document["benchmarks"][1]["extra_info"] |= changes
    (results / "cpu.json").write_text(json.dumps(document), encoding="utf-8")
    before = readme.read_text(encoding="utf-8")
    for arguments in ([], ["--check"]):
        assert main([f"--document={readme}", f"--results={results}", *arguments]) == 2
        assert re.search(said.replace("(", r"\("), capsys.readouterr().err)
    assert readme.read_text(encoding="utf-8") == before


def keep(path: Path, figures: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(figures), encoding="utf-8")


def keep_experiments(folder: Path) -> None:
    """Write what trainings and a plan leave behind."""
    learnt = {
        name: {"seeds": 2, "perplexity": [5 + i, 0.25], "nats_less_local": [-0.1 * i or 0.0, 0.05]}
        for i, name in enumerate(("local", "full", "linear", "delta"))
    }
    keep(folder / "book" / "book.json", {"summary": learnt})
    ratios = {"local": {"ratio": 1.0}, "delta": {"ratio": 0.5}}
    counts = {name: {"counted": {"512": 1024 * i, "8192": 1, "65536": 2048 * i}} for i, name in enumerate(ratios)}
    keep(
        folder / "baselines" / "baselines.json",
        {"summary": learnt, "kept": counts, "speed": {"train": ratios, "evaluate": ratios}},
    )
    row = {"prefill_floor_s": 306.1, "decode_floor_s_per_token": 0.0455, "state_bytes": 0, "cache_bytes": 2**37}
    row |= {"forward_flops": 304e15, "flops_saving": 1.0}
    estimates = [row | {"scheme": name, "length": n} for n in (64, 8) for name in ("full", "rmt", "infini", "armt")]
    keep(folder / "plan" / "llama-3-8b.json", {"update": "linear", "estimates": estimates})
    for task, right in (("reasoning", 3), ("memorize", 4)):
        cells = [{"segments": n, "tokens": 499 * n, "samples": 4, "right": right} for n in (2, 64)]
        keep(folder / "rmt" / task / "evaluation.json", {"lengths": cells, "published": {"2": 1.0, "64": 0.982}})
        keep(folder / "rmt" / task / "figures.json", {})
    keep(folder / "rmt" / "detect" / "figures.json", {})


def test_tables_of_trainings_and_plans(tmp_path: Path) -> None:
    assert [table(name, tmp_path) for name in ("baselines", "book", "plan", "memory-tasks")] == [None] * 4
    keep_experiments(tmp_path)
    assert cells(table("baselines", tmp_path) or "")[2:] == [
        ["local", "0", "0", "5.000 ± 0.250", "+0.000 ± 0.050", "1.00", "1.00"],
        ["delta", "1,024", "2,048", "8.000 ± 0.250", "-0.300 ± 0.050", "0.50", "0.50"],
    ]
    path = tmp_path / "baselines" / "baselines.json"
    figures = json.loads(path.read_text(encoding="utf-8"))
    keep(path, figures | {"rates": {"local": 0.01, "delta": 0.003}})
    chosen = cells(table("baselines", tmp_path) or "")
    assert chosen[0][:4] == ["", "learning rate", "bytes kept of 512", "of 65,536"]
    assert [row[:3] for row in chosen[2:]] == [["local", "0.01", "0"], ["delta", "0.003", "1,024"]]
    keep(path, figures)
    assert cells(table("book", tmp_path) or "")[0] == ["", "full attention", "local", "linear memory", "delta memory"]
    assert cells(table("book", tmp_path) or "")[2:] == [
        ["perplexity", "6.00 ± 0.25", "5.00 ± 0.25", "7.00 ± 0.25", "8.00 ± 0.25"],
        ["nats per byte, against local", "-0.100 ± 0.050", "0", "-0.200 ± 0.050", "-0.300 ± 0.050"],
    ]
    costs = ["304 P", "1.00", "306 s", "45.5 ms", "0", "128 GiB"]
    assert cells(table("plan", tmp_path) or "")[2:] == [
        [name, *costs] for name in ("full attention", "RMT", "Infini-attention, linear", "ARMT")
    ]
    assert cells(table("memory-tasks", tmp_path) or "") == [
        ["right, % (of samples)", "2 segments", "64"],
        ["---"] * 3,
        ["memorize", "100.0 (4)", "100.0 (4)"],
        ["the paper's", "100.0", "98.2"],
        ["reasoning", "75.0 (4)", "75.0 (4)"],
        ["the paper's", "100.0", "98.2"],
    ]


def test_the_headline_has_a_row_for_each_result_that_is_there(tmp_path: Path, results: Path) -> None:
    assert table("headline", tmp_path) is None
    assert table("headline", results) is None
    others = {"eager loop delta": 1.5, "infini-transformer-pytorch delta": 2.5, "SDPA flash full": 5.0}
    more = [row("small", name, "forward + backward", ratio, 7.0) for name, ratio in others.items()]
    for name, kept in (("segattn delta", 1 << 20), ("SDPA, growing cache", 64 << 20)):
        behind = {"context": 4096, "dtype": "float32"}
        more.append(row("decode, 4K behind", name, "decode", 0.5, 0.1, memory=kept, case=behind))
    keep(results / "cpu.json", suite(*more))
    keep_experiments(results)
    keep(results / "demo" / "figures.json", {"trained_length": 64})
    recall = [{"length": n, "right": right, "samples": 4} for n, right in ((64, 0), (128, 4), (128, 2))]
    keep(results / "demo" / "million.json", {"cells": recall})
    for name, long, whole in (("-trained-128k", 999, (0.9, 0.8)), ("-window", 99, (0.0, 0.1))):
        lengths = ((9, (0, 0)), (long, whole))
        cells_of = [{"length": n, "exact": share, "samples": 10} for n, shares in lengths for share in shares]
        keep(results / "pretrained" / f"smollm2-passkeys{name}" / "passkey.json", {"cells": cells_of})
    another = {"cells": [{"length": 999, "exact": 0.5, "samples": 4}, {"length": 99, "exact": 0.0, "samples": 4}]}
    keep(results / "pretrained" / "smollm2-passkeys-trained-delta-0-128k" / "passkey.json", another)
    rows = [row[1:] for row in cells(table("headline", results) or "")[2:]]
    assert rows == [
        ["1.40", "eager loop over segments 1.50, infini-transformer-pytorch 2.50, full attention 5.00"],
        ["1 MiB", "keys and values 64 MiB"],
        ["75.0 % of 8", "trained on 64 tokens"],
        ["19 of 24", "without a memory 1 of 20, from 99"],
        ["100.0 % of 4", "the paper's 98.2 %"],
        ["75.0 % of 4", "the paper's 98.2 %"],
        ["8.00 ± 0.25", "segments alone 5.00 ± 0.25, full attention 6.00 ± 0.25"],
    ]


def test_tables_of_trainings_and_plans_are_held(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_experiments(tmp_path)
    names = ("baselines", "book", "plan", "memory-tasks", "headline")
    marked = [f"<!-- report: {name} -->\n<!-- /report -->\n" for name in names]
    path = tmp_path / "README.md"
    path.write_text("".join(marked), encoding="utf-8")
    command = [f"--document={path}", f"--results={tmp_path}"]
    assert main(command) == main([*command, "--check"]) == 0
    text = path.read_text(encoding="utf-8")
    figures = {"baselines": "8.000 ±", "book": "8.00 ±", "plan": "306 s", "memory-tasks": "98.2"}
    figures["headline"] = "8.00 ± 0.25 | segments"
    for name, figure in figures.items():
        path.write_text(text.replace(figure, figure.replace("8", "7").replace("3", "4"), 1), encoding="utf-8")
        assert list(differences([path], tmp_path)) == [f"{path}: the table {name} is not what the results say"]
    for name, markers in zip(names, marked, strict=True):
        # neither may the markers be left out, nor the table with them
        path.write_text("".join(x for x in marked if x != markers), encoding="utf-8")
        capsys.readouterr()
        assert main(command) == main([*command, "--check"]) == 2
        assert capsys.readouterr().err.count(f"one of {path} must have <!-- report: {name} -->") == 2


def test_pairs_held_are_those_up_to_the_first_loss(tmp_path: Path) -> None:
    assert table("retrieval", tmp_path) is None
    shares = {"4": (1000, [0.96, 0.94, 0.97]), "16": (4000, [1.0, 0.95, 0.5]), "1": (250, [0.5, 0.4, 0.3])}
    for name, (size, accuracies) in shares.items():
        lengths = [
            {"segments": n, "accuracy": share, "state_bytes": size}
            for n, share in zip((3, 5, 9), accuracies, strict=True)
        ]
        keep(tmp_path / "rmt" / "retrieval" / name / "evaluation.json", {"lengths": lengths})
    assert cells(table("retrieval", tmp_path) or "") == [
        ["state, bytes", "2 pairs", "4", "8", "held at 95 %"],
        ["---"] * 5,
        ["250", "50.0", "40.0", "30.0", "0"],
        ["1,000", "96.0", "94.0", "97.0", "2"],
        ["4,000", "100.0", "95.0", "50.0", "4"],
    ]


def test_benchmarks_say_memory_and_time_by_length(tmp_path: Path) -> None:
    assert table("benchmarks", tmp_path) is None
    cells_of = {
        "ruler": [("a", 1024, 0.5, 300, 8.0), ("b", 1024, 0.0, 200, 4.0), ("a", 4096, 1.0, 299, 9.0)],
        "babilong": [("qa1", 4096, 0.25, 310, 30.0), ("qa1", 1024, 0.0, 309, 1.5)],
    }
    for name, found in cells_of.items():
        made = [
            {"task": task, "length": length, "samples": 4, "score": score, "peak_bytes": mib * 2**20, "seconds": time}
            for task, length, score, mib, time in found
        ]
        keep(tmp_path / "lm_eval" / f"{name}.json", {"cells": made})
    assert cells(table("benchmarks", tmp_path) or "") == [
        ["", "1,024 tokens", "4,096"],
        ["---"] * 3,
        ["RULER (a, b): most memory held, MiB", "300", "299"],
        ["seconds a text, its making included", "1.5", "2.2"],
        ["right, %", "25.0", "100.0"],
        ["BABILong (qa1): most memory held, MiB", "309", "310"],
        ["seconds a text, its making included", "0.4", "7.5"],
        ["right, %", "0.0", "25.0"],
    ]
    keep(tmp_path / "lm_eval" / "babilong.json", {"cells": made[:1]})
    with pytest.raises(ValueError, match=r"babilong must be of \[1024, 4096\] tokens as the other, got \[4096\]"):
        table("benchmarks", tmp_path)


def test_scores_have_a_row_for_each_task_and_model(tmp_path: Path) -> None:
    assert table("scores", tmp_path) is None
    for folder, name, found in (
        ("smollm2", "ruler", [("a", 1024, 1.0), ("a", 2048, 0.9), ("b", 2048, 0.05)]),
        ("smollm2-window", "ruler", [("a", 2048, 0.3)]),
        ("smollm2-window", "babilong", [("qa1", 1024, 0.25)]),
    ):
        made = [{"task": task, "length": length, "samples": 20, "score": score} for task, length, score in found]
        keep(tmp_path / "lm_eval" / folder / f"{name}.json", {"cells": made})
    full, window = "SmolLM2-135M-Instruct, full attention", "segments of 256, lookback=1, sinks=4"
    assert cells(table("scores", tmp_path) or "") == [
        ["right, %", "", "1,024", "2,048"],
        ["---"] * 4,
        ["RULER a, 20 texts", full, "100", "90"],
        ["RULER b, 20 texts", full, "", "5"],
        ["RULER a, 20 texts", window, "", "30"],
        ["BABILong qa1, 20 texts", window, "25", ""],
    ]


def test_readings_say_how_much_of_the_way_to_full_attention_is_won(tmp_path: Path) -> None:
    assert table("readings", tmp_path) is None
    for name, losses in (
        ("full", [2.0, 2.2]), ("window", [2.5, 2.9]), ("delta", [2.4, 2.6]),
        ("window-lora", [2.3, 2.7]), ("delta-lora", [2.1, 2.3]), ("delta-rounds", [2.3, 2.5]),
    ):  # fmt: skip
        parts = [{"end": 10 * i, "perplexity": math.exp(nats)} for i, nats in enumerate(losses, 1)]
        mean = {"nats": sum(losses) / 2, "perplexity": math.exp(sum(losses) / 2)}
        path = tmp_path / "pretrained" / f"smollm2-text-{name}" / "perplexity.json"
        keep(path, {"by_position": parts, "mean": mean})
    assert cells(table("readings", tmp_path) or "") == [
        ["perplexity", "to 10", "to 20", "all", "won"],
        ["---"] * 5,
        ["full attention", "7.4", "9.0", "8.2", ""],
        ["window alone", "12.2", "18.2", "14.9", ""],
        ["memory fitted, delta", "11.0", "13.5", "12.2", "33%"],
        ["memory fitted, delta, then trained in rounds", "10.0", "12.2", "11.0", "50%"],
        ["window alone, then LoRA", "10.0", "14.9", "12.2", ""],
        ["memory fitted, delta, then LoRA", "8.2", "10.0", "9.0", ""],
    ]


def test_far_readings_have_a_row_for_each_way(tmp_path: Path) -> None:
    assert table("far-readings", tmp_path) is None
    for name, nats in (("delta-rounds-32k", 2.3), ("window-32k", 2.5), ("window", 2.0)):
        parts = [{"end": 10, "perplexity": math.exp(nats)}, {"end": 20, "perplexity": 9.04}]
        mean = {"nats": nats, "perplexity": 9.5}
        keep(tmp_path / "pretrained" / f"smollm2-text-{name}" / "perplexity.json", {"by_position": parts, "mean": mean})
    assert cells(table("far-readings", tmp_path) or "") == [
        ["perplexity", "to 10", "to 20", "all"],
        ["---"] * 4,
        ["window alone", "12.2", "9.0", "9.5"],
        ["memory fitted, delta, then trained in rounds", "10.0", "9.0", "9.5"],
    ]


def test_what_is_fitted_to_passkeys_is_read_beside_the_window(tmp_path: Path) -> None:
    assert table("beside-passkeys", tmp_path) is None
    for name, perplexity in (
        ("smollm2-passkeys", 9.0),
        ("smollm2-passkeys-trained-linear-1", 9.25),
        ("smollm2-delta", 8.0),
    ):
        rows = [
            {
                "conversion": way,
                "by_position": [{"end": end} for end in (4, 8, 12, 16)],
                "quarters": [value],
                "perplexity": value,
            }
            | {"cache_bytes": 2048}
            for way, value in (
                ("full attention", 7.5),
                ("untrained", 9.5),
                ("window alone", 9.75),
                ("adapted", perplexity),
            )
        ]
        keep(tmp_path / "pretrained" / name / "adapt.json", {"rows": rows})
    assert cells(table("beside-passkeys", tmp_path) or "") == [
        ["SmolLM2-135M-Instruct, perplexity", "to 16", "all", "kept"],
        ["---"] * 4,
        ["full attention", "7.5", "7.50", "2 KiB"],
        ["window alone", "9.8", "9.75", "2 KiB"],
        ["fitted alone, linear", "9.0", "9.00", "2 KiB"],
        ["trained, linear, seed 1", "9.2", "9.25", "2 KiB"],
    ]


def test_passkeys_have_a_row_for_each_reader_and_length(tmp_path: Path) -> None:
    assert table("passkeys", tmp_path) is None
    for folder, samples, found in (
        ("smollm2-passkeys", 10, [(1500, 0.1, 1.0, 1.0), (1500, 0.5, 0.9, 0.98), (6000, 0.1, 0.7, 0.86)]),
        ("smollm2-passkeys-long", 5, [(32768, 0.1, 0.4, 0.6)]),
        ("smollm2-passkeys-window", 10, [(1500, 0.1, 0.0, 0.06), (1500, 0.5, 0.0, 0.0)]),
    ):
        made = [dict(zip(("length", "depth", "exact", "tokens"), x, strict=True), samples=samples) for x in found]
        keep(tmp_path / "pretrained" / folder / "passkey.json", {"cells": made})
    assert cells(table("passkeys", tmp_path) or "") == [
        ["whole keys; digits", "tokens", "at 10 %", "at 50 %"],
        ["---"] * 4,
        ["window alone", "1,500", "0 of 10; 6 %", "0 of 10; 0 %"],
        ["fitted alone, linear", "1,500", "10 of 10; 100 %", "9 of 10; 98 %"],
        ["fitted alone, linear", "6,000", "7 of 10; 86 %", ""],
        ["fitted alone, linear", "32,768", "2 of 5; 60 %", ""],
    ]


def test_rounds_have_a_row_for_each_training(tmp_path: Path) -> None:
    assert table("rounds", tmp_path) is None
    keep(tmp_path / "pretrained" / "smollm2-passkeys" / "adapt.json", {"rounds": []})
    assert table("rounds", tmp_path) is None
    found = [{"loss": 1.304 / n, "digits": 0.9, "keys": 1 - 0.5 / n} for n in range(1, 15)]
    keep(tmp_path / "pretrained" / "smollm2-passkeys-trained-delta-0" / "adapt.json", {"rounds": found})
    head, _, row = cells(table("rounds", tmp_path) or "")
    assert head == ["nats a digit; whole keys", *(f"round {n}" for n in (1, 2, 3, 4, 6, 8, 10, 12, 14))]
    assert row[:4] == ["trained, delta, seed 0", "1.30; 50 %", "0.65; 75 %", "0.43; 83 %"]
    assert row[-1] == "0.09; 96 %"


def test_recurrent_lengths_have_a_row_for_each_reader(tmp_path: Path) -> None:
    assert table("recurrent-lengths", tmp_path) is None
    summary = [
        {"reader": reader, "segments": n, "ratio_to_shortest": ratio, "kept_bytes": kept}
        for reader, n, ratio, kept in (("full", 8, 1.0, 2048), ("RMT", 64, 1.014, 512), ("RMT", 8, 1.0, 512))
    ]
    keep(tmp_path / "rmt" / "lengths.json", {"summary": summary})
    assert cells(table("recurrent-lengths", tmp_path) or "") == [
        ["time of a token, ÷ that of 8 segments; kept", "8 segments", "64"],
        ["---"] * 3,
        ["full", "1.00; 2 KiB", ""],
        ["RMT", "1.00; 512 B", "1.01; 512 B"],
    ]


def test_experiments_that_are_none_are_named(tmp_path: Path) -> None:
    keep_experiments(tmp_path)
    keep(tmp_path / "book" / "book.json", {"runs": []})
    with pytest.raises(ResultError, match=r"results for the table book in .* must be its command's, got KeyError"):
        table("book", tmp_path)
    cells = [{"segments": n, "samples": 4, "right": 1} for n in (2, 8)]
    keep(tmp_path / "rmt" / "reasoning" / "evaluation.json", {"lengths": cells, "published": {"2": 1, "8": 1}})
    with pytest.raises(ResultError, match=r"reasoning must be of \[2, 64\] segments as the others, got \[2, 8\]"):
        table("memory-tasks", tmp_path)


def test_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "segattn.bench.report", "--check"], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_million_has_a_row_for_each_rule_and_length(tmp_path: Path) -> None:
    assert table("million", tmp_path) is None
    summary = [
        {"update": update, "length": length, "depth": depth, "seeds": 2, "samples": 8, "right": i}
        for i, (update, length, depth) in enumerate(itertools.product(("delta", "linear"), (512, 2048), (0.0, 0.5)))
    ]
    keep(
        tmp_path / "demo" / "million.json", {"setup": {"lengths": [512, 2048], "depths": [0, 0.5]}, "summary": summary}
    )
    assert cells(table("million", tmp_path) or "") == [
        ["passkeys recalled whole; seeds", "tokens", "at 0 %", "at 50 %"],
        ["---"] * 4,
        ["delta", "512", "0 of 8; 2", "1 of 8; 2"],
        ["delta", "2,048", "2 of 8; 2", "3 of 8; 2"],
        ["linear", "512", "4 of 8; 2", "5 of 8; 2"],
        ["linear", "2,048", "6 of 8; 2", "7 of 8; 2"],
    ]
