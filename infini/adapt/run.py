"""Adapt a plain model: convert it, fit its memory layer after layer, measure, and write the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ...runs.checkpoint import read_checkpoint, save_checkpoint
from ...runs.errors import SettingError, named
from ...runs.figures import prepare, read_text, versions, write_figures
from ...runs.settings import check_same
from ...runs.silence import SILENT
from ...runs.text import text_sha256
from ..evaluate.conversions import FULL, Row, first_tokens, measure
from ..evaluate.gate_map import gate_map
from ..evaluate.loading import Loaded, convert_named, load_plain
from ..evaluate.retrieval import check_positions
from ..evaluate.settings import Checkpoint
from ..gate import Gate
from ..huggingface.settings import attentions_of, conversion_of, trunk_of
from ..huggingface.watching import AttentionCall, watched
from ..train.model import save_model
from .fit import WINDOW_ALONE, LayerFit, Recipe, fit_layer, memory_parameters
from .settings import Adaptation

# may change between a run and its continuation, where weights and texts are compared
FREE = ("model", "tokenizer", "device", "text", "eval_text")
PARTS = ("layers", "tensors", "fingerprint")


class Outputs(NamedTuple):
    """The files of a run: layers that are fitted, all figures, two pictures, the folder of the model."""

    checkpoint: Path
    figures: Path
    picture: Path
    gates: Path
    model: Path

    @classmethod
    def of(cls, folder: Path) -> Outputs:
        """Return the files of a run in `folder`."""
        names = ("checkpoint.pt", "adapt.json", "adapt.png", "gates.png", "model")
        return cls(*(folder / name for name in names))


class Listener(Protocol):
    """Take note of a run's progress."""

    def begin(self, steps: int) -> None:
        """Take note of the number of steps that are left, of all layers."""

    def read(self, steps: int) -> None:
        """Take note of steps that have been taken since."""

    def finished(self, what: str) -> None:
        """Take note of a layer or a measurement, in words."""


def run_adaptation(
    checkpoint: Checkpoint, adaptation: Adaptation, folder: Path, listener: Listener = SILENT, *, resume: bool = False
) -> dict[str, Any]:
    """Convert a plain model and fit its gates and maps, all else frozen; write checkpoint, figures, pictures and model.

    Args:
        checkpoint: of a plain model.
        resume: keep the layers that the folder's checkpoint has, and fit the others to the same figures.

    Returns:
        Every figure of the run, as in the JSON file.

    Raises:
        SettingError: naming an option that cannot be or, with `resume`, is not the earlier run's.
    """
    path = Outputs.of(folder)
    texts = [read_text(name) for name in (adaptation.text, adaptation.eval_text) if name is not None]
    prepare(path.figures, path.checkpoint, resume=resume)
    settings = asdict(checkpoint) | asdict(adaptation)
    settings |= {"text_sha256": text_sha256(texts[0]), "eval_text_sha256": text_sha256(texts[-1])}
    saved = _saved(path.checkpoint, settings) if resume and path.checkpoint.exists() else {}
    loaded = load_plain(checkpoint)
    if saved and saved["fingerprint"] != loaded.about["fingerprint"]:
        raise SettingError("model", f"must be the earlier run's with --resume, got {checkpoint.model!r}, another one")
    rows, held_out = _stretches(loaded, texts, adaptation)
    model = loaded.model.requires_grad_(False)
    report = [measure(model, FULL, held_out)]
    listener.finished(_said(report[-1]))
    options = {name: getattr(adaptation, name) for name in ("segment_len", "lookback", "sinks", "update")}
    convert_named(model, options, memory_maps=adaptation.maps)
    report += [measure(model, "untrained", held_out), _window_alone(model, held_out)]
    for row in report[1:]:
        listener.finished(_said(row))
    layers = _fit(loaded, rows, adaptation, path.checkpoint, settings, saved, listener)
    report.append(measure(model, "adapted", held_out))
    listener.finished(_said(report[-1]))
    figures = {
        "command": "adapt",
        "settings": settings,
        "model": loaded.about | {"conversion": conversion_of(model).settings.as_entry()},
        "versions": versions(),
        "rows": [row._asdict() for row in report],
        "layers": layers,
    }
    write_figures(path.figures, figures)
    _draw(path, figures, model)
    save_model(model, loaded.tokenizer, model.state_dict(), path.model)
    return figures


def _stretches(loaded: Loaded, texts: Sequence[str], adaptation: Adaptation) -> tuple[Tensor, list[int]]:
    """Return the stretches to fit to, spread over the text, int64 [rows + 1, length], and the tokens to measure on.

    Raises:
        SettingError: a text is too short, or the model has too few positions to fit to or to measure on so many tokens.
    """
    with named(length="length"):
        check_positions(loaded.model, adaptation.length)
    tokens, measured = (loaded.tokenizer.encode(text)[adaptation.skip :] for text in (texts[0], texts[-1]))
    prefix, count = loaded.tokenizer.prefix, adaptation.rows + 1
    held_out = first_tokens(loaded, measured, adaptation.eval_tokens, "eval_tokens")
    if len(texts) == 1:
        tokens = tokens[len(held_out) :]
    size = adaptation.length - len(prefix)
    if len(tokens) < count * size:
        problem = f"must be of {count * size} tokens and more for --rows {adaptation.rows}, got {len(tokens)}"
        raise SettingError("text", problem)
    apart = len(tokens) // count
    rows = [[*prefix, *tokens[i * apart : i * apart + size]] for i in range(count)]
    return torch.tensor(rows, device="cpu"), held_out


def _fit(
    loaded: Loaded,
    rows: Tensor,
    adaptation: Adaptation,
    path: Path,
    settings: Mapping[str, Any],
    saved: Mapping[str, Any],
    listener: Listener,
) -> list[dict[str, Any]]:
    """Fit the layers in one pass over all stretches, each as the pass comes to it; return their figures."""
    model: Any = loaded.model
    recipe = Recipe(adaptation.window, adaptation.steps, adaptation.gate_lr, adaptation.map_lr, adaptation.seed)
    layers: dict[int, dict[str, Any]] = dict(saved.get("layers", {}))
    tensors: dict[int, dict[str, Tensor]] = dict(saved.get("tensors", {}))
    attentions = attentions_of(trunk_of(model))
    with torch.no_grad():
        for layer, kept in tensors.items():
            for name, parameter in memory_parameters(attentions[layer]).items():
                parameter.copy_(kept[name])
    left = [layer for layer in conversion_of(model).settings.layers if layer not in layers]
    listener.begin(len(left) * recipe.steps)
    count = len(rows)

    def fit(call: AttentionCall) -> Tensor:
        full = call.rows(0, count).full()
        # the stretches are then read twice side by side: in full attention, and as the fitted layers read them
        fitted = call.rows(count, 2 * count) if adaptation.own else call
        if call.layer not in layers:
            figures = fit_layer(fitted, full, recipe, on_step=lambda: listener.read(1))
            layers[call.layer] = figures._asdict()
            tensors[call.layer] = {name: x.detach().cpu() for name, x in memory_parameters(call.attention).items()}
            content = {"settings": dict(settings), "layers": layers, "tensors": tensors}
            save_checkpoint(path, content | {"fingerprint": loaded.about["fingerprint"]})
            listener.finished(_said_of_layer(figures))
        return torch.cat([full, fitted.segmented()]) if adaptation.own else full

    if left:
        inputs = rows.repeat(2, 1) if adaptation.own else rows
        with torch.no_grad(), watched(model, fit):
            trunk_of(model)(input_ids=inputs.to(model.device), use_cache=False)
    return [layers[layer] for layer in sorted(layers)]


def _window_alone(model: Any, tokens: Sequence[int]) -> Row:
    """Measure a converted model without its memory."""
    gates = [module.bias for module in model.modules() if isinstance(module, Gate)]
    kept = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.fill_(WINDOW_ALONE)
        row = measure(model, "window alone", tokens)
        for gate, before in zip(gates, kept, strict=True):
            gate.copy_(before)
    return row


def _saved(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    saved = read_checkpoint(path, "segattn adapt", PARTS, settings)
    check_same(settings, saved["settings"], FREE)
    return saved


def _draw(path: Outputs, figures: Mapping[str, Any], model: Any) -> None:
    # matplotlib takes a second to import, and only this needs it
    from ...runs.heat_maps import plot_gates
    from ..evaluate.plots import plot_conversions

    tokens = figures["settings"]["eval_tokens"]
    plot_conversions(path.picture, figures["rows"], f"Perplexity of {tokens:,} tokens, memory fitted")
    gates = gate_map(model)
    plot_gates(path.gates, gates.share, gates.layers, "Share of memory per head")


def _said(row: Row) -> str:
    return f"{row.conversion}: perplexity {row.perplexity:.4g}"


def _said_of_layer(fitted: LayerFit) -> str:
    closed = 1 - sum(fitted.after) / len(fitted.after)
    return (
        f"layer {fitted.layer}: the window misses {100 * fitted.beyond:.2g} %, of which {100 * closed:.3g} % came back"
    )
