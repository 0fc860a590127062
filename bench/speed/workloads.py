"""Sizes of the calls that are timed, in the order of importance."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...runs.figures import format_length
from ..planner.floors import Sizes

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
BOTH = "forward + backward"
DIRECTIONS = ("forward", "backward", BOTH)

# numbers of a workload "B,H,T,K,L"
CALL_NUMBERS = 5
# fields of a case that say how it is timed, not what: the JSON has no place for them
TIMING_FIELDS = ("peers", "seconds", "rounds", "limit", "counted")

# peers of the cases, by name
OURS = ("segattn delta", "segattn linear", "segattn local")
LOCAL = ("SDPA flash local", "SDPA cuDNN local")
LOOPS = ("eager loop delta", "eager loop linear")
OURS_AND_LOCAL = (*OURS, *LOCAL)
# ours, and what PyTorch computes without compiling
UNCOMPILED = (*OURS_AND_LOCAL, *LOOPS, "torch backend delta", "torch backend linear", "SDPA flash full")
# ours and those by which PyTorch's compiler makes kernels for minutes
BESIDE_COMPILED = (
    "segattn delta",
    "SDPA flash local",
    "FlexAttention local",
    "compiled torch delta",
    "compiled torch linear",
)
# ours and what others have published; a machine without their packages skips them
BESIDE_PUBLISHED = (
    "SDPA flash local",
    "SDPA efficient local",
    "segattn delta",
    "infini-transformer-pytorch linear",
    "infini-transformer-pytorch delta",
    "compiled eager loop linear",
    "compiled eager loop delta",
    "fla linear attention",
    "fla gated delta rule",
)


@dataclass(frozen=True)
class Case:
    """One size of a call of attention, and how it is timed.

    name: shown in tables; goals find the case by it.
    T: tokens of each row of text.
    L: tokens per segment.
    K: width of a head, V too.
    H, G: query heads, key/value heads.
    peers: names of `PEERS` that are timed.
    B: rows of text.
    dtype: name of the inputs' dtype, of `DTYPES`.
    directions: those of `DIRECTIONS` that are timed.
    seconds: time of timing for each direction, within the bounds on rounds.
    rounds: least and most rounds of each direction.
    limit: seconds after which the whole case is given up.
    counted: count launches too.
    """

    name: str
    T: int
    L: int
    K: int
    H: int
    G: int
    peers: tuple[str, ...]
    B: int = 1
    dtype: str = "bfloat16"
    directions: tuple[str, ...] = DIRECTIONS
    seconds: float = 1.5
    rounds: tuple[int, int] = (3, 30)
    limit: float = 60.0
    counted: bool = False

    def sizes(self) -> Sizes:
        """Return the sizes that floors are counted by."""
        return Sizes(self.B, self.H, self.G, self.T, self.K, self.K, self.L, DTYPES[self.dtype].itemsize)

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON says of the case."""
        return {key: value for key, value in asdict(self).items() if key not in TIMING_FIELDS}


@dataclass(frozen=True)
class DecodeCase:
    """One new token for each of B rows, behind `context` tokens; the unfinished segment's tokens are the tail.

    name, B, H, G, K, L, dtype, limit: as in `Case`.
    context: tokens read before the new one, in each row.
    """

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
    def text_bytes(self) -> int:
        """Bytes of all keys and values of the text."""
        return 2 * self.B * self.G * self.context * self.K * DTYPES[self.dtype].itemsize

    @property
    def tail(self) -> int:
        """Tokens of the unfinished segment, with the new one: the most that there can be behind the context."""
        return min(self.context, self.L - 1)

    def sizes(self) -> Sizes:
        """Return the sizes that floors are counted by."""
        return Sizes(self.B, self.H, self.G, self.tail, self.K, self.K, self.L, DTYPES[self.dtype].itemsize)

    def as_json(self) -> dict[str, Any]:
        """Return what the JSON says of the case."""
        return {key: value for key, value in asdict(self).items() if key != "limit"} | {"tail": self.tail}


def _case(time: int, segment_len: int, width: int, peers: tuple[str, ...], note: str = "", **options: Any) -> Case:
    heads = options.pop("H", 2048 // width)
    groups = options.pop("G", heads)
    name = f"T{format_length(time)} L{segment_len} K{width} H{heads}/{groups}{' ' if note else ''}{note}"
    return Case(name, time, segment_len, width, heads, groups, peers, **options)


def _sweep(time: int, width: int, segment_len: int) -> Case:
    # full attention to one million tokens takes minutes
    full = ("SDPA flash full",) if time <= 1 << 18 else ()
    local = OURS_AND_LOCAL if time <= 1 << 18 else ("segattn delta", "segattn linear", "SDPA flash local")
    return _case(time, segment_len, width, (*local, *full), seconds=1.0)


BY_LENGTH = ("SDPA flash local", "segattn delta", "eager loop delta", "SDPA flash full")


def _by_length(longest: int, width: int, segment_len: int, **options: Any) -> tuple[Case, ...]:
    """Return cases whose lengths double from 2048 tokens to `longest`."""
    times = [2048 << i for i in range((longest // 2048).bit_length())]
    return tuple(
        _case(time, segment_len, width, BY_LENGTH, "by length", directions=(BOTH,), **options) for time in times
    )


MAIN = _case(32 << 10, 2048, 128, UNCOMPILED, counted=True)
LONG = _case(128 << 10, 2048, 128, (*OURS, "SDPA flash local", "SDPA flash full"))

CASES: tuple[Case, ...] = (
    MAIN,
    LONG,
    _case(32 << 10, 512, 128, UNCOMPILED),
    _case(32 << 10, 2048, 64, UNCOMPILED),
    _case(32 << 10, 2048, 128, (*OURS_AND_LOCAL, "torch backend delta", "SDPA flash full"), H=32, G=8),
    _case(32 << 10, 512, 64, OURS_AND_LOCAL),
    _case(32 << 10, 2048, 128, BESIDE_COMPILED, "compiled", limit=150.0, counted=True),
    _case(32 << 10, 2048, 128, OURS_AND_LOCAL, "float16", dtype="float16"),
    _sweep(1 << 20, 128, 2048),
    *(_sweep(time << 10, 128, 2048) for time in (2, 8, 512)),
    *(_sweep(time << 10, 64, 2048) for time in (2, 128, 1024)),
    *(_sweep(time << 10, 128, 512) for time in (2, 128, 1024)),
    _case(32 << 10, 512, 64, BESIDE_COMPILED, "compiled", limit=120.0),
    _case(32 << 10, 2048, 128, BESIDE_PUBLISHED, "published", limit=150.0),
    *_by_length(1 << 20, 128, 2048, limit=300.0),
)
DECODES: tuple[DecodeCase, ...] = tuple(
    DecodeCase(f"B{rows} context {format_length(context)}", rows, 32, 8, 128, 2048, context)
    for rows in (64, 1)
    for context in (4 << 10, 64 << 10, 1 << 20, 1 << 10)
)

# peers on a CPU: all but those that are the same as another there, or compile for minutes
ANYWHERE = (
    "SDPA flash local",
    "SDPA cuDNN local",
    "SDPA efficient local",
    "FlexAttention local",
    *OURS[::-1],
    *LOOPS[::-1],
    "infini-transformer-pytorch linear",
    "infini-transformer-pytorch delta",
    "SDPA flash full",
    "fla linear attention",
    "fla gated delta rule",
)


def _decodes(
    heads: int, groups: int, width: int, segment_len: int, contexts: tuple[int, ...]
) -> tuple[DecodeCase, ...]:
    return tuple(
        DecodeCase(
            f"decode H{heads}/{groups} K{width} L{segment_len}, {format_length(n)} behind",
            1,
            heads,
            groups,
            width,
            segment_len,
            n,
        )
        for n in contexts
    )


def parse_workloads(workloads: Iterable[str], dtype: str) -> tuple[tuple[Case, ...], tuple[DecodeCase, ...]]:
    """Return the cases of "B,H,T,K,L", as many key/value heads as query heads, and one new token behind such texts.

    Raises:
        ValueError: anything but five positive integers, T a multiple of L.
    """
    cases, decodes = [], []
    for sizes in workloads:
        numbers = [int(x) if x.isdecimal() else 0 for x in sizes.split(",")]
        if len(numbers) != CALL_NUMBERS or min(numbers) < 1 or numbers[2] % numbers[4]:
            raise ValueError(f"workload must be five positive integers B,H,T,K,L, T a multiple of L, got {sizes!r}")
        rows, heads, time, width, segment_len = numbers
        cases.append(_case(time, segment_len, width, ANYWHERE, f"B{rows}", H=heads, B=rows, dtype=dtype))
        found = _decodes(heads, heads, width, segment_len, (time,))
        decodes += [replace(x, B=rows, name=f"{x.name} B{rows}", dtype=dtype) for x in found]
    return tuple(cases), tuple(decodes)


def suite(device: str, dtype: str | None = None) -> tuple[tuple[Case, ...], tuple[DecodeCase, ...]]:
    """Return the cases of a device: on "cuda" those of `bench/on_device`, else float32 and a few minutes' worth.

    Args:
        dtype: Of all cases, in place of their own.
    """
    cases, decodes = CASES, DECODES
    if device != "cuda":
        dtype = dtype or "float32"
        cases = (
            _case(8 << 10, 1024, 64, ANYWHERE, H=4),
            _case(8 << 10, 2048, 128, (*ANYWHERE, "compiled eager loop delta"), H=2, directions=("forward", BOTH)),
            *_by_length(16 << 10, 64, 1024, H=2),
        )
        decodes = _decodes(8, 2, 64, 1024, (4 << 10, 64 << 10))
    if dtype is None:
        return cases, decodes
    # the case that is there for its dtype would be another's double
    others = [x for x in cases if "float16" not in x.name]
    return tuple(replace(x, dtype=dtype) for x in others), tuple(replace(x, dtype=dtype) for x in decodes)


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
