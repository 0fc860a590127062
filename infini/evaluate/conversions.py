"""What conversions cost before any training: the perplexity of one text in full attention, and in each of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ...runs.errors import SettingError, named
from ...runs.figures import prepare, read_text, write_figures
from ...runs.silence import SILENT
from ...runs.text import text_sha256
from ..conversion_options import ConversionOptions
from ..huggingface.conversion import convert
from ..huggingface.convertible import checked_trunk
from . import perplexity as ppl
from .loading import Loaded, load_plain
from .retrieval import check_positions
from .runs import Listener, Outputs, begin_figures, earlier_run
from .settings import CONVERSIONS, Checkpoint, Conversions

# into which a text is cut, in the table and in the picture
QUARTERS, PARTS = 4, 16
FULL = "full attention"
# words of a conversion → the option, and what reads its value; maps are the identity until they are trained
WORDS: dict[str, tuple[str, Any]] = {
    "segment_len": ("segment_len", int),
    "gate": ("gate_init", float),
    "lookback": ("lookback", int),
    "sinks": ("sinks", int),
    "update": ("update", str),
    "memory_layers": ("memory_layers", str),
}


class Row(NamedTuple):
    """The figures of one way to read the text.

    conversion: its words, or "full attention".
    quarters: perplexity in each quarter of the tokens that are predicted, all but the text's first.
    perplexity: of the whole text.
    by_position: perplexity in smaller parts, for a picture.
    cache_bytes: kept at the text's end, to go on from there.
    """

    conversion: str
    quarters: list[float]
    perplexity: float
    by_position: list[dict[str, Any]]
    cache_bytes: int
    seconds: float


def run_conversions(
    checkpoint: Checkpoint, conversions: Conversions, folder: Path, listener: Listener = SILENT, *, resume: bool = False
) -> dict[str, Any]:
    """Measure every conversion; write convert-report.json after each, and convert-report.png.

    Args:
        checkpoint: of a plain model.
        resume: keep the conversions that the folder has, and measure the others.

    Returns:
        Every figure of the run, as in the JSON file.

    Raises:
        SettingError: naming an option that cannot be or, with `resume`, is not the earlier run's.
    """
    path = Outputs.of(folder, "convert-report")
    arguments = {text: arguments_of(text) for text in conversions.conversions}
    text = read_text(conversions.text)
    prepare(path.figures, resume=resume)
    plain, tokenizer, about = loaded = load_plain(checkpoint)
    tokens = first_tokens(loaded, tokenizer.encode(text)[conversions.skip :], conversions.tokens, "tokens")
    settings = asdict(checkpoint) | asdict(conversions) | {"text_sha256": text_sha256(text)}
    kept = earlier_run(path.figures, resume, settings, about)
    rows = {row["conversion"]: Row(**row) for row in kept.get("rows", ())}
    figures = begin_figures("convert-report", settings, about)
    with named(model="model"):
        checked_trunk(plain)
    models = {FULL: plain} | _converted(plain, arguments, conversions.conversions == CONVERSIONS, listener)
    listener.begin((len(tokens) - 1) * len(models.keys() - rows.keys()))
    try:
        for name, model in models.items():
            if name not in rows:
                rows[name] = measure(model, name, tokens, listener.read)
                listener.finished(f"{name}: perplexity {rows[name].perplexity:.4g}")
            figures["rows"] = [rows[name]._asdict() for name in models if name in rows]
            write_figures(path.figures, figures)
    finally:
        if rows:
            # matplotlib takes a second to import, and only this needs it
            from .plots import plot_conversions

            plot_conversions(path.picture, figures["rows"], f"Perplexity of {len(tokens):,} tokens, untrained")
    return figures


def _converted(
    plain: nn.Module, arguments: dict[str, dict[str, Any]], usual: bool, listener: Listener
) -> dict[str, nn.Module]:
    """Return the model in each conversion that it takes, before any is measured: copies, which share its weights.

    Args:
        plain: stays as it is.
        usual: nobody has chosen the conversions, and those that are refused are left out.

    Raises:
        SettingError: of `conversions`: one that was chosen is refused, or all of the usual ones are.
    """
    models: dict[str, nn.Module] = {}
    refused: dict[str, str] = {}
    weights = {id(x): x for x in (*plain.parameters(), *plain.buffers())}
    for name, options in arguments.items():
        try:
            models[name] = convert(copy.deepcopy(plain, {**weights}), **options, quiet=True)
        except (TypeError, ValueError) as error:
            if not usual:
                problem = f"must be what the model can be converted to, got {name!r}: {error}"
                raise SettingError("conversions", problem) from None
            refused[name] = str(error)
            listener.finished(f"{name} is left out: {error}")
    if not models:
        name, reason = next(iter(refused.items()))
        raise SettingError(
            "conversions",
            f'must be given, as none of the usual ones fits this model: for "{name}", {reason}. Name some that fit, '
            'such as --conversions "32"',
        )
    return models


def arguments_of(conversion: str) -> dict[str, Any]:
    """Return the arguments of `convert` that a conversion's words say, such as "256 gate=-4 lookback=1 sinks=4".

    Raises:
        SettingError: of `conversions`.
    """
    options: dict[str, Any] = {}
    first, *rest = conversion.split() or [""]
    for word in (first if "=" in first else f"segment_len={first}", *rest):
        name, _, value = word.partition("=")
        try:
            option, read = WORDS[name]
            options[option] = read(value)
        except (KeyError, ValueError):
            raise SettingError(
                "conversions",
                "must be tokens per segment and words such as gate=-4, update=linear, lookback=1, sinks=4, "
                f"memory_layers=10-20, got {conversion!r}",
            ) from None
    try:
        return ConversionOptions(**options).convert_arguments()
    except SettingError as error:
        raise SettingError("conversions", f"{error.name} {error.problem}") from None


def first_tokens(loaded: Loaded, tokens: Sequence[int], count: int, option: str) -> list[int]:
    """Return the first `count` tokens of a text, those included that every text begins with, to measure a model on.

    Args:
        tokens: of the text, without those that are skipped.
        option: name of the setting that holds `count`.

    Raises:
        SettingError: of `option`: the text or the model's positions are fewer; or of `text`.
    """
    with named(length=option, text="text"):
        document = ppl.documents_of(tokens, loaded.tokenizer.prefix, count)[0]
        check_positions(loaded.model, len(document))
    if len(document) < count:
        raise SettingError(option, f"must be at most those of the text, {len(document)} after --skip, got {count}")
    return document


def measure(model: Any, name: str, tokens: Sequence[int], on_tokens: Callable[[int], None] = lambda count: None) -> Row:
    """Return the figures of a model that reads a text of at least 16 tokens; `on_tokens` is called with those read."""
    widths = ppl.Widths(1, None, None)
    [document] = ppl.measure_documents(model, [tokens], widths, on_tokens=on_tokens)
    predicted = ppl.by_position([document], widths)
    return Row(
        name,
        [part.perplexity for part in _parts(predicted, QUARTERS)],
        ppl.joined(predicted).perplexity,
        [part._asdict() for part in _parts(predicted, min(PARTS, len(predicted)))],
        document.cache_bytes,
        document.seconds,
    )


def _parts(predicted: Sequence[ppl.Bucket], count: int) -> list[ppl.Bucket]:
    """Join neighbouring tokens to so many parts, which differ by at most one token."""
    ends = [number * len(predicted) // count for number in range(count + 1)]
    return [ppl.joined(predicted[begin:end]) for begin, end in pairwise(ends)]
