"""Tensors of `torch.inference_mode`, such as a state left by generation, as inputs of a call that is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NAMESPACE = "segattn"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define("copied(Tensor x) -> Tensor")
_LIBRARY.impl("copied", torch.clone, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::copied", torch.empty_like, lib=_LIBRARY)


def savable(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Return the tensors; if gradients are wanted, copies of those of inference mode, which no backward may save.

    What is None stays None; a tensor that comes twice is copied once.
    """
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors):
        return tensors
    if torch.compiler.is_compiling():
        return tuple(None if x is None else normal(x) for x in tensors)
    copies = {id(x): x.clone() for x in tensors if x is not None and x.is_inference()}
    return tuple(copies.get(id(x), x) for x in tensors)


def normal(x: Tensor) -> Tensor:
    """Return `x`, or a copy where it was made in inference mode and autograd could not save it for a backward pass."""
    if torch.compiler.is_compiling():
        # a graph cannot ask where a tensor is from, and of a copy that the compiler can see through it saves the source
        return x if x.requires_grad or not torch.is_grad_enabled() else torch.ops.segattn.copied(x)
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x
