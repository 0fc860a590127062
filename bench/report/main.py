"""Make the documents' tables and the plots from the results in bench/results, or --check that they agree with them.

The documents are README.md and docs/*.md. A table stands between `<!-- report: NAME -->` and `<!-- /report -->`;
`<!-- report: NAME FILE -->` is of one result. The results are what `pytest bench/ --benchmark-json` and
`bench/on_device` write, in the folder itself, and what trainings and plans keep, in folders in it; plots of the former
go to the folder `plots`. A required table must stand in one of the documents where there are results of it.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ..speed.machine import ROOT
from ..speed.rows import ResultError
from . import plots as report_plots
from .records import Result, read_all
from .tables import TABLES

MARKED = re.compile(
    r"(<!-- report: (?P<name>[\w-]*)(?: (?P<file>[\w.-]+))? -->\n)(?P<table>.*?)(?P<end><!-- /report -->)", re.DOTALL
)
BEGIN, END = re.compile(r"^<!-- report: ", re.MULTILINE), re.compile(r"^<!-- /report -->", re.MULTILINE)
# tables link to results from the root of the tree
LINK = "](bench/results/"


def documents() -> list[Path]:
    """Return the documents of the tree that may have tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def made_of(name: str, results: Sequence[Result], folder: Path) -> str | None:
    """Return the table of that name, None where there is nothing to show.

    Raises:
        ResultError: what it would be made of is no result.
    """
    try:
        return TABLES[name].make(results, folder)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ResultError(f"results for the table {name} in {folder} must be its command's, got {error!r}") from error


def rewritten(text: str, results: Sequence[Result], folder: Path, document: Path) -> str:
    """Return a document's text with its tables made anew, of the results that were read from `folder`.

    Raises:
        ResultError: a table that is not known, that no result is of, or whose markers are not a pair.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ResultError(f"{document}: report must name one of {', '.join(TABLES)}, got {name!r}")
        if match["file"] and not TABLES[name].has_files:
            raise ResultError(f"{document}: report {name!r} must name no file, got {match['file']!r}")
        made = made_of(name, [x for x in results if match["file"] in (None, x.name)], folder)
        if made is None:
            which = " ".join(filter(None, (name, match["file"])))
            raise ResultError(
                f"{document}: report {which!r} must have results, got none of it: remove the markers, or measure"
            )
        return f"{match[1]}\n{made.replace(LINK, link)}\n\n{match['end']}"

    if not len(BEGIN.findall(text)) == len(END.findall(text)) == len(MARKED.findall(text)):
        raise ResultError(
            f"{document}: each <!-- report: NAME --> must have its <!-- /report -->, on lines of their own"
        )
    link = f"]({Path(os.path.relpath(folder, document.parent)).as_posix()}/"
    return MARKED.sub(table, text)


def check_required(texts: Mapping[Path, str], results: Sequence[Result], folder: Path) -> None:
    """Check that every required table stands in one of the documents.

    Raises:
        ResultError: naming the table that does not, though there are results of it.
    """
    named = {match["name"] for text in texts.values() for match in MARKED.finditer(text)}
    for name, entry in TABLES.items():
        if entry.is_required and name not in named and made_of(name, results, folder) is not None:
            raise ResultError(
                f"one of {', '.join(map(str, texts))} must have <!-- report: {name} --> and <!-- /report -->: there "
                "are results of it"
            )


def stale_plots(folder: Path, results: Sequence[Result]) -> Iterator[Path]:
    """Yield plots that are missing, of other data, or of none."""
    for name, (data_of, _) in report_plots.PLOTS.items():
        path = folder / name
        data = data_of(results)
        if report_plots.data_in(path) != data or (data is None and path.exists()):
            yield path


def write(paths: Sequence[Path], folder: Path) -> Iterator[str]:
    """Bring documents and plots to what the results say, and yield what was written."""
    results = read_all(folder)
    before, after = _before_and_after(paths, results, folder)
    for path in paths:
        if after[path] != before[path]:
            path.write_text(after[path], encoding="utf-8")
            yield str(path)
    for path in list(stale_plots(folder / "plots", results)):
        data_of, draw = report_plots.PLOTS[path.name]
        data = data_of(results)
        if data is None:
            path.unlink()
        else:
            report_plots.write(path, data, draw)
        yield str(path)


def differences(paths: Sequence[Path], folder: Path) -> Iterator[str]:
    """Yield what of documents and plots is not as the results say."""
    results = read_all(folder)
    before, after = _before_and_after(paths, results, folder)
    for path in paths:
        for old, new in zip(MARKED.finditer(before[path]), MARKED.finditer(after[path]), strict=True):
            if old["table"] != new["table"]:
                yield f"{path}: the table {old['name']} is not what the results say"
    for path in stale_plots(folder / "plots", results):
        yield f"{path} is not what the results say"


def _before_and_after(
    paths: Sequence[Path], results: Sequence[Result], folder: Path
) -> tuple[dict[Path, str], dict[Path, str]]:
    before = {path: path.read_text(encoding="utf-8") for path in paths}
    check_required(before, results, folder)
    return before, {path: rewritten(text, results, folder, path) for path, text in before.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status: 1 with --check where something differs, 2 where it cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m segattn.bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    parser.add_argument(
        "--document",
        type=Path,
        action="append",
        dest="documents",
        metavar="PATH",
        help="may be repeated; default: README.md and docs/*.md of the checkout",
    )
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    options = parser.parse_args(arguments)
    try:
        lines = list((differences if options.check else write)(options.documents or documents(), options.results))
    except (ResultError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for line in lines:
        sys.stdout.write(f"{line}\n" if options.check else f"written: {line}\n")
    if options.check and lines:
        sys.stdout.write("python -m segattn.bench.report brings them in line\n")
    return int(options.check and bool(lines))
