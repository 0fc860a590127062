"""Fit of a layer's gate and maps to the output of full attention, all else frozen (arXiv 2410.10254, transfer)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..huggingface.settings import GATE, MEMORY
from ..huggingface.watching import AttentionCall
from .schedule import cosine

# sigmoid(β) is 1 and 0 in float32
MEMORY_ALONE, WINDOW_ALONE = 100.0, -110.0
# of the memory, with which a fit begins: neither so small nor so large that a gate's gradient vanishes
LEAST_SHARE, LARGEST_SHARE = 0.001, 0.9


class LayerFit(NamedTuple):
    """The figures of a layer, on a stretch of text that was not fitted to, in its rows beyond the window.

    beyond: share of the output's energy that the window alone misses: Σ (window − full)² / Σ full².
    before: loss of each head with the best gates before any step: Σ (out − full)² / Σ (window − full)².
    after: loss of each head after all steps.
    gates: sigmoid(β) of each head after all steps of this fit; rounds of training end to end change them further.
    """

    layer: int
    beyond: float
    before: list[float]
    after: list[float]
    gates: list[float]


class Recipe(NamedTuple):
    """Hold the settings of a layer's fit.

    first: the first row that counts, beyond what local attention sees.
    steps: of Adam, each on one row of the batch.
    gate_lr, map_lr: learning rates at the beginning; they fall to 0 as a cosine.
    seed: of the order of rows.
    """

    first: int
    steps: int
    gate_lr: float
    map_lr: float
    seed: int


def fit_layer(
    call: AttentionCall, full: Tensor, recipe: Recipe, on_step: Callable[[], None] = lambda: None
) -> LayerFit:
    """Fit the gate, and the maps where there are any, of the layer that is called; the last row is held out.

    The loss of a head is its squared error over that of the window alone, so that no head outweighs another.

    Args:
        call: of a converted layer with a memory, with at least two rows.
        full: [B, H, T, V], the outputs to fit to.
        on_step: called after each step.
    """
    parameters = memory_parameters(call.attention)
    gate = parameters[f"{GATE}.bias"]
    maps = [parameter for parameter in parameters.values() if parameter is not gate]
    rows = [_Row(call.rows(i, i + 1), full[i : i + 1], recipe.first, gate) for i in range(len(full))]
    *fitted, held_out = rows
    with torch.no_grad():
        gate.copy_(_best_gate(fitted))
        before = held_out.losses()
    groups = [{"params": [gate], "lr": recipe.gate_lr}, {"params": maps, "lr": recipe.map_lr}]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]], betas=(0.9, 0.99))
    schedule = cosine(optimizer, recipe.steps)
    generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + call.layer)
    with torch.enable_grad(), trained([gate, *maps]):
        for _ in range(recipe.steps):
            row = fitted[int(torch.randint(len(fitted), (1,), generator=generator, device="cpu"))]
            optimizer.zero_grad()
            row.losses().sum().backward()
            optimizer.step()
            schedule.step()
            on_step()
        optimizer.zero_grad()
    with torch.no_grad():
        after, gates = held_out.losses(), gate.sigmoid()
    return LayerFit(call.layer, held_out.beyond, before.tolist(), after.tolist(), gates.tolist())


def memory_parameters(attention: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a converted attention's gate and maps, by name."""
    return {name: x for name, x in attention.named_parameters() if name.partition(".")[0] in MEMORY}


class _Row:
    """A stretch of text at one layer: what is wanted, what the window alone gives, and the energy that it misses."""

    def __init__(self, call: AttentionCall, full: Tensor, first: int, gate: nn.Parameter) -> None:
        self.call, self.first, self.gate = call, first, gate
        with torch.no_grad():
            self.full = full[:, :, first:].float()
            self.window = self._with_gate(WINDOW_ALONE)
            self.missed = _energy(self.window - self.full)
        self.beyond = float(self.missed.sum() / _energy(self.full).sum())

    def losses(self) -> Tensor:
        """Return the loss [H] of each head over that of the window alone."""
        return _energy(self._out() - self.full) / self.missed.clamp(min=torch.finfo(torch.float32).tiny)

    def products(self) -> tuple[Tensor, Tensor]:
        """Return, for each head, what the memory adds to the window times what is missed, and times itself, [H]."""
        added = self._with_gate(MEMORY_ALONE) - self.window
        return ((self.full - self.window) * added).sum((0, 2, 3)), _energy(added)

    def _with_gate(self, value: float) -> Tensor:
        kept = self.gate.detach().clone()
        self.gate.fill_(value)
        out = self._out()
        self.gate.copy_(kept)
        return out

    def _out(self) -> Tensor:
        return self.call.segmented()[:, :, self.first :].float()


def _energy(x: Tensor) -> Tensor:
    return x.square().sum((0, 2, 3))


def _best_gate(rows: list[_Row]) -> Tensor:
    """Return the β [H] of least squared error over all rows, with the maps as they are."""
    wanted, added = (torch.stack(parts).sum(0) for parts in zip(*(row.products() for row in rows), strict=True))
    share = (wanted / added.clamp(min=torch.finfo(torch.float32).tiny)).clamp(LEAST_SHARE, LARGEST_SHARE)
    return share.logit()


@contextmanager
def trained(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let these parameters have gradients, though the model is frozen."""
    kept = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, before in zip(parameters, kept, strict=True):
            parameter.requires_grad_(before)
