"""Tables in Markdown from records, with their conditions beneath: what stands between the README's markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from .cases import BOTH
from .records import Record, Result

MIB = 2**20
ORDER = ("forward", "backward", BOTH, "reading", "training step")
BY_LENGTH = "by length"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


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
        ratios = ["-" if x is None else spread(x.ratio) if x.ratio else x.status for x in own]
        rows.append([name, *ratios, mib(next((x.memory for x in reversed(own) if x and x.memory), None))])
    head = [f"{case}, ÷ {records[0].baseline}", *directions, memory]
    return markdown(head, rows)


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
    return _section(results, lambda x: x.tokens_per_second is not None, "MiB")


TABLES: Mapping[str, Callable[[Sequence[Result]], str | None]] = {
    "speed": speed,
    "lengths": lengths,
    "decode": decode,
    "recurrent": recurrent,
}
