"""The command `segattn evaluate`: a Hugging Face model, converted or plain, on long texts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from ..infini.evaluate.settings import PLACES, Books, Grid, Needle, Positions, Source, Tasks
from ..runs.errors import SettingError, named
from .options import Out, ResumeMeasuring, help_of, options_of, settings_from
from .progress import Reading
from .shell import Command, counts, print_files

if TYPE_CHECKING:
    from ..infini.evaluate.books import Draw
    from ..infini.evaluate.loading import Loaded

app = typer.Typer(no_args_is_help=True, help="Evaluate a Hugging Face model, converted or plain, on long texts.")

Lengths = Annotated[str, typer.Option(help=help_of(Grid, "lengths"))]
Depths = Annotated[str, typer.Option(help=help_of(Grid, "depths"))]

Names = Annotated[str, typer.Option(help=help_of(Tasks, "tasks"))]
UpTo = Annotated[str, typer.Option(help=help_of(Tasks, "lengths"))]

FOLDER = Path("segattn-evaluation")


@app.command()
@options_of(Source, Grid, arguments=("model",))
def passkey(
    lengths: Lengths = "32K,128K,1M",
    depths: Depths = "start,middle,end",
    out: Out = FOLDER,
    resume: ResumeMeasuring = False,
    **given: Any,
) -> None:
    """Measure passkey retrieval in the wording of the Infini-attention paper, by length and depth.

    A converted model needs the same memory at every length. Ctrl-C leaves the cells that are measured.
    """
    with _command("passkey", out).run() as console:
        from ..infini.evaluate.runs import run_passkey

        source, grid = settings_from(Source, given), _grid(lengths, depths, given)
        with Reading(console, "passkey") as listener:
            figures = run_passkey(source, grid, out, listener, resume=resume)
        console.print(_cells(figures, "Passkeys"))
        _summary(console, "passkey", out, figures)


@app.command()
@options_of(Needle, Source, Grid, arguments=("model",))
def needle(
    lengths: Lengths = "4K,8K,16K,32K",
    depths: Depths = "0,0.25,0.5,0.75,1",
    samples: Annotated[int, typer.Option(help=help_of(Grid, "samples"))] = 5,
    out: Out = FOLDER,
    resume: ResumeMeasuring = False,
    **given: Any,
) -> None:
    """Measure a needle in a haystack, a sentence hidden in running text, by length and depth."""
    with _command("needle", out).run() as console:
        from ..infini.evaluate.runs import run_needle

        source, hidden = settings_from(Source, given), settings_from(Needle, given)
        grid = _grid(lengths, depths, given | {"samples": samples})
        with Reading(console, "needle") as listener:
            figures = run_needle(source, grid, hidden, out, listener, resume=resume)
        console.print(_cells(figures, "Needles"))
        _summary(console, "needle", out, figures)


@app.command()
@options_of(Source, Books, arguments=("model",))
def book(
    lengths: Annotated[str, typer.Option(help=help_of(Books, "lengths"))] = "4K,32K,128K,500K",
    text: Annotated[str | None, typer.Option(help="File of running text, UTF-8. Default: made-up words.")] = None,
    out: Out = FOLDER,
    resume: ResumeMeasuring = False,
    **given: Any,
) -> None:
    """Ask questions whose answers are spread over a whole book, each book read once and all questions asked from there.

    A length in which a text is shorter than the book has the text again from its beginning.
    """
    with _command("book", out).run() as console:
        from ..infini.evaluate.runs import run_book
        from ..rmt.tasks.books import draw_book
        from ..rmt.tasks.make import text_task
        from ..runs.figures import read_text
        from ..runs.text import text_sha256

        source, books = settings_from(Source, given), settings_from(Books, given | {"lengths": lengths_in(lengths)})
        texts = {"text": text, "text_sha256": None if text is None else text_sha256(read_text(text))}

        def library(loaded: Loaded) -> Draw:
            encode = loaded.tokenizer.encode
            model: Any = loaded.model
            with named(people="people", text="text"):
                task = text_task(
                    "book",
                    book=text,
                    people=books.people,
                    encode=lambda sentence: encode(f" {sentence}"),
                    vocab_size=model.get_input_embeddings().num_embeddings,
                )
            return lambda length, index: draw_book(task, length, seed=books.seed, index=index)

        with Reading(console, "book") as listener:
            figures = run_book(source, books, library, out, listener, texts=texts, resume=resume)
        console.print(_cells(figures, "Answers"))
        _summary(console, "book", out, figures)


@app.command()
@options_of(Positions, Source, arguments=("model",))
def perplexity(out: Out = FOLDER, resume: ResumeMeasuring = False, **given: Any) -> None:
    """Measure the perplexity of a text by position in the document and inside the segment.

    Ctrl-C leaves the documents that are measured.
    """
    with _command("perplexity", out).run() as console:
        from ..infini.evaluate.runs import run_perplexity

        source, positions = settings_from(Source, given), settings_from(Positions, given)
        with Reading(console, "perplexity") as listener:
            figures = run_perplexity(source, positions, out, listener, resume=resume)
        console.print(_buckets(figures["by_position"], "Perplexity by position in the document"))
        if figures["by_segment_position"]:
            console.print(_buckets(figures["by_segment_position"], "Perplexity by position inside the segment"))
        _summary(console, "perplexity", out, figures)
        mean = figures["mean"]
        console.print(f"mean over {mean['tokens']} tokens: {mean['perplexity']:.4f}")


@app.command()
@options_of(Source, Tasks, arguments=("model",))
def ruler(
    tasks: Names = "niah_single_1,niah_multikey_2,niah_multikey_3,ruler_vt,ruler_cwe,ruler_fwe",
    lengths: UpTo = "4K,8K,16K,32K,64K,128K",
    out: Out = FOLDER,
    resume: ResumeMeasuring = False,
    **given: Any,
) -> None:
    """Measure RULER's tasks by lm-eval: needles, chains of variables and frequent words, in texts that it makes.

    Those whose texts lm-eval downloads run by its own command: python -m segattn.infini.evaluate.harness.
    """
    with _command("ruler", out).run() as console:
        _check_harness()
        from ..infini.evaluate.benchmarks import ruler as benchmark
        from ..infini.evaluate.runs import run_benchmark

        source, chosen = settings_from(Source, given), _tasks(tasks, lengths, given)
        with Reading(console, "ruler") as listener:
            figures = run_benchmark(source, chosen, benchmark(), out, listener, resume=resume)
        console.print(_scores(figures, "RULER"))
        _summary(console, "ruler", out, figures)


@app.command()
@options_of(Source, Tasks, arguments=("model",))
def babilong(
    tasks: Names = "qa1,qa2,qa4",
    lengths: UpTo = "4K,8K,16K,32K,64K,128K",
    babi: Annotated[str | None, typer.Option(help="Folder of bAbI's files. Default: generated stories.")] = None,
    book: Annotated[str | None, typer.Option(help="File of running text, UTF-8. Default: made-up words.")] = None,
    out: Out = FOLDER,
    resume: ResumeMeasuring = False,
    **given: Any,
) -> None:
    """Measure BABILong's tasks by lm-eval: facts scattered in a book, and a question, with two examples before them."""
    with _command("babilong", out).run() as console:
        _check_harness()
        from ..infini.evaluate.benchmarks import babilong as benchmark
        from ..infini.evaluate.runs import run_benchmark
        from ..rmt.tasks.babilong import Stories

        source, chosen = settings_from(Source, given), _tasks(tasks, lengths, given)
        with named(form="tasks", babi="babi", book="book", text="book", path="babi"):
            stories = Stories(chosen.tasks, babi, book)

        asked = benchmark(chosen.tasks, stories.documents)
        with Reading(console, "babilong") as listener:
            figures = run_benchmark(source, chosen, asked, out, listener, texts=stories.settings, resume=resume)
        console.print(_scores(figures, "BABILong"))
        _summary(console, "babilong", out, figures)


@app.command()
def gates(
    model: Annotated[str, typer.Argument(help=help_of(Source, "model"), show_default=False)],
    gates: Annotated[str | None, typer.Option(help=help_of(Source, "gates"))] = None,
    out: Out = FOLDER,
) -> None:
    """Show the gates of a converted model by layer and head: 0 is local attention alone, 1 the memory alone."""
    with Command("evaluate gates", {"model": "MODEL"}).run() as console:
        from ..infini.evaluate.runs import run_gates

        figures = run_gates(Source(model, gates=gates, device="cpu"), out)
        table = Table(title="Share of the memory, by layer", title_justify="left")
        for column in ("layer", "least", "mean", "largest", "local heads", "mixed", "memory"):
            table.add_column(column, justify="right")
        for row in figures["layers"]:
            shares = (f"{row[name]:.3f}" for name in ("least", "mean", "largest"))
            table.add_row(str(row["layer"]), *shares, *(str(row[name]) for name in ("local", "mixed", "memory")))
        console.print(table)
        _summary(console, "gates", out, figures)


def _grid(lengths: str, depths: str, given: dict[str, Any]) -> Grid:
    return settings_from(Grid, given | {"lengths": lengths_in(lengths), "depths": depths_in(depths)})


def _tasks(tasks: str, lengths: str, given: dict[str, Any]) -> Tasks:
    names = tuple(dict.fromkeys(filter(None, map(str.strip, tasks.split(",")))))
    return settings_from(Tasks, given | {"tasks": names, "lengths": lengths_in(lengths)})


def _check_harness() -> None:
    """Check that lm-eval is installed, before anything is loaded.

    Raises:
        ImportError: it is not.
    """
    from ..infini.evaluate.harness import harness_class

    harness_class()


def lengths_in(text: str, option: str = "lengths") -> tuple[int, ...]:
    """Return the lengths that an option's text names, in rising order, each once."""
    return tuple(sorted(set(counts(option, text, "4096,32K,1M"))))


def depths_in(text: str, option: str = "depths") -> tuple[float, ...]:
    """Return the depths that an option's text names, in rising order, each once."""
    depths = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            depth = PLACES[part] if part in PLACES else float(part)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise SettingError(option, f"must be start, middle, end or shares from 0 to 1 with commas, got {text!r}")
        depths.append(depth)
    return tuple(sorted(set(depths)))


def _cells(figures: dict[str, Any], what: str) -> Table:
    """Return right answers and right tokens by length and depth, in per cent."""
    lengths = sorted({cell["length"] for cell in figures["cells"]})
    table = Table(title=f"{what} found / tokens of the answers right, %", title_justify="left")
    table.add_column("depth", justify="right")
    for length in lengths:
        table.add_column(f"{length:,}", justify="right")
    share = {(c["depth"], c["length"]): f"{100 * c['exact']:.1f} / {100 * c['tokens']:.1f}" for c in figures["cells"]}
    for depth in sorted({cell["depth"] for cell in figures["cells"]}):
        table.add_row(f"{100 * depth:g} %", *(share.get((depth, length), "") for length in lengths))
    return table


def _scores(figures: dict[str, Any], title: str) -> Table:
    """Return the score by task and length, in per cent, and the most memory that was held at each length."""
    from ..runs.figures import format_length

    lengths = sorted({cell["length"] for cell in figures["cells"]})
    table = Table(title=f"{title}, right in %", title_justify="left")
    table.add_column("task")
    for length in lengths:
        table.add_column(format_length(length), justify="right")
    scores = {(cell["task"], cell["length"]): f"{100 * cell['score']:.1f}" for cell in figures["cells"]}
    for task in dict.fromkeys(cell["task"] for cell in figures["cells"]):
        table.add_row(task, *(scores.get((task, length), "") for length in lengths))
    held = [[cell["peak_bytes"] for cell in figures["cells"] if cell["length"] == length] for length in lengths]
    if all(None not in cells for cells in held):
        table.add_section()
        table.add_row("most memory held, MiB", *(f"{max(cells) / 2**20:,.0f}" for cells in held))
    return table


def _buckets(buckets: list[dict[str, Any]], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("positions", "tokens", "nats", "perplexity"):
        table.add_column(column, justify="right")
    for bucket in buckets:
        positions = f"{bucket['begin']:,} to {bucket['end'] - 1:,}"
        table.add_row(positions, f"{bucket['tokens']:,}", f"{bucket['nats']:.4f}", f"{bucket['perplexity']:.4f}")
    return table


def _command(name: str, out: Path) -> Command:
    again = f"go on with the same command and --resume --out {shlex.quote(str(out))}"
    return Command(f"evaluate {name}", {"model": "MODEL"}, again, smaller="a smaller --batch or --piece")


def _summary(console: Console, name: str, out: Path, figures: dict[str, Any]) -> None:
    """Print the bytes that a text's state takes, where they are measured, and the files."""
    from ..infini.evaluate.runs import Outputs

    measured = figures.get("cells", figures.get("documents", ()))
    sizes = sorted({cell["cache_bytes"] for cell in measured if "cache_bytes" in cell})
    if sizes:
        console.print(f"state of a text: {' to '.join(map(str, dict.fromkeys([sizes[0], sizes[-1]])))} bytes")
    print_files(console, Outputs.of(out, name)._asdict())
