"""Layers side by side: one call runs several layers that differ only in the values of their parameters.

The layers' batches are laid end to end, [A · B, ...]. Only modules that hold parameters need to know: they split the
batch, and multiply each part by its own layer's. Attention, activations and dropout run over the whole batch at once.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..twins import twin, with_tensors

Tensors = dict[str, Tensor]


def kind(module: nn.Module) -> Any:
    """Return a key that is equal for modules that compute the same but for the values of their parameters."""
    parts = []
    for path, part in module.named_modules():
        values = {name: _plain(x) for name, x in vars(part).items()}
        if not values.get("scale_attn_by_inverse_layer_idx"):
            values.pop("layer_idx", None)
        parts.append((path, type(part), tuple((name, x) for name, x in values.items() if x is not None)))
    tensors = tuple((name, x.shape, x.dtype, x.device) for name, x in _tensors(module).items())
    return tuple(parts), tensors


def routes(module: nn.Module) -> bool:
    """Return whether tokens go to experts, whose batches are no longer those of layers laid end to end."""
    return any(path.rpartition(".")[2] == "experts" for path, _ in module.named_modules())


def stacked_tensors(modules: list[nn.Module]) -> Tensors:
    """Stack the parameters and buffers of A modules of one kind: name → [A, ...]."""
    held = [_tensors(module) for module in modules]
    return {name: torch.stack([own[name] for own in held]) for name in held[0]}


def stacked(module: nn.Module, tensors: Tensors) -> nn.Module:
    """Return a shallow copy of `module` that runs A modules, whose tensors these are: [A · B, ...] → [A · B, ...]."""
    if not module._parameters:
        children = {
            name: child
            and stacked(child, {k.removeprefix(f"{name}."): x for k, x in tensors.items() if k.startswith(f"{name}.")})
            for name, child in module._modules.items()
        }
        copied = twin(module, children)
        copied.__dict__.pop("forward", None)
        return copied
    copied, count = twin(module), next(iter(tensors.values())).shape[0]
    # code that reads a weight instead of calling the module gets one of another shape, and an error
    copied.__dict__["_parameters"] = {name: tensors.get(name) for name in module._parameters}
    copied.forward = partial(_forward, module, tensors, count)
    return copied


def _forward(module: nn.Module, tensors: Tensors, count: int, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Run `count` modules of one kind over their parts of the batch x."""
    parts = x.unflatten(0, (count, -1))
    if type(module) in (nn.Linear, Conv1D):
        weight, bias = tensors["weight"], tensors.get("bias")
        weight = weight.mT if isinstance(module, nn.Linear) else weight
        rows = parts.flatten(1, -2)
        out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, weight)
        return out.view(*x.shape[:-1], out.shape[-1])

    def one(values: Tensors, part: Tensor) -> Tensor:
        own = {id(x): values[name] for name, x in _tensors(module).items()}
        return with_tensors(module, own)(part, *args, **kwargs)

    return torch.vmap(one, randomness="different")(tensors, parts).flatten(0, 1)


def _tensors(module: nn.Module) -> Tensors:
    """Return the parameters and buffers of a module, by name."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


def _plain(x: Any) -> Any:
    """Return a number, a string, or several of them, as what can be compared; None for all else."""
    if isinstance(x, dict):
        x = tuple(x.items())
    if isinstance(x, (tuple, list)):
        own = tuple(_plain(item) for item in x)
        return None if None in own else own
    return x if isinstance(x, (bool, int, float, str)) else None
