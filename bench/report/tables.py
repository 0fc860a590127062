"""Tables in Markdown from records, with their conditions beneath: what stands between the README's markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..speed.workloads import BOTH
from .experiments import baselines, book, markdown, memory_tasks, plan, recurrent_lengths, retrieval
from .headline import headline
from .records import Record, Result

MIB = 2**20
OF_MODELS = ("reading", "training step", "generation")
ORDER = ("forward", "backward", BOTH, *OF_MODELS)
BY_LENGTH = "by length"


def spread(three: tuple[float, float, float] | None) -> str:
    """The median, and the 20th and the 80th percentile where the results have them."""
    if three is None:
        return "-"
    median, low, high = three
    return f"{median:.2f}" if low == high == median else f"{median:.2f} ({low:.2f}-{high:.2f})"


def mib(memory: int | None) -> str:
    return "-" if memory is None else f"{memory / MIB:.0f}" if memory >= 100 * MIB else f"{memory / MIB:.3g}"


def _case_of(record: Record) -> str:
    """The group without its direction."""
    return record.key.group.removesuffix(f", {record.direction}")


def _cases(result: Result, wanted: Callable[[Record], bool]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in result.records:
        if wanted(record):
            found.setdefault(_case_of(record), []).append(record)
    return found


def _table(case: str, records: Sequence[Record], memory: str) -> str:
    """Who against direction: ratios, and the memory of the last direction."""
    directions = sorted({x.direction for x in records}, key=lambda x: (*ORDER, x).index(x))
    cells = {(x.key.provider, x.direction): x for x in records}
    rows = []
    for name in dict.fromkeys(x.key.provider for x in records):
        own = [cells.get((name, direction)) for direction in directions]
        reasons = {f"{x.status}: {x.reason}".removesuffix(": ") for x in own if x is not None and x.ratio is None}
        if len(reasons) == 1 and all(x is None or x.ratio is None for x in own):
            rows.append([name, reasons.pop(), *[""] * len(directions)])
            continue
        ratios = ["-" if x is None else _ratio(x) for x in own]
        rows.append([name, *ratios, mib(next((x.memory for x in reversed(own) if x and x.memory), None))])
    head = [f"{case}, ÷ {records[0].baseline}", *directions, memory]
    return markdown(head, rows)


def _ratio(record: Record) -> str:
    if record.ratio is None:
        return record.status
    return f"{spread(record.ratio)}, noisy" if record.noisy else spread(record.ratio)


def _section(results: Iterable[Result], wanted: Callable[[Record], bool], memory: str) -> str | None:
    parts = []
    for result in results:
        tables = [_table(case, records, memory) for case, records in _cases(result, wanted).items()]
        if tables:
            parts += [*tables, f"{result.conditions}; [{result.name}](bench/results/{result.name})"]
    return "\n\n".join(parts) or None


def _of_attention(record: Record) -> bool:
    return record.tokens_per_second is None and record.direction in ORDER[:3]


def speed(results: Sequence[Result]) -> str | None:
    """Segment attention, a table for each case but those that are there for their lengths."""
    return _section(results, lambda x: _of_attention(x) and not _is_by_length(x), "peak MiB")


def _is_by_length(record: Record) -> bool:
    return BY_LENGTH in record.key.group


def lengths(results: Sequence[Result]) -> str | None:
    """Milliseconds of forward and backward against the length of the text."""
    parts = []
    for result in results:
        records = [x for x in result.records if _is_by_length(x)]
        if not records:
            continue
        times = sorted({x.sizes["T"] for x in records})
        cells = {(x.key.provider, x.sizes["T"]): x for x in records}
        rows = [
            [name, *(_length_cell(cells.get((name, time))) for time in times)]
            for name in dict.fromkeys(x.key.provider for x in records)
        ]
        parts += [markdown([f"ms, {records[0].direction}", *(f"{time} tokens" for time in times)], rows)]
        parts += [f"{result.conditions}; [{result.name}](bench/results/{result.name})"]
    return "\n\n".join(parts) or None


def _length_cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record.ms is None:
        return record.status
    return f"{record.ms[0]:.0f}" if record.ms[0] >= 100 else f"{record.ms[0]:.3g}"


def decode(results: Sequence[Result]) -> str | None:
    """A token behind a text: the ratio to a cache that grows, and what is kept."""
    return _section(results, lambda x: x.direction == "decode", "kept MiB")


def recurrent(results: Sequence[Result]) -> str | None:
    """RMT and ARMT: reading, training, writing."""
    return _section(results, lambda x: x.tokens_per_second is not None or x.direction in OF_MODELS, "MiB")


class Entry(NamedTuple):
    """make: a table of the results, and of the folder that they lie in; None where there is nothing to show.

    is_required: a README without it must not be, where there is something.
    has_files: it may be of one of the results.
    """

    make: Callable[[Sequence[Result], Path], str | None]
    is_required: bool = False
    has_files: bool = False


def _of_results(make: Callable[[Sequence[Result]], str | None], is_required: bool = False) -> Entry:
    return Entry(lambda results, folder: make(results), is_required, has_files=True)


def _of_folder(make: Callable[[Path], str | None]) -> Entry:
    return Entry(lambda results, folder: make(folder), is_required=True)


TABLES: Mapping[str, Entry] = {
    "headline": Entry(headline, is_required=True),
    "speed": _of_results(speed, is_required=True),
    "lengths": _of_results(lengths),
    "decode": _of_results(decode),
    "recurrent": _of_results(recurrent),
    "baselines": _of_folder(baselines),
    "book": _of_folder(book),
    "plan": _of_folder(plan),
    "memory-tasks": _of_folder(memory_tasks),
    "retrieval": _of_folder(retrieval),
    "recurrent-lengths": _of_folder(recurrent_lengths),
}
