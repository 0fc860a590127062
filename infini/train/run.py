"""Train a model on a text, and write log, checkpoints, figures and model."""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh

from ...runs.errors import SettingError, UntrainedMemoryWarning
from ...runs.figures import prepare, versions, write_figures
from ...runs.interrupts import InterruptedRunError
from ...runs.settings import check_same
from ...runs.silence import SILENT
from ...runs.untrained import expect_short_texts
from ..evaluate.loading import Tokenizer
from ..huggingface.settings import conversion_of
from ..sharding import runs_of
from . import checkpoints, log
from .model import build_model, save_model
from .processes import agreed, deferred_stop, is_first, joined, largest, mesh_of
from .settings import MAY_CHANGE, TrainSettings
from .stream import Position, Rows
from .trainer import Trainer


class Outputs(NamedTuple):
    """The files of a run: a line of JSON per step, the figures of all steps, checkpoints, the folder of the model."""

    log: Path
    figures: Path
    checkpoints: Path
    model: Path

    @classmethod
    def of(cls, folder: Path) -> Outputs:
        """Return the files of a run in `folder`."""
        return cls(folder / "log.jsonl", folder / "figures.json", folder / "checkpoints", folder / "model")


class Listener(Protocol):
    """An observer of a run."""

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        """Take note of a step and its line of the log."""


def finetune(
    settings: TrainSettings,
    folder: Path,
    listener: Listener = SILENT,
    *,
    device: str | None = None,
    timeout: float = 600.0,
    keep: int = 2,
    resume: bool = False,
) -> dict[str, Any]:
    """Train as `segattn finetune` does: in this process alone, or on all that torchrun has started.

    Args:
        device: where to run, such as "cpu" or "cuda"; None: GPUs where there are any.
        timeout: seconds to wait for a process that does not answer.
        settings, folder, listener, keep, resume: as in `run_training`.

    Returns:
        The figures; nothing on ranks other than the first.

    Raises:
        As `run_training`; RuntimeError: this process has a default process group already.
    """
    with joined(device, timeout) as place:
        return run_training(settings, folder, listener, place, keep=keep, resume=resume)


def run_training(
    settings: TrainSettings,
    folder: Path,
    listener: Listener,
    device: torch.device,
    *,
    keep: int = 2,
    resume: bool = False,
) -> dict[str, Any]:
    """Train, on every rank of the default process group together.

    Args:
        folder: the same one for all processes.
        listener: called after each step on this rank.
        device: of this process.
        keep: checkpoints that stay.
        resume: go on from the newest checkpoint, on as many ranks as there are now, to the weights of a run that was
            never stopped. Settings in `MAY_CHANGE` may be others: steps still to come have the rates of a run that had
            these settings from its first step. Model, tokenizer and text may stand elsewhere, if they hold the same.
            The others must be the checkpoint's.

    Returns:
        The figures; nothing on ranks other than the first.

    Raises:
        SettingError: on every rank: a setting that cannot be, or with `resume`, one that is not the checkpoint's.
        InterruptedRunError: on every rank: one of them got a signal to stop, and the checkpoint is written.
        RuntimeError: a process has ended, or does not answer within the group's timeout.

    Warns:
        UntrainedMemoryWarning: rows are no longer than a segment.
    """
    outputs = Outputs.of(folder)
    if keep < 1:
        raise SettingError("keep", f"must be at least 1, got {keep}")
    mesh = mesh_of(device, settings.sequence_ranks)
    model, tokenizer, rows, saved = agreed(lambda: _prepare(settings, outputs, mesh, resume))
    trainer = Trainer(model, settings, mesh, device)
    words, least = conversion_of(model).settings.without_memory
    if settings.length <= least:
        # once, and not by every process
        expect_short_texts(model)
        if is_first():
            warnings.warn(
                f"no memory is trained: length must be more than {words}, {least}, for a row to read its memory, got "
                f"{settings.length}",
                UntrainedMemoryWarning,
                stacklevel=2,
            )
    if saved is not None:
        checkpoints.load(trainer, outputs.checkpoints, saved["step"])
    _train(trainer, rows, outputs, listener, keep)
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not is_first():
        return {}
    save_model(model, tokenizer, weights, outputs.model)
    figures = _figures(trainer, outputs.log)
    write_figures(outputs.figures, figures)
    return figures


def resumed(folder: Path, given: Mapping[str, Any]) -> tuple[TrainSettings, int]:
    """Return the settings to go on with in `folder`, and how many steps were taken.

    Args:
        given: settings to replace those of the checkpoint.

    Raises:
        SettingError: of `resume`, where there is no checkpoint of this version; or naming the setting.
    """
    saved = checkpoints.about(Outputs.of(folder).checkpoints)
    return TrainSettings(**saved["settings"] | given), saved["step"]


def _prepare(
    settings: TrainSettings, outputs: Outputs, mesh: DeviceMesh, resume: bool
) -> tuple[Any, Tokenizer, Rows, dict[str, Any] | None]:
    """Load and check everything that a run begins with, on each rank; the first makes the folder and reads the text."""
    saved = checkpoints.about(outputs.checkpoints) if resume else None
    if saved is not None:
        check_same(asdict(settings), saved["settings"], MAY_CHANGE)
        if settings.steps < saved["step"]:
            problem = f"must be at least the {saved['step']} of the checkpoint with --resume, got {settings.steps}"
            raise SettingError("steps", problem)
    _check_ranks(settings, mesh)
    if is_first() and outputs.log.parent.exists():
        # before the model is loaded, which may take long
        prepare(outputs.log, resume=resume)
    model, tokenizer = build_model(settings)
    conversion, ranks = conversion_of(model), mesh.size(1)
    if ranks > 1 and conversion.native:
        problem = f"must be converted in every layer for ranks that share rows, got layers {list(conversion.native)}"
        raise SettingError("model", f"{problem} that are not: choose --sequence-ranks 1")
    if ranks > 1 and (conversion.settings.lookback or conversion.settings.sinks):
        problem = f"must be 1 for a model with lookback or sinks, got {ranks}: no rank sees the tokens of others"
        raise SettingError("sequence_ranks", problem)
    try:
        runs_of(settings.length, ranks, conversion.settings.segment_len)
    except ValueError as error:
        raise SettingError("length", f"is too short: {error}") from None
    rows = Rows(settings, tokenizer, None if saved is None else Position(*saved["position"]))
    if saved is not None and is_first() and saved["rows"] != rows.fingerprint:
        name = "dataset" if settings.text is None else "text"
        raise SettingError(name, "must hold the tokens of the checkpoint's with --resume, got others")
    if is_first():
        prepare(outputs.log, resume=resume)
    return model, tokenizer, rows, saved


def _check_ranks(settings: TrainSettings, mesh: DeviceMesh) -> None:
    groups, ranks = mesh.shape
    if settings.batch % groups:
        raise SettingError(
            "batch",
            f"must be a multiple of the {groups} groups of {ranks} ranks that read rows of their own, got "
            f"{settings.batch}: choose another, or more --sequence-ranks",
        )
    if mesh.size() == 1:
        return
    if settings.piece is not None:
        problem = f"must be left out on {mesh.size()} processes, each of which reads its run of a row at once"
        raise SettingError("piece", f"{problem}, got {settings.piece}")
    if settings.weights != "float32":
        problem = f"must be float32 on {mesh.size()} processes, over which they are spread"
        raise SettingError("weights", f"{problem}, got {settings.weights!r}: choose --dtype for products")


def _train(trainer: Trainer, rows: Rows, outputs: Outputs, listener: Listener, keep: int) -> None:
    settings, place, held_out = trainer.settings, _place(trainer), rows.held_out()
    with deferred_stop() as caught, log.opened(outputs.log, settings, trainer.step) as write:
        while trainer.step < settings.steps:
            figures = trainer.advance(rows.read)
            seconds, peak = largest(figures["seconds"], _peak_bytes(trainer.device))
            speed = {"seconds": seconds, "tokens_per_second": settings.tokens_per_step / seconds}
            figures |= speed | {"peak_bytes": int(peak), **place}
            done = trainer.step == settings.steps
            if len(held_out) and (done or trainer.step % settings.eval_every == 0):
                figures["eval_loss"] = trainer.evaluate(held_out)
            write(figures)
            listener.trained(trainer.step, settings.steps, figures)
            [stop] = largest(bool(caught))
            if stop or done or trainer.step % settings.save_every == 0:
                about = {
                    "step": trainer.step,
                    "position": rows.position,
                    "rows": rows.fingerprint,
                    "settings": asdict(settings),
                }
                checkpoints.save(trainer, outputs.checkpoints, about, keep)
            if stop and not done:
                raise InterruptedRunError


def _peak_bytes(device: torch.device) -> int:
    """Return the peak of the memory of tensors on a GPU, or of the process on a CPU; 0 where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.name != "posix":
        return 0
    import resource
    import sys

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _place(trainer: Trainer) -> dict[str, Any]:
    """Return the conditions of speed and memory that may change when a run is resumed."""
    mesh, device = trainer.mesh, trainer.device
    return {
        "ranks": dict(zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "gradient_checkpointing": trainer.settings.gradient_checkpointing,
    }


def _figures(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Return the figures of the whole run, from its log.

    Speed and memory are those of all steps under the conditions of the last step.
    """
    settings, model = trainer.settings, trainer.model
    lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    place = {name: lines[-1][name] for name in _place(trainer)}
    timed = [line for line in lines if place.items() <= line.items()]
    rate = settings.tokens_per_step / statistics.median(line["seconds"] for line in timed)
    return {
        "settings": asdict(settings),
        "versions": versions(),
        **place,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "trained_parameters": sum(parameter.numel() for parameter in trainer.trained),
        "conversion": conversion_of(model).settings.as_entry(),
        "dtype": str(trainer.dtype or model.dtype).removeprefix("torch."),
        "steps": lines[-1]["step"],
        "tokens": lines[-1]["tokens"],
        "loss": lines[-1]["loss"],
        "eval_loss": {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line},
        "seconds": sum(line["seconds"] for line in lines),
        "timed_steps": len(timed),
        "tokens_per_second": rate,
        "tokens_per_second_and_rank": rate / math.prod(place["ranks"].values()),
        "peak_bytes": max(line["peak_bytes"] for line in timed),
    }
