"""Accuracy against length, far beyond the trained one: what `segattn rmt evaluate` does, and the files it writes."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...runs.checkpoint import SettingError, named
from ...runs.figures import prepare, versions, write_figures
from ..tasks.answers import answer, chance, fewest_segments, interval, length_of, samples_of
from . import published
from .folder import Outputs, Run, fingerprint, load_run, trained_tokens
from .peak import peak_bytes
from .settings import existing


class Files(NamedTuple):
    """Where an evaluation's files are."""

    figures: Path
    picture: Path

    @classmethod
    def of(cls, folder: Path) -> Files:
        """The files of an evaluation in `folder`."""
        return cls(folder / "evaluation.json", folder / "evaluation.png")


class Listener(Protocol):
    """Is told how far an evaluation has come."""

    def begin(self, tokens: int) -> None:
        """So many are to be read."""

    def read(self, tokens: int) -> None:
        """So many more have been."""

    def finished(self, figures: dict[str, Any]) -> None:
        """A length, with its figures."""


@dataclass(frozen=True)
class Grid:
    """Lengths to measure at.

    Args:
        segments: of each length.
        samples: per length; one for all, or as many as there are lengths.
        batch: samples read at once; likewise.
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
            given = getattr(self, name)
            if len(given) not in (1, len(self.segments)):
                raise SettingError(
                    name, f"must be one number, or one for each of {len(self.segments)} lengths, got {len(given)}"
                )
        for name in ("segments", "samples", "batch"):
            if min(getattr(self, name), default=0) < 1:
                raise SettingError(name, f"must be at least 1, got {min(getattr(self, name), default='none')}")
        if len(set(self.segments)) < len(self.segments):
            raise SettingError("segments", f"must differ from each other, got {','.join(map(str, self.segments))}")
        if not 0 <= self.seed < 2**32:
            raise SettingError("seed", f"must be from 0 to 2**32 - 1, got {self.seed}")

    def rows(self) -> list[tuple[int, int, int]]:
        """Segments, samples and batch of each length, the shortest first."""
        lengths = len(self.segments)
        samples, batch = (x * lengths if len(x) == 1 else x for x in (self.samples, self.batch))
        return sorted(zip(self.segments, samples, batch, strict=True))


def usual_samples(segments: int) -> int:
    """Fewer where each takes long."""
    return 200 if segments < 512 else 100 if segments < 4096 else 50


@dataclass
class Cell:
    """What was measured at one length, in so many samples as yet.

    right: of the samples.
    seconds: of reading and answering them.
    state_bytes: what one text's memory takes.
    peak_bytes: as in `peak_bytes`, of the largest batch, without its tokens.
    """

    segments: int
    tokens: int
    samples: int = 0
    right: int = 0
    seconds: float = 0.0
    state_bytes: int = 0
    peak_bytes: int | None = None

    def figures(self) -> dict[str, Any]:
        """With what follows from it."""
        return asdict(self) | {
            "accuracy": self.right / self.samples,
            "interval": list(interval(self.right, self.samples)),
            "seconds_per_token": self.seconds / (self.samples * self.tokens),
        }


def run_evaluation(
    folder: Path,
    grid: Grid,
    listener: Listener,
    *,
    out: Path | None = None,
    babi: str | None = None,
    book: str | None = None,
    device: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Accuracy of a trained run at lengths of many segments, on the test's facts and the test's part of the text.

    The same questions are asked at every length. Writes evaluation.json after every batch, and evaluation.png. Samples
    are read piece by piece: beyond a text's tokens, memory does not grow with its length.

    Args:
        folder: of the run.
        out: folder of what is written; None: the run's own.
        babi, book: other files than those that it was trained on.
        resume: keep the samples that are there, and measure the others.

    Returns:
        Every figure, as in the JSON file.

    Raises:
        SettingError: naming an option that cannot be, or, with `resume`, is not the earlier evaluation's.
    """
    files = Files.of(folder if out is None else out)
    existing("babi", babi)
    existing("book", book)
    run = load_run(folder, babi=babi, book=book, device=device)
    _check_lengths(run, grid)
    about = _about(run, grid, folder)
    cells = _earlier(files.figures, about, resume)
    prepare(files.figures, resume)
    _measure(run, grid, cells, about, files, listener)
    return _write(files, about, cells, grid)


def _measure(
    run: Run, grid: Grid, cells: dict[int, Cell], about: dict[str, Any], files: Files, listener: Listener
) -> None:
    length = run.settings.tokens
    for segments, _, _ in grid.rows():
        cells.setdefault(segments, Cell(segments, length_of(run.task, segments * length)))
    listener.begin(sum(cells[n].tokens * max(0, samples - cells[n].samples) for n, samples, _ in grid.rows()))
    try:
        for segments, samples, batch in grid.rows():
            cell = cells[segments]
            while cell.samples < samples:
                _read(run, cell, min(batch, samples - cell.samples), grid.seed, listener)
                _write(files, about, cells, grid)
            listener.finished(cell.figures())
    finally:
        if any(cell.samples for cell in cells.values()):
            _draw(files.picture, _write(files, about, cells, grid))


def _read(run: Run, cell: Cell, rows: int, seed: int, listener: Listener) -> None:
    """Add a batch to what a length has."""
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
        # on a GPU there are only those of a piece
        own = peak[0] - (0 if device.type == "cuda" else batch.input_ids.nbytes)
        cell.peak_bytes = max(own, cell.peak_bytes or 0)


def _check_lengths(run: Run, grid: Grid) -> None:
    """A length that cannot be is known before hours are spent on shorter ones."""
    length = run.settings.tokens
    fewest = fewest_segments(run.task, length)
    least, most = min(grid.segments), max(grid.segments)
    if least < fewest:
        raise SettingError("segments", f"must be at least {fewest} to hold every sample, got {least}")
    with named(length="segments"):
        samples_of(run.task, 0, 1, length_of(run.task, most * length), grid.seed)


def _about(run: Run, grid: Grid, folder: Path) -> dict[str, Any]:
    """What samples and answers depend on; and the trained length."""
    weights = hashlib.sha256(Outputs.of(folder).weights.read_bytes()).hexdigest()
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
    """The cells to go on with, by segments."""
    if not resume or not path.is_file():
        return {}
    try:
        figures = json.loads(path.read_text(encoding="utf-8"))
        before = {name: figures[name] for name in about}
        names = Cell.__dataclass_fields__
        cells = [Cell(**{name: cell[name] for name in names}) for cell in figures["lengths"]]
    except (ValueError, KeyError, TypeError):
        raise SettingError(
            "resume", f"needs figures of segattn rmt evaluate; {str(path)!r} is another file, or damaged"
        ) from None
    if before["weights_sha256"] != about["weights_sha256"]:
        raise SettingError(
            "resume", f"needs the weights of {str(path)!r}, which have changed since: give another --out, or delete it"
        )
    for name, option in {"seed": "seed", "data_sha256": "book"}.items():
        if before[name] != about[name]:
            raise SettingError(option, f"must be of the earlier {name}, {before[name]!r}, got {about[name]!r}")
    return {cell.segments: cell for cell in cells}


def _write(files: Files, about: dict[str, Any], cells: dict[int, Cell], grid: Grid) -> dict[str, Any]:
    measured = [cells[segments].figures() for segments in sorted(cells) if cells[segments].samples]
    # the paper's segments, where they are as long as these
    paper = published.curve(about["task"]) if about["segment_len"] == published.SEGMENT_LEN else {}
    figures = about | {
        "complete": all(cells[segments].samples >= samples for segments, samples, _ in grid.rows()),
        "versions": versions(),
        "lengths": measured,
        "published": {str(n): share for n, share in paper.items()},
        "published_source": published.SOURCE,
    }
    write_figures(files.figures, figures)
    return figures


def _draw(path: Path, figures: dict[str, Any]) -> None:
    # matplotlib takes a second to import, and only this needs it
    from .plots import plot_accuracy

    plot_accuracy(path, figures)
