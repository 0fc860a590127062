"""What ranks that share a sequence send each other: its keys and values, or a memory's state.

Bytes are those that one rank sends for one layer in one training step, forward and backward, for each sequence. A link
has its bandwidth each way; messages that depend on each other wait for each other. The state after the whole text is
not sent, since models do not need it. Neither the memory that holds gathered states for a moment is counted, nor the
time to compose them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ...runs.errors import SettingError
from .floors import FLOAT32
from .settings import ITEMSIZE, check_choice, check_size
from .shapes import Shape


class Traffic(NamedTuple):
    """Hold what one rank sends.

    bytes: of all messages.
    messages: the number that are sent one after another.
    """

    bytes: int
    messages: int


@dataclass(frozen=True)
class Links:
    """The speed of a rank's links; the defaults are from the data sheets of H100 SXM's NVLink and 400 Gb/s InfiniBand.

    node_ranks: ranks of a node.
    node_bandwidth, bandwidth: bytes per second inside a node and between nodes, one way.
    latency: seconds of a message.

    Raises:
        SettingError: naming what cannot be.
    """

    node_ranks: int = 8
    node_bandwidth: float = 450e9
    bandwidth: float = 50e9
    latency: float = 10e-6

    def __post_init__(self) -> None:
        check_size("node_ranks", self.node_ranks)
        for name in ("node_bandwidth", "bandwidth"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingError(name, f"must be positive and finite, got {getattr(self, name)}")
        if not 0 <= self.latency < float("inf"):
            raise SettingError("latency", f"must not be negative, and finite, got {self.latency}")

    def seconds(self, traffic: Traffic, ranks: int) -> float:
        """Return the seconds to send; with ranks of several nodes, a ring waits for the link between nodes."""
        rate = self.node_bandwidth if ranks <= self.node_ranks else self.bandwidth
        return traffic.bytes / rate + traffic.messages * self.latency


@dataclass(frozen=True)
class Split:
    """A sequence of `length` tokens that is split over `ranks` ranks.

    Raises:
        SettingError: naming what cannot be.
    """

    shape: Shape
    length: int
    ranks: int
    segment_len: int = 2048
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        for name in ("length", "ranks", "segment_len"):
            check_size(name, getattr(self, name))
        check_choice("dtype", self.dtype, tuple(ITEMSIZE))

    @property
    def share(self) -> int:
        """The number of tokens of the rank that has most."""
        return -(-self.length // self.ranks)

    @property
    def has_segments(self) -> bool:
        """Return whether every rank can have a segment, the last one an unfinished one."""
        return self.ranks <= -(-self.length // self.segment_len)


def ring(split: Split) -> Traffic | None:
    """Count ring attention (arXiv 2310.01889): keys and values go round, in the backward pass with their gradients.

    There are W - 1 hops of k and v forward and backward, and W of dk and dv, which return to their rank. None where a
    rank has no tokens.
    """
    if split.ranks > split.length:
        return None
    hops = 0 if split.ranks == 1 else 2 * (split.ranks - 1) + split.ranks
    block = 2 * split.share * split.shape.keys * ITEMSIZE[split.dtype]
    # k and v, then dk and dv, are sent side by side in the backward pass
    return Traffic(hops * block, 0 if split.ranks == 1 else 2 * split.ranks - 1)


def ulysses(split: Split) -> Traffic | None:
    """Count DeepSpeed Ulysses (arXiv 2309.14509): all-to-all of q, k, v and of the output, and of their gradients.

    A rank has at least one query head: None where ranks outnumber them, or do not divide them. A key/value head is sent
    to all the ranks whose query heads read it.
    """
    heads, groups, W = split.shape.heads, split.shape.kv_heads, split.ranks
    if heads % W or split.length < W:
        return None
    # the query heads are cut into W parts and into G parts: the number of pairs of parts that overlap
    kv_heads = groups + W - math.gcd(groups, W)
    numbers = split.share * 2 * (heads + kv_heads) * split.shape.head_width
    exchanges = 0 if W == 1 else 4
    return Traffic(2 * numbers * (W - 1) // W * ITEMSIZE[split.dtype], exchanges)


def linear(split: Split) -> Traffic | None:
    """Count the linear rule: all gather every rank's sums, K (V + 1) a key/value head, and gradients of the states."""
    return _gathered(split, 2 * _state(split), collectives=2)


def linear_scan(split: Split) -> Traffic | None:
    """Count the linear rule by a prefix scan, which passes sums on in log2 W rounds where `linear` gathers all."""
    if not split.has_segments:
        return None
    rounds = 2 * (split.ranks - 1).bit_length()
    return Traffic(rounds * _state(split), rounds)


def delta(split: Split) -> Traffic | None:
    """Count the delta rule: key sums first, K a key/value head, then every rank's affine map, K (K + V).

    The backward pass gathers the memory's gradients with the K K of the maps again, which no rank keeps, then the key
    sums' gradients.
    """
    maps = split.shape.keys * split.shape.head_width * FLOAT32
    return _gathered(split, 2 * (_state(split) + maps), collectives=4)


def _state(split: Split) -> int:
    """Return the bytes of M and z of one layer, float32."""
    return split.shape.keys * (split.shape.head_width + 1) * FLOAT32


def _gathered(split: Split, share: int, collectives: int) -> Traffic | None:
    """Count all-gathers of a rank's `share` bytes in a ring: W - 1 hops each; None where a rank has no segment."""
    if not split.has_segments:
        return None
    hops = split.ranks - 1
    return Traffic(hops * share, hops * collectives)


EXCHANGES: dict[str, Callable[[Split], Traffic | None]] = {
    "ring": ring,
    "ulysses": ulysses,
    "linear": linear,
    "linear scan": linear_scan,
    "delta": delta,
}
