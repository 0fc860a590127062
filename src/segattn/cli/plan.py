"""The command `segattn plan`: what attention, segments and memories cost, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

from ..runs.errors import SettingError, named
from .shell import Command, check_file, counts, write_json

if TYPE_CHECKING:
    from ..bench.planner.shapes import Shape

DEFAULT = "model"
# columns of a page that is no terminal
PAGE = 160
# heading → figure, and the function of `bench.planner.units` that writes it
COSTS = {
    "FLOPs": ("forward_flops", "in_flops"),
    "full ÷": ("flops_saving", "in_times"),
    "moved": ("forward_bytes", "in_bytes"),
    "prefill": ("prefill_floor_s", "in_seconds"),
    "decode": ("decode_floor_s_per_token", "in_seconds"),
}
KEPT = {name: (f"{name}_bytes", "in_bytes") for name in ("state", "cache", "activation", "checkpointed")}


class _Group(TyperGroup):
    """A group whose command is `model` where no other is named."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        named = bool(args) and (args[0] in self.commands or args[0] in ctx.help_option_names)
        return super().parse_args(ctx, args if named else [DEFAULT, *args])


app = typer.Typer(
    cls=_Group,
    help="What a model costs over a text: `segattn plan SHAPE` is short for `segattn plan model SHAPE`. "
    "Its options, such as --length, --gpu and --png: `segattn plan model --help`.",
)

Shaped = Annotated[
    str,
    typer.Argument(
        help="opt-125m … opt-175b, llama-3.2-1b … llama-3.1-405b, "
        "or a model's folder or config.json (needs segattn[hf]), or layers=12,width=768,…"
    ),
]
Dtype = Annotated[str, typer.Option(help="Dtype of weights and activations: bfloat16, float16 or float32.")]
Json = Annotated[Path | None, typer.Option(help="File to write every figure to.")]
Png = Annotated[
    Path | None, typer.Option(help="File for a picture of the figures, such as plan.png, plan.pdf or plan.svg.")
]
Formulas = Annotated[bool, typer.Option("--formulas", help="Print the formulas too, and what their letters mean.")]
SegmentLen = Annotated[int, typer.Option(help="Tokens per segment.")]


@app.command(DEFAULT)
def model(
    shape: Shaped = "llama-3-8b",
    length: Annotated[str, typer.Option(help="Tokens of text, such as 4096,32K,1M.")] = "8K,128K,1M",
    segment_len: SegmentLen = 2048,
    memory: Annotated[int, typer.Option(help="Memory tokens of RMT and ARMT.")] = 16,
    d_mem: Annotated[int, typer.Option(help="Width of ARMT's keys before their feature map.")] = 64,
    nu: Annotated[
        int, typer.Option(help="ν of ARMT's feature map: a key has 2 ν features for each of its numbers.")
    ] = 3,
    update: Annotated[str, typer.Option(help="Update rule of Infini-attention's memory: delta or linear.")] = "delta",
    lookback: Annotated[
        int, typer.Option(help="Whole segments that a token of local and infini sees before its own, 0 or 1.")
    ] = 0,
    sinks: Annotated[int, typer.Option(help="First tokens of a text that all later ones of local and infini see.")] = 0,
    bptt: Annotated[int | None, typer.Option(help="Segments that gradients reach back. Default: all.")] = None,
    gpu: Annotated[
        str,
        typer.Option(
            help="GPU whose least times are given, such as H100, H200, B200, A100 SXM 80GB, RTX 5090, MI300X."
        ),
    ] = "H100",
    dtype: Dtype = "bfloat16",
    batch: Annotated[int, typer.Option(help="Sequences in a batch.")] = 1,
    formulas: Formulas = False,
    json: Json = None,
    png: Png = None,
) -> None:
    """Show FLOPs, memory and floor times of full attention, separate segments, RMT, Infini-attention and ARMT."""
    with _command("model", json, png) as console:
        from ..bench.planner.report import LETTERS, PLAN_NOTES, SLOWER_PRODUCTS, estimates
        from ..bench.planner.settings import PlanSettings, gpu_of
        from ..bench.planner.shapes import shape_of

        sizes = shape_of(shape)
        row, peak = gpu_of(gpu)
        options = {"segment_len": segment_len, "memory": memory, "d_mem": d_mem, "nu": nu, "update": update}
        options |= {"lookback": lookback, "sinks": sinks, "bptt": bptt, "batch": batch, "dtype": dtype}
        plans = [PlanSettings(sizes, tokens, **options) for tokens in _counts("length", length)]  # type: ignore[arg-type]
        rows = estimates(plans, peak)
        window = f", lookback {lookback}, {sinks} sinks" if lookback or sinks else ""
        title = f"{sizes.name}, segments of {segment_len}{window}, batch {batch}, {dtype}, floors on {row}"
        notes: tuple[str, ...] = PLAN_NOTES
        if dtype == "float32":
            title += " by its bfloat16 peak"
            notes += (SLOWER_PRODUCTS,)
        console.print(_table(f"What it costs: {title}", rows, COSTS), _table("What is kept of a sequence", rows, KEPT))
        _notes(console, (*notes, LETTERS), formulas)
        if dtype == "float32" and not formulas:
            console.print(SLOWER_PRODUCTS, markup=False)
        document = {"shape": _shape(sizes), "gpu": row, "peak": peak._asdict()} | options
        _write(console, json, document | {"formulas": notes, "estimates": rows})
        if png is not None:
            from ..bench.planner.plots import plan_figure
            from ..runs.pictures import save_picture

            save_picture(plan_figure(rows, title), png)
            console.print(f"picture in {png}", markup=False)


def _table(title: str, rows: Sequence[dict[str, Any]], columns: dict[str, tuple[str, str]]) -> Table:
    """Return a table with a section for each length and a line for each scheme."""
    from ..bench.planner import units
    from ..runs.figures import format_length

    table = Table(title=title, title_justify="left")
    table.add_column("tokens", justify="right", overflow="fold")
    table.add_column("", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right", overflow="fold")
    length = None
    for row in rows:
        if length not in (None, row["length"]):
            table.add_section()
        cells = (getattr(units, unit)(row[name]) for name, unit in columns.values())
        table.add_row("" if row["length"] == length else format_length(row["length"]), row["scheme"], *cells)
        length = row["length"]
    return table


@app.command()
def exchange(
    shape: Shaped = "llama-3-8b",
    length: Annotated[str, typer.Option(help="Tokens of a sequence, such as 32K,1M.")] = "32K,256K,2M,16M",
    ranks: Annotated[str, typer.Option(help="Ranks that share the sequence, such as 2,8,64.")] = "2,8,32,128,1024,4096",
    segment_len: SegmentLen = 2048,
    node_ranks: Annotated[int, typer.Option(help="Ranks in a node.")] = 8,
    node_bandwidth: Annotated[float, typer.Option(help="GB/s of a rank's link inside a node, one way.")] = 450,
    bandwidth: Annotated[float, typer.Option(help="GB/s of a rank's link between nodes, one way.")] = 50,
    latency: Annotated[float, typer.Option(help="Latency of a message, microseconds.")] = 10,
    dtype: Dtype = "bfloat16",
    formulas: Formulas = False,
    json: Json = None,
    png: Png = None,
) -> None:
    """Show what ranks that share a sequence send: ring attention, Ulysses, and a memory's state."""
    with _command("exchange", json, png) as console:
        from ..bench.planner.exchange import EXCHANGES, Links
        from ..bench.planner.report import EXCHANGE_NOTES, LETTERS, exchanges
        from ..bench.planner.shapes import shape_of
        from ..bench.planner.units import in_bytes, in_seconds
        from ..runs.figures import format_length

        sizes = shape_of(shape)
        links = Links(node_ranks, node_bandwidth * 1e9, bandwidth * 1e9, latency / 1e6)
        rows = exchanges(sizes, _counts("length", length), _counts("ranks", ranks), segment_len, dtype, links)
        title = f"{sizes.name}, segments of {segment_len}, {dtype}, {node_bandwidth:g} GB/s in nodes of {node_ranks}, "
        title += f"{bandwidth:g} GB/s between, {latency:g} µs"
        table = Table(title=f"Sent by a rank, a layer and step: {title}", title_justify="left")
        for name in ("tokens", "ranks", *EXCHANGES):
            table.add_column(name, justify="right", overflow="fold")
        for row in rows:
            cells = [
                "–" if row["bytes"][x] is None else f"{in_bytes(row['bytes'][x])}\n{in_seconds(row['seconds'][x])}"
                for x in EXCHANGES
            ]
            table.add_row(format_length(row["length"]), f"{row['ranks']:,}", *cells)
        console.print(table)
        _notes(console, (*EXCHANGE_NOTES, LETTERS), formulas)
        document = {"shape": _shape(sizes), "segment_len": segment_len, "dtype": dtype, "links": vars(links)}
        _write(console, json, document | {"formulas": EXCHANGE_NOTES, "exchanges": rows})
        if png is not None:
            from ..bench.planner.plots import exchange_figure
            from ..runs.pictures import save_picture

            save_picture(exchange_figure(rows, title), png)
            console.print(f"picture in {png}", markup=False)


@app.command()
def published(formulas: Formulas = False, json: Json = None, png: Png = None) -> None:
    """Show published figures by their papers' formulas: FLOPs of RMT over OPT models, numbers kept by each memory."""
    with _command("published", json, png) as console:
        from ..bench.planner import published as papers

        rows, kept = papers.savings(), papers.memories()
        tokens = papers.SEGMENTS[-1] * papers.SEGMENT_LEN
        table = Table(
            title=f"FLOPs of full attention over RMT's, {tokens:,} tokens in segments of {papers.SEGMENT_LEN}",
            title_justify="left",
        )
        for name in ("model", "ratio", f"with {papers.MEMORY} memory tokens", "printed"):
            table.add_column(name, justify="right" if name != "model" else "left", overflow="fold")
        for row in rows:
            ratios = (f"{row[name][-1]:.2f}" for name in ("saving", "saving_with_memory"))
            table.add_row(row["shape"], *ratios, str(row["printed"] or ""))
        console.print(table, _memory_table(kept))
        _notes(console, papers.NOTES, formulas)
        document = {"formulas": papers.NOTES, "savings": rows, "memories": [x._asdict() for x in kept]}
        _write(console, json, document)
        if png is not None:
            from ..bench.planner.plots import savings_figure
            from ..runs.pictures import save_picture

            save_picture(savings_figure(rows), png)
            console.print(f"picture in {png}", markup=False)


def _memory_table(kept: Sequence[Any]) -> Table:
    table = Table(title="Numbers kept of a text, arXiv 2404.07143, table 2", title_justify="left")
    for name in ("model", "formula", "numbers", "printed", "share", "printed share"):
        table.add_column(name, justify="left" if name in ("model", "formula") else "right", overflow="fold")
    for row in kept:
        shares = f"{row.share:.1f}", f"{row.printed_share:g}"
        table.add_row(row.name, row.formula, f"{row.numbers:,}", f"{row.printed:g} M", *shares)
    return table


@contextmanager
def _command(name: str, json: Path | None, png: Path | None) -> Iterator[Console]:
    """Check before any work that the files can be written, and print whole cells where there is no terminal."""
    from ..runs.pictures import picture_format

    with Command(f"plan {name}", {"shape": "SHAPE"}).run() as console, named(path="png"):
        check_file("json", json)
        check_file("png", png)
        if png is not None:
            picture_format(png)
        if not console.is_terminal:
            console.width = PAGE
        try:
            yield console
        except OSError as error:
            problem = f"must be a file that can be written, got {str(png)!r} ({error.strerror})"
            raise SettingError("png", problem) from None


def _counts(name: str, text: str) -> list[int]:
    """Read numbers, in order, each once."""
    return sorted(set(counts(name, text, {"length": "4096,32K,1M", "ranks": "2,8,64"}[name])))


def _shape(shape: Shape) -> dict[str, Any]:
    return vars(shape) | {"matrices": shape.matrices}


def _notes(console: Console, notes: Sequence[str], formulas: bool) -> None:
    """Print the formulas, or a line that says how to see them."""
    for note in notes if formulas else ("--formulas prints how these figures are computed",):
        console.print(note, markup=False)


def _write(console: Console, path: Path | None, document: dict[str, Any]) -> None:
    if path is not None:
        write_json("json", path, document)
        console.print(f"figures in {path}", markup=False)
