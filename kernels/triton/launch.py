"""The start of kernels: tensors as strided views, tiles by name, errors that say what to do."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError
from triton.runtime.errors import OutOfResources

from ..sequences import Layout
from ..state import Sinks
from .configs import Target, Tile, tile_for
from .tiles import INTERPRETED, SinkTokens, Tokens, block


class Launch(NamedTuple):
    """A kernel about to run: `arguments` without the tile's."""

    kernel: Any
    programs: int
    tile: Tile
    arguments: dict[str, Any]


# plain globals, as autograd launches from threads of its own
_redirected: tuple[Target, Callable[[Launch], None]] | None = None
_tried: dict[str, Tile] = {}


@contextmanager
def redirecting(target: Target, take: Callable[[Launch], None]) -> Iterator[None]:
    """Pass the launches inside to `take`, as they would be on `target`, instead of running them."""
    global _redirected
    before, _redirected = _redirected, (target, take)
    try:
        yield
    finally:
        _redirected = before


def is_redirected() -> bool:
    """Return whether launches are passed on, so that their tensors need not be on a GPU."""
    return _redirected is not None


@contextmanager
def recording(target: Target) -> Iterator[list[Launch]]:
    """List the launches inside, as they would be on `target`, instead of running them: nothing is written."""
    launches: list[Launch] = []
    with redirecting(target, launches.append):
        yield launches


@contextmanager
def trying(tiles: dict[str, Tile]) -> Iterator[None]:
    """Let the kernels named in `tiles` take those instead of the table's: for tuning, and for tests of every tile."""
    global _tried
    before, _tried = _tried, tiles
    try:
        yield
    finally:
        _tried = before


def view(x: Tensor | None) -> Tokens | None:
    """Return tokens [B, heads, T, width], whose last dimension must be contiguous, as an argument of a kernel."""
    if x is None:
        return None
    row, head, time, _ = x.stride()
    return Tokens(x, row, head, time, x.shape[1], tl.constexpr(x.shape[3]))


def view_sinks(sinks: Sinks | None) -> SinkTokens | None:
    """Return sinks, whose last dimensions must be contiguous, as an argument of a kernel."""
    if sinks is None:
        return None
    return SinkTokens(view(sinks.k), view(sinks.v), sinks.seen, tl.constexpr(sinks.k.shape[2]))


def segment_arguments(layout: Layout) -> dict[str, Any]:
    """Return the arguments by which a kernel finds the segment of a slot."""
    return {
        "slots": layout.slots,
        "time": layout.time,
        "segment_len": layout.segment_len,
        "segments": layout.per_row,
    }


def dense_rows(x: Tensor) -> Tensor:
    """Return x, copied where its last dimension is strided, or where a tile's rows would be 2^31 elements apart."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**22 else x.contiguous()


def new_tokens(like: Tensor, heads: int, time: int, width: int, padded: bool = False) -> Tensor:
    """Return a new [B, heads, time, width] in the memory order of `like`; zeros where it may be padded."""
    new = like.new_zeros if padded else like.new_empty
    if like.stride(1) < like.stride(2):
        return new((like.shape[0], time, heads, width)).transpose(1, 2)
    return new((like.shape[0], heads, time, width))


def tile_of(kernel: Any, like: Tensor, key_width: int, value_width: int) -> Tile:
    """Return the table's tile for `kernel` on the device of `like`, in its dtype."""
    target = _target(like.device)
    tile = _tried.get(kernel.__name__) or tile_for(kernel.__name__, target, like.dtype, key_width, value_width)
    widest_k, widest_v = block(key_width), block(value_width)
    return replace(
        tile,
        CHUNK=min(tile.CHUNK, widest_k, widest_v),
        ROWS=min(tile.ROWS, widest_k),
        COLUMNS=min(tile.COLUMNS, widest_v),
    )


def launch(kernel: Any, programs: int, tile: Tile, like: Tensor, **arguments: Any) -> None:
    """Run `kernel` on the device of `like`.

    Raises:
        RuntimeError: the tile does not fit the GPU.
    """
    if programs == 0:
        return
    if _redirected is not None:
        _redirected[1](Launch(kernel, programs, tile, arguments))
        return
    device = torch.cuda.device(like.device) if like.is_cuda else nullcontext()
    try:
        with device:
            kernel[(programs,)](
                **(constants(kernel, tile) | arguments),
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                enable_fp_fusion=True,
            )
    except (OutOfResources, TritonError) as error:
        raise RuntimeError(_refusal(kernel.__name__, tile, target_of(like.device).name, error)) from error


def _refusal(name: str, tile: Tile, target: str, error: Exception) -> str:
    remedy = "Use narrower heads or backend='torch', and please report the GPU"
    if isinstance(error, OutOfResources):
        need = f"it needs {error.required} of {error.name}, the limit is {error.limit}"
        return f"{name} does not fit {target}: with {tile} {need}. {remedy}"
    return f"{name} cannot be compiled for {target} with {tile}: {error}. {remedy}"


def constants(kernel: Any, tile: Tile) -> dict[str, Any]:
    """Return the fields of a tile that the kernel names."""
    return {name: value for name, value in asdict(tile).items() if name in kernel.arg_names}


def processors(device: torch.device) -> int:
    """Return the number of the GPU's multiprocessors."""
    return _target(device).processors


def _target(device: torch.device) -> Target:
    """Return what launches with tensors on a device are for."""
    return target_of(device) if _redirected is None else _redirected[0]


def warn_of_compiler(target: str, version: str) -> None:
    """Warn of a version of Triton, such as "3.6.0", that leaves out fences which the kernels need on a target.

    Before 3.7.1 no `fence.proxy.async` stands between what `cp.async` copies and the matrix instructions that read it,
    on Hopper and on data center Blackwell. PTX wants one; a B200's results were wrong without (pytorch issue 181248).
    """
    if target.startswith(("sm_9", "sm_10")) and tuple(map(int, re.findall(r"\d+", version)[:3])) < (3, 7, 1):
        warnings.warn(
            f"Triton {version} leaves out fences that {target} needs, so results may be wrong: install torch>=2.13, "
            "which brings Triton 3.7.1 or later, or check your calls with `segattn check`",
            RuntimeWarning,
            stacklevel=2,
        )


@cache
def target_of(device: torch.device) -> Target:
    """Return what the kernels are compiled for on a device."""
    if INTERPRETED.value:
        return Target("interpreter", 0)
    properties = torch.cuda.get_device_properties(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    shared = triton.runtime.driver.active.utils.get_device_properties(index)["max_shared_mem"]
    if torch.version.hip:
        return Target(properties.gcnArchName.split(":")[0], shared, properties.multi_processor_count)
    target = f"sm_{properties.major}{properties.minor}"
    warn_of_compiler(target, triton.__version__)
    return Target(target, shared, properties.multi_processor_count)
