"""Tile sizes: one table per kernel, and a shared-memory rule where the table is silent. Nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Tile:
    """Sizes that are compiled in, named as the kernels name them. A kernel takes those that it names."""

    BLOCK_M: int = 64
    BLOCK_N: int = 64
    CHUNK: int = 64
    ROWS: int = 64
    COLUMNS: int = 64
    PRECISION: str = "tf32x3"
    num_warps: int = 4
    num_stages: int = 2


class Target(NamedTuple):
    """What kernels are compiled for, and its shared memory per program in bytes."""

    name: str
    shared: int


TARGETS = {
    "sm_80": Target("sm_80", 166912),
    "sm_90": Target("sm_90", 232448),
    "sm_100": Target("sm_100", 232448),
    "sm_120": Target("sm_120", 101376),
    "gfx942": Target("gfx942", 65536),
}


# interpreted kernels run the smallest tiles there are, so that small calls have many
INTERPRETER = Tile(16, 16, 16, 16, 16, "ieee")

TABLE = {
    "attend_kernel": Tile(128, 64, 64, num_warps=8, num_stages=3),
    "query_grad_kernel": Tile(128, 64, 64, num_warps=8, num_stages=2),
    "key_grad_kernel": Tile(64, 128, 64, num_warps=8, num_stages=2),
    "key_sums_kernel": Tile(BLOCK_N=64),
    "normalizer_kernel": Tile(BLOCK_N=32),
    "product_kernel": Tile(BLOCK_N=64, COLUMNS=64),
    "scan_kernel": Tile(ROWS=128, COLUMNS=16, num_warps=8),
    "curvature_kernel": Tile(ROWS=64, COLUMNS=64, CHUNK=32),
    "weight_sums_kernel": Tile(BLOCK_N=64, CHUNK=64),
    "write_grad_kernel": Tile(BLOCK_N=64, CHUNK=32),
    "decode_kernel": Tile(BLOCK_N=64),
    "read_kernel": Tile(),
    "read_grad_kernel": Tile(),
}


@cache
def tile_for(kernel: str, target: Target, dtype: torch.dtype, key_width: int, value_width: int) -> Tile:
    if target.name == "interpreter":
        return INTERPRETER
    return TABLE[kernel]
