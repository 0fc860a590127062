"""How the kernels become operations that PyTorch knows: opaque to the compiler, with schemas from type hints."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, get_type_hints

import torch
from torch import Tensor

from ..state import Options

NAMESPACE = "segattn"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(
    name: str, operation: Callable[..., Any], shapes: Callable[..., Any], mutates: Iterable[str] = ()
) -> None:  # fmt: skip
    """Register `operation` as torch.ops.segattn.<name>; `shapes` returns its results without data, for the compiler."""
    LIBRARY.define(torch.library.infer_schema(operation, op_name=name, mutates_args=mutates))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, operation, device)
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes, lib=LIBRARY)


def with_flat_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with the fields of its argument `options` as arguments of their own: schemas have no tuples."""
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    first = list(signature.parameters).index("options")
    last = first + len(Options._fields)
    hints = get_type_hints(Options)
    parameters[first : first + 1] = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=hints[name])
        for name in Options._fields
    ]

    @functools.wraps(function)
    def flat(*arguments: Any) -> Any:
        return function(*arguments[:first], Options(*arguments[first:last]), *arguments[last:])

    flat.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return flat


def or_empty(like: Tensor, *tensors: Tensor | None) -> list[Tensor]:
    """Return an empty tensor in place of every None, as operations return tensors only."""
    return [like.new_empty(0) if x is None else x for x in tensors]


def or_none(x: Tensor) -> Tensor | None:
    """Return None in place of an empty tensor."""
    return x if x.numel() else None


def distinct(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return the tensors with none of them twice: a compiled graph takes a function's inputs one by one."""
    seen: list[Tensor | None] = []
    for x in tensors:
        again = x is not None and any(x is other for other in seen)
        seen.append(x.view_as(x) if x is not None and again else x)
    return tuple(seen)
