"""The command of long training on a process that ends itself: after a step, or while a checkpoint is being written."""

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from segattn.infini.long_training import command
from segattn.infini.long_training.trainer import LongTrainer

# "step" or "save", the rank, the step, the signal
EVENT = "LONG_TRAINING_EVENT"


def perhaps(place: str, step: int) -> None:
    kind, *numbers = os.environ[EVENT].split()
    rank, when, signal = map(int, numbers)
    if (kind, rank, when) == (place, dist.get_rank(), step):
        os.kill(os.getpid(), signal)


class Listener(command._Lines):
    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        super().trained(step, steps, figures)
        perhaps("step", step)


def state_dict(trainer: LongTrainer) -> dict[str, Any]:
    perhaps("save", trainer.step)
    return whole_state_dict(trainer)


whole_state_dict = LongTrainer.state_dict


def main(rank: int, *arguments: str) -> None:
    torch.set_num_threads(1)
    command._Lines, LongTrainer.state_dict = Listener, state_dict
    command.app(arguments)


if __name__ == "__main__":
    main(int(os.environ["RANK"]), *sys.argv[1:])
