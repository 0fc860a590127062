"""The command `segattn evaluate`: a Hugging Face model, converted or plain, on long texts."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from .progress import Reading
from .shell import Command, counts

if TYPE_CHECKING:
    from ..infini.evaluate.loading import Source

app = typer.Typer(no_args_is_help=True, help="Evaluate a Hugging Face model, converted or plain, on long texts.")

Model = Annotated[str, typer.Argument(help="Folder or name of a model, converted or plain.", show_default=False)]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder or name of a tokenizer, or 'bytes' for a model of bytes. Default: the model's."),
]
Convert = Annotated[bool, typer.Option("--convert", help="Convert a plain model to segments and a memory first.")]
SegmentLen = Annotated[int | None, typer.Option(help="With --convert: tokens per segment. Default: 2048.")]
Update = Annotated[str | None, typer.Option(help="With --convert: delta or linear. Default: delta.")]
Gates = Annotated[str | None, typer.Option(help="File of gates, by whose settings a plain model is converted.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda. Default: a GPU where one is.")]
Lengths = Annotated[str, typer.Option(help="Tokens of a text, such as 4096,32K,1M.")]
Depths = Annotated[
    str, typer.Option(help="Places of what is hidden: start, middle, end, or shares from 0 to 1; with commas.")
]
Samples = Annotated[int, typer.Option(help="Texts per length and depth.")]
Seed = Annotated[int, typer.Option(help="Seed of the texts.")]
Batch = Annotated[int, typer.Option(help="Texts read at once.")]
Piece = Annotated[int | None, typer.Option(help="Tokens read at once of a text, whole segments. Default: about 4096.")]
Out = Annotated[Path, typer.Option(help="Folder for what is written.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what is measured, and measure the rest.")]

FOLDER = Path("segattn-evaluation")


@app.command()
def passkey(
    model: Model,
    tokenizer: Tokenizer = None,
    convert: Convert = False,
    segment_len: SegmentLen = None,
    update: Update = None,
    gates: Gates = None,
    dtype: Dtype = "auto",
    device: Device = None,
    lengths: Lengths = "32K,128K,1M",
    depths: Depths = "start,middle,end",
    samples: Samples = 10,
    seed: Seed = 0,
    batch: Batch = 1,
    piece: Piece = None,
    out: Out = FOLDER,
    resume: Resume = False,
) -> None:
    """Measure passkey retrieval in the wording of the Infini-attention paper, by length and depth.

    A converted model needs the same memory at every length. Ctrl-C leaves the cells that are measured.
    """
    with _command("passkey", out).run() as console:
        from ..infini.evaluate.runs import Grid, run_passkey

        source = _source(model, tokenizer, convert, segment_len, update, gates, dtype, device)
        grid = Grid(_lengths(lengths), _depths(depths), samples, seed, batch, piece)
        with Reading(console, "passkey") as listener:
            figures = run_passkey(source, grid, out, listener, resume=resume)
        console.print(_cells(figures, "Passkeys"))
        _summary(console, "passkey", out, figures)


@app.command()
def needle(
    model: Model,
    text: Annotated[Path, typer.Option(help="Running text to hide the needle in, UTF-8.", show_default=False)],
    needle: Annotated[str | None, typer.Option(help="Sentence to hide. Default: one about San Francisco.")] = None,
    question: Annotated[str | None, typer.Option(help="What the text ends with, up to the answer.")] = None,
    answer: Annotated[str | None, typer.Option(help="What the model should say.")] = None,
    score: Annotated[
        str, typer.Option(help="substring: the answer is in what it says; tokens: it says just that.")
    ] = "substring",
    tokenizer: Tokenizer = None,
    convert: Convert = False,
    segment_len: SegmentLen = None,
    update: Update = None,
    gates: Gates = None,
    dtype: Dtype = "auto",
    device: Device = None,
    lengths: Lengths = "4K,8K,16K,32K",
    depths: Depths = "0,0.25,0.5,0.75,1",
    samples: Samples = 5,
    seed: Seed = 0,
    batch: Batch = 1,
    piece: Piece = None,
    out: Out = FOLDER,
    resume: Resume = False,
) -> None:
    """Measure a needle in a haystack, a sentence hidden in running text, by length and depth."""
    with _command("needle", out).run() as console:
        from ..infini.evaluate.runs import Grid, Needle, run_needle
        from ..runs.checkpoint import SettingError

        source = _source(model, tokenizer, convert, segment_len, update, gates, dtype, device)
        options = {"needle": needle, "question": question, "answer": answer}
        words = {name: value for name, value in options.items() if value is not None}
        for name in options.keys() - words.keys() if words else ():
            raise SettingError(name, f"must come with {' and '.join('--' + other for other in words)}")
        grid = Grid(_lengths(lengths), _depths(depths), samples, seed, batch, piece)
        with Reading(console, "needle") as listener:
            figures = run_needle(source, grid, Needle(str(text), **words, score=score), out, listener, resume=resume)
        console.print(_cells(figures, "Needles"))
        _summary(console, "needle", out, figures)


@app.command()
def perplexity(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text to read, UTF-8.", show_default=False)],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a document; the text is cut into such. Default: it is one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Tokens of the text that are read. Default: all.")] = None,
    buckets: Annotated[int, typer.Option(help="Approximate number of buckets for a document's positions.")] = 16,
    tokenizer: Tokenizer = None,
    convert: Convert = False,
    segment_len: SegmentLen = None,
    update: Update = None,
    gates: Gates = None,
    dtype: Dtype = "auto",
    device: Device = None,
    batch: Batch = 1,
    piece: Piece = None,
    out: Out = FOLDER,
    resume: Resume = False,
) -> None:
    """Measure the perplexity of a text by position in the document and inside the segment.

    Ctrl-C leaves the documents that are measured.
    """
    with _command("perplexity", out).run() as console:
        from ..infini.evaluate.runs import Positions, run_perplexity

        source = _source(model, tokenizer, convert, segment_len, update, gates, dtype, device)
        positions = Positions(str(text), length, limit, buckets, batch, piece)
        with Reading(console, "perplexity") as listener:
            figures = run_perplexity(source, positions, out, listener, resume=resume)
        console.print(_buckets(figures["by_position"], "Perplexity by position in the document"))
        if figures["by_segment_position"]:
            console.print(_buckets(figures["by_segment_position"], "Perplexity by position inside the segment"))
        _summary(console, "perplexity", out, figures)
        mean = figures["mean"]
        console.print(f"mean over {mean['tokens']} tokens: {mean['perplexity']:.4f}")


@app.command()
def gates(
    model: Model,
    gates: Gates = None,
    out: Out = FOLDER,
) -> None:
    """Show the gates of a converted model by layer and head: 0 is local attention alone, 1 the memory alone."""
    with Command("evaluate gates", {"model": "MODEL"}).run() as console:
        from ..infini.evaluate.loading import Source
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


def _source(
    model: str,
    tokenizer: str | None,
    convert: bool,
    segment_len: int | None,
    update: str | None,
    gates: str | None,
    dtype: str,
    device: str | None,
) -> Source:
    from ..infini.evaluate.loading import Source

    return Source(model, tokenizer, convert, segment_len, update, gates, dtype, device)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(sorted(set(counts("lengths", text, "4096,32K,1M"))))


def _depths(text: str) -> tuple[float, ...]:
    from ..infini.evaluate.retrieval import DEPTHS
    from ..runs.checkpoint import SettingError

    depths = []
    for part in filter(None, map(str.strip, text.split(","))):
        try:
            depth = DEPTHS[part] if part in DEPTHS else float(part)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise SettingError("depths", f"must be start, middle, end or shares from 0 to 1 with commas, got {text!r}")
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
    """Print the bytes that a text's cache takes, where they are measured, and the files."""
    from ..infini.evaluate.runs import Outputs

    sizes = sorted({cell["cache_bytes"] for cell in figures.get("cells", figures.get("documents", ()))})
    if sizes:
        console.print(f"cache of a text: {' to '.join(map(str, dict.fromkeys([sizes[0], sizes[-1]])))} bytes")
    for file, path in Outputs.of(out, name)._asdict().items():
        console.print(f"{file:8} {path}", markup=False)
