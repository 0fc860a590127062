"""The gate between memory and local attention, and the parameter groups that let an optimiser move it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .precision import KeptWide


class Gate(KeptWide):
    """The gate β, one number per query head; sigmoid(β) weighs the memory (arXiv 2404.07143, equation 10).

    Calling it returns β, float32 [H], as a new tensor: a call, unlike a read of the parameter, runs hooks that gather
    sharded parameters, which may free the parameter's memory as soon as it ends. β stays float32 when the model is
    cast. The parameter is named `bias` because trainers apply no weight decay to that name: decay would pull β to 0,
    and every head to half memory.

    Args:
        heads: query heads, H.
        init: initial value of β.
    """

    def __init__(self, heads: int, init: float = 0.0) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((heads,), float(init), dtype=torch.float32))

    def forward(self) -> Tensor:
        """Return a copy of β, float32 [H]."""
        # FSDP and ZeRO free the parameter when this call has ended, while β is still needed
        return self.bias.to(torch.float32, copy=True)

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the gate."""
        return f"heads={self.bias.numel()}"


def parameter_groups(
    model: nn.Module, lr: float, gate_lr: float = 1e-2, weight_decay: float = 0.01
) -> list[dict[str, Any]]:
    """Split a model's parameters for an optimiser: matrices, vectors, and gates at a learning rate of their own.

    At a model's usual learning rate β hardly leaves its initial value, and every head stays half memory.

    Args:
        model: any module; parameters that do not require a gradient are left out.
        lr: learning rate of all parameters but the gates.
        gate_lr: learning rate of the gates, which have no weight decay.
        weight_decay: weight decay of parameters with two or more dimensions; vectors have none.

    Returns:
        The groups of matrices, vectors and gates in that order, empty ones left out; each is a dictionary of "params",
        "lr" and "weight_decay", as `torch.optim` takes them.

    Raises:
        TypeError: `model` is not a module.

    Warns:
        UserWarning: the model has no gate, or none that requires a gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, whose gates are looked for, got {type(model).__name__}: pass the model, "
            "not its parameters"
        )
    biases = _biases(model)
    if not biases:
        warnings.warn(
            f"model has no gate, so it trains without a memory, got a {type(model).__name__}: call segattn.convert "
            "before the optimiser is made",
            stacklevel=2,
        )
    elif not any(bias.requires_grad for bias in biases):
        warnings.warn("no gate is trained: with PEFT, name them by modules_to_save=['segattn_gate']", stacklevel=2)
    return split_parameters(model, lr, gate_lr, weight_decay)


def split_parameters(model: nn.Module, lr: float, gate_lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of `parameter_groups`, also of a model that is to have no gate, or none that is trained."""
    gates = {id(bias) for bias in _biases(model)}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if id(p) not in gates and p.ndim >= 2]
    vectors = [p for p in trained if id(p) not in gates and p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "lr": lr, "weight_decay": weight_decay},
        {"params": vectors, "lr": lr, "weight_decay": 0.0},
        {"params": [p for p in trained if id(p) in gates], "lr": gate_lr, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _biases(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of all gates inside a model."""
    return [module.bias for module in model.modules() if isinstance(module, Gate)]
