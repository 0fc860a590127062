"""Decoders: the attention of one new token behind a long text, by this package, by PyTorch, and over a growing cache.

The new token's key and value lie in the cache already: putting them there is the same two small copies for each.
"""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.attention import segment_attention
from ...kernels.check.gates import GATES, relative_error
from ...kernels.decoding import segment_decode
from ...kernels.memory import memory_write
from ...kernels.state import MemoryState
from ..planner import floors
from ..planner.floors import Work
from .attention_calls import backend_here, memory_after
from .correctness import TIMES
from .timing import captured, copies_needed, time_once
from .workloads import DTYPES, DecodeCase

FOLDS = 5


class Step(NamedTuple):
    """The inputs of one step: q [B, H, 1, K], keys and values [B, G, ·, K], the gate [H], and the memory."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    memory: Tensor
    normalizer: Tensor


class Decoder(NamedTuple):
    """One way to decode, over several copies of the inputs, so that a step finds none of them in a GPU's L2 cache.

    run: The step over a copy, → [B, H, 1, K].
    expected: Its output in float64.
    alter: Changes a copy's inputs, so that the expected output changes its sign.
    kept_bytes: Keys, values and memory of the text.
    work: Operations and bytes that a step must spend.
    allowed: The largest relative error of a right step, and of a right fold.
    fold: Writes a finished segment of the first copy into the memory; folded: what the memory should be.
    """

    copies: int
    run: Callable[[int], Tensor]
    expected: Callable[[int], Tensor]
    alter: Callable[[int], None]
    kept_bytes: int
    work: Work
    allowed: float
    fold: Callable[[], Sequence[Tensor]] | None = None
    folded: Callable[[], Sequence[Tensor]] | None = None

    def error(self, copy: int, found: object) -> float:
        """Return the relative error of an output for the inputs as they are now; infinite for another shape."""
        return _error(found, self.expected(copy))

    def complaint(self, error: float) -> str:
        """Return what is wrong with a relative error; nothing where it is allowed."""
        return "" if error <= self.allowed else f"relative error of {error:.1e} (at most {self.allowed:.1e})"

    def fold_error(self) -> float:
        """Return the relative error of a fold; 0 for a decoder without one."""
        if self.fold is None or self.folded is None:
            return 0.0
        return max(_error(x, y) for x, y in zip(self.fold(), self.folded(), strict=True))

    def fold_ms(self, segment_len: int, device: torch.device) -> float:
        """Return each token's share, in milliseconds, of the median time to write a segment into the memory."""
        fold = self.fold
        if fold is None:
            return 0.0
        times = [time_once(lambda copy: fold, 0, device)[0] for _ in range(FOLDS + 1)]
        # the first may compile
        return statistics.median(times[1:]) / segment_len


def _error(found: object, expected: Tensor) -> float:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return math.inf
    error = relative_error(found, expected)
    return math.inf if math.isnan(error) else error


def draw_step(case: DecodeCase, device: torch.device) -> list[Step]:
    """Return copies of the inputs, enough to outrun the L2 cache, with keys and values of a whole segment."""
    sizes = case.sizes()
    copies = copies_needed(sizes.keys_values + sizes.state, device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, rows: int, dtype: torch.dtype = DTYPES[case.dtype]) -> Tensor:
        return torch.randn((case.B, heads, rows, case.K), device=device, dtype=dtype, generator=generator)

    # the size of a memory of all segments before the tail
    written = case.context // case.L * case.L
    return [
        Step(
            normal(case.H, 1),
            normal(case.G, case.L),
            normal(case.G, case.L),
            torch.zeros(case.H, device=device),
            normal(case.G, case.K, torch.float32) * written**0.5,
            torch.rand(case.B, case.G, case.K, device=device, generator=generator) * written,
        )
        for _ in range(copies)
    ]


def step_by_reference(x: Step, segment_len: int) -> Tensor:
    """Return the step's output [B, H, 1, K] by the reference, in the inputs' dtype."""
    q, k, v, gate, *state = x
    return segment_attention(
        q, k, v, segment_len=segment_len, gate=gate, state=MemoryState(*state), backend="reference"
    ).out


def step_eager(x: Step) -> Tensor:
    """Return the step's output [B, H, 1, K] by PyTorch's own operations."""
    q, k, v, gate, memory, normalizer = x
    out = F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])
    features = (F.elu(q) + 1).float().unflatten(1, (k.shape[1], -1)).squeeze(3)
    weight = features @ normalizer[..., None]
    held = weight > 0
    recalled = torch.where(held, features @ memory / weight, 0.0).flatten(1, 2).unsqueeze(2)
    g = gate.sigmoid()[:, None, None] * held.flatten(1, 2).unsqueeze(2)
    return (g * recalled + (1 - g) * out).to(q.dtype)


def _of_a_segment(case: DecodeCase, device: torch.device, *, eager: bool) -> Decoder:
    """Return a decoder over a buffer of one segment: `segment_decode`, or PyTorch's own operations."""
    buffers = draw_step(case, device)
    steps = [x._replace(k=x.k[:, :, : case.tail], v=x.v[:, :, : case.tail]) for x in buffers]
    lengths = torch.full((case.B,), case.tail, dtype=torch.int32, device=device)
    counters = torch.zeros(case.B * case.G, dtype=torch.int32, device=device)
    backend = backend_here(device)

    def run(copy: int) -> Tensor:
        if eager:
            return step_eager(steps[copy])
        q, k, v, gate, *state = buffers[copy]
        return segment_decode(
            q, k, v, lengths, gate=gate, state=MemoryState(*state), counters=counters, backend=backend
        )

    def expected(copy: int) -> Tensor:
        return step_by_reference(Step(*(x.double() for x in steps[copy])), case.L)

    def alter(copy: int) -> None:
        for x in (buffers[copy].v, buffers[copy].memory):
            x.neg_()

    _, keys, values, _, memory, normalizer = buffers[0]
    first = keys, values, memory, normalizer

    def fold() -> Sequence[Tensor]:
        if eager:
            return memory_after(*first)
        return tuple(memory_write(keys, values, MemoryState(memory, normalizer), backend=backend))

    def folded() -> Sequence[Tensor]:
        k, v, m, z = (x.double() for x in first)
        return memory_after(k, v, m, z)

    kept, work = sum(x.nbytes for x in first), floors.decode(case.sizes())
    allowed = GATES[case.dtype].outputs * (TIMES if eager else 1)
    return Decoder(len(steps), run, expected, alter, kept, work, allowed, fold, folded)


def growing_cache(case: DecodeCase, device: torch.device) -> Decoder:
    """Return attention to the whole text, whose keys and values lie in one buffer, at its best: nothing is copied."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int, tokens: int) -> Tensor:
        shape = case.B, heads, tokens, case.K
        return torch.randn(shape, device=device, dtype=DTYPES[case.dtype], generator=generator)

    def draw() -> tuple[Tensor, ...]:
        return normal(case.H, 1), normal(case.G, case.context), normal(case.G, case.context)

    drawn = [draw()]
    kept_bytes = drawn[0][1].nbytes + drawn[0][2].nbytes
    drawn += [draw() for _ in range(copies_needed(kept_bytes, device) - 1)]

    def run(copy: int) -> Tensor:
        q, keys, values = drawn[copy]
        return F.scaled_dot_product_attention(q, keys, values, enable_gqa=case.H != case.G)

    def expected(copy: int) -> Tensor:
        q, keys, values = (x.double() for x in drawn[copy])
        weights = q.unflatten(1, (case.G, -1)).squeeze(3) @ keys.mT * case.K**-0.5
        return (weights.softmax(-1) @ values).flatten(1, 2).unsqueeze(2)

    def alter(copy: int) -> None:
        drawn[copy][2].neg_()

    work = floors.decode(replace(case.sizes(), T=case.context), gated=False)
    return Decoder(len(drawn), run, expected, alter, kept_bytes, work, TIMES * GATES[case.dtype].outputs)


def in_graphs(decoder: Decoder, device: torch.device) -> Decoder:
    """Return the decoder with its step replayed from CUDA graphs, one for each copy of the inputs.

    Raises:
        RuntimeError: Something in the step cannot be captured.
    """
    graphs = [captured(functools.partial(decoder.run, copy), device) for copy in range(decoder.copies)]

    def run(copy: int) -> Tensor:
        output = graphs[copy]()
        assert isinstance(output, Tensor)
        return output

    return decoder._replace(run=run)


GROWING_CACHE = "SDPA, growing cache"
EAGER = "eager delta"
DECODERS: Mapping[str, Callable[[DecodeCase, torch.device], Decoder]] = {
    GROWING_CACHE: growing_cache,
    EAGER: functools.partial(_of_a_segment, eager=True),
    "segattn delta": functools.partial(_of_a_segment, eager=False),
}
# bytes of keys and values beyond which no cache grows; in float64 they are four times as many
ROOM = 8 << 30


def names_of(case: DecodeCase) -> tuple[str, ...]:
    """Return the decoders that have room for a case, the baseline first."""
    names = tuple(DECODERS)
    return names if case.text_bytes <= ROOM else names[1:]
