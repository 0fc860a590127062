"""The gate β between memory and local attention, and the optimiser's groups that let it move."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """β [H], one per query head; sigmoid(β) weighs the memory (arXiv 2404.07143, equation 10).

    float32 whatever the model's dtype. Called, so that hooks which gather parameters see it. The parameter is named
    `bias` because trainers keep weight decay off that name: decay pulls β to 0, and every head to half memory.
    """

    def __init__(self, heads: int, init: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((heads,), float(init), dtype=torch.float32))

    def forward(self) -> Tensor:
        # a checkpoint in half precision may have been assigned
        return self.bias.float()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        before = self.bias.detach()
        super()._apply(fn, recurse)
        if self.bias.dtype != torch.float32:
            self.bias.data = before.to(device=self.bias.device, dtype=torch.float32)
        return self


def parameter_groups(
    model: nn.Module, lr: float, gate_lr: float = 1e-2, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices with weight decay, vectors without, gates without and at their own rate.

    At a model's usual rate β hardly leaves its start, and every head stays half memory.

    Args:
        model: any module; parameters that need no gradient are left out.
        lr: learning rate of everything but the gates.
        gate_lr: learning rate of the gates.
        weight_decay: of parameters with two dimensions or more.

    Returns:
        Dictionaries of "params", "lr" and "weight_decay", in that order, without empty groups.
    """
    found = [gate.bias for gate in model.modules() if isinstance(gate, Gate)]
    if found and not any(bias.requires_grad for bias in found):
        warnings.warn("no gate is trained: with PEFT, name them by modules_to_save=['segattn_gate']", stacklevel=2)
    gates = {id(bias) for bias in found}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if id(p) not in gates and p.ndim >= 2]
    vectors = [p for p in trained if id(p) not in gates and p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in gates], "lr": gate_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
