"""A training run as `segattn rmt train` makes it: it may stop at any step and be resumed, and writes its figures."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from ...runs.checkpoint import read_checkpoint, save_checkpoint, save_weights
from ...runs.errors import SettingError, UntrainedMemoryWarning, named
from ...runs.figures import prepare, versions, write_figures
from ...runs.interrupts import InterruptedRunError, deferred_interrupt
from ...runs.settings import check_same
from ...runs.silence import SILENT
from ..tasks.answers import count_right, interval, samples_of
from .curriculum import DivergedError, Stage, Step, Trainer
from .folder import RunFiles, build, fingerprint, start_from, write_sources
from .settings import TrainSettings

CHECKPOINT_EVERY = 50
CURVE_EVERY = 10
TEST_SEED = 0
# settings that may change when a run is resumed: places of files, and what is yet to be done
FREE = "babi book pretrained start device short short_segments segments steps threshold anneal test_samples".split()
# more of them, which are in each stage's figures
OF_STAGE = ("bptt", "noise", "decoys", "later_batch", "later_lr")


class Listener(Protocol):
    """A display of a run's progress."""

    def trained(self, stage: Stage, done: int, step: Step) -> None:
        """Show a step, after which `done` steps of the stage are taken."""

    def finished(self, figures: dict[str, Any]) -> None:
        """Show the figures of a stage that is done."""


def run_training(
    settings: TrainSettings, folder: Path, listener: Listener = SILENT, *, resume: bool = False
) -> dict[str, Any]:
    """Train by the curriculum, and write weights and figures after each stage, checkpoints between.

    Args:
        folder: for the files.
        listener: shows progress.
        resume: continue from the checkpoint in `folder`; the weights become those of a run that was never stopped.

    Returns:
        Every figure of the run, as in the JSON file.

    Raises:
        SettingError: a setting that cannot be, or, with `resume`, differs from the checkpoint's.
        InterruptedRunError: by Ctrl-C, with the checkpoint written.

    Warns:
        UntrainedMemoryWarning: no stage has a text of more than a segment.
    """
    files = RunFiles.of(folder)
    saved = _checkpoint(files.checkpoint) if resume else None
    if saved is not None:
        check_same(_plain(settings), saved["settings"], (*FREE, *OF_STAGE))
    if resume:
        run = build(settings, files)
    elif settings.start is None:
        run = build(settings)
    else:
        run = start_from(Path(settings.start), settings)
    settings = run.settings
    with named(
        segments="segments", short="short", short_segments="short_segments", length="segments", segment_len="short"
    ):
        trainer = Trainer(run.memory, run.task, settings.tokens, settings.recipe(), settings.seed)
        # fail on a length that cannot be drawn before the hours that lead to it
        samples_of(run.task, 0, 1, trainer.plan[-1].length, TEST_SEED)
    if max(stage.segments for stage in trainer.plan) == 1:
        warnings.warn(
            f"no memory is trained: segments must go beyond 1 for a text to read its memory, got {settings.segments}",
            UntrainedMemoryWarning,
            stacklevel=2,
        )
    data = fingerprint(settings)
    if saved is None:
        prepare(files.checkpoint, files.figures, resume=False)
        write_sources(run, files)
    else:
        _restore(trainer, saved, data)
    _train(trainer, settings, data, files, listener)
    return _write(trainer, settings, files)


def saved_settings(folder: Path) -> dict[str, Any]:
    """Return the settings of the run whose checkpoint is in a folder.

    Raises:
        SettingError: of `resume`: the folder holds no checkpoint.
    """
    return dict(_checkpoint(RunFiles.of(folder).checkpoint)["settings"])


def _train(trainer: Trainer, settings: TrainSettings, data: str, files: RunFiles, listener: Listener) -> None:
    """Train until the curriculum is over or Ctrl-C is pressed.

    Raises:
        SettingError: of the rate at which the loss is no number.
        InterruptedRunError: by Ctrl-C, with the checkpoint written.
    """

    def save() -> None:
        content = {"settings": _plain(settings), "data": data, "trainer": trainer.state_dict()}
        save_checkpoint(files.checkpoint, content)

    with deferred_interrupt() as interrupted:
        while not trainer.over:
            while not trainer.stage_over and not interrupted:
                try:
                    step = trainer.advance()
                except DivergedError as error:
                    raise _too_high(trainer.plan[trainer.stage], error) from None
                listener.trained(trainer.plan[trainer.stage], trainer.step, step)
                if trainer.index % CHECKPOINT_EVERY == 0:
                    save()
            if trainer.stage_over:
                figures = _stage_figures(trainer, settings)
                trainer.next_stage(figures)
                listener.finished(figures)
                _write(trainer, settings, files)
            save()
            if interrupted and not trainer.over:
                raise InterruptedRunError


def _too_high(stage: Stage, error: DivergedError) -> SettingError:
    """Return the error of the option that the stage's rate comes from."""
    if stage.segments == 1:
        return SettingError("lr", f"must be lower, in a new run: {error}")
    return SettingError("later_lr", f"must be lower: {error}; go on with --resume and a lower one")


def _stage_figures(trainer: Trainer, settings: TrainSettings) -> dict[str, Any]:
    """Test the memory at the present stage's length, and return the stage's figures."""
    stage, log, samples = trainer.plan[trainer.stage], trainer.log, settings.test_samples
    trainer.memory.eval()
    hits = count_right(trainer.memory, trainer.task, stage.length, stage.segment_len, samples, TEST_SEED)
    trainer.memory.train()
    blocks = [log[i : i + CURVE_EVERY] for i in range(0, len(log), CURVE_EVERY)]
    return {
        "segments": stage.segments,
        "tokens": stage.length,
        "segment_len": stage.segment_len,
        "annealed": stage.annealed,
        **{name: getattr(settings, name) for name in OF_STAGE},
        "steps": trainer.step,
        "threshold": stage.threshold,
        "converged": trainer.converged,
        "seconds": round(trainer.seconds, 2),
        "training_accuracy": log[-1].running,
        "test_accuracy": hits / samples,
        "test_interval": list(interval(hits, samples)),
        "test_samples": samples,
        "loss": [round(sum(step.loss for step in block) / len(block), 5) for block in blocks],
        "accuracy": [round(sum(step.accuracy for step in block) / len(block), 5) for block in blocks],
    }


def _write(trainer: Trainer, settings: TrainSettings, files: RunFiles) -> dict[str, Any]:
    """Write weights and figures, and return the figures."""
    parameters = list(trainer.memory.parameters())
    figures = {
        "settings": _plain(settings),
        "versions": versions(),
        "device": str(trainer.device),
        "parameters": sum(x.numel() for x in parameters),
        "trained_parameters": sum(x.numel() for x in trainer.trained),
        "vocab_size": trainer.task.vocab_size,
        "classes": list(trainer.task.classes),
        "complete": trainer.over,
        "steps": trainer.index,
        "seconds": round(sum(stage["seconds"] for stage in trainer.done), 2),
        "curve_every": CURVE_EVERY,
        "stages": trainer.done,
        "before": json.loads(files.before.read_text(encoding="utf-8")) if files.before.exists() else None,
    }
    save_weights(trainer.memory, files.weights)
    write_figures(files.figures, figures)
    return figures


def _plain(settings: TrainSettings) -> dict[str, Any]:
    """Return the settings as JSON gives them back, with lists in place of tuples."""
    return {name: list(x) if isinstance(x, tuple) else x for name, x in asdict(settings).items()}


def _checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint.

    Raises:
        SettingError: of `resume`: there is none that can be continued from.
    """
    return read_checkpoint(path, "segattn rmt train", ("data", "trainer"), TrainSettings.__dataclass_fields__)


def _restore(trainer: Trainer, saved: dict[str, Any], data: str) -> None:
    """Load a checkpoint into a trainer.

    Raises:
        SettingError: of `book`: other data; of `segments`: other stages than those that were begun.
    """
    if saved["data"] != data:
        raise SettingError("book", "and --babi must hold what they held before with --resume, got other files")
    state = saved["trainer"]
    begun = [(figures["tokens"], figures["segment_len"], figures["annealed"]) for figures in state["done"]]
    if state["log"]:
        begun.append(tuple(state["now"]))
    if [stage.kind for stage in trainer.plan[: len(begun)]] != begun:
        lengths = ", ".join(f"{length} ({min(length, cut)} a segment)" for length, cut, _ in begun)
        raise SettingError(
            "segments", f"must begin as the checkpoint's with --resume, with stages of {lengths} tokens, got others"
        )
    trainer.load_state_dict(state)
