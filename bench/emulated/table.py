"""Write executed calls as a plain-text table, a line for each kernel, and list what failed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...kernels.check.gates import DTYPES
from .jobs import Measured, Row
from .launches import EMULATED

# the outputs and gradients by which a kernel is judged: those that it, or its like, writes last
OUTPUTS = {
    "attend_kernel": ("out",),
    "decode_kernel": ("out",),
    "read_kernel": ("out",),
    "product_kernel": ("memory", "dmemory"),
    "add_parts_kernel": ("memory", "dmemory"),
    "scan_kernel": ("memory", "dmemory"),
    "key_sums_kernel": ("normalizer",),
    "normalizer_kernel": ("normalizer", "dnormalizer"),
    "query_grad_kernel": ("dq", "dmemory_q", "dgate"),
    "read_grad_kernel": ("dq",),
    "curvature_kernel": ("dnormalizer", "dmemory_k"),
    "weight_sums_kernel": ("dnormalizer",),
    "write_grad_kernel": ("dmemory_k", "dk", "dv", "dbeta"),
    "key_grad_kernel": ("dk", "dv"),
    "sink_grad_kernel": ("dsink_k", "dsink_v"),
}
HEAD = (
    f"{'target':7} {'dtype':9} {'kernel':19} {'calls':>5} {'programs':>8} {'error':>8} {'gate':>6} {'share':>6} "
    f"{'races':>5} {'other':>5} {'seconds':>7}  worst in"
)
WORST = 8


class Worst(NamedTuple):
    """The measurement that is nearest to its gate, and where it was made."""

    measured: Measured
    where: str

    @property
    def share(self) -> float:
        """The error as a share of its gate; infinite for what is not finite."""
        share = self.measured.error / self.measured.gate
        return math.inf if math.isnan(share) else share


def table(rows: Sequence[Row], kernels: Sequence[str]) -> Iterator[str]:
    """Yield a line for each target, dtype and kernel of which a row has launches, and then the worst of all."""
    yield HEAD
    lines: list[tuple[str, float | None]] = []
    for target in EMULATED:
        for dtype in DTYPES:
            here = [row for row in rows if row.job[:2] == (target, dtype)]
            for kernel in kernels:
                if any(_launched(kernel, row) for row in here):
                    worst = _worst(kernel, here)
                    line = f"{target:7} {dtype:9} {kernel:19} {_line(kernel, here, worst)}"
                    lines.append((line, worst.share if worst else None))
    for line, _ in lines:
        yield line
    yield "\nnearest to their gates"
    measured = [(share, line) for line, share in lines if share is not None]
    for _, line in sorted(measured, reverse=True)[:WORST]:
        yield line


def _launched(kernel: str, row: Row) -> bool:
    """Return whether the kernel ran in a row, or was to."""
    return any(launch.kernel == kernel for launch in row.launches)


def _worst(kernel: str, rows: Sequence[Row]) -> Worst | None:
    """Return the worst measurement of what the kernel writes; None where there is none."""
    found = [
        Worst(row.measured[name], f"{name}, {row.job.call}")
        for row in rows
        if _launched(kernel, row)
        for name in OUTPUTS[kernel]
        if name in row.measured
    ]
    return max(found, key=lambda x: x.share, default=None)


def _line(kernel: str, rows: Sequence[Row], worst: Worst | None) -> str:
    """Return a kernel's line under `HEAD`, without its name."""
    ran = [(row, launch) for row in rows for launch in row.launches if launch.kernel == kernel]
    calls = len({row.job for row, _ in ran})
    ended = [row for row in rows if row.problem and row.launches and row.launches[-1].kernel == kernel]
    races = sum(row.kind == "race" for row in ended)
    error = f"{'-':>8} {'-':>6} {'-':>6}"
    if worst is not None:
        error = f"{worst.measured.error:8.1e} {worst.measured.gate:6.0e} {worst.share:6.2f}"
    return (
        f"{calls:5} {sum(x.programs for _, x in ran):8} {error} {races:5} {len(ended) - races:5} "
        f"{sum(x.executing for _, x in ran):7.1f}  {worst.where if worst else '-'}"
    )


def failures(rows: Sequence[Row]) -> list[str]:
    """Return one line for every call that had no end, and for every output that is above its gate."""
    lines = []
    for row in rows:
        if row.problem:
            lines.append(f"{row.job}: {row.problem}")
        lines += [
            f"{row.job}: {name} is off by {found.error:.1e}, its gate is {found.gate:.0e}"
            for name, found in row.measured.items()
            # not by >, as NaN is no number
            if not found.error <= found.gate
        ]
    return lines
