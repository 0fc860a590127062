"""Ways to read segments with a memory: ours, `recurrent-memory-transformer-pytorch`, and plain loops.

All that stands in one group has the same weights, and computes the same loss, gradients and memory as its definition, a
plain loop over the same layers. One row differs: in the group "Llama", the peer runs its own layers, of the same sizes.

The peer is measured at its best, and set so that it does what the paper says: flash attention, no memories of
Transformer-XL (which its training does not use), no hyper-connections, the same memory at both ends of a segment. Two
differences are its own: its loss does not read the last token, and its reading computes logits, which ours does when
asked to.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...rmt.recurrent.memory import RecurrentMemory
from .associative_loop import AssociativeLoop, memory_first
from .measure import synchronize
from .recurrent_models import (
    Loop,
    PeerEmbedding,
    PeerLayers,
    Sizes,
    associative,
    first_memory,
    llama,
    peer_transformer,
    plain_llama,
    plain_peer,
    recurrent,
    trained,
)

DIRECTIONS = ("reading", "training step")


class RecurrentPeer(NamedTuple):
    """One way to read and to train, with its weights.

    loss: From ids [B, T] to the mean cross-entropy of each next token, differentiable.
    read: From ids [B, T] to the memory after the last segment.
    parameters: The trained parameters, the memory tokens first.
    """

    loss: Callable[[Tensor], Tensor]
    read: Callable[[Tensor], Sequence[Tensor]]
    parameters: Sequence[Tensor]


Make = Callable[[Sizes, torch.device], RecurrentPeer]


@dataclass(frozen=True)
class Entry:
    """One way to read and to train, beside its definition.

    definition: Computes the same from the same weights.
    tolerance: Of `check`, in float32.
    """

    make: Make
    definition: Make
    tolerance: float = 1e-5
    needs_gpu: bool = False


def of_loop(make: Callable[[Sizes, torch.device], Loop]) -> Make:
    """Return a maker of a loop as a peer."""

    def make_peer(sizes: Sizes, device: torch.device) -> RecurrentPeer:
        loop = make(sizes, device)
        return RecurrentPeer(loop.loss, loop.read, loop.parameters)

    return make_peer


def rmt_pytorch(sizes: Sizes, device: torch.device) -> RecurrentPeer:
    """Return the package recurrent-memory-transformer-pytorch as it is."""
    from recurrent_memory_transformer_pytorch import RecurrentMemoryTransformerWrapper

    transformer, memory = peer_transformer(sizes, device), first_memory(sizes, device)
    wrapper = RecurrentMemoryTransformerWrapper(transformer)
    return RecurrentPeer(
        lambda ids: wrapper(ids, memories=memory, return_loss=True)[0],
        lambda ids: [wrapper(ids, memories=memory)[1]],
        [memory, *trained(transformer)],
    )


def _ours(module: RecurrentMemory, trained_too: Sequence[Tensor]) -> RecurrentPeer:
    return RecurrentPeer(
        lambda ids: _loss_of(module(ids, labels=ids).loss),
        lambda ids: [module(ids, output_logits=False).state.memory],
        [module.memory, *trained_too],
    )


def ours_llama(
    sizes: Sizes, device: torch.device, *, attention: str | None = None, compiled: bool = False
) -> RecurrentPeer:
    """Return ours around a Llama."""
    model = llama(sizes, device)
    module = recurrent(sizes, device, model, attention=attention)
    if compiled:
        module.compile(dynamic=False)
    return _ours(module, trained(model))


def ours_peer(sizes: Sizes, device: torch.device) -> RecurrentPeer:
    """Return ours around the peer's layers."""
    transformer = peer_transformer(sizes, device)
    parts: dict[str, Any] = {"embedding": PeerEmbedding(transformer), "head": transformer.to_logits}
    module = recurrent(sizes, device, PeerLayers(transformer), kind="decoder", **parts)
    return _ours(module, trained(transformer))


def ours_associative(sizes: Sizes, device: torch.device, *, schedule: str) -> RecurrentPeer:
    """Return our ARMT around a Llama."""
    module = associative(sizes, device, schedule)
    return RecurrentPeer(
        lambda ids: _loss_of(module(ids, labels=ids).loss),
        lambda ids: [x for memory in module(ids, output_logits=False).state.memories for x in memory],
        memory_first(module),
    )


def _loss_of(loss: Tensor | None) -> Tensor:
    if loss is None:
        raise RuntimeError("a call with labels returned no loss")
    return loss


loop_llama, loop_peer = of_loop(plain_llama), of_loop(plain_peer)
loop_associative = of_loop(lambda sizes, device: AssociativeLoop(associative(sizes, device)))
PEER = "recurrent-memory-transformer-pytorch"
# the first of each group is the baseline of the others
GROUPS: Mapping[str, Mapping[str, Entry]] = {
    "layers of the peer": {
        PEER: Entry(rmt_pytorch, loop_peer),
        "segattn": Entry(ours_peer, loop_peer),
        "plain loop": Entry(loop_peer, loop_peer),
    },
    "Llama": {
        "plain loop": Entry(loop_llama, loop_llama),
        "segattn": Entry(ours_llama, loop_llama),
        "segattn, its attention": Entry(functools.partial(ours_llama, attention="segattn"), loop_llama),
        "segattn, compiled": Entry(functools.partial(ours_llama, compiled=True), loop_llama, needs_gpu=True),
        PEER: Entry(rmt_pytorch, loop_peer),
    },
    "Llama, associative": {
        "plain loop": Entry(loop_associative, loop_associative),
        **{
            # ARMT divides by what the memory holds of a key, however little
            f"segattn {schedule}": Entry(
                functools.partial(ours_associative, schedule=schedule), loop_associative, tolerance=1e-4
            )
            for schedule in ("vertical", "horizontal", "diagonal")
        },
    },
}


def check(entry: Entry, sizes: Sizes, device: torch.device) -> float:
    """Return the worst relative error of the loss, its gradients, and the memory, against the definition."""
    ids = sizes.ids(device)
    found, expected = (_results(make(sizes, device), ids) for make in (entry.make, entry.definition))
    if [x.shape for x in found] != [x.shape for x in expected]:
        return math.inf
    errors = [(x - y).norm() / y.norm().clamp(min=1e-30) for x, y in zip(found, expected, strict=True)]
    # the maximum with a NaN is NaN
    return float(torch.stack(errors).max())


def _results(peer: RecurrentPeer, ids: Tensor) -> list[Tensor]:
    loss = peer.loss(ids)
    gradients = torch.autograd.grad(loss, peer.parameters)
    with torch.no_grad():
        kept = peer.read(ids)
    return [loss.detach(), gradients[0], torch.cat([x.flatten() for x in gradients]), *kept]


def step(peer: RecurrentPeer, ids: Tensor, direction: str) -> Callable[[], None]:
    """Return the function to measure: reading without gradients, or the loss and the gradient of every parameter."""

    def read() -> None:
        with torch.no_grad():
            peer.read(ids)
        synchronize(ids.device)

    def train() -> None:
        torch.autograd.grad(peer.loss(ids), peer.parameters)
        synchronize(ids.device)

    return read if direction == DIRECTIONS[0] else train
