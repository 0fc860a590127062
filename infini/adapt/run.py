"""Adapt a plain model: convert it, fit its memory to running text or to passkeys, measure, and write the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runs.checkpoint import read_checkpoint
from ...runs.errors import SettingError
from ...runs.figures import prepare, read_text, versions, write_figures
from ...runs.settings import check_same
from ...runs.silence import SILENT
from ...runs.text import text_sha256
from ..evaluate.conversions import FULL, Row, first_tokens, measure
from ..evaluate.gate_map import GateMap, gate_map
from ..evaluate.loading import Loaded, convert_named, load_plain
from ..evaluate.settings import Checkpoint
from ..huggingface.conversion import revert
from ..huggingface.settings import conversion_of, trunk_of
from ..huggingface.watching import AttentionCall, watched
from ..train.model import save_model
from .asking import ask, check_asked
from .fit import LayerFit, Recipe, fit_layer
from .kept import ADAPTED, WINDOW, Kept, Listener, without_memory
from .lookups import Prompts
from .passkey_rounds import PasskeyRounds
from .passkeys import check_room, fit_to_passkeys, prompts_for, search_heads
from .rounds import Rounds, train_in_rounds
from .settings import Adaptation, Passkeys, check_together
from .text_rounds import TextRounds, stretch_at

# may change between a run and its continuation, where weights and texts are compared
FREE = ("model", "tokenizer", "device", "text", "eval_text", "ask", "ask_depths")


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


def run_adaptation(
    checkpoint: Checkpoint,
    adaptation: Adaptation,
    folder: Path,
    listener: Listener = SILENT,
    *,
    passkeys: Passkeys | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Convert a plain model and fit its gates and maps, all else frozen; write checkpoint, figures, pictures and model.

    Args:
        checkpoint: of a plain model.
        passkeys: with `adaptation.prompts`, how the memory is fitted to them instead of running text, and asked. None:
            as by default.
        resume: keep the layers, rounds and passkeys that the folder's checkpoint has, and go on to the same figures.
            Rounds may be added to a run that has done none, and passkeys asked at other lengths.

    Returns:
        Every figure of the run, as in the JSON file.

    Raises:
        SettingError: naming an option that cannot be or, with `resume`, is not the earlier run's.
    """
    path, passkeys = Outputs.of(folder), passkeys or Passkeys()
    check_together(adaptation, passkeys)
    texts = [read_text(name) for name in (adaptation.text, adaptation.eval_text) if name is not None]
    with _no_empty_folder(folder):
        prepare(path.figures, path.checkpoint, resume=resume)
        settings = asdict(checkpoint) | asdict(adaptation) | asdict(passkeys)
        settings |= {"text_sha256": text_sha256(texts[0]), "eval_text_sha256": text_sha256(texts[-1])}
        loaded, kept = _begin(checkpoint, settings, path, resume=resume)
        tokens, held_out = _tokens(loaded, texts, adaptation)
        options, prompts = _plan(loaded, adaptation, passkeys, kept, listener)
        model: Any = loaded.model
        report: list[Row] = []

        def note(name: str) -> None:
            stage = f"perplexity, {name}"
            listener.begin(stage, len(held_out) - 1)
            report.append(measure(model, name, held_out, partial(listener.read, stage)))
            listener.finished(f"{name}: perplexity {report[-1].perplexity:.4g}")

        note(FULL)
        if prompts is not None:
            ask(loaded, FULL, passkeys, kept, listener)
        convert_named(model, options)
        note("untrained")
        with without_memory(model):
            note(WINDOW)
        kept.restore(model)
        task = _fit(loaded, tokens, prompts, adaptation, passkeys, kept, listener)
        if adaptation.rounds:
            train_in_rounds(model, task, adaptation.rounds, adaptation.round_lr, adaptation.seed, kept, listener)
        if prompts is not None:
            with without_memory(model):
                ask(loaded, WINDOW, passkeys, kept, listener)
            ask(loaded, ADAPTED, passkeys, kept, listener)
        note(ADAPTED)
        return _write(path, loaded, kept, report)


@contextmanager
def _no_empty_folder(folder: Path) -> Iterator[None]:
    """Remove a folder that was not there before, where a run ends in an error and has written nothing to it."""
    is_new = not folder.exists()
    try:
        yield
    except BaseException:
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _begin(checkpoint: Checkpoint, settings: Mapping[str, Any], path: Outputs, *, resume: bool) -> tuple[Loaded, Kept]:
    """Load the plain model, frozen, and what an earlier run has kept for it.

    Raises:
        SettingError: the earlier run was of other settings, or of another model.
    """
    saved = _saved(path.checkpoint, settings) if resume and (path.checkpoint.exists() or path.figures.exists()) else {}
    loaded = load_plain(checkpoint)
    fingerprint = loaded.about["fingerprint"]
    if saved and saved["fingerprint"] != fingerprint:
        raise SettingError("model", f"must be the earlier run's with --resume, got {checkpoint.model!r}, another one")
    loaded.model.requires_grad_(False)
    return loaded, Kept(path.checkpoint, settings, fingerprint, saved)


def _plan(
    loaded: Loaded, adaptation: Adaptation, passkeys: Passkeys, kept: Kept, listener: Listener
) -> tuple[dict[str, Any], Prompts | None]:
    """Return the arguments of `convert`, and the prompts to fit to, if any; the model stays plain.

    What cannot be is refused here, before anything is measured.
    """
    model, options, prompts = loaded.model, adaptation.convert_arguments(), None
    if adaptation.prompts:
        check_asked(loaded, passkeys)
        prompts = prompts_for(loaded, adaptation, passkeys)
    convert_named(model, options)
    if prompts is not None:
        if not kept.heads:
            everywhere = adaptation.memory_layers is None
            kept.heads = search_heads(model, prompts, passkeys.attended, listener, everywhere=everywhere)
            kept.save()
        options["memory_layers"] = list(kept.heads)
    revert(model)
    return options, prompts


def _fit(
    loaded: Loaded,
    tokens: Tensor,
    prompts: Prompts | None,
    adaptation: Adaptation,
    passkeys: Passkeys,
    kept: Kept,
    listener: Listener,
) -> Rounds:
    """Fit the layers that are not kept, to prompts or to running text; return what rounds read after that fit."""
    if prompts is None:
        _fit_to_text(loaded, _stretches(loaded, tokens, adaptation), adaptation, kept, listener)
        return TextRounds(loaded, tokens, adaptation.length, adaptation.window)
    fit_to_passkeys(loaded, prompts, adaptation, passkeys, kept, listener)
    return PasskeyRounds(loaded, adaptation, passkeys)


def _write(path: Outputs, loaded: Loaded, kept: Kept, report: Sequence[Row]) -> dict[str, Any]:
    """Write figures, pictures and the model; return the figures.

    In "layers" are the figures of the fit, the gates behind it among them; in "gates" are those of the model that is
    written, which rounds have changed further: for each layer with a memory, sigmoid(β) of each head. In "passkeys" is
    what each model recalls by length and depth, as in `RetrievalCell`; none where this run asks for none.
    """
    model: Any = loaded.model
    gates = gate_map(model)
    asked = kept.passkeys if kept.settings["ask"] else {}
    figures = {
        "command": "adapt",
        "settings": kept.settings,
        "model": loaded.about | {"conversion": conversion_of(model).settings.as_entry()},
        "versions": versions(),
        "rows": [row._asdict() for row in report],
        "layers": kept.in_order(),
        "rounds": kept.rounds,
        "passkeys": [{"conversion": name} | cell for name, cells in asked.items() for cell in cells],
        "gates": {str(layer): share.tolist() for layer, share in zip(gates.layers, gates.share, strict=True)},
    }
    write_figures(path.figures, figures)
    _draw(path, figures, gates)
    save_model(model, loaded.tokenizer, model.state_dict(), path.model)
    return figures


def _tokens(loaded: Loaded, texts: Sequence[str], adaptation: Adaptation) -> tuple[Tensor, list[int]]:
    """Return the tokens to adapt to, int64 [N], and those to measure on.

    Raises:
        SettingError: a text is too short, or the model has too few positions to fit to or to measure on so many tokens.
    """
    tokens, measured = (loaded.tokenizer.encode(text)[adaptation.skip :] for text in (texts[0], texts[-1]))
    check_room(loaded.model, adaptation.eval_tokens, "eval_tokens")
    held_out = first_tokens(loaded, measured, adaptation.eval_tokens, "eval_tokens")
    if len(texts) == 1:
        tokens = tokens[len(held_out) :]
    if not adaptation.prompts:
        check_room(loaded.model, adaptation.length, "length")
        least = (adaptation.rows + 1) * (adaptation.length - len(loaded.tokenizer.prefix))
        if len(tokens) < least:
            problem = f"must be of {least} tokens and more for --rows {adaptation.rows}, got {len(tokens)}"
            remedy = ": give fewer --rows"
            if len(texts) == 1:
                problem += f" behind the first {len(held_out)}, which are measured on"
                remedy += ", or another text to measure on by --eval-text"
            raise SettingError("text", problem + remedy)
    return torch.tensor(tokens, dtype=torch.int64, device="cpu"), held_out


def _stretches(loaded: Loaded, tokens: Tensor, adaptation: Adaptation) -> Tensor:
    """Return stretches that are spread over the text, int64 [rows + 1, length]."""
    prefix, count = loaded.tokenizer.prefix, adaptation.rows + 1
    begins = [i * (len(tokens) // count) for i in range(count)]
    return torch.stack([stretch_at(begin, tokens, adaptation.length, prefix) for begin in begins])


def _fit_to_text(loaded: Loaded, rows: Tensor, adaptation: Adaptation, kept: Kept, listener: Listener) -> None:
    """Fit the layers that are not kept in one pass over all stretches, each as the pass comes to it."""
    model: Any = loaded.model
    recipe = Recipe(adaptation.window, adaptation.steps, adaptation.gate_lr, adaptation.map_lr, adaptation.seed)
    left, stage = kept.left(conversion_of(model).settings.memory_layers), "fit layers"
    listener.begin(stage, len(left) * recipe.steps)
    count = len(rows)

    def fit(call: AttentionCall) -> Tensor:
        full = call.rows(0, count).full()
        # the stretches are then read twice side by side: in full attention, and as the fitted layers read them
        fitted = call.rows(count, 2 * count) if adaptation.own else call
        if call.layer in left:
            figures = fit_layer(fitted, full, recipe, on_step=lambda: listener.read(stage, 1))
            kept.add(call.attention, figures._asdict())
            listener.finished(_said_of_layer(figures))
        return torch.cat([full, fitted.segmented()]) if adaptation.own else full

    if left:
        inputs = rows.repeat(2, 1) if adaptation.own else rows
        with torch.no_grad(), watched(model, fit):
            trunk_of(model)(input_ids=inputs.to(model.device), use_cache=False)


def _saved(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    saved = read_checkpoint(path, "segattn adapt", Kept.PARTS, settings)
    check_same(settings, saved["settings"], {"rounds", *_free(settings, saved)})
    if saved["rounds"] and settings["rounds"] != (before := saved["settings"]["rounds"]):
        problem = (
            f"must be the checkpoint's with --resume, {before}, got {settings['rounds']}: of these "
            f"{len(saved['rounds'])} are done, and the learning rate falls over all of them"
        )
        raise SettingError("rounds", problem)
    return saved


def _free(settings: Mapping[str, Any], saved: Mapping[str, Any]) -> set[str]:
    """Return the settings that may change between a run and its continuation."""
    free = {*FREE}
    if not saved["rounds"]:
        free.add("round_lr")
    # else the stretches that are fitted to begin where the measured tokens end
    if settings["prompts"] or settings["eval_text"]:
        free.add("eval_tokens")
    return free


def _draw(path: Outputs, figures: Mapping[str, Any], gates: GateMap) -> None:
    # matplotlib takes a second to import, and only this needs it
    from ...runs.heat_maps import plot_gates
    from ..evaluate.plots import plot_conversions

    tokens = figures["settings"]["eval_tokens"]
    plot_conversions(path.picture, figures["rows"], f"Perplexity of {tokens:,} tokens, memory fitted")
    plot_gates(path.gates, gates.share, gates.layers, "Share of memory per head")


def _said_of_layer(fitted: LayerFit) -> str:
    beyond, closed = 100 * fitted.beyond, 100 * (1 - sum(fitted.after) / len(fitted.after))
    return f"layer {fitted.layer}: the window misses {beyond:,.1f} %, of which {closed:,.1f} % came back"
