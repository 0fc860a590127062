"""The cells (layer, segment) of an associative memory, run in the order of a schedule."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.state import MemoryState
from ..backbone import check_not_offloaded
from .decoder import Layer
from .layer import DPFP, AssociativeLayer, Projections, memorize, recall, side_by_side
from .placement import Placement
from .schedules import SCHEDULES
from .stacking import Tensors, kind, routes, stacked, stacked_tensors

States = list[MemoryState | None]


class Options(NamedTuple):
    """Hold what all cells share.

    schedule: one of SCHEDULES.
    features: of queries and keys.
    epsilon: added to denominators.
    num_memory: rows at a segment's end that are written, m; 0: the memory is only read.
    checkpoint: keep only the inputs of cells for the backward pass, and run the cells again there.
    """

    schedule: str
    features: DPFP
    epsilon: float
    num_memory: int
    checkpoint: bool


def run(
    layers: Sequence[Layer],
    memories: Sequence[AssociativeLayer | None],
    hidden: Tensor,
    states: States,
    places: Placement | None,
    options: Options,
) -> tuple[Tensor, States]:
    """Run every layer over every segment.

    Args:
        layers: of the model, in order.
        memories: one a layer; None for a layer without.
        hidden: [S, B, W, d].
        states: one a layer, of B memories; None for a layer without.
        places: None: all rows have all segments, whole, and gradients go through all.

    Returns:
        [S, B, W, d], and the states after the last segment.
    """
    xs, states = list(hidden.unbind()), list(states)
    blocks = _blocks(layers, memories, together=options.schedule == "diagonal" and len(xs) > 1)
    step = _step
    if options.checkpoint and torch.is_grad_enabled():
        step = partial(checkpoint, _step, use_reentrant=False)
    for wave in SCHEDULES[options.schedule](len(layers), len(xs)):
        for block in blocks:
            cells = [(layer, segment) for layer, segment in wave if layer in block.members]
            if not cells:
                continue
            inside, segments = zip(*cells, strict=True)
            x = side_by_side([xs[segment] for segment in segments])
            x, state = step(block, inside, x, _join([states[i] for i in inside]), segments, places, options)
            for (layer, segment), out, after in zip(cells, x, _split(state, len(cells)), strict=True):
                xs[segment], states[layer] = out, after
    return torch.stack(xs), states


class _Block(NamedTuple):
    """Layers that run at once.

    members: their indices in the model.
    layers: as the model has them.
    tensors: parameters and buffers of all, side by side; empty for a single layer.
    run: one layer that computes them all.
    projections: of their memories, None for layers without.
    """

    members: tuple[int, ...]
    layers: tuple[Layer, ...]
    tensors: Tensors
    run: Layer
    projections: Projections | None

    @classmethod
    def of(cls, members: tuple[int, ...], layers: tuple[Layer, ...], projections: Projections | None) -> _Block:
        """Lay the layers side by side; a single one stays as it is."""
        tensors = stacked_tensors([layer.module for layer in layers]) if len(layers) > 1 else {}
        return cls(members, layers, tensors, _side_by_side(layers[0], tensors), projections)

    def part(self, members: tuple[int, ...]) -> _Block:
        """Return a block of some of the layers, which are next to each other in this one."""
        if members == self.members:
            return self
        first = self.members.index(members[0])
        part = slice(first, first + len(members))
        layers = self.layers[part]
        projections = self.projections and self.projections.part(part)
        if torch.is_grad_enabled():
            # the gradient of a slice is as large as all of it
            return _Block.of(members, layers, projections)
        tensors = {name: x[part] for name, x in self.tensors.items()} if len(members) > 1 else {}
        return _Block(members, layers, tensors, _side_by_side(layers[0], tensors), projections)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Run A layers side by side: [A, B, W, d] → [A, B, W, d]."""
        return self.run(hidden.flatten(0, 1)).reshape(hidden.shape)


def _side_by_side(layer: Layer, tensors: Tensors) -> Layer:
    """Return a layer that runs all layers with these tensors; the layer itself where there are none."""
    return layer._replace(module=stacked(layer.module, tensors)) if tensors else layer


def _blocks(layers: Sequence[Layer], memories: Sequence[AssociativeLayer | None], together: bool) -> list[_Block]:
    """Group the layers that are alike into blocks, or, unless `together`, put each into a block of its own."""
    alike: dict[Any, list[int]] = {}
    for index, (layer, memory) in enumerate(zip(layers, memories, strict=True)):
        alone = not together or routes(layer.module)
        key = index if alone else (kind(layer.module), _identity((layer.args, layer.kwargs)), memory is None)
        alike.setdefault(key, []).append(index)
    blocks = []
    for members in alike.values():
        if len(members) > 1:
            for index in members:
                module = layers[index].module
                check_not_offloaded("model", module, module.parameters(), "pass schedule='vertical', or keep it here")
        held = [memory for index in members if (memory := memories[index]) is not None]
        projections = Projections.of(held) if held else None
        blocks.append(_Block.of(tuple(members), tuple(layers[index] for index in members), projections))
    return blocks


def _identity(argument: Any) -> Any:
    """Return what is equal for arguments of a layer that are the same."""
    if isinstance(argument, (tuple, list)):
        return tuple(_identity(x) for x in argument)
    if isinstance(argument, dict):
        return tuple((name, _identity(x)) for name, x in argument.items())
    return argument if isinstance(argument, (bool, int, float, str)) else id(argument)


def _step(
    block: _Block,
    layers: tuple[int, ...],
    hidden: Tensor,
    state: MemoryState | None,
    segments: tuple[int, ...],
    places: Placement | None,
    options: Options,
) -> tuple[Tensor, MemoryState | None]:
    """Read the memories, run the layers, and write the memories.

    Args:
        layers: A of the block's.
        hidden: [A, B, W, d], inputs of the layers.
        state: of A · B memories; None for layers without.
        segments: the one that each layer reads.
        places: where memory tokens stand, as in `run`.
    """
    block = block.part(layers)
    if block.projections is None or state is None:
        return block(hidden), None
    writes, alive, linked = (None, None, None) if places is None else places.of_segments(segments)
    if linked is not None:
        state = _choose(linked, state, state.detach())
    hidden = block(hidden + recall(hidden, block.projections, state, options.features, options.epsilon))
    if not options.num_memory:
        return hidden, state
    last = hidden[:, :, -options.num_memory :]
    rows = last if writes is None else torch.take_along_dim(hidden, writes[..., None], 2)
    after = memorize(rows, block.projections, state, options.features, options.epsilon)
    return hidden, after if alive is None else _choose(alive, after, state)


def _choose(where: Tensor, yes: MemoryState, no: MemoryState) -> MemoryState:
    """Return the memories of `yes` where [A, B] is true, those of `no` elsewhere."""
    row = where.flatten()[:, None, None]
    return MemoryState(
        torch.where(row[..., None], yes.memory, no.memory), torch.where(row, yes.normalizer, no.normalizer)
    )


def _join(states: list[MemoryState | None]) -> MemoryState | None:
    """Join the states of A layers with B rows each to one of A · B rows; None for layers without a memory."""
    if len(states) == 1:
        return states[0]
    held = [state for state in states if state is not None]
    return MemoryState(*(torch.cat(parts) for parts in zip(*held, strict=True))) if held else None


def _split(state: MemoryState | None, layers: int) -> list[MemoryState | None]:
    """Split a state of A · B rows into those of A layers."""
    if state is None or layers == 1:
        return [state] * layers
    return [MemoryState(*parts) for parts in zip(*(x.chunk(layers) for x in state), strict=True)]
