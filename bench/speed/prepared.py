"""Inputs of a case, and its peers made ready to be timed on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .peers import Peer, to_segments
from .timing import Prepare, copies_needed
from .workloads import DTYPES, Case


class Drawn(NamedTuple):
    """One copy of a case's inputs, and the gradient of its output."""

    q: Tensor
    k: Tensor
    v: Tensor
    gate: Tensor
    dout: Tensor


def draw(case: Case, device: torch.device, copies: int | None = None) -> list[Drawn]:
    """Return copies of the inputs, by default enough to outrun the L2 cache."""
    sizes = case.sizes()
    if copies is None:
        copies = copies_needed(sizes.queries + sizes.keys_values, device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(heads: int) -> Tensor:
        shape = (case.B, heads, case.T, case.K)
        return torch.randn(shape, device=device, dtype=DTYPES[case.dtype], generator=generator)

    found = []
    for _ in range(copies):
        gate = torch.randn(case.H, device=device, generator=generator)
        found.append(Drawn(normal(case.H), normal(case.G), normal(case.G), gate, normal(case.H)))
    return found


def preparation(peer: Peer, case: Case, drawn: list[Drawn], direction: str) -> Prepare:
    """Return what is timed in one direction; for the backward alone, the forward is the preparation.

    A run returns the output, else the gradients of q, k and v, and of the gate where the peer has a memory.
    """
    grad = direction != "forward"

    def prepare(copy: int) -> Callable[[], object]:
        q, k, v, gate, dout = drawn[copy]
        if peer.of_segments:
            q, k, v, dout = (to_segments(x, case.L) for x in (q, k, v, dout))
        q, k, v, gate = (x.detach().requires_grad_(grad) for x in (q, k, v, gate))
        used = (q, k, v) if peer.update is None else (q, k, v, gate)

        def gradients(out: Tensor) -> tuple[Tensor, ...]:
            # a single segment reads no memory, and then the gate has no gradient
            return torch.autograd.grad(out, used, dout, allow_unused=True)

        if direction == "forward":
            return lambda: peer.run(q, k, v, gate, case.L)
        if direction == "backward":
            out = peer.run(q, k, v, gate, case.L)
            return lambda: gradients(out)
        return lambda: gradients(peer.run(q, k, v, gate, case.L))

    return prepare
