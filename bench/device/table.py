"""A run's document as plain text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Document = Mapping[str, Any]


def table(document: Document) -> str:
    return "\n".join((*_head(document), *_checks(document), *_timings(document), *_decode(document), *_end(document)))


def _head(document: Document) -> Iterator[str]:
    versions = ", ".join(f"{name} {value}" for name, value in document["versions"].items() if value)
    changed = " with changes" if document["dirty"] else ""
    yield f"\n{document['device']['name']}; {versions}; commit {document['commit']}{changed}"


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
        for name, problem in list(record["failures"].items())[:4]:
            yield f"  {record['dtype']} {record['width']}, {name}: {problem}"


def _timings(document: Document) -> Iterator[str]:
    for case in document["timings"]:
        yield f"\n{case['name']} {case['dtype']}: ms (TFLOP/s, share of the floor)"
        for name, found in case["peers"].items():
            if found["status"] != "timed":
                yield f"  {name:22} {found['status']}: {found.get('reason', '')}"
                continue
            columns = [_cell(found.get(direction, {})) for direction in case["directions"]]
            both = found.get("forward + backward", {})
            memory = both.get("peak_bytes", 0) / 2**20
            launches = (found.get("forward", {}).get("launches"), both.get("launches"))
            yield f"  {name:22} {' '.join(columns)} {memory:8.1f} MiB  launches {launches[0]}, {launches[1]}"


def _cell(found: Mapping[str, Any]) -> str:
    if "median_ms" not in found:
        return f"{'-':>24}"
    share = f", {found['floor_share']:.0%}" if "floor_share" in found else ""
    inside = f"({found['tflops']:.3g}{share})"
    return f"{found['median_ms']:9.3f} {inside:14}"


def _decode(document: Document) -> Iterator[str]:
    for case in document["decode"]:
        cells = [
            f"{name} {found['median_ms']:.4f} ms ({found['gbytes_per_s']:.4g} GB/s)"
            if "median_ms" in found
            else f"{name} {found['status']}: {found.get('reason', '')}"
            for name, found in case["decoders"].items()
        ]
        yield f"decode {case['name']}, tail {case['tail']}: {'; '.join(cells)}"


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
