"""The labels of a converted language model, which its head would hand to a loss unchecked."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from ...kernels.text import check_labels
from .parallel import ranks_of


def arguments_with_labels(model: Any) -> tuple[str, ...]:
    """Return the names of a model's arguments, in order, where it is a language model with its head; else none."""
    names = tuple(inspect.signature(model.forward).parameters)
    return names if "labels" in names and model.can_generate() else ()


def check(
    names: tuple[str, ...], trunk: nn.Module, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Check a call's labels, and pass them on as int64, which the loss takes alone: a pre-hook of the model.

    Args:
        names: of the model's arguments, in order.
        trunk: the module that runs the layers; on ranks that share texts it refuses labels, on all of them.
        model, args, kwargs: as PyTorch calls a pre-hook.

    Raises:
        TypeError, ValueError: `labels` or `shift_labels` are not int32 or int64 [B, T], or some logits are left out.
    """
    inputs = dict(zip(names, args, strict=False)) | kwargs
    tokens = inputs.get("input_ids") if inputs.get("input_ids") is not None else inputs.get("inputs_embeds")
    labelled = [name for name in ("labels", "shift_labels") if inputs.get(name) is not None]
    # what is read is checked by the trunk
    if not labelled or ranks_of(trunk) is not None or not isinstance(tokens, Tensor) or tokens.ndim < 2:
        return args, kwargs
    for name in labelled:
        inputs[name] = check_labels(name, inputs[name], "[B, T]", tokens.shape[:2])
    if isinstance(kept := inputs.get("logits_to_keep", 0), Tensor) or kept:
        raise ValueError(f"logits_to_keep must be left out beside labels, which need the logits of all, got {kept}")
    return (), inputs
