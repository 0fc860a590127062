"""In which order the cells (layer, segment) are run: all orders compute the same.

A cell needs the layer below in its own segment, and its own layer's memory of the segment before. Recurrence that
stays inside a layer leaves more than one order, and lets a diagonal of cells run at once (arXiv 2506.05229).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ...kernels.state import MemoryState
from .decoder import Layer
from .layer import DPFP, AssociativeLayer, Projections, memorize, recall, side_by_side
from .placement import Placement
from .stacking import Tensors, kind, routes, stacked, stacked_tensors

Wave = list[tuple[int, int]]
States = list[MemoryState | None]


def vertical(depth: int, segments: int) -> Iterator[Wave]:
    """Segment by segment."""
    return ([(layer, segment)] for segment in range(segments) for layer in range(depth))


def horizontal(depth: int, segments: int) -> Iterator[Wave]:
    """Layer by layer."""
    return ([(layer, segment)] for layer in range(depth) for segment in range(segments))


def diagonal(depth: int, segments: int) -> Iterator[Wave]:
    """All cells with the same layer + segment at once."""
    for at in range(depth + segments - 1):
        yield [(layer, at - layer) for layer in range(max(0, at - segments + 1), min(depth, at + 1))]


SCHEDULES: dict[str, Callable[[int, int], Iterator[Wave]]] = {
    "vertical": vertical,
    "horizontal": horizontal,
    "diagonal": diagonal,
}


class Options(NamedTuple):
    """What all cells share.

    schedule: one of SCHEDULES.
    features: of queries and keys.
    num_memory: rows at a segment's end that are written, m; 0: the memory is only read.
    checkpoint: keep what goes into cells alone for their backward, and run them again there.
    """

    schedule: str
    features: DPFP
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
    """Every layer over every segment.

    Args:
        hidden: [S, B, W, d].
        states: one a layer, of B memories; None for a layer without.
        places: None: all rows have all segments, whole, and all gradient.

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
    layers: as they are.
    tensors: of all, side by side; empty for a single layer.
    run: all of them in one.
    projections: of their memories, None for layers without.
    """

    members: tuple[int, ...]
    layers: tuple[Layer, ...]
    tensors: Tensors
    run: Layer
    projections: Projections | None

    @classmethod
    def of(cls, members: tuple[int, ...], layers: tuple[Layer, ...], projections: Projections | None) -> _Block:
        tensors = stacked_tensors([layer.module for layer in layers]) if len(layers) > 1 else {}
        return cls(members, layers, tensors, _side_by_side(layers[0], tensors), projections)

    def part(self, members: tuple[int, ...]) -> _Block:
        """Some of them, next to each other."""
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
        """[A, B, W, d] → [A, B, W, d]."""
        return self.run(hidden.flatten(0, 1)).reshape(hidden.shape)


def _side_by_side(layer: Layer, tensors: Tensors) -> Layer:
    return layer._replace(module=stacked(layer.module, tensors)) if tensors else layer


def _blocks(layers: Sequence[Layer], memories: Sequence[AssociativeLayer | None], together: bool) -> list[_Block]:
    """Layers that are alike together, or each alone."""
    alike: dict[Any, list[int]] = {}
    for index, (layer, memory) in enumerate(zip(layers, memories, strict=True)):
        alone = not together or routes(layer.module)
        key = index if alone else (kind(layer.module), _identity((layer.args, layer.kwargs)), memory is None)
        alike.setdefault(key, []).append(index)
    blocks = []
    for members in alike.values():
        held = [memory for index in members if (memory := memories[index]) is not None]
        projections = Projections.of(held) if held else None
        blocks.append(_Block.of(tuple(members), tuple(layers[index] for index in members), projections))
    return blocks


def _identity(given: Any) -> Any:
    if isinstance(given, (tuple, list)):
        return tuple(_identity(x) for x in given)
    if isinstance(given, dict):
        return tuple((name, _identity(x)) for name, x in given.items())
    return given if isinstance(given, (bool, int, float, str)) else id(given)


def _step(
    block: _Block,
    layers: tuple[int, ...],
    hidden: Tensor,
    state: MemoryState | None,
    segments: tuple[int, ...],
    places: Placement | None,
    options: Options,
) -> tuple[Tensor, MemoryState | None]:
    """Read, run the layers, write: A of the block's, [A, B, W, d], each in its own one of `segments`."""
    block = block.part(layers)
    if block.projections is None or state is None:
        return block(hidden), None
    writes, alive, linked = (None, None, None) if places is None else places.of_segments(segments)
    if linked is not None:
        state = _choose(linked, state, state.detach())
    hidden = block(hidden + recall(hidden, block.projections, state, options.features))
    if not options.num_memory:
        return hidden, state
    last = hidden[:, :, -options.num_memory :]
    rows = last if writes is None else torch.take_along_dim(hidden, writes[..., None], 2)
    after = memorize(rows, block.projections, state, options.features)
    return hidden, after if alive is None else _choose(alive, after, state)


def _choose(where: Tensor, yes: MemoryState, no: MemoryState) -> MemoryState:
    """`yes` where [A, B] is true."""
    row = where.flatten()[:, None, None]
    return MemoryState(
        torch.where(row[..., None], yes.memory, no.memory), torch.where(row, yes.normalizer, no.normalizer)
    )


def _join(states: list[MemoryState | None]) -> MemoryState | None:
    """Of A layers with B rows each, one of A · B rows; None for layers without a memory."""
    if len(states) == 1:
        return states[0]
    held = [state for state in states if state is not None]
    return MemoryState(*(torch.cat(parts) for parts in zip(*held, strict=True))) if held else None


def _split(state: MemoryState | None, layers: int) -> list[MemoryState | None]:
    if state is None or layers == 1:
        return [state] * layers
    return [MemoryState(*parts) for parts in zip(*(x.chunk(layers) for x in state), strict=True)]
