"""A run of the demo: train a small decoder to recall a passkey, evaluate it far beyond its length, write the files."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from ...runs.checkpoint import read_checkpoint, save_checkpoint
from ...runs.errors import SettingError
from ...runs.figures import prepare, read_text, versions, write_figures
from ...runs.interrupts import InterruptedRunError, deferred_interrupt
from ...runs.settings import check_same
from ...runs.text import generate_text, text_sha256
from .decoder import Decoder, DecoderConfig
from .evaluation import Cell, Evaluation, evaluate
from .passkey import PasskeyTask
from .settings import FREE, DemoSettings
from .training import Recipe, Trainer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CHECKPOINT_EVERY = 50
GENERATED_WORDS = 60_000


class Outputs(NamedTuple):
    """The files of a run."""

    checkpoint: Path
    recall: Path
    gates: Path
    figures: Path

    @classmethod
    def of(cls, folder: Path) -> Outputs:
        """Return the files of a run in `folder`."""
        return cls(folder / "checkpoint.pt", folder / "recall.png", folder / "gates.png", folder / "figures.json")


class Listener(Protocol):
    """Take note of a run's progress."""

    def trained(self, step: int, steps: int, loss: float, accuracy: float) -> None:
        """Take note of a training step; the accuracy is that of the last twenty."""

    def evaluated(self, done: int, cells: int, cell: Cell) -> None:
        """Take note of a cell of the evaluation."""


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run whose checkpoint is in `folder`.

    Raises:
        SettingError: of `resume`, where there is none.
    """
    return dict(_checkpoint(folder)["settings"])


def finished_figures(settings: DemoSettings, folder: Path) -> dict[str, Any] | None:
    """Return the figures of a finished run with these very settings and this text in `folder`; None without one."""
    try:
        figures: dict[str, Any] = json.loads(Outputs.of(folder).figures.read_text(encoding="utf-8"))
        same = figures["settings"] == _plain(settings) and figures["text_sha256"] == text_sha256(_text(settings))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return figures if same else None


def build(settings: DemoSettings) -> tuple[Trainer, str]:
    """Return a run before its first step, and the fingerprint of its text.

    Raises:
        SettingError: of `text`, `segment_len` or `lengths`: no sample can be drawn from the text, or it has no room.
    """
    text = _text(settings)
    try:
        task = PasskeyTask(text)
    except ValueError as error:
        raise SettingError("text", f"must be running text for the task, got {settings.text!r}: {error}") from None
    if settings.segments * settings.segment_len < task.shortest:
        need = -(-task.shortest // settings.segments)
        raise SettingError(
            "segment_len",
            f"must be at least {need}, so that {settings.segments} segments hold a sample, got {settings.segment_len}",
        )
    if min(settings.lengths) < task.shortest:
        raise SettingError(
            "lengths", f"must be at least {task.shortest}, so that they hold a sample, got {min(settings.lengths)}"
        )
    torch.manual_seed(settings.seed)
    config = DecoderConfig(
        vocabulary=len(task.words),
        segment_len=settings.segment_len,
        neighbours=task.digits,
        update=settings.update,
        attention={"write_bias": -8.0, "rope_base": 30.0},
    )
    model = Decoder(config).to(settings.device)
    recipe = Recipe(steps=settings.steps, segments=settings.segments)
    return Trainer(model, task, recipe, settings.seed), text_sha256(text)


def run_demo(settings: DemoSettings, folder: Path, listener: Listener, *, resume: bool = False) -> dict[str, Any]:
    """Train, evaluate, and write checkpoint, pictures and figures to `folder`.

    Args:
        resume: continue from the checkpoint in `folder`; the weights become those of a run that was never stopped.

    Returns:
        Every figure of the run, as in the JSON file.

    Raises:
        SettingError: a setting cannot be; with `resume`, it is not the checkpoint's; without, `folder` holds a run.
        InterruptedRunError: Ctrl-C stopped the training, and its checkpoint is written.
    """
    begin = time.perf_counter()
    trainer, fingerprint = build(settings)
    before = 0.0
    if resume:
        before = _restore(trainer, settings, fingerprint, folder)
    prepare(*Outputs.of(folder), resume=resume)
    _train(trainer, settings, fingerprint, folder, listener, before)
    trained = time.perf_counter()
    lengths = settings.lengths
    done = 0

    def on_cell(cell: Cell) -> None:
        nonlocal done
        done += 1
        listener.evaluated(done, len(lengths) * len(DEPTHS), cell)

    model, task = trainer.model.eval(), trainer.task
    drawn: dict[str, Any] = {"samples": settings.texts(), "seed": settings.seed}
    evaluation = evaluate(model, task, lengths=lengths, depths=DEPTHS, **drawn, on_cell=on_cell)
    seconds = {"train": before + trained - begin, "evaluate": time.perf_counter() - trained}
    figures = _figures(settings, fingerprint, trainer, evaluation, seconds)
    _write(figures, evaluation, trainer, Outputs.of(folder))
    return figures


def _checkpoint(folder: Path) -> dict[str, Any]:
    path, settings = Outputs.of(folder).checkpoint, DemoSettings.__dataclass_fields__
    return read_checkpoint(path, "segattn demo", ("text", "seconds", "trainer"), settings)


def _restore(trainer: Trainer, settings: DemoSettings, fingerprint: str, folder: Path) -> float:
    """Bring the trainer to the checkpoint, and return the seconds that were spent on it."""
    saved = _checkpoint(folder)
    check_same(asdict(settings), saved["settings"], FREE)
    if saved["trainer"]["recipe"] != asdict(trainer.recipe):
        raise SettingError("resume", "needs a checkpoint of this version: the recipe of training has changed since")
    if saved["text"] != fingerprint:
        raise SettingError(
            "text", f"must be a file of the checkpoint's text with --resume, got {settings.text!r}, which holds another"
        )
    trainer.load_state_dict(saved["trainer"])
    return float(saved["seconds"])


def _train(
    trainer: Trainer, settings: DemoSettings, fingerprint: str, folder: Path, listener: Listener, before: float
) -> None:
    begin = time.perf_counter()

    def save() -> None:
        seconds = before + time.perf_counter() - begin
        content = {
            "settings": asdict(settings),
            "text": fingerprint,
            "seconds": seconds,
            "trainer": trainer.state_dict(),
        }
        save_checkpoint(Outputs.of(folder).checkpoint, content)

    with deferred_interrupt() as interrupted:
        while trainer.step < settings.steps:
            trainer.advance()
            recent = trainer.accuracies[-20:]
            listener.trained(trainer.step, settings.steps, trainer.losses[-1], sum(recent) / len(recent))
            if interrupted or trainer.step % CHECKPOINT_EVERY == 0 or trainer.step == settings.steps:
                save()
            if interrupted:
                raise InterruptedRunError


def _figures(
    settings: DemoSettings, fingerprint: str, trainer: Trainer, evaluation: Evaluation, seconds: dict[str, float]
) -> dict[str, Any]:
    model = trainer.model
    return {
        "settings": _plain(settings),
        "text_sha256": fingerprint,
        "recipe": asdict(trainer.recipe),
        "model": asdict(model.config) | {"parameters": sum(p.numel() for p in model.parameters())},
        "versions": versions(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "trained_length": settings.segments * settings.segment_len,
        "recall": [cell._asdict() for cell in evaluation.cells],
        "state_bytes": {str(length): size for length, size in evaluation.state_bytes.items()},
        "gates": model.gates().tolist(),
        "loss": trainer.losses,
        "training_recall": trainer.accuracies,
    }


def _write(figures: dict[str, Any], evaluation: Evaluation, trainer: Trainer, outputs: Outputs) -> None:
    # matplotlib takes a second to import, and only this needs it
    from ...runs.heat_maps import plot_gates, plot_recall

    update, gates = figures["settings"]["update"], trainer.model.gates()
    recall = {(cell.depth, cell.length): cell.exact for cell in evaluation.cells}
    title, label = f"Passkey recall, {update} memory", "passkeys recalled whole, %"
    plot_recall(outputs.recall, recall, title, label, figures["trained_length"])
    plot_gates(outputs.gates, gates, range(len(gates)), "Share of memory per head")
    write_figures(outputs.figures, figures)


def _plain(settings: DemoSettings) -> dict[str, Any]:
    """Return the settings as they are read from the JSON file."""
    return asdict(settings) | {"lengths": list(settings.lengths)}


def _text(settings: DemoSettings) -> str:
    return generate_text(GENERATED_WORDS, settings.seed) if settings.text is None else read_text(settings.text)
