"""Tensors of `torch.inference_mode`, such as a state left by generation, as inputs of a call that is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def savable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors; if gradients are wanted, copies of those of inference mode, which no backward may save.

    What is None stays None; a tensor that comes twice is copied once.
    """
    # inside a compiled graph nothing may ask where a tensor is from
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return tensors
    if not any(x is not None and x.requires_grad for x in tensors):
        return tensors
    copies = {id(x): x.clone() for x in tensors if x is not None and x.is_inference()}
    return tuple(copies.get(id(x), x) for x in tensors)
