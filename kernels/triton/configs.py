"""Tile sizes: one table, and a shared-memory rule where the table is silent. Nothing is tuned at run time."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import NamedTuple

import torch


@dataclass(frozen=True)
class Tile:
    """Sizes that are compiled in, named as the kernels name them. A kernel takes those that it names."""

    BLOCK_M: int = 64  # queries
    BLOCK_N: int = 64  # keys or tokens
    CHUNK: int = 64  # columns of features at a time
    ROWS: int = 64  # of a state
    COLUMNS: int = 64  # of a state
    PRECISION: str = "tf32x3"  # of float32 products of states
    num_warps: int = 4
    num_stages: int = 2


class Target(NamedTuple):
    """Name what kernels are compiled for, the shared memory that a program may have there, and multiprocessors."""

    name: str
    shared: int  # bytes
    processors: int = 4  # few, where it is not known: as interpreted, and compiled for a GPU that is not here


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", 166912),
        Target("sm_90", 232448),
        Target("sm_100", 232448),
        Target("sm_120", 101376),
        Target("gfx942", 65536),
    )
}
# whose rows a GPU takes that the table does not name
FAMILIES = {"sm_8": "sm_80", "sm_9": "sm_90", "sm_10": "sm_100", "sm_11": "sm_100", "sm_12": "sm_120", "gfx9": "gfx942"}

# interpreted kernels run the smallest tiles there are, so that small calls have many
INTERPRETER = Tile(16, 16, 16, 16, 16, "ieee")


def _tile(m: int = 64, n: int = 64, chunk: int = 64, warps: int = 4, stages: int = 2, **other: int) -> Tile:
    return Tile(m, n, chunk, num_warps=warps, num_stages=stages, **other)  # type: ignore[arg-type]


# (kernel, bits of the dtype, width of the wider of K and V up to this) → target, or "" for those not named → tile
TABLE: dict[tuple[str, int, int], dict[str, Tile]] = {
    ("attend_kernel", 16, 64): {
        "": _tile(128, 64, stages=3),
        "sm_120": _tile(64, 64),
        "gfx942": _tile(64, 64, stages=1),
    },
    ("attend_kernel", 16, 128): {
        "": _tile(128, 64, warps=8, stages=3),
        "sm_80": _tile(64, 64),
        "sm_90": _tile(128, 64, 128, warps=8, stages=3),
        "sm_120": _tile(64, 32, 32),
        "gfx942": _tile(64, 32, stages=1),
    },
    ("attend_kernel", 16, 256): {
        "": _tile(64, 64, warps=8),
        "sm_80": _tile(64, 32, warps=8, stages=3),
        "sm_120": _tile(32, 32, 32),
        "gfx942": _tile(32, 16, 32, stages=1),
    },
    ("query_grad_kernel", 16, 64): {
        "": _tile(128, 64, warps=8, stages=3),
        "sm_100": _tile(128, 64, 32, warps=8, stages=3),
        "sm_120": _tile(128, 64, 32, warps=8, stages=3),
        "gfx942": _tile(64, 32, stages=1),
    },
    ("query_grad_kernel", 16, 128): {
        "": _tile(128, 64, 32, warps=8),
        "sm_80": _tile(64, 64, 32, warps=8),
        "sm_90": _tile(128, 64, 128, warps=8, stages=3),
        "sm_120": _tile(64, 32, 32),
        "gfx942": _tile(32, 32, 32, stages=1),
    },
    ("query_grad_kernel", 16, 256): {
        "": _tile(64, 32, warps=8),
        "sm_120": _tile(32, 32, 32, warps=8, stages=1),
        "gfx942": _tile(16, 16, 16, stages=1),
    },
    ("key_grad_kernel", 16, 64): {
        "": _tile(64, 128, warps=8, stages=3),
        "sm_120": _tile(32, 64),
        "gfx942": _tile(32, 64, stages=1),
    },
    ("key_grad_kernel", 16, 128): {
        "": _tile(64, 64, warps=8),
        "sm_90": _tile(64, 128, warps=8, stages=4),
        "sm_100": _tile(64, 128, warps=8, stages=3),
        "gfx942": _tile(32, 32, stages=1),
    },
    ("key_grad_kernel", 16, 256): {
        "": _tile(32, 64, warps=8),
        "sm_100": _tile(32, 64, warps=8, stages=3),
        "sm_120": _tile(32, 32, warps=8, stages=1),
        "gfx942": _tile(16, 16, stages=1),
    },
    ("sink_grad_kernel", 16, 128): {"": _tile(), "gfx942": _tile(32, stages=1)},
    ("sink_grad_kernel", 16, 256): {"": _tile(32, stages=1), "gfx942": _tile(16, stages=1)},
    ("key_sums_kernel", 16, 256): {"": _tile(n=64)},
    ("normalizer_kernel", 32, 64): {"": _tile(n=64)},
    ("normalizer_kernel", 32, 128): {"": _tile(n=32)},
    ("normalizer_kernel", 32, 256): {"": _tile(n=16)},
    ("product_kernel", 16, 64): {"": _tile(stages=3), "sm_100": _tile(n=32), "gfx942": _tile(stages=1)},
    ("product_kernel", 16, 128): {
        "": _tile(warps=8, COLUMNS=128, stages=3),
        "sm_100": _tile(n=32, warps=8),
        "sm_120": _tile(n=32, warps=8, stages=3),
        "gfx942": _tile(n=32, warps=8, stages=1),
    },
    ("product_kernel", 16, 256): {"": _tile(n=32, warps=8), "gfx942": _tile(n=16, warps=8, stages=1, COLUMNS=32)},
    ("scan_kernel", 32, 64): {"": _tile(COLUMNS=16)},
    ("scan_kernel", 32, 128): {
        "": _tile(warps=8, ROWS=128, COLUMNS=16),
        "sm_90": _tile(COLUMNS=16),
        "gfx942": _tile(warps=8, stages=1, COLUMNS=16),
    },
    ("scan_kernel", 32, 256): {
        "": _tile(warps=8, stages=1, ROWS=128, COLUMNS=16),
        "sm_120": _tile(warps=8, stages=1, COLUMNS=16),
        "gfx942": _tile(warps=8, stages=1, COLUMNS=16),
    },
    ("add_parts_kernel", 32, 256): {"": _tile(ROWS=16)},
    ("curvature_kernel", 16, 256): {
        "": _tile(chunk=16, ROWS=32, COLUMNS=32),
        "sm_90": _tile(chunk=32),
        "sm_100": _tile(chunk=32),
    },
    ("weight_sums_kernel", 16, 64): {
        "": _tile(),
        "sm_90": _tile(stages=3),
        "sm_120": _tile(warps=8),
        "gfx942": _tile(n=32, chunk=32, stages=1),
    },
    ("weight_sums_kernel", 16, 128): {
        "": _tile(chunk=128, warps=8),
        "sm_90": _tile(chunk=128, warps=8, stages=3),
        "gfx942": _tile(n=32, chunk=32, stages=1),
    },
    ("weight_sums_kernel", 16, 256): {"": _tile(n=32, chunk=32, warps=8, stages=1)},
    ("write_grad_kernel", 16, 64): {
        "": _tile(),
        "sm_80": _tile(chunk=32),
        "sm_120": _tile(chunk=16),
        "gfx942": _tile(n=32, chunk=32, stages=1),
    },
    ("write_grad_kernel", 16, 128): {
        "": _tile(warps=8),
        "sm_80": _tile(n=16, chunk=32, stages=1),
        "sm_90": _tile(chunk=128, warps=8, stages=1),
        "sm_120": _tile(n=16, warps=8, stages=1),
        "gfx942": _tile(n=32, chunk=16, stages=1),
    },
    ("write_grad_kernel", 16, 256): {"": _tile(n=32, chunk=16, warps=8, stages=1)},
    # on AMD only one wave's stores are sure to come before the count that it makes
    ("decode_kernel", 16, 128): {"": _tile(), "gfx942": _tile(n=32, chunk=32, warps=1, stages=1)},
    ("decode_kernel", 16, 256): {"": _tile(n=32, chunk=32), "gfx942": _tile(n=16, chunk=16, warps=1, stages=1)},
    ("read_kernel", 16, 256): {"": _tile(), "gfx942": _tile(32, chunk=32, stages=1)},
    ("read_grad_kernel", 16, 256): {"": _tile(chunk=32), "gfx942": _tile(32, chunk=16, stages=1)},
    # float32: exact products are sums of scalar ones, which want small tiles
    ("attend_kernel", 32, 128): {"": _tile(32, 32, 16, warps=8, stages=1), "gfx942": _tile(32, 16, 16, stages=1)},
    ("attend_kernel", 32, 256): {"": _tile(16, 16, 16, stages=1)},
    ("query_grad_kernel", 32, 64): {
        "": _tile(16, 16, 16, warps=8, stages=1),
        "sm_100": _tile(32, 32, 16, warps=8, stages=1),
    },
    ("query_grad_kernel", 32, 128): {"": _tile(16, 16, 16, warps=8, stages=1)},
    ("query_grad_kernel", 32, 256): {"": _tile(16, 16, 16, stages=1)},
    ("key_grad_kernel", 32, 128): {"": _tile(16, 16, 16, warps=8, stages=1), "gfx942": _tile(16, 16, 16, stages=1)},
    ("key_grad_kernel", 32, 256): {"": _tile(16, 16, 16, stages=1)},
    ("sink_grad_kernel", 32, 256): {"": _tile(16, 16, stages=1)},
    ("product_kernel", 32, 128): {"": _tile(n=16, warps=8, stages=1, COLUMNS=32)},
    ("product_kernel", 32, 256): {"": _tile(n=16, warps=8, stages=1, COLUMNS=16)},
    ("weight_sums_kernel", 32, 256): {"": _tile(n=16, chunk=16, warps=8, stages=1)},
    ("write_grad_kernel", 32, 256): {"": _tile(n=16, chunk=16, warps=8, stages=1)},
    ("key_sums_kernel", 32, 256): {"": _tile(n=32)},
    ("curvature_kernel", 32, 256): {"": _tile(chunk=32, ROWS=32, COLUMNS=32)},
    ("decode_kernel", 32, 256): {
        "": _tile(n=16, chunk=16, warps=8, stages=1),
        "gfx942": _tile(n=16, chunk=16, warps=1, stages=1),
    },
    ("read_kernel", 32, 256): {
        "": _tile(16, chunk=16, warps=8, stages=1),
        "sm_100": _tile(16, chunk=32, warps=8, stages=1),
    },
    ("read_grad_kernel", 32, 256): {"": _tile(16, chunk=16, warps=8, stages=1)},
}
_WIDTHS = {
    (kernel, bits): sorted(width for other, size, width in TABLE if (other, size) == (kernel, bits))
    for kernel, bits, _ in TABLE
}


# kernels that loop over tiles of K columns beside tiles of V, and targets whose products read them from shared memory
_ATTENTION = ("attend_kernel", "query_grad_kernel", "key_grad_kernel")
_ASYNCHRONOUS = ("sm_90", "sm_100")


def _ragged(width: int) -> bool:
    """Return whether a tile, whose columns are a power of two, has columns that there are none of."""
    return width & (width - 1) != 0


def family(target: str) -> str:
    """Return the target whose rows of the table `target` takes.

    Raises:
        RuntimeError: the kernels are not written for it.
    """
    if target in TARGETS:
        return target
    for prefix in sorted(FAMILIES, key=len, reverse=True):
        if target.startswith(prefix) and (len(target) == len(prefix) + 1 or prefix.startswith("gfx")):
            return FAMILIES[prefix]
    known = ", ".join(TARGETS)
    raise RuntimeError(f"the kernels are for {known} and their kin, this GPU is {target}: pass backend='torch'")


def shared_bytes(kernel: str, tile: Tile, bits: int, key_width: int, value_width: int) -> int:
    """Return about what a program keeps in shared memory: rows that stay, and rows that stream by."""
    wide, size = key_width + value_width, bits // 8
    stay, stream = {
        "attend_kernel": (tile.BLOCK_M * key_width, tile.BLOCK_N * wide),
        "query_grad_kernel": (tile.BLOCK_M * wide, tile.BLOCK_N * wide),
        "key_grad_kernel": (tile.BLOCK_N * wide, tile.BLOCK_M * wide),
        "sink_grad_kernel": (tile.BLOCK_N * wide, tile.BLOCK_M * wide),
        "product_kernel": (tile.BLOCK_N * key_width, tile.BLOCK_N * (key_width + tile.COLUMNS)),
        "scan_kernel": (0, tile.ROWS * tile.ROWS * 2),
    }.get(kernel, (tile.BLOCK_N * key_width, tile.CHUNK * wide))
    return size * (stay + tile.num_stages * stream)


@cache
def tile_for(kernel: str, target: Target, dtype: torch.dtype, key_width: int, value_width: int) -> Tile:
    """Return the table's tile; on a GPU of a family with less shared memory, the tile shrunk until it fits.

    Raises:
        RuntimeError: a GPU that the kernels are not for.
    """
    if target.name == "interpreter":
        return INTERPRETER
    kin = family(target.name)
    bits = 8 * dtype.itemsize
    widest = max(key_width, value_width)
    width = next(width for width in _WIDTHS[kernel, bits] if width >= widest)
    rows = TABLE[kernel, bits, width]
    tile = replace(rows.get(kin, rows[""]), PRECISION="ieee" if kin.startswith("gfx") else "tf32x3")
    if kernel in _ATTENTION and kin in _ASYNCHRONOUS and _ragged(key_width) != _ragged(value_width):
        # ragged tiles pass through registers: Triton 3.7 fences these before the copies beside them have landed
        tile = replace(tile, num_stages=1)
    if target.shared >= TARGETS[kin].shared:
        return tile
    while shared_bytes(kernel, tile, bits, key_width, value_width) > target.shared:
        if tile.num_stages > 1:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif max(tile.BLOCK_M, tile.BLOCK_N) > 16:
            tile = replace(tile, BLOCK_M=max(16, tile.BLOCK_M // 2), BLOCK_N=max(16, tile.BLOCK_N // 2))
        else:
            break
    return tile
