"""Runs of the evaluations: check the options, measure what is missing, write the JSON and the picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ...runs.errors import SettingError, named
from ...runs.figures import earlier_figures, prepare, read_text, versions, write_figures
from ...runs.settings import check_same
from ...runs.silence import SILENT
from ...runs.text import text_sha256
from ..conversion_options import NAMES as CONVERSION
from . import perplexity as ppl
from .books import EXTRA, Draw, check_book, measure_books
from .loading import Loaded, load
from .needle import NeedleText
from .passkey import PasskeyText
from .reading import piece_len
from .retrieval import RetrievalCell, RetrievalTask, check_positions, check_prompt, in_order, measure_grid
from .settings import Books, Grid, Needle, Positions, Source, Tasks

if TYPE_CHECKING:
    from .benchmarks import Benchmark

# may change between a run and its continuation, where weights, their dtype, the conversion and the text are compared
FREE = (
    *("model", "convert", *CONVERSION, "gates", "dtype", "device", "text", "batch", "piece"),
    *("lengths", "depths", "tasks", "babi", "book", "conversions"),
)

# what a continuation adds to
AXES = ("lengths", "depths", "tasks")


class Listener(Protocol):
    """Take note of a run's progress."""

    def begin(self, tokens: int) -> None:
        """Take note of the number of tokens that are to be read."""

    def read(self, tokens: int) -> None:
        """Take note of tokens that have been read since."""

    def finished(self, what: str) -> None:
        """Take note of a cell or document, in words."""


class Outputs(NamedTuple):
    """The files of an evaluation."""

    figures: Path
    picture: Path

    @classmethod
    def of(cls, folder: Path, command: str) -> Outputs:
        """Return the files of a command, named after it, so that one folder holds those of all."""
        return cls(folder / f"{command}.json", folder / f"{command}.png")


def run_passkey(
    source: Source, grid: Grid, folder: Path, listener: Listener = SILENT, *, resume: bool = False
) -> dict[str, Any]:
    """Measure passkeys by length and depth; write passkey.json after every cell, and passkey.png.

    Args:
        resume: keep the cells that the folder has, and measure the others.

    Returns:
        Every figure of the run, as in the JSON file.

    Raises:
        SettingError: naming an option that cannot be or, with `resume`, is not the earlier run's.
    """
    path = Outputs.of(folder, "passkey")
    prepare(path.figures, resume=resume)
    loaded = load(source)
    settings = asdict(source) | asdict(grid)
    return _retrieve(PasskeyText(loaded.tokenizer), loaded, grid, settings, path, listener, resume)


def run_needle(
    source: Source, grid: Grid, needle: Needle, folder: Path, listener: Listener = SILENT, *, resume: bool = False
) -> dict[str, Any]:
    """Measure a needle in running text as `run_passkey` measures passkeys; write needle.json and needle.png."""
    path = Outputs.of(folder, "needle")
    text = read_text(needle.text)
    prepare(path.figures, resume=resume)
    loaded = load(source)
    options = asdict(needle) | {"text": text}
    with named(**{name: name for name in options}):
        task = NeedleText(loaded.tokenizer, **options)
    settings = asdict(source) | asdict(grid) | asdict(needle) | {"text_sha256": text_sha256(text)}
    return _retrieve(task, loaded, grid, settings, path, listener, resume)


def run_book(
    source: Source,
    books: Books,
    library: Callable[[Loaded], Draw],
    folder: Path,
    listener: Listener = SILENT,
    *,
    texts: dict[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Ask questions about books; write book.json after every length, and book.png. Otherwise as `run_passkey`.

    Args:
        library: from the loaded model to the maker of its books.
        texts: settings of what the books are made from, kept beside the others.
    """
    path = Outputs.of(folder, "book")
    prepare(path.figures, resume=resume)
    loaded = load(source)
    draw = library(loaded)
    with named(length="lengths", piece="piece", people="people"):
        for length in books.lengths:
            check_book(draw(length, 0))
        check_positions(loaded.model, max(books.lengths) + EXTRA)
        piece_len(loaded.model, books.piece)
    settings = asdict(source) | asdict(books) | (texts or {})
    kept = earlier_run(path.figures, resume, settings, loaded.about)
    figures = begin_figures("book", settings, loaded.about, kept) | {"cells": kept.get("cells", [])}
    done = {cell["length"] for cell in figures["cells"]}
    left = [length for length in books.lengths if length not in done]
    listener.begin(sum(left) * books.books)
    try:
        for length in left:
            cells = measure_books(loaded, draw, length, books=books.books, piece=books.piece, on_tokens=listener.read)
            every = [*(RetrievalCell(**cell) for cell in figures["cells"]), *cells]
            figures["cells"] = [cell._asdict() for cell in in_order(every)]
            write_figures(path.figures, figures)
            share = sum(cell.exact for cell in cells) / len(cells)
            listener.finished(f"{length} tokens: {100 * share:.1f} % right")
    finally:
        if figures["cells"]:
            _draw_cells(path.picture, figures)
    return figures


def run_perplexity(
    source: Source, positions: Positions, folder: Path, listener: Listener = SILENT, *, resume: bool = False
) -> dict[str, Any]:
    """Measure perplexity by position; write perplexity.json after every document, and perplexity.png.

    Otherwise as `run_passkey`.
    """
    path = Outputs.of(folder, "perplexity")
    text = read_text(positions.text)
    prepare(path.figures, resume=resume)
    model, tokenizer, about = load(source)
    # a text that is one document is as long as its limit
    length = "limit" if positions.length is None and positions.limit is not None else "length"
    with named(text="text", length=length, piece="piece"):
        documents = ppl.documents_of(tokenizer.encode(text)[: positions.limit], tokenizer.prefix, positions.length)
        check_positions(model, max(map(len, documents)))
        piece_len(model, positions.piece)
    widths = ppl.widths(model, max(map(len, documents)), positions.buckets)
    settings = asdict(source) | asdict(positions) | {"text_sha256": text_sha256(text)}
    kept = earlier_run(path.figures, resume, settings, about)
    done = [ppl.Document(**document) for document in kept.get("documents", ())]
    figures = begin_figures("perplexity", settings, about)

    def keep(measured: list[ppl.Document]) -> None:
        figures.update(_by_position(measured, widths, len(documents)))
        write_figures(path.figures, figures)
        listener.finished(f"document {measured[-1].number + 1}: perplexity {ppl.whole(measured).perplexity:.4g} so far")

    numbers = {document.number for document in done}
    listener.begin(sum(len(document) - 1 for number, document in enumerate(documents) if number not in numbers))
    reading: dict[str, Any] = {"batch": positions.batch, "piece": positions.piece, "on_tokens": listener.read}
    try:
        measured = ppl.measure_documents(model, documents, widths, done=done, on_documents=keep, **reading)
        figures.update(_by_position(measured, widths, len(documents)))
        write_figures(path.figures, figures)
    finally:
        if "mean" in figures:
            _draw_perplexity(path.picture, figures)
    return figures


def run_gates(source: Source, folder: Path) -> dict[str, Any]:
    """Show the gates of a converted model; write gates.json and gates.png, over earlier ones.

    Raises:
        SettingError: the model is not converted, or an option cannot be.
    """
    from ...runs.heat_maps import plot_gates
    from .gate_map import gate_map

    path = Outputs.of(folder, "gates")
    prepare(path.figures, resume=True)
    model, _, about = load(source, with_tokenizer=False)
    if about["conversion"] is None:
        raise SettingError("model", f"must be a converted model, got {source.model!r}, which is plain and has no gates")
    gates = gate_map(model)
    figures = begin_figures("gates", asdict(source), about) | {"layers": gates.rows()}
    write_figures(path.figures, figures)
    plot_gates(path.picture, gates.share, gates.layers, "Share of memory per head")
    return figures


def run_benchmark(
    source: Source,
    tasks: Tasks,
    benchmark: Benchmark,
    folder: Path,
    listener: Listener = SILENT,
    *,
    texts: dict[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Measure tasks of a benchmark by length with lm-eval; write NAME.json after every cell, and NAME.png.

    Otherwise as `run_passkey`.

    Args:
        texts: settings of what the texts are made from, kept beside the others.
    """
    from .benchmarks import BenchmarkCell, measure, model_of

    path = Outputs.of(folder, benchmark.name)
    tasks.check(benchmark.tasks)
    prepare(path.figures, resume=resume)
    loaded = load(source)
    with named(length="lengths", piece="piece"):
        check_positions(loaded.model, max(tasks.lengths))
        lm = model_of(loaded, tasks)
    settings = asdict(source) | asdict(tasks) | (texts or {})
    kept = earlier_run(path.figures, resume, settings, loaded.about)
    figures = begin_figures(benchmark.name, settings, loaded.about, kept) | {"cells": kept.get("cells", [])}
    done = {(cell["task"], cell["length"]): BenchmarkCell(**cell) for cell in figures["cells"]}
    left = [(task, length) for length in tasks.lengths for task in tasks.tasks if (task, length) not in done]
    listener.begin(sum(length for _, length in left) * tasks.samples)
    try:
        for task, length in left:
            lm.on_answers = partial(_count, listener, length)
            with named(length="lengths", task="tasks"):
                cell = measure(lm, benchmark, task, length, samples=tasks.samples, seed=tasks.seed)
            done[task, length] = cell
            figures["cells"] = [done[place]._asdict() for place in sorted(done)]
            write_figures(path.figures, figures)
            listener.finished(f"{task}, {length} tokens: {100 * cell.score:.1f} % right")
    finally:
        if done:
            _draw_benchmark(path.picture, benchmark.title, figures)
    return figures


def _count(listener: Listener, length: int, answers: int) -> None:
    listener.read(length * answers)


def _retrieve(
    task: RetrievalTask,
    loaded: Loaded,
    grid: Grid,
    settings: dict[str, Any],
    path: Outputs,
    listener: Listener,
    resume: bool,
) -> dict[str, Any]:
    model, _, about = loaded
    names = {"length": "lengths", "depth": "depths", "piece": "piece", "model": "model"}
    # before hours are spent on the first lengths
    with named(**names):
        for depth in grid.depths:
            check_prompt(min(grid.lengths), depth, task.shortest)
        check_positions(model, max(grid.lengths) + task.extra)
        piece_len(model, grid.piece)
    kept = earlier_run(path.figures, resume, settings, about)
    done = [RetrievalCell(**cell) for cell in kept.get("cells", ())]
    figures = begin_figures(path.figures.stem, settings, about, kept) | {"cells": kept.get("cells", [])}

    def keep(cell: RetrievalCell, cells: list[RetrievalCell]) -> None:
        figures["cells"] = [cell._asdict() for cell in cells]
        write_figures(path.figures, figures)
        listener.finished(f"{cell.length} tokens, depth {100 * cell.depth:g} %: {100 * cell.exact:.1f} % right")

    places = {(cell.length, cell.depth) for cell in done}
    left = [length for length in grid.lengths for depth in grid.depths if (length, depth) not in places]
    listener.begin(sum(left) * grid.samples)
    options: dict[str, Any] = {"samples": grid.samples, "seed": grid.seed, "batch": grid.batch, "piece": grid.piece}
    try:
        with named(**names):
            measure_grid(
                model, task, grid.lengths, grid.depths, done=done, on_cell=keep, on_tokens=listener.read, **options
            )
    finally:
        if figures["cells"]:
            write_figures(path.figures, figures)
            _draw_cells(path.picture, figures)
    return figures


def earlier_run(path: Path, resume: bool, settings: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    """Read the figures to go on with; without `resume`, or where there are none yet, return none.

    Raises:
        SettingError: naming what is not the earlier run's.
    """
    if not resume or not path.is_file():
        return {}
    with earlier_figures(path) as figures:
        earlier, model = dict(figures["settings"]), dict(figures["model"])
    check_same(settings, earlier, FREE, "the earlier run's")
    for name in ("conversion", "dtype", "fingerprint"):
        if model.get(name) != about[name]:
            problem = f"must be the earlier run's with --resume, of {name} {model.get(name)}, got one of {about[name]}"
            raise SettingError("model", problem)
    return figures


def begin_figures(
    command: str, settings: dict[str, Any], about: dict[str, Any], kept: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Return the first entries of a file of figures: the command, its settings, the model, versions of software.

    Args:
        kept: the figures that the run goes on with, whose lengths, depths and tasks are named too.
    """
    # tuples are lists in JSON
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}
    earlier = (kept or {}).get("settings", {})
    plain |= {name: sorted({*earlier[name], *plain[name]}) for name in AXES if name in plain and name in earlier}
    return {"command": command, "settings": plain, "model": about, "versions": versions()}


def _by_position(measured: list[ppl.Document], widths: ppl.Widths, documents: int) -> dict[str, Any]:
    return {
        "complete": len(measured) == documents,
        "mean": ppl.whole(measured)._asdict(),
        "by_position": [bucket._asdict() for bucket in ppl.by_position(measured, widths)],
        "by_segment_position": [bucket._asdict() for bucket in ppl.by_segment_position(measured, widths)],
        "cache_bytes": max(document.cache_bytes for document in measured),
        "seconds": round(sum(document.seconds for document in measured), 3),
        "documents": [document._asdict() for document in measured],
    }


def _draw_cells(path: Path, figures: dict[str, Any]) -> None:
    # matplotlib takes a second to import, and only this needs it
    from ...runs.heat_maps import plot_recall

    shares = {(cell["depth"], cell["length"]): cell["exact"] for cell in figures["cells"]}
    titles = {"passkey": "Passkey retrieval", "needle": "Needle in a haystack", "book": "Questions about a book"}
    title = titles[figures["command"]]
    plot_recall(path, shares, title, "answered right, %")


def _draw_benchmark(path: Path, title: str, figures: dict[str, Any]) -> None:
    from .plots import plot_benchmark

    plot_benchmark(path, figures["cells"], title)


def _draw_perplexity(path: Path, figures: dict[str, Any]) -> None:
    from .plots import plot_perplexity

    document, segment = (
        [ppl.Bucket(**bucket) for bucket in figures[name]] for name in ("by_position", "by_segment_position")
    )
    plot_perplexity(path, document, segment, figures["mean"]["perplexity"], "Perplexity by position")
