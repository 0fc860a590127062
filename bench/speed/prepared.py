"""Inputs of a case, and its peers made ready to be timed on them."""

from __future__ import annotations

import functools
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


def inputs_of(peer: Peer, case: Case, drawn: Drawn, gradients: bool) -> Drawn:
    """Return the inputs as a peer takes them, leaves of a graph of their own."""
    q, k, v, gate, dout = drawn
    if peer.of_segments:
        q, k, v, dout = (to_segments(x, case.L) for x in (q, k, v, dout))
    q, k, v, gate = (x.detach().requires_grad_(gradients) for x in (q, k, v, gate))
    return Drawn(q, k, v, gate, dout)


def gradients_of(peer: Peer, inputs: Drawn, out: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k and v, and of the gate where the peer has a memory.

    A single segment reads no memory, and then the gate has no gradient.
    """
    used = inputs[:3] if peer.update is None else inputs[:4]
    return torch.autograd.grad(out, used, inputs.dout, allow_unused=True)


def preparation(peer: Peer, case: Case, drawn: list[Drawn], direction: str) -> Prepare:
    """Return what is timed in one direction, a run to the output or to `gradients_of` it.

    For the backward alone, the forward is the preparation.
    """

    def prepare(copy: int) -> Callable[[], object]:
        inputs = inputs_of(peer, case, drawn[copy], direction != "forward")
        forward = functools.partial(peer.run, *inputs[:4], case.L)
        if direction == "forward":
            return forward
        if direction == "backward":
            return functools.partial(gradients_of, peer, inputs, forward())
        return lambda: gradients_of(peer, inputs, forward())

    return prepare
