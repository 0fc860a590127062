"""The command `segattn evaluate`: a Hugging Face model, converted or plain, on long texts."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from .progress import Bars, Lines

if TYPE_CHECKING:
    from typing_extensions import Self

    from ..infini.evaluate.loading import Source

app = typer.Typer(no_args_is_help=True, help="Evaluate a Hugging Face model, converted or plain, on long texts.")

Model = Annotated[str, typer.Argument(help="Folder or name of a model, converted or plain.", show_default=False)]
Tokenizer = Annotated[
    str | None,
    typer.Option(help="Folder or name of a tokenizer, or 'bytes' for a model of bytes. Default: the model's."),
]
Convert = Annotated[bool, typer.Option("--convert", help="Give a plain model segments and a memory first.")]
SegmentLen = Annotated[int | None, typer.Option(help="With --convert: tokens per segment. Default: 2048.")]
Update = Annotated[str | None, typer.Option(help="With --convert: delta or linear. Default: delta.")]
Gates = Annotated[str | None, typer.Option(help="File of gates; it says how to convert a plain model.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="Such as cpu or cuda. Default: a GPU where one is.")]
Lengths = Annotated[str, typer.Option(help="Tokens of a text, as 4096 or 4K, 1M; with commas.")]
Depths = Annotated[
    str, typer.Option(help="Where it is hidden: start, middle, end, or shares from 0 to 1; with commas.")
]
Samples = Annotated[int, typer.Option(help="Texts per length and depth.")]
Seed = Annotated[int, typer.Option(help="Of the texts.")]
Batch = Annotated[int, typer.Option(help="Texts read at once.")]
Piece = Annotated[int | None, typer.Option(help="Tokens read at once of a text, whole segments. Default: about 4096.")]
Out = Annotated[Path, typer.Option(help="Folder for what is written.")]
Resume = Annotated[bool, typer.Option("--resume", help="Keep what the folder has, and measure what it lacks.")]

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
    """Passkey retrieval in the wording of the Infini-attention paper, by length and depth.

    A converted model needs the same memory at every length. Ctrl-C leaves the cells that are done.
    """
    with _Command("passkey", out) as command:
        from ..infini.evaluate.runs import Grid, run_passkey

        source = _source(model, tokenizer, convert, segment_len, update, gates, dtype, device)
        grid = Grid(_lengths(lengths), _depths(depths), samples, seed, batch, piece)
        with command.listener() as listener:
            figures = run_passkey(source, grid, out, listener, resume=resume)
        command.show(_cells(figures, "Passkeys"), figures)


@app.command()
def needle(
    model: Model,
    text: Annotated[Path, typer.Option(help="Running text to hide the needle in, UTF-8.", show_default=False)],
    needle: Annotated[str | None, typer.Option(help="Sentence that is hidden. Default: of San Francisco.")] = None,
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
    """A needle in a haystack: a sentence hidden in running text, by length and depth."""
    with _Command("needle", out) as command:
        from ..infini.evaluate.runs import Grid, Needle, run_needle
        from ..runs.checkpoint import SettingError

        source = _source(model, tokenizer, convert, segment_len, update, gates, dtype, device)
        given = {"needle": needle, "question": question, "answer": answer}
        own = {name: value for name, value in given.items() if value is not None}
        for name in given.keys() - own.keys() if own else ():
            raise SettingError(name, f"must come with {' and '.join('--' + other for other in own)}")
        grid = Grid(_lengths(lengths), _depths(depths), samples, seed, batch, piece)
        with command.listener() as listener:
            figures = run_needle(source, grid, Needle(str(text), **own, score=score), out, listener, resume=resume)
        command.show(_cells(figures, "Needles"), figures)


@app.command()
def perplexity(
    model: Model,
    text: Annotated[Path, typer.Option(help="Text to read, UTF-8.", show_default=False)],
    length: Annotated[
        int | None, typer.Option(help="Tokens of a document; the text is cut into such. Default: it is one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Tokens of the text that are read. Default: all.")] = None,
    buckets: Annotated[int, typer.Option(help="Of positions in a document, about so many.")] = 16,
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
    """Perplexity of a text by position: in the document, and inside the segment.

    Ctrl-C leaves the documents that are done.
    """
    with _Command("perplexity", out) as command:
        from ..infini.evaluate.runs import Positions, run_perplexity

        source = _source(model, tokenizer, convert, segment_len, update, gates, dtype, device)
        positions = Positions(str(text), length, limit, buckets, batch, piece)
        with command.listener() as listener:
            figures = run_perplexity(source, positions, out, listener, resume=resume)
        tables = [_buckets(figures["by_position"], "Perplexity by position in the document")]
        if figures["by_segment_position"]:
            tables.append(_buckets(figures["by_segment_position"], "Perplexity by position inside the segment"))
        command.show(*tables, figures)
        mean = figures["mean"]
        command.console.print(f"mean over {mean['tokens']} tokens: {mean['perplexity']:.4f}")


@app.command()
def gates(
    model: Model,
    gates: Gates = None,
    out: Out = FOLDER,
) -> None:
    """The gates of a converted model by layer and head: 0 is local attention alone, 1 the memory alone."""
    with _Command("gates", out) as command:
        from ..infini.evaluate.loading import Source
        from ..infini.evaluate.runs import run_gates

        figures = run_gates(Source(model, gates=gates, device="cpu"), out)
        table = Table(title="Share of the memory, by layer", title_justify="left")
        for column in ("layer", "least", "mean", "largest", "local heads", "mixed", "memory"):
            table.add_column(column, justify="right")
        for row in figures["layers"]:
            shares = (f"{row[name]:.3f}" for name in ("least", "mean", "largest"))
            table.add_row(str(row["layer"]), *shares, *(str(row[name]) for name in ("local", "mixed", "memory")))
        command.show(table, figures)


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


def _lengths(given: str) -> tuple[int, ...]:
    from ..runs.checkpoint import SettingError

    lengths = []
    for part in filter(None, map(str.strip, given.split(","))):
        unit = {"K": 2**10, "M": 2**20}.get(part[-1].upper(), 1)
        number = part[:-1] if unit > 1 else part
        if not number.isdecimal() or int(number) < 1:
            raise SettingError("lengths", f"must be numbers of tokens with commas, as 4096,32K,1M, got {given!r}")
        lengths.append(int(number) * unit)
    return tuple(sorted(set(lengths)))


def _depths(given: str) -> tuple[float, ...]:
    from ..infini.evaluate.retrieval import DEPTHS
    from ..runs.checkpoint import SettingError

    depths = []
    for part in filter(None, map(str.strip, given.split(","))):
        try:
            depth = DEPTHS[part] if part in DEPTHS else float(part)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise SettingError("depths", f"must be start, middle, end or shares from 0 to 1 with commas, got {given!r}")
        depths.append(depth)
    return tuple(sorted(set(depths)))


def _cells(figures: dict[str, Any], what: str) -> Table:
    """Right answers and right tokens by length and depth, in per cent."""
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


class _Command:
    """One command: what it prints, and what becomes of its errors."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.out = name, out
        self.console = Console(soft_wrap=True, highlight=False)
        self.errors = Console(stderr=True, soft_wrap=True, highlight=False)

    def listener(self) -> _Bar | _Lines:
        """A bar on a terminal, lines elsewhere."""
        return _Bar(self.console, self.name) if self.console.is_terminal else _Lines(self.console)

    def show(self, *shown: Any) -> None:
        """Tables, and of the figures given last, bytes and files."""
        from ..infini.evaluate.runs import Outputs

        *tables, figures = shown
        for table in tables:
            self.console.print(table)
        held = sorted({cell["cache_bytes"] for cell in figures.get("cells", figures.get("documents", ()))})
        if held:
            self.console.print(f"cache of a text: {' to '.join(map(str, dict.fromkeys([held[0], held[-1]])))} bytes")
        for name, path in Outputs.of(self.out, self.name)._asdict().items():
            self.console.print(f"{name:8} {path}", markup=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        from torch import OutOfMemoryError

        from ..runs.checkpoint import SettingError

        again = f"; go on with the same command and --resume --out {shlex.quote(str(self.out))}"
        if isinstance(error, SettingError):
            option = "MODEL" if error.name == "model" else f"--{error.name.replace('_', '-')}"
            self._stop(f"{option} {error.problem}", 2)
        if isinstance(error, ImportError) and error.name in ("transformers", "safetensors"):
            self._stop(f"needs {error.name}: pip install 'segattn[hf]'", 1)
        if isinstance(error, OutOfMemoryError):
            self._stop(f"out of memory: try a smaller --batch or --piece{again}", 1)
        if isinstance(error, KeyboardInterrupt):
            self._stop(f"stopped{again}", 130)

    def _stop(self, message: str, status: int) -> None:
        self.errors.print(f"segattn evaluate {self.name}: {message}", markup=False)
        raise typer.Exit(status) from None


class _Bar(Bars):
    """Tokens read of those to read, on a terminal."""

    def __init__(self, console: Console, name: str) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
        super().__init__(console, *columns, TextColumn("{task.fields[note]}"))
        self.task = self.progress.add_task(name, total=None, note="")

    def begin(self, tokens: int) -> None:
        self.progress.update(self.task, total=tokens)

    def read(self, tokens: int) -> None:
        self.progress.advance(self.task, tokens)

    def finished(self, what: str) -> None:
        self.progress.update(self.task, note=what)


class _Lines(Lines):
    """A line for everything that is done, for a file or a pipe."""

    def begin(self, tokens: int) -> None:
        return None

    def read(self, tokens: int) -> None:
        return None

    def finished(self, what: str) -> None:
        self.console.print(what, markup=False)
