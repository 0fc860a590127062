"""Who writes one token behind a long text: ours, PyTorch's operations over the same state, and a cache that grows.

Each step begins with putting the new token's key and value into its cache.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels.associative import memory_write
from ..kernels.decoding import segment_decode
from ..kernels.state import MemoryState
from .attention_calls import has_kernels
from .cases import DTYPES, DecodeCase
from .device_decode import Step, draw_step, step_eager, step_ours
from .measure import synchronize


class Decoder(NamedTuple):
    """run: one step → [B, H, 1, K]. expected: of it, in float64. kept_bytes: keys, values and memory of the text."""

    run: Callable[[], Tensor]
    expected: Callable[[], Tensor]
    kept_bytes: int
    fold: Callable[[], object] | None = None

    def fold_ms(self, segment_len: int, device: torch.device) -> float:
        """Milliseconds that writing a finished segment into the memory comes to, for each token of it."""
        if self.fold is None:
            return 0.0
        times = []
        for _ in range(4):
            synchronize(device)
            start = time.perf_counter()
            self.fold()
            synchronize(device)
            times.append(time.perf_counter() - start)
        return min(times[1:]) * 1e3 / segment_len


def _buffer(x: Tensor, segment_len: int) -> Tensor:
    return F.pad(x, (0, 0, 0, segment_len - x.shape[2]))


def ours(case: DecodeCase, device: torch.device) -> Decoder:
    """`segment_decode` over a buffer of one segment."""
    return _of_a_segment(case, device, eager=False)


def eager(case: DecodeCase, device: torch.device) -> Decoder:
    """The same in PyTorch's own operations."""
    return _of_a_segment(case, device, eager=True)


def _of_a_segment(case: DecodeCase, device: torch.device, *, eager: bool) -> Decoder:
    step = draw_step(case, device, copies=1)[0]
    state = MemoryState(step.memory, step.normalizer)
    keys, values = (_buffer(x, case.L) for x in (step.k, step.v))
    lengths = torch.full((case.B,), case.tail, dtype=torch.int32, device=device)
    counters = torch.zeros(case.B * case.G, dtype=torch.int32, device=device)
    new_k, new_v = step.k[:, :, -1:].clone(), step.v[:, :, -1:].clone()
    seen = slice(case.tail - 1, case.tail)
    backend = "triton" if has_kernels(device) else "torch"

    def run() -> Tensor:
        keys[:, :, seen], values[:, :, seen] = new_k, new_v
        if eager:
            held = step._replace(k=keys[:, :, : case.tail], v=values[:, :, : case.tail])
            return step_eager(held, case.L)
        return segment_decode(
            step.q, keys, values, lengths, gate=step.gate, state=state, counters=counters, backend=backend
        )

    return Decoder(
        run,
        lambda: step_ours(Step(*(x.double() for x in step)), case.L, "reference"),
        sum(x.nbytes for x in (keys, values, *state)),
        lambda: memory_write(keys, values, state, backend=backend),
    )


def growing_cache(case: DecodeCase, device: torch.device) -> Decoder:
    """Attention to the whole text, whose keys and values lie in one buffer, at its best: nothing is copied."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        shape = case.B, heads, tokens, case.K
        return torch.randn(shape, device=device, dtype=DTYPES[case.dtype], generator=generator)

    q, keys, values = normal(case.H, 1), normal(case.G, case.context), normal(case.G, case.context)
    new_k, new_v = keys[:, :, -1:].clone(), values[:, :, -1:].clone()
    attend = functools.partial(F.scaled_dot_product_attention, enable_gqa=case.H != case.G)

    def run() -> Tensor:
        keys[:, :, -1:], values[:, :, -1:] = new_k, new_v
        return attend(q, keys, values)

    def expected() -> Tensor:
        asked, held, recalled = (x.double() for x in (q, keys, values))
        weights = asked.unflatten(1, (case.G, -1)).squeeze(3) @ held.mT * case.K**-0.5
        return (weights.softmax(-1) @ recalled).flatten(1, 2).unsqueeze(2)

    return Decoder(run, expected, keys.nbytes + values.nbytes)


BASELINE = "SDPA, growing cache"
DECODERS: Mapping[str, Callable[[DecodeCase, torch.device], Decoder]] = {
    BASELINE: growing_cache,
    "segattn delta": ours,
    "eager delta": eager,
}
