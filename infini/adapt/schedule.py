"""The learning rates of every training of an adaptation."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, steps: int, *, warm_up: int = 1, done: int = 0) -> LambdaLR:
    """Return a schedule by which the rates of all groups rise linearly at first, and fall to 0 as a cosine.

    Args:
        steps: of the whole training.
        warm_up: steps in which they rise.
        done: steps that an earlier run has taken, whose state the optimizer has.
    """

    def share(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / max(1, steps)))

    return LambdaLR(optimizer, share, last_epoch=done - 1)
