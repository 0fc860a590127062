"""Accuracy against length, far beyond the trained one, as `segattn rmt evaluate` measures it and writes it to files."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from ...runs.errors import SettingError, named
from ...runs.figures import earlier_figures, prepare, versions, write_figures
from ...runs.peak import peak_bytes
from ...runs.settings import check_least
from ...runs.silence import SILENT
from ..tasks.answers import answer, chance, fewest_segments, interval, length_of, samples_of
from . import published
from .folder import Run, RunFiles, fingerprint, load_run, trained_tokens
from .plots import plot_accuracy


class Listener(Protocol):
    """A display of an evaluation's progress."""

    def begin(self, tokens: int) -> None:
        """Begin an evaluation that reads this many tokens."""

    def read(self, tokens: int) -> None:
        """Count this many more tokens as read."""

    def finished(self, figures: dict[str, Any]) -> None:
        """Show the figures of a length that is done."""


@dataclass(frozen=True)
class Grid:
    """The lengths to measure at.

    Args:
        segments: of each length.
        samples: per length; one number for all, or one for each length.
        batch: samples read at once; one number for all, or one for each length.
        seed: of the samples.

    Raises:
        SettingError: naming the option.
    """

    segments: tuple[int, ...] = (2, 8, 64, 512, 4096)
    samples: tuple[int, ...] = (200,)
    batch: tuple[int, ...] = (25,)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "batch"):
            count = len(getattr(self, name))
            if count not in (1, len(self.segments)):
                raise SettingError(
                    name, f"must be one number, or one for each of {len(self.segments)} lengths, got {count}"
                )
        for name in ("segments", "samples", "batch"):
            if min(getattr(self, name), default=0) < 1:
                raise SettingError(name, f"must be at least 1, got {min(getattr(self, name), default='none')}")
        if len(set(self.segments)) < len(self.segments):
            raise SettingError("segments", f"must differ from each other, got {','.join(map(str, self.segments))}")
        check_least(self, {"seed": 0})

    def rows(self) -> list[tuple[int, int, int]]:
        """Return the segments, samples and batch of each length, the shortest first."""
        lengths = len(self.segments)
        samples, batch = (x * lengths if len(x) == 1 else x for x in (self.samples, self.batch))
        return sorted(zip(self.segments, samples, batch, strict=True))


def usual_samples(segments: int) -> int:
    """Return the default number of samples at a length: fewer where each takes long."""
    return 200 if segments < 512 else 100 if segments < 4096 else 50


@dataclass
class Cell:
    """The measurements at one length so far.

    segments, tokens: the length.
    samples: number that was read.
    right: number of them that was answered right.
    seconds: taken to read and answer them.
    state_bytes: size of one text's memory.
    peak_bytes: as in `peak_bytes`, of the largest batch, without its tokens; None where unknown.
    """

    segments: int
    tokens: int
    samples: int = 0
    right: int = 0
    seconds: float = 0.0
    state_bytes: int = 0
    peak_bytes: int | None = None

    def figures(self) -> dict[str, Any]:
        """Return the measurements, with accuracy, interval and time per token."""
        return asdict(self) | {
            "accuracy": self.right / self.samples,
            "interval": list(interval(self.right, self.samples)),
            "seconds_per_token": self.seconds / (self.samples * self.tokens),
        }


def run_evaluation(
    folder: Path,
    grid: Grid,
    listener: Listener = SILENT,
    *,
    out: Path | None = None,
    babi: str | None = None,
    book: str | None = None,
    device: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Measure the accuracy of a trained run at lengths of many segments, on the test's facts and part of the text.

    The same questions are asked at every length. Writes evaluation.json after every batch, and evaluation.png. Samples
    are read piece by piece: beyond a text's tokens, memory does not grow with its length.

    Args:
        folder: of the run.
        grid: lengths and samples.
        listener: shows progress.
        out: folder for the files; None: the run's.
        babi, book: other files than those that the run was trained on; None: the same.
        device: None: a GPU where one is.
        resume: keep the samples that were measured, and measure the others.

    Returns:
        Every figure, as in the JSON file.

    Raises:
        SettingError: naming an option that cannot be, or, with `resume`, differs from the earlier evaluation's.
    """
    path = RunFiles.of(folder if out is None else out).evaluation
    run = load_run(folder, babi=babi, book=book, device=device)
    _check_lengths(run, grid)
    about = _about(run, grid, folder)
    cells = _earlier(path, about, resume)
    prepare(path, resume=resume)
    _measure(run, grid, cells, about, path, listener)
    return _write(path, about, cells, grid)


def _measure(
    run: Run, grid: Grid, cells: dict[int, Cell], about: dict[str, Any], path: Path, listener: Listener
) -> None:
    """Measure until every length has its samples, and write the figures after each batch, the picture at the end."""
    length = run.settings.tokens
    for segments, _, _ in grid.rows():
        cells.setdefault(segments, Cell(segments, length_of(run.task, segments * length)))
    listener.begin(sum(cells[n].tokens * max(0, samples - cells[n].samples) for n, samples, _ in grid.rows()))
    try:
        for segments, samples, batch in grid.rows():
            cell = cells[segments]
            while cell.samples < samples:
                _read(run, cell, min(batch, samples - cell.samples), grid.seed, listener)
                _write(path, about, cells, grid)
            listener.finished(cell.figures())
    finally:
        if any(cell.samples for cell in cells.values()):
            plot_accuracy(path.with_suffix(".png"), _write(path, about, cells, grid))


def _read(run: Run, cell: Cell, rows: int, seed: int, listener: Listener) -> None:
    """Read a batch of `rows` samples, and add it to a length's measurements."""
    batch = samples_of(run.task, cell.samples, cell.samples + rows, cell.tokens, seed)
    device = next(run.memory.parameters()).device
    with peak_bytes(device) as peak:
        begin = time.perf_counter()
        answers = answer(run.memory, batch, run.settings.tokens, listener.read)
        cell.right += int(answers.right.sum())
        cell.seconds += time.perf_counter() - begin
    cell.samples += rows
    cell.state_bytes = answers.state_bytes
    if peak:
        # on a GPU there are only the tokens of a piece
        own = peak[0] - (0 if device.type == "cuda" else batch.input_ids.nbytes)
        cell.peak_bytes = max(own, cell.peak_bytes or 0)


def _check_lengths(run: Run, grid: Grid) -> None:
    """Check that samples of all lengths exist, before hours are spent on the shorter ones."""
    length = run.settings.tokens
    fewest = fewest_segments(run.task, length)
    least, most = min(grid.segments), max(grid.segments)
    if least < fewest:
        raise SettingError("segments", f"must be at least {fewest} to hold every sample, got {least}")
    with named(length="segments"):
        samples_of(run.task, 0, 1, length_of(run.task, most * length), grid.seed)


def _about(run: Run, grid: Grid, folder: Path) -> dict[str, Any]:
    """Return what samples and answers depend on, and the trained length."""
    weights = hashlib.sha256(RunFiles.of(folder).weights.read_bytes()).hexdigest()
    return {
        "task": run.settings.task,
        "segment_len": run.settings.tokens,
        "trained_segments": -(-trained_tokens(folder) // run.settings.tokens),
        "seed": grid.seed,
        "data_sha256": fingerprint(run.settings),
        "weights_sha256": weights,
        "chance": chance(run.task),
    }


def _earlier(path: Path, about: dict[str, Any], resume: bool) -> dict[int, Cell]:
    """Return the measurements to continue from, by segments: none without `resume`.

    Raises:
        SettingError: of what differs from the earlier evaluation.
    """
    if not resume or not path.is_file():
        return {}
    with earlier_figures(path) as figures:
        before = {name: figures[name] for name in about}
        names = Cell.__dataclass_fields__
        cells = [Cell(**{name: cell[name] for name in names}) for cell in figures["lengths"]]
    if before["weights_sha256"] != about["weights_sha256"]:
        raise SettingError(
            "resume", f"needs the weights of {str(path)!r}, which have changed since: give another --out, or delete it"
        )
    if before["seed"] != about["seed"]:
        raise SettingError("seed", f"must be of the earlier seed, {before['seed']!r}, got {about['seed']!r}")
    if before["data_sha256"] != about["data_sha256"]:
        raise SettingError("book", "and --babi must hold what they held before with --resume, got other files")
    return {cell.segments: cell for cell in cells}


def _write(path: Path, about: dict[str, Any], cells: dict[int, Cell], grid: Grid) -> dict[str, Any]:
    """Write the figures, and return them."""
    measured = [cells[segments].figures() for segments in sorted(cells) if cells[segments].samples]
    # only where segments are as long as the paper's
    paper = published.curve(about["task"]) if about["segment_len"] == published.SEGMENT_LEN else {}
    figures = about | {
        "complete": all(cells[segments].samples >= samples for segments, samples, _ in grid.rows()),
        "versions": versions(),
        "lengths": measured,
        "published": {str(n): share for n, share in paper.items()},
        "published_source": published.SOURCE,
    }
    write_figures(path, figures)
    return figures
