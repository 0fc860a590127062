"""The log of a run: a line of JSON per step, and TensorBoard or Weights & Biases where asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from .processes import is_first
from .settings import TrainSettings

Figures = Mapping[str, Any]
Write = Callable[[Figures], None]


@contextmanager
def opened(path: Path, settings: TrainSettings, steps: int) -> Iterator[Write]:
    """Yield a function that writes the figures of a step; on ranks other than the first it does nothing.

    Args:
        path: of the log; TensorBoard's and Weights & Biases' files stand beside it.
        steps: how many the run has taken; lines of later steps are dropped.
    """
    if not is_first():
        yield _ignore
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if path.is_file() else []
    path.write_text("".join(lines), encoding="utf-8")
    with path.open("a", encoding="utf-8") as file, _TRACKERS[settings.log](path.parent, settings, steps) as track:

        def write(figures: Figures) -> None:
            file.write(json.dumps(figures) + "\n")
            file.flush()
            track(figures)

        yield write


@contextmanager
def _tensorboard(folder: Path, settings: TrainSettings, steps: int) -> Iterator[Write]:
    writer = import_module("torch.utils.tensorboard").SummaryWriter(folder / "tensorboard", purge_step=steps + 1)

    def track(figures: Figures) -> None:
        for name, number in _numbers(figures).items():
            writer.add_scalar(name, number, figures["step"])

    try:
        yield track
    finally:
        writer.close()


@contextmanager
def _wandb(folder: Path, settings: TrainSettings, steps: int) -> Iterator[Write]:
    # a resumed run is another run of the same group
    group, config = folder.resolve().name, asdict(settings)
    with import_module("wandb").init(project="segattn", group=group, dir=str(folder), config=config) as run:
        yield lambda figures: run.log(_numbers(figures), step=figures["step"])


def _ignore(figures: Figures) -> None:
    """Write nothing."""


def _numbers(figures: Figures) -> dict[str, float]:
    return {name: x for name, x in figures.items() if type(x) in (int, float) and name != "step"}


_TRACKERS: dict[str, Callable[[Path, TrainSettings, int], AbstractContextManager[Write]]] = {
    "none": lambda *run: nullcontext(_ignore),
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}
