"""What the stages of an adaptation share: what is kept of them, progress, and a model without its memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ...runs.checkpoint import save_checkpoint
from ..gate import Gate
from ..huggingface.settings import attentions_of, trunk_of
from .fit import WINDOW_ALONE, memory_parameters

# names of the model whose memory is closed, and of the one that is fitted
WINDOW, ADAPTED = "window alone", "adapted"


class Listener(Protocol):
    """Take note of a run's progress."""

    def begin(self, stage: str, count: int) -> None:
        """Take note of a stage, and of the steps, prompts or tokens that are left of it."""

    def read(self, stage: str, count: int) -> None:
        """Take note of those that a stage has done since."""

    def finished(self, what: str) -> None:
        """Take note of a layer or a measurement, in words."""


class Kept:
    """Hold what a run has come to, and write it to a file after each part.

    That is the heads that look passkeys up, figures and parameters of each layer that is fitted, figures of each round
    of training end to end with what the optimizer holds, and the passkeys that are asked, by the model's name.

    Args:
        path: of the checkpoint.
        settings: of the run.
        fingerprint: of the plain model.
        saved: content of an earlier run's checkpoint; empty: there is none.
    """

    PARTS = ("heads", "layers", "tensors", "fingerprint", "rounds", "optimizer", "passkeys")

    def __init__(self, path: Path, settings: Mapping[str, Any], fingerprint: str, saved: Mapping[str, Any]) -> None:
        self.path, self.settings, self.fingerprint = path, dict(settings), fingerprint
        self.heads: dict[int, list[int]] = dict(saved.get("heads", {}))
        self.layers: dict[int, dict[str, Any]] = dict(saved.get("layers", {}))
        self.tensors: dict[int, dict[str, Tensor]] = dict(saved.get("tensors", {}))
        self.rounds: list[dict[str, Any]] = list(saved.get("rounds", []))
        self.optimizer: dict[str, Any] = dict(saved.get("optimizer", {}))
        self.passkeys: dict[str, list[dict[str, Any]]] = dict(saved.get("passkeys", {}))

    def restore(self, model: Any) -> None:
        """Give a converted model the parameters of the layers that are fitted."""
        attentions = attentions_of(trunk_of(model))
        with torch.no_grad():
            for layer, tensors in self.tensors.items():
                for name, parameter in memory_parameters(attentions[layer]).items():
                    parameter.copy_(tensors[name])

    def left(self, layers: Iterable[int]) -> list[int]:
        """Return those of the layers that are not fitted."""
        return [layer for layer in layers if layer not in self.layers]

    def add(self, attention: Any, figures: dict[str, Any]) -> None:
        """Keep a layer that is fitted."""
        self.layers[int(attention.layer_idx)] = figures
        self._keep([attention])

    def add_round(self, attentions: Iterable[Any], figures: dict[str, Any], optimizer: dict[str, Any]) -> None:
        """Keep a round, which has changed all of these layers."""
        self.rounds.append(figures)
        self.optimizer = optimizer
        self._keep(attentions)

    def save(self) -> None:
        """Write all to the file."""
        save_checkpoint(self.path, {name: getattr(self, name) for name in ("settings", *self.PARTS)})

    def _keep(self, attentions: Iterable[Any]) -> None:
        # what was asked of another model
        self.passkeys.pop(ADAPTED, None)
        for attention in attentions:
            # copies, since later steps change them in place
            tensors = {name: x.detach().to("cpu", copy=True) for name, x in memory_parameters(attention).items()}
            self.tensors[int(attention.layer_idx)] = tensors
        self.save()

    def in_order(self) -> list[dict[str, Any]]:
        """Return the figures of all layers that are fitted."""
        return [self.layers[layer] for layer in sorted(self.layers)]


@contextmanager
def without_memory(model: Any) -> Iterator[None]:
    """Close every gate of a converted model for as long as this lasts."""
    gates = [module.bias for module in model.modules() if isinstance(module, Gate)]
    kept = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.fill_(WINDOW_ALONE)
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, before in zip(gates, kept, strict=True):
                gate.copy_(before)
