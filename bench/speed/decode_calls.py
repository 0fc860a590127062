"""Who writes one token behind a long text: ours, PyTorch's operations over the same state, and a cache that grows.

Each step begins with putting the new token's key and value into its cache.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.decoding import segment_decode
from ...kernels.memory import memory_write
from ...kernels.state import MemoryState
from ..device.decode import Step, draw_step, step_eager, step_ours
from .attention_calls import has_kernels, memory_after
from .measure import synchronize
from .timing import copies_needed
from .workloads import DTYPES, DecodeCase

FOLDS = 5


class Decoder(NamedTuple):
    """One of several copies of the inputs at a time, so that a step finds no keys and values in a GPU's L2 cache.

    run: copy → [B, H, 1, K]. expected: of it, in float64. alter: makes the expected output another.
    kept_bytes: keys, values and memory of the text. fold: writes a finished segment of the first copy into the memory,
    and `folded` is what it should be.
    """

    copies: int
    run: Callable[[int], Tensor]
    expected: Callable[[int], Tensor]
    alter: Callable[[int], None]
    kept_bytes: int
    fold: Callable[[], Sequence[Tensor]] | None = None
    folded: Callable[[], Sequence[Tensor]] | None = None

    def error(self, copy: int, found: object) -> float:
        """Relative error of an output, for the inputs as they are now; of no such shape, infinite."""
        return _error(found, self.expected(copy))

    def fold_error(self) -> float:
        if self.fold is None or self.folded is None:
            return 0.0
        return max(_error(x, y) for x, y in zip(self.fold(), self.folded(), strict=True))

    def fold_ms(self, segment_len: int, device: torch.device) -> float:
        """Milliseconds that writing a finished segment into the memory comes to for each token of it, the median."""
        if self.fold is None:
            return 0.0
        times = []
        for _ in range(FOLDS + 1):
            synchronize(device)
            start = time.perf_counter()
            self.fold()
            synchronize(device)
            times.append(time.perf_counter() - start)
        # the first may compile
        return statistics.median(times[1:]) * 1e3 / segment_len


def _error(found: object, expected: Tensor) -> float:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return math.inf
    error = float((found.double() - expected).norm() / expected.norm())
    return math.inf if math.isnan(error) else error


def _buffer(x: Tensor, segment_len: int) -> Tensor:
    return F.pad(x, (0, 0, 0, segment_len - x.shape[2]))


def ours(case: DecodeCase, device: torch.device) -> Decoder:
    """`segment_decode` over a buffer of one segment."""
    return _of_a_segment(case, device, eager=False)


def eager(case: DecodeCase, device: torch.device) -> Decoder:
    """The same in PyTorch's own operations."""
    return _of_a_segment(case, device, eager=True)


def _of_a_segment(case: DecodeCase, device: torch.device, *, eager: bool) -> Decoder:
    steps = draw_step(case, device)
    buffers = [tuple(_buffer(x, case.L) for x in (step.k, step.v)) for step in steps]
    new = [tuple(x[:, :, -1:].clone() for x in (step.k, step.v)) for step in steps]
    lengths = torch.full((case.B,), case.tail, dtype=torch.int32, device=device)
    counters = torch.zeros(case.B * case.G, dtype=torch.int32, device=device)
    seen = slice(case.tail - 1, case.tail)
    backend = "triton" if has_kernels(device) else "torch"

    def held(copy: int) -> Step:
        return steps[copy]._replace(**{name: x[:, :, : case.tail] for name, x in zip("kv", buffers[copy], strict=True)})

    def run(copy: int) -> Tensor:
        (keys, values), step = buffers[copy], steps[copy]
        keys[:, :, seen], values[:, :, seen] = new[copy]
        if eager:
            return step_eager(held(copy), case.L)
        state = MemoryState(step.memory, step.normalizer)
        return segment_decode(
            step.q, keys, values, lengths, gate=step.gate, state=state, counters=counters, backend=backend
        )

    def expected(copy: int) -> Tensor:
        return step_ours(Step(*(x.double() for x in held(copy))), case.L, "reference")

    def alter(copy: int) -> None:
        for x in (buffers[copy][1], new[copy][1], steps[copy].memory):
            x.neg_()

    first = buffers[0][0], buffers[0][1], steps[0].memory, steps[0].normalizer

    def fold() -> Sequence[Tensor]:
        if eager:
            return memory_after(*first)
        return memory_write(first[0], first[1], MemoryState(*first[2:]), backend=backend)

    def folded() -> Sequence[Tensor]:
        keys, values, memory, normalizer = (x.double() for x in first)
        return memory_after(keys, values, memory, normalizer)

    return Decoder(len(steps), run, expected, alter, sum(x.nbytes for x in first), fold, folded)


def growing_cache(case: DecodeCase, device: torch.device) -> Decoder:
    """Attention to the whole text, whose keys and values lie in one buffer, at its best: nothing is copied."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        shape = case.B, heads, tokens, case.K
        return torch.randn(shape, device=device, dtype=DTYPES[case.dtype], generator=generator)

    def draw() -> tuple[Tensor, ...]:
        q, keys, values = normal(case.H, 1), normal(case.G, case.context), normal(case.G, case.context)
        return q, keys, values, keys[:, :, -1:].clone(), values[:, :, -1:].clone()

    drawn = [draw()]
    kept_bytes = drawn[0][1].nbytes + drawn[0][2].nbytes
    drawn += [draw() for _ in range(copies_needed(kept_bytes, device) - 1)]
    attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=case.H != case.G)

    def run(copy: int) -> Tensor:
        q, keys, values, new_k, new_v = drawn[copy]
        keys[:, :, -1:], values[:, :, -1:] = new_k, new_v
        return attend(q, keys, values)

    def expected(copy: int) -> Tensor:
        asked, held, recalled = (x.double() for x in drawn[copy][:3])
        weights = asked.unflatten(1, (case.G, -1)).squeeze(3) @ held.mT * case.K**-0.5
        return (weights.softmax(-1) @ recalled).flatten(1, 2).unsqueeze(2)

    def alter(copy: int) -> None:
        for x in (drawn[copy][2], drawn[copy][4]):
            x.neg_()

    return Decoder(len(drawn), run, expected, alter, kept_bytes)


BASELINE = "SDPA, growing cache"
DECODERS: Mapping[str, Callable[[DecodeCase, torch.device], Decoder]] = {
    BASELINE: growing_cache,
    "segattn delta": ours,
    "eager delta": eager,
}
