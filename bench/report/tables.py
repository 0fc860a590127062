"""Tables in Markdown from rows, with their conditions beneath: what stands between a document's markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..speed.rows import Row
from ..speed.timing import Times
from ..speed.workloads import BOTH
from .experiments import (
    adaptations,
    baselines,
    benchmarks,
    beside_passkeys,
    book,
    conversions,
    far_readings,
    figures_in,
    markdown,
    memory_tasks,
    million,
    passkeys,
    plan,
    questions,
    readings,
    recurrent_lengths,
    retrieval,
    rounds,
    scores,
)
from .headline import headline
from .records import Result

MIB = 2**20
OF_MODELS = ("reading", "training step", "generation")
ORDER = ("forward", "backward", BOTH, *OF_MODELS)
BY_LENGTH = "by length"


def spread(times: Times) -> str:
    """Return the median, and the 20th and the 80th percentile where they differ."""
    median, low, high = times
    return f"{median:.2f}" if low == high == median else f"{median:.2f} ({low:.2f}-{high:.2f})"


def mib(memory: int | None) -> str:
    """Return a number of bytes in MiB."""
    return "-" if memory is None else f"{memory / MIB:.0f}" if memory >= 100 * MIB else f"{memory / MIB:.3g}"


def _case_of(row: Row) -> str:
    """Return the group without its direction."""
    return row.group.removesuffix(f", {row.direction}")


def _cases(result: Result, wanted: Callable[[Row], bool]) -> dict[str, list[Row]]:
    cases: dict[str, list[Row]] = {}
    for row in result.rows:
        if wanted(row):
            cases.setdefault(_case_of(row), []).append(row)
    return cases


def _table(case: str, rows: Sequence[Row], memory: str) -> str:
    """Return peers against directions: ratios, and the memory of the last direction."""
    directions = sorted({x.direction for x in rows}, key=lambda x: (*ORDER, x).index(x))
    cells = {(x.peer, x.direction): x for x in rows}
    lines = []
    for name in dict.fromkeys(x.peer for x in rows):
        line = [cells.get((name, direction)) for direction in directions]
        reasons = {f"{x.status}: {x.reason}".removesuffix(": ") for x in line if x is not None and x.ratio is None}
        if len(reasons) == 1 and all(x is None or x.ratio is None for x in line):
            lines.append([name, reasons.pop(), *[""] * len(directions)])
            continue
        ratios = ["-" if x is None else _ratio(x) for x in line]
        lines.append([name, *ratios, mib(next((x.memory for x in reversed(line) if x and x.memory), None))])
    head = [f"{case}, ÷ {rows[0].baseline}", *directions, memory]
    return markdown(head, lines)


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return row.status
    return f"{spread(row.ratio)}, noisy" if row.noisy else spread(row.ratio)


def _section(results: Iterable[Result], wanted: Callable[[Row], bool], memory: str) -> str | None:
    parts = []
    for result in results:
        tables = [_table(case, rows, memory) for case, rows in _cases(result, wanted).items()]
        if tables:
            parts += [*tables, f"{result.conditions}; [{result.name}](bench/results/{result.name})"]
    return "\n\n".join(parts) or None


def _of_attention(row: Row) -> bool:
    return row.tokens_per_second is None and row.direction in ORDER[:3]


def speed(results: Sequence[Result]) -> str | None:
    """Return segment attention, a table for each case but those that are there for their lengths."""
    return _section(results, lambda x: _of_attention(x) and not _is_by_length(x), "peak MiB")


def _is_by_length(row: Row) -> bool:
    return BY_LENGTH in row.group


def lengths(results: Sequence[Result]) -> str | None:
    """Return milliseconds of forward and backward against the length of the text."""
    parts = []
    for result in results:
        rows = [x for x in result.rows if _is_by_length(x)]
        if not rows:
            continue
        times = sorted({x.case["T"] for x in rows})
        cells = {(x.peer, x.case["T"]): x for x in rows}
        lines = [
            [name, *(_length_cell(cells.get((name, time))) for time in times)]
            for name in dict.fromkeys(x.peer for x in rows)
        ]
        parts += [markdown([f"ms, {rows[0].direction}", *(f"{time} tokens" for time in times)], lines)]
        parts += [f"{result.conditions}; [{result.name}](bench/results/{result.name})"]
    return "\n\n".join(parts) or None


def _length_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    if row.ms is None:
        return row.status
    return f"{row.ms.median:.0f}" if row.ms.median >= 100 else f"{row.ms.median:.3g}"


def decode(results: Sequence[Result]) -> str | None:
    """Return a token behind a text: the ratio to a cache that grows, and the bytes kept."""
    return _section(results, lambda x: x.direction == "decode", "kept MiB")


def recurrent(results: Sequence[Result]) -> str | None:
    """Return RMT and ARMT: reading, training, writing."""
    return _section(results, lambda x: x.tokens_per_second is not None or x.direction in OF_MODELS, "MiB")


class Entry(NamedTuple):
    """A table by its name.

    make: From the results, and the folder that they lie in, to the table; None where there is nothing to show.
    is_required: The documents must have it, where there is something to show.
    has_files: It may be of one of the results.
    """

    make: Callable[[Sequence[Result], Path], str | None]
    is_required: bool = False
    has_files: bool = False


def _of_results(make: Callable[[Sequence[Result]], str | None], is_required: bool = False) -> Entry:
    return Entry(lambda results, folder: make(results), is_required, has_files=True)


def _of_file(path: str, make: Callable[[Any], str]) -> Entry:
    def table(results: Sequence[Result], folder: Path) -> str | None:
        figures = figures_in(folder / path)
        return None if figures is None else make(figures)

    return Entry(table, is_required=True)


def _of_folder(make: Callable[[Path], str | None]) -> Entry:
    return Entry(lambda results, folder: make(folder), is_required=True)


TABLES: Mapping[str, Entry] = {
    "headline": Entry(headline, is_required=True),
    "speed": _of_results(speed, is_required=True),
    "lengths": _of_results(lengths),
    "decode": _of_results(decode),
    "recurrent": _of_results(recurrent),
    "baselines": _of_file("baselines/baselines.json", baselines),
    "book": _of_file("book/book.json", book),
    "plan": _of_file("plan/llama-3-8b.json", plan),
    "memory-tasks": _of_folder(memory_tasks),
    "retrieval": _of_folder(retrieval),
    "questions": _of_file("questions/questions.json", questions),
    "benchmarks": _of_folder(benchmarks),
    "scores": _of_folder(scores),
    "conversions": _of_folder(conversions),
    "adaptations": _of_folder(adaptations),
    "beside-passkeys": _of_folder(beside_passkeys),
    "passkeys": _of_folder(passkeys),
    "readings": _of_folder(readings),
    "far-readings": _of_folder(far_readings),
    "rounds": _of_folder(rounds),
    "million": _of_file("demo/million.json", million),
    "recurrent-lengths": _of_file("rmt/lengths.json", recurrent_lengths),
}
