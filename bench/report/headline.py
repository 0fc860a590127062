"""Make the README's one table: a line for each thing that the package is for, from the results that the others show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..planner.units import in_bytes
from ..speed.rows import Row
from ..speed.workloads import BOTH
from .experiments import figures_in, markdown, spread
from .records import Result

OURS = "segattn delta"
CACHE = "SDPA, growing cache"
OTHERS = {
    "eager loop delta": "eager loop over segments",
    "infini-transformer-pytorch delta": "infini-transformer-pytorch",
    "SDPA flash full": "full attention",
}
TASKS = {"memorize": "one fact", "reasoning": "two facts"}


def headline(results: Sequence[Result], folder: Path) -> str | None:
    """Return a row for each result that is there: what was measured, what came out, and what stands beside it."""
    rows = [*_speed(results), *_decoding(results), *_demo(folder), *_pretrained(folder), *_memory_tasks(folder)]
    rows += _book(folder)
    return markdown(["", "segattn", "for comparison"], rows) if rows else None


def _speed(results: Sequence[Result]) -> list[list[str]]:
    """Return the time of training on the CPU, at the first case that all were timed at."""
    groups: dict[str, dict[str, Row]] = {}
    for row in (x for result in results for x in result.rows):
        if row.device.startswith("cpu") and row.direction == BOTH and row.ratio:
            groups.setdefault(row.group, {})[row.peer] = row
    for cells in groups.values():
        if {OURS, *OTHERS} <= cells.keys():
            ours = cells[OURS]
            what = f"forward + backward of {ours.case['T']:,} tokens on a CPU, ÷ attention inside segments alone"
            beside = ", ".join(f"{words} {_ratio(cells[name])}" for name, words in OTHERS.items())
            return [[what, _ratio(ours), beside]]
    return []


def _decoding(results: Sequence[Result]) -> list[list[str]]:
    """Return the bytes that decoding keeps, behind the longest text."""
    lengths: dict[int, dict[str, int]] = {}
    for row in (x for result in results for x in result.rows):
        if row.memory and "context" in row.case and row.peer in (OURS, CACHE):
            lengths.setdefault(row.case["context"], {})[row.peer] = row.memory
    both = {tokens: kept for tokens, kept in lengths.items() if len(kept) == 2}
    if not both:
        return []
    kept = both[max(both)]
    what = f"kept of {max(both):,} tokens in a layer, to decode the next"
    return [[what, in_bytes(kept[OURS]), f"keys and values {in_bytes(kept[CACHE])}"]]


def _demo(folder: Path) -> list[list[str]]:
    """Return the passkeys recalled from the longest texts, by all models of the experiment together."""
    figures, million = (figures_in(folder / "demo" / f"{name}.json") for name in ("figures", "million"))
    if figures is None or million is None:
        return []
    longest = max(cell["length"] for cell in million["cells"])
    cells = [cell for cell in million["cells"] if cell["length"] == longest]
    right, samples = (sum(cell[name] for cell in cells) for name in ("right", "samples"))
    recalled = f"{100 * right / samples:.1f} % of {samples}"
    return [[f"passkeys recalled from {longest:,} tokens", recalled, f"trained on {figures['trained_length']} tokens"]]


def _pretrained(folder: Path) -> list[list[str]]:
    """Return the passkeys that a pretrained model's trainings recall from long texts, and those without a memory."""
    trained = [figures_in(path) for path in (folder / "pretrained").glob("smollm2-passkeys-trained*/passkey.json")]
    window = figures_in(folder / "pretrained" / "smollm2-passkeys-window" / "passkey.json")
    if not trained or window is None:
        return []
    memory = [cell for figures in trained for cell in figures["cells"]]
    longest, of_window = (max(cell["length"] for cell in cells) for cells in (memory, window["cells"]))
    recalled, alone = (
        _recalled(cell for cell in cells if cell["length"] == length)
        for cells, length in ((memory, longest), (window["cells"], of_window))
    )
    against = f"without a memory {alone}, from {of_window:,}"
    return [[f"passkeys that SmolLM2, converted, recalls from {longest:,} tokens", recalled, against]]


def _recalled(cells: Iterable[dict[str, Any]]) -> str:
    """Return how many passkeys of some cells were recalled whole, in words."""
    right, samples = (sum(x) for x in zip(*((c["exact"] * c["samples"], c["samples"]) for c in cells), strict=True))
    return f"{round(right)} of {samples}"


def _memory_tasks(folder: Path) -> list[list[str]]:
    rows = []
    for task, facts in TASKS.items():
        evaluation = figures_in(folder / "rmt" / task / "evaluation.json")
        if evaluation is not None:
            cell = evaluation["lengths"][-1]
            share = f"{100 * cell['right'] / cell['samples']:.1f} % of {cell['samples']}"
            paper = f"the paper's {100 * evaluation['published'][str(cell['segments'])]:.1f} %"
            rows.append([f"questions about {facts} in {cell['tokens']:,} tokens, RMT", share, paper])
    return rows


def _book(folder: Path) -> list[list[str]]:
    figures = figures_in(folder / "book" / "book.json")
    if figures is None:
        return []
    local, full, delta = (spread(figures["summary"][name]["perplexity"], ".2f") for name in ("local", "full", "delta"))
    return [["perplexity per byte of a book, small models", delta, f"segments alone {local}, full attention {full}"]]


def _ratio(row: Row) -> str:
    return f"{row.ratio[0]:.2f}" if row.ratio else row.status
