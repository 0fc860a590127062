"""What is timed on a device: one table in two sizes, in the order of importance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from .floors import Sizes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
DIRECTIONS = ("forward", "backward", "forward + backward")

OURS = ("segattn delta", "segattn linear", "segattn local")
LOCAL = ("SDPA flash local", "SDPA cuDNN local")
LOOPS = ("eager loop delta", "eager loop linear")
SOME = (*OURS, *LOCAL)
MOST = (*SOME, *LOOPS, "torch backend delta", "torch backend linear", "SDPA flash full")
NOT_WRITTEN = ("peers", "seconds", "rounds", "limit", "counted")
SLOW = ("segattn delta", "SDPA flash local", "FlexAttention local", "compiled torch delta", "compiled torch linear")


@dataclass(frozen=True)
class Case:
    """One row of text of T tokens, K = V.

    seconds: of timing for each direction, within the bounds on rounds; limit: of the whole case; counted: launches too.
    """

    name: str
    T: int
    L: int
    K: int
    H: int
    G: int
    peers: tuple[str, ...]
    dtype: str = "bfloat16"
    directions: tuple[str, ...] = DIRECTIONS
    seconds: float = 1.5
    rounds: tuple[int, int] = (3, 30)
    limit: float = 60.0
    counted: bool = False

    def sizes(self) -> Sizes:
        itemsize = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return Sizes(1, self.H, self.G, self.T, self.K, self.K, self.L, itemsize)

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key not in NOT_WRITTEN}


@dataclass(frozen=True)
class DecodeCase:
    """One new token for each of B rows, behind `context` tokens, of which the unfinished segment's are the tail."""

    name: str
    B: int
    H: int
    G: int
    K: int
    L: int
    context: int
    dtype: str = "bfloat16"
    limit: float = 30.0

    @property
    def tail(self) -> int:
        """Tokens of the unfinished segment, the new one among them: the most there can be behind that context."""
        return min(self.context, self.L - 1)

    def sizes(self) -> Sizes:
        itemsize = torch.empty((), dtype=DTYPES[self.dtype]).element_size()
        return Sizes(self.B, self.H, self.G, self.tail, self.K, self.K, self.L, itemsize)

    def as_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "limit"} | {"tail": self.tail}


def _size(time: int) -> str:
    return f"{time >> 20}M" if time >= 1 << 20 else f"{time >> 10}K" if time >= 1 << 10 else str(time)


def _case(time: int, segment_len: int, width: int, peers: tuple[str, ...], note: str = "", **options: Any) -> Case:
    heads = options.pop("H", 2048 // width)
    groups = options.pop("G", heads)
    name = f"T{_size(time)} L{segment_len} K{width} H{heads}/{groups}{' ' if note else ''}{note}"
    return Case(name, time, segment_len, width, heads, groups, peers, **options)


def _sweep(time: int, width: int, segment_len: int) -> Case:
    # full attention to one million tokens is minutes
    full = ("SDPA flash full",) if time <= 1 << 18 else ()
    local = SOME if time <= 1 << 18 else ("segattn delta", "segattn linear", "SDPA flash local")
    return _case(time, segment_len, width, (*local, *full), seconds=1.0)


MAIN = _case(32 << 10, 2048, 128, MOST, counted=True)
LONG = _case(128 << 10, 2048, 128, (*OURS, "SDPA flash local", "SDPA flash full"))

CASES: tuple[Case, ...] = (
    MAIN,
    LONG,
    _case(32 << 10, 512, 128, MOST),
    _case(32 << 10, 2048, 64, MOST),
    _case(32 << 10, 2048, 128, (*SOME, "torch backend delta", "SDPA flash full"), H=32, G=8),
    _case(32 << 10, 512, 64, SOME),
    _case(32 << 10, 2048, 128, SLOW, "compiled", limit=150.0, counted=True),
    _case(32 << 10, 2048, 128, SOME, "float16", dtype="float16"),
    _sweep(1 << 20, 128, 2048),
    *(_sweep(time << 10, 128, 2048) for time in (2, 8, 512)),
    *(_sweep(time << 10, 64, 2048) for time in (2, 128, 1024)),
    *(_sweep(time << 10, 128, 512) for time in (2, 128, 1024)),
    _case(32 << 10, 512, 64, SLOW, "compiled", limit=120.0),
)
DECODES: tuple[DecodeCase, ...] = tuple(
    DecodeCase(f"B{rows} context {_size(context)}", rows, 32, 8, 128, 2048, context)
    for rows in (64, 1)
    for context in (4 << 10, 64 << 10, 1 << 20, 1 << 10)
)


def _tiny(name: str, time: int, segment_len: int, peers: tuple[str, ...], heads: int = 1, **options: Any) -> Case:
    once: dict[str, Any] = {"dtype": "float32", "seconds": 0.0, "rounds": (1, 1), "counted": True}
    return Case(name, time, segment_len, 16, heads, 1, peers, **(once | options))


TINY_MAIN = _tiny(
    "tiny",
    32,
    16,
    (*OURS[::2], "SDPA flash local", "SDPA cuDNN local", "FlexAttention local", "eager loop delta"),
)
TINY_CASES: tuple[Case, ...] = (
    TINY_MAIN,
    _tiny("tiny short segments", 32, 8, ("segattn delta", "SDPA flash full"), directions=DIRECTIONS[::2]),
    _tiny("tiny grouped", 48, 16, ("torch backend delta", "eager loop delta"), heads=2),
)
TINY_DECODES: tuple[DecodeCase, ...] = tuple(
    DecodeCase(f"tiny context {context}", 1, 2, 1, 16, 32, context, "float32") for context in (64, 4096)
)
