"""What every implementation must spend: operations and bytes of a call, and the time that a named GPU takes for them.

An operation is a multiplication or an addition of a matrix product, counted for visible pairs only. Bytes are those of
inputs read once and outputs written once; a fused implementation needs no others. Element-wise work is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

FLOAT32 = 4


@dataclass(frozen=True)
class Work:
    """Operations of matrix products, and bytes through the device's memory."""

    operations: int
    bytes: int

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)


@dataclass(frozen=True)
class Sizes:
    """A causal call with as many queries as keys and no state before it.

    itemsize: bytes of one element of q.
    lookback: whole segments that a query sees before its own.
    sinks: first tokens that all later queries see.
    """

    B: int
    H: int
    G: int
    T: int
    K: int
    V: int
    L: int
    itemsize: int
    lookback: int = 0
    sinks: int = 0

    @property
    def written(self) -> int:
        """The number of segments of one row that are written: complete ones, without those of the lookback."""
        return max(self.T // self.L - self.lookback, 0)

    @property
    def later(self) -> int:
        """The number of tokens of one row that have a memory before their window."""
        return max(self.T - (1 + self.lookback) * self.L, 0)

    @property
    def pairs(self) -> int:
        """The number of visible pairs of one query head."""
        looked_back = self.lookback * self.L * max(self.T - self.L, 0)
        return pairs(self.T, self.L) + looked_back + self.sinks * self.later

    @property
    def queries(self) -> int:
        """The bytes of q."""
        return self.B * self.H * self.T * self.K * self.itemsize

    @property
    def outputs(self) -> int:
        """The bytes of the output."""
        return self.B * self.H * self.T * self.V * self.itemsize

    @property
    def keys_values(self) -> int:
        """The bytes of k and v."""
        return self.B * self.G * self.T * (self.K + self.V) * self.itemsize

    @property
    def state(self) -> int:
        """The bytes of M and z, one of each per row and key/value head, float32."""
        return self.B * self.G * self.K * (self.V + 1) * FLOAT32


def pairs(time: int, segment_len: int) -> int:
    """Count the visible (query, key) pairs of one head: n (n + 1) / 2 per segment of n tokens."""
    whole, last = divmod(time, segment_len)
    return whole * segment_len * (segment_len + 1) // 2 + last * (last + 1) // 2


def local_forward(s: Sizes) -> Work:
    """Count local attention, q kᵀ and p v: B H pairs · 2 (K + V). It reads q, k, v and writes o."""
    return Work(s.B * s.H * s.pairs * 2 * (s.K + s.V), s.queries + s.keys_values + s.outputs)


def local_backward(s: Sizes) -> Work:
    """Count its backward pass, for B H pairs: q kᵀ again, dq and dk, 2 K each; do vᵀ and dv, 2 V each.

    It reads q, k, v, do, o and one float32 statistic a row, and writes dq, dk, dv.
    """
    rows = s.B * s.H * s.T * FLOAT32
    moved = 2 * (s.queries + s.keys_values) + 2 * s.outputs + rows
    return Work(s.B * s.H * s.pairs * (6 * s.K + 4 * s.V), moved)


def read(s: Sizes) -> Work:
    """Count σ(q) M for every query behind the first window: B H later · 2 K V, q and the state being on the chip."""
    return Work(s.B * s.H * s.later * 2 * s.K * s.V, 0)


def read_backward(s: Sizes) -> Work:
    """Count dn Mᵀ for the queries and σ(q)ᵀ dn for the memory: twice the read."""
    return Work(2 * read(s).operations, 0)


def write(s: Sizes, update: str) -> Work:
    """Count σ(k)ᵀ v over segments that are written: B G · 2 K V a token; by the delta rule σ(k) M too behind the first.

    It writes the state.
    """
    values = s.B * s.G * 2 * s.K * s.V
    tokens = s.written * s.L
    known = max(tokens - s.L, 0) if update == "delta" else 0
    return Work(values * (tokens + known), s.state)


def write_backward(s: Sizes, update: str) -> Work:
    """Count the two adjoints of each product of the write: twice the write. It reads the gradient of the state."""
    return Work(2 * write(s, update).operations, s.state)


def forward(s: Sizes, update: str | None) -> Work:
    """Count attention, and the memory's read and write; with update None attention alone."""
    work = local_forward(s)
    return work if update is None else work + read(s) + write(s, update)


def backward(s: Sizes, update: str | None) -> Work:
    """Count the backward pass of `forward`."""
    work = local_backward(s)
    return work if update is None else work + read_backward(s) + write_backward(s, update)


def decode(s: Sizes, gated: bool = True) -> Work:
    """Count one query per row at the end of T tokens of an unfinished segment: B H (2 T (K + V) + 2 K V).

    It reads q, the tokens' k and v and the state, and writes o.
    """
    local = 2 * s.T * (s.K + s.V)
    recalled = 2 * s.K * s.V if gated else 0
    query_output = s.B * s.H * (s.K + s.V) * s.itemsize
    return Work(s.B * s.H * (local + recalled), query_output + s.keys_values + (s.state if gated else 0))


class Peak(NamedTuple):
    """The most per second: operations of dense bfloat16 products that add up in float32, and bytes of device memory."""

    operations: float
    bytes: float


# row, words that a device's name must hold, peak by its maker's data sheet, without sparsity; the first match wins
PEAKS: tuple[tuple[str, tuple[str, ...], Peak], ...] = (
    ("A100 40GB", ("A100", "40GB"), Peak(312e12, 1.555e12)),
    ("A100 PCIe 80GB", ("A100", "80GB", "PCIE"), Peak(312e12, 1.935e12)),
    ("A100 SXM 80GB", ("A100", "80GB"), Peak(312e12, 2.039e12)),
    ("H100 PCIe", ("H100", "PCIE"), Peak(756e12, 2.0e12)),
    ("H100 NVL", ("H100", "NVL"), Peak(835e12, 3.9e12)),
    ("H100 SXM", ("H100",), Peak(989.4e12, 3.35e12)),
    ("H200 NVL", ("H200", "NVL"), Peak(835e12, 4.8e12)),
    ("H200", ("H200",), Peak(989.4e12, 4.8e12)),
    ("B200", ("B200",), Peak(2250e12, 8.0e12)),
    ("RTX 5090", ("RTX 5090",), Peak(209.5e12, 1.792e12)),
    ("MI300X", ("MI300X",), Peak(1307.4e12, 5.3e12)),
)


def peak_of(device_name: str) -> tuple[str, Peak] | None:
    """Return the name and peak of a device's row of `PEAKS`, by the name that its driver gives it; None without one."""
    name = device_name.upper()
    # other products, with other figures, whose names hold a row's words
    if "GB200" in name or "GH200" in name:
        return None
    for row, words, peak in PEAKS:
        if all(word.upper() in name for word in words):
            return row, peak
    return None


def seconds(work: Work, peak: Peak) -> float:
    """Return the least time for `work`: the slower of its operations and its bytes."""
    return max(work.operations / peak.operations, work.bytes / peak.bytes)
