"""What every memory task gives: a batch that its arguments alone decide."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

IGNORE = -100
SPLITS = ("train", "test")


class Batch(NamedTuple):
    """Samples of a task.

    input_ids: [B, T] int64.
    labels: the classes [B] int64 of a class task; of a token task [B, T] int64, -100 everywhere but on the answer's
        own places, as in Hugging Face's models, which shift them: logits t predict label t + 1.
    """

    input_ids: Tensor
    labels: Tensor


def generator_of(batch_size: int, *, seed: int, index: int, split: str) -> np.random.Generator:
    """The random numbers of one batch; those of another seed, index or split are independent of them.

    Raises:
        ValueError: a batch of less than one sample, a negative seed or index, an unknown split.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("index", index, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(split_index(split), index)))


def split_index(split: str) -> int:
    """0 for "train", 1 for "test".

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)
