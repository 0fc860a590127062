"""Checkpoints, written by any number of processes together and read by any other number."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from ...runs.errors import SettingError
from ...runs.figures import write_figures
from ..conversion_options import NAMES as CONVERSION
from .processes import is_first
from .settings import TrainSettings
from .trainer import Trainer

RUN = "run.json"
# the file that PyTorch writes last, when every process has written its part
LAST = ".metadata"
# the checkpoint of an earlier version of `segattn finetune`
OLDER = "checkpoint.pt"


def whole(folder: Path) -> list[Path]:
    """Return the checkpoints that were written to their end, the newest one last."""
    checkpoints = [path for path in folder.glob("step-*") if (path / LAST).is_file() and (path / RUN).is_file()]
    return sorted(checkpoints, key=_step)


def save(trainer: Trainer, folder: Path, about: dict[str, Any], keep: int) -> None:
    """Write a checkpoint beside the earlier ones, on every rank, and delete all but the newest.

    Args:
        about: the run, in plain types.
        keep: how many stay.
    """
    path = folder / f"step-{trainer.step}"
    if is_first():
        # the remains of a save that was cut short
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        write_figures(path / RUN, about)
    dist.barrier()
    save_state(trainer.state_dict(), checkpoint_id=path)
    if is_first():
        for old in whole(folder)[:-keep]:
            shutil.rmtree(old)


def about(folder: Path) -> dict[str, Any]:
    """Return what the newest checkpoint says of its run.

    Raises:
        SettingError: of `resume`, where there is none, or it is damaged or of another version.
    """
    checkpoints = whole(folder)
    if not checkpoints:
        if (older := folder.parent / OLDER).is_file():
            raise _of_another_version(older)
        problem = f"needs a checkpoint in the output folder, and there is no {str(folder)!r} with one"
        raise SettingError("resume", problem)
    try:
        content = json.loads((checkpoints[-1] / RUN).read_text(encoding="utf-8"))
        settings, _, _, _ = content["settings"], content["rows"], content["position"], content["step"]
        # older ones lack some of the options by which a model is converted
        content["settings"] = settings = dict.fromkeys(CONVERSION) | settings
        is_of_this_version = settings.keys() == {field.name for field in fields(TrainSettings)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        problem = f"needs a checkpoint of segattn finetune; {str(checkpoints[-1])!r} is another, or damaged"
        raise SettingError("resume", problem) from None
    if not is_of_this_version:
        raise _of_another_version(checkpoints[-1])
    return dict(content)


def load(trainer: Trainer, folder: Path, step: int) -> None:
    """Give a trainer the parameters and the optimizer of a checkpoint, on every rank.

    Raises:
        SettingError: of `model`, where the checkpoint is of another one, or damaged.
    """
    state, path = trainer.state_dict(), folder / f"step-{step}"
    try:
        load_state(state, checkpoint_id=path)
    except (CheckpointException, KeyError, ValueError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise SettingError("model", f"must be the checkpoint's with --resume, {str(path)!r}, whole: {reason}") from None
    trainer.load_state_dict(state, step)


def _of_another_version(path: Path) -> SettingError:
    problem = f"needs a checkpoint of this version, got {str(path)!r}, of another version: finish the run with that one"
    return SettingError("resume", problem)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))
