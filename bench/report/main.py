"""From the results in bench/results to the README's tables and to plots; --check: are they what the results say?

A table stands between `<!-- report: NAME -->` and `<!-- /report -->`; `<!-- report: NAME FILE -->` is of one result.
The results are what `pytest bench/ --benchmark-json` and `bench/on_device` write, in the folder itself, and what
trainings and plans keep, in folders in it; plots of the former go to the folder `plots`. What is required of the tables
must not be missing where there are results of it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
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


def made_of(name: str, results: Sequence[Result], folder: Path) -> str | None:
    """The table of that name, None where there is nothing to show.

    Raises:
        ResultError: what it would be made of is no result.
    """
    try:
        return TABLES[name].make(results, folder)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ResultError(f"results for the table {name} in {folder} must be its command's, got {error!r}") from error


def rewritten(text: str, results: Sequence[Result], folder: Path) -> str:
    """The text with its tables made anew, of the results that were read from `folder`.

    Raises:
        ResultError: a table that is not known, that no result is of, whose markers are not a pair, or that is missing.
    """

    def table(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ResultError(f"report must name one of {', '.join(TABLES)}, got {name!r}")
        if match["file"] and not TABLES[name].has_files:
            raise ResultError(f"report {name!r} must name no file, got {match['file']!r}")
        made = made_of(name, [x for x in results if match["file"] in (None, x.name)], folder)
        if made is None:
            which = " ".join(filter(None, (name, match["file"])))
            raise ResultError(f"report {which!r} must have results, got none of it: remove the markers, or measure")
        return f"{match[1]}\n{made}\n\n{match['end']}"

    if not len(BEGIN.findall(text)) == len(END.findall(text)) == len(MARKED.findall(text)):
        raise ResultError("each <!-- report: NAME --> must have its <!-- /report -->, on lines of their own")
    made = MARKED.sub(table, text)
    named = {match["name"] for match in MARKED.finditer(text)}
    for name, entry in TABLES.items():
        if entry.is_required and name not in named and made_of(name, results, folder) is not None:
            raise ResultError(f"README must have <!-- report: {name} --> and <!-- /report -->: there are results of it")
    return made


def stale_plots(folder: Path, results: Sequence[Result]) -> Iterator[Path]:
    """Plots that are missing, of other data, or of none."""
    for name, (data_of, _) in report_plots.PLOTS.items():
        path = folder / name
        data = data_of(results)
        if report_plots.data_in(path) != data or (data is None and path.exists()):
            yield path


def write(readme: Path, results: Path) -> Iterator[str]:
    """Bring both to what the results say; yields what was written."""
    found = read_all(results)
    text = readme.read_text(encoding="utf-8")
    made = rewritten(text, found, results)
    if made != text:
        readme.write_text(made, encoding="utf-8")
        yield str(readme)
    for path in list(stale_plots(results / "plots", found)):
        data_of, draw = report_plots.PLOTS[path.name]
        data = data_of(found)
        if data is None:
            path.unlink()
        else:
            report_plots.write(path, data, draw)
        yield str(path)


def differences(readme: Path, results: Path) -> Iterator[str]:
    """What is not as the results say."""
    found = read_all(results)
    text = readme.read_text(encoding="utf-8")
    made = [match["table"] for match in MARKED.finditer(rewritten(text, found, results))]
    for match, table in zip(MARKED.finditer(text), made, strict=True):
        if match["table"] != table:
            yield f"{readme}: the table {match['name']} is not what the results say"
    for path in stale_plots(results / "plots", found):
        yield f"{path} is not what the results say"


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 with --check where something differs, 2 where it cannot be told."""
    parser = argparse.ArgumentParser(prog="python -m segattn.bench.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit status 1 where something differs")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results")
    given = parser.parse_args(arguments)
    try:
        lines = list((differences if given.check else write)(given.readme, given.results))
    except (ResultError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    for line in lines:
        sys.stdout.write(f"{line}\n" if given.check else f"written: {line}\n")
    if given.check and lines:
        sys.stdout.write("python -m segattn.bench.report brings them in line\n")
    return int(given.check and bool(lines))


if __name__ == "__main__":
    sys.exit(main())
