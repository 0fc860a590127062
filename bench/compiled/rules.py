"""Check compiled kernels by rules, and count what their main loops cost for each pair of a query and a key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ...kernels.triton.configs import TARGETS, Tile
from .ahead_of_time import TENSOR_MEMORY, Compiled
from .gpus import RATES
from .jobs import Job, Row
from .machine_code import Loop

OWN = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "sm_120": "HMMA", "gfx942": "v_mfma"}
ATTENTION = ("attend_kernel", "query_grad_kernel", "key_grad_kernel")
# rows of products that an instruction takes at least, and the warps that work on them together; smaller ones go by HMMA
LEAST_ROWS = {"HGMMA": 64, "UTCHMMA": 64}
LEAST_WARPS = 4
# where a tile says how many rows a kernel's products have; of other kernels it is the width
ROWS = {
    "attend_kernel": "BLOCK_M",
    "query_grad_kernel": "BLOCK_M",
    "key_grad_kernel": "BLOCK_N",
    "scan_kernel": "ROWS",
    "curvature_kernel": "ROWS",
    "weight_sums_kernel": "BLOCK_N",
    "write_grad_kernel": "BLOCK_N",
    "read_kernel": "BLOCK_M",
    "read_grad_kernel": "BLOCK_M",
}
# the queries of a group at one step fill 16 rows, and so do a few sinks
FEW_ROWS = ("decode_kernel", "sink_grad_kernel")
# widths at which nothing may be spilled: tiles are chosen for them; masks of the columns of others take registers
UNSPILLED = (64, 128)
# cases whose softmax loops may be no longer than those of "local"
NO_LONGER = ("delta", "delta, window")
# of a loop's instructions: with more registers in use, an address is computed again
SLACK = 0.02


def failures(rows: Sequence[Row]) -> list[str]:
    """Return one line for every rule that a row breaks."""
    return [f"{row.job}: {problem}" for row in rows for problem in _problems(row)] + list(_grown_loops(rows))


def _problems(row: Row) -> Iterator[str]:
    """Yield the rules that one row breaks by itself."""
    job, found = row.job, row.compiled
    if found is None:
        yield f"does not compile: {row.error}"
        return
    if found.spilled and job.width in UNSPILLED:
        yield f"{found.spilled} bytes spilled"
    limit = TARGETS[job.target].shared
    if found.shared > limit:
        yield f"{found.shared} bytes of shared memory, the limit is {limit}"
    if found.tensor_memory > TENSOR_MEMORY:
        yield f"{found.tensor_memory} columns of tensor memory, the limit is {TENSOR_MEMORY}"
    if found.products and job.dtype != "float32":
        accepted = instructions_accepted(job, row.tile)
        if not set(accepted) & set(found.tensor_core):
            yield f"multiplies matrices without {' or '.join(accepted)}"


def instructions_accepted(job: Job, tile: Tile) -> tuple[str, ...]:
    """Return the tensor-core instructions of which a kernel must use one."""
    own = OWN[job.target]
    if own not in LEAST_ROWS:
        return (own,)
    rows = getattr(tile, ROWS[job.kernel]) if job.kernel in ROWS else job.width
    small = job.kernel in FEW_ROWS or rows < LEAST_ROWS[own] or tile.num_warps < LEAST_WARPS
    return (own, "HMMA") if small else (own,)


def _grown_loops(rows: Sequence[Row]) -> Iterator[str]:
    """Yield attention kernels whose softmax loops are longer with a memory, lookback and sinks than without any.

    The memory is read behind these loops, and so are the sinks: they must add nothing to them.
    """
    attends = {
        row.job: row.compiled.loops[:2]
        for row in rows
        if row.compiled is not None and row.job.kernel == "attend_kernel" and row.job.dtype != "float32"
    }
    for job, fused in attends.items():
        local = next((loops for j, loops in attends.items() if j[:3] == job[:3] and j.case == "local"), None)
        if job.case not in NO_LONGER or local is None:
            continue
        if min(len(fused), len(local)) < 2:
            yield f"{job}: its two softmax loops were not found"
            continue
        for name, mine, bare in zip(("", "masked "), fused, local, strict=True):
            if mine.instructions > bare.instructions * (1 + SLACK):
                counts = f"{mine.instructions} instructions, {bare.instructions} without a memory"
                yield f"{job}: the {name}softmax loop holds {counts}"


class Cost(NamedTuple):
    """The cost of a kernel's loop without masks, for each pair of a query and a key."""

    instructions: float  # of threads
    operations: int  # of matrix products
    issue: float  # clocks of a multiprocessor to begin the instructions
    tensor_core: float  # clocks of its tensor cores

    @property
    def share(self) -> float:
        """Return the tensor cores' share of the time, were instructions and products to run one after the other."""
        return self.tensor_core / (self.tensor_core + self.issue)


def cost_of(row: Row) -> Cost | None:
    """Return the cost of attention's main loop, or of its gradients', in 16 bits.

    None for other kernels and float32, and where the loop was not found.
    """
    if row.compiled is None or row.job.kernel not in ATTENTION or row.job.dtype == "float32":
        return None
    loop = main_loop(row.job.kernel, row.compiled)
    if loop is None:
        return None
    threads = row.tile.num_warps * (64 if row.job.target.startswith("gfx") else 32)
    instructions = loop.instructions * threads / (row.tile.BLOCK_M * row.tile.BLOCK_N)
    # with K = V: q kᵀ and p v; q kᵀ, do vᵀ and dq; q kᵀ, do vᵀ, dk and dv
    products = {"attend_kernel": 2, "query_grad_kernel": 3, "key_grad_kernel": 4}[row.job.kernel]
    operations = 2 * products * row.job.width
    rate = RATES[row.job.target]
    return Cost(instructions, operations, instructions / rate.instructions, operations / rate.operations)


def main_loop(kernel: str, compiled: Compiled) -> Loop | None:
    """Return the loop without masks, None where there are fewer than two loops.

    It is the first of attention's two, the last but one of dq's, and the last of dk's and dv's.
    """
    if len(compiled.loops) < 2:
        return None
    return compiled.loops[{"attend_kernel": 0, "query_grad_kernel": -2, "key_grad_kernel": -1}[kernel]]
