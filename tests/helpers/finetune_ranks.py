"""`segattn finetune` on a process that ends itself: after a step, or while a checkpoint is being written."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from segattn.cli import finetune as command
from segattn.cli.main import app
from segattn.infini.train.trainer import Trainer

# "step" or "save", the rank, the step, the signal
EVENT = "FINETUNE_EVENT"


def perhaps(place: str, step: int) -> None:
    kind, *numbers = os.environ[EVENT].split()
    rank, when, signal = map(int, numbers)
    if (kind, rank, when) == (place, dist.get_rank(), step):
        os.kill(os.getpid(), signal)


class Listener(command.Steps):
    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        super().trained(step, steps, figures)
        perhaps("step", step)


def state_dict(trainer: Trainer) -> dict[str, Any]:
    perhaps("save", trainer.step)
    return whole_state_dict(trainer)


whole_state_dict = Trainer.state_dict


def main(rank: int, *arguments: str) -> None:
    torch.set_num_threads(1)
    command.Steps, Trainer.state_dict = Listener, state_dict
    app(["finetune", *arguments])


if __name__ == "__main__":
    main(int(os.environ["RANK"]), *sys.argv[1:])
