"""The batches of every memory task, which depend on their arguments alone."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

SPLITS = ("train", "test")


class Batch(NamedTuple):
    """Samples of a task.

    input_ids: int64 [B, T].
    labels: of a class task, classes int64 [B]; of a token task, int64 [B, T], IGNORED everywhere but at the answer's
        tokens, as Hugging Face's models take them: logits t predict label t + 1.
    """

    input_ids: Tensor
    labels: Tensor


def generator_of(batch_size: int, *, seed: int, index: int, split: str) -> np.random.Generator:
    """Return the random numbers of one batch, independent of those of any other seed, index or split.

    Raises:
        ValueError: a batch of less than one sample, a negative seed or index, an unknown split.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("seed", seed, 0), ("index", index, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(split_index(split), index)))


def split_index(split: str) -> int:
    """Return 0 for "train", 1 for "test".

    Raises:
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return SPLITS.index(split)
