"""A run's document as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..speed import rows

Document = Mapping[str, Any]
VERSIONS = ("segattn", "torch", "triton", "python", "cuda", "hip")


def table(document: Document) -> str:
    """Return the whole run, part by part."""
    return "\n".join((*_head(document), *_checks(document), *_timings(document), *_end(document)))


def _head(document: Document) -> Iterator[str]:
    machine, commit = document["machine_info"], document["commit_info"]
    versions = ", ".join(f"{name} {machine[name]}" for name in VERSIONS if name in machine)
    changed = " with changes" if commit["dirty"] else ""
    yield f"\n{machine['device']}; {versions}; commit {commit['id']}{changed}"


def _checks(document: Document) -> Iterator[str]:
    for record in document["check"]:
        verdict = "passed" if record["passed"] else f"{len(record['failures'])} failures"
        which = f"{record['dtype']}, run {record['number']}, share {record['share']}"
        yield f"check {which}: {record['compared']} calls compared, {verdict}"
        for row in record["failures"][:8]:
            yield f"  {row['call']}: {row['output']} {row['problem']} (error {row['error']}, gate {row['gate']})"
    for dtype, same in document.get("same_twice", {}).items():
        if not same:
            yield f"check {dtype}: the two runs differ"
    bad = [record for record in document["tiles"] if not record["passed"]]
    yield f"tiles: {len(document['tiles'])} rows of dtype and width, {len(bad)} with failures"
    for record in bad:
        for row in record["failures"][:4]:
            yield f"  {record['dtype']} {record['width']}, {row['call']}: {row['output']} {row['problem']}"


def _timings(document: Document) -> Iterator[str]:
    for heading, lines in rows.table(rows.from_json(document)):
        yield f"\n{heading}"
        yield from (f"  {line}" for line in lines)


def _end(document: Document) -> Iterator[str]:
    for record in document["profile"]:
        yield f"\nprofile of {record['peer']}, {record['case']}, {record['direction']}: {record['total_ms']:.3f} ms"
        for kernel in record["kernels"][:10]:
            yield f"  {kernel['ms']:9.4f} ms {kernel['count']:4} × {kernel['name']}"
    yield "\ngoals"
    for goal in document["goals"]:
        verdict = {True: "met", False: "MISSED", None: "not measured"}[goal["met"]]
        measured = "-" if goal["measured"] is None else f"{goal['measured']:g}"
        yield f"  {verdict:12} {measured:>8} {goal['bound']:>7}  {goal['goal']}"
    for row in document["skipped"]:
        yield f"skipped {row['part']} {row['job']}: {row['reason']}"
    yield f"{document['spent_s']} s of {document['budget_s']} s"
