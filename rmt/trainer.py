"""What Hugging Face's Trainer is told of its settings that do not suit a memory, where it first meets the memory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any, TypeVar

Output = TypeVar("Output", bound=tuple[Any, ...])
_README = "rmt/README.md, 'With other libraries'"


def no_config(kind: str) -> AttributeError:
    """Return the error of a memory's `config`, which Trainer reads where it is to smooth labels."""
    return AttributeError(
        f"label_smoothing_factor must be 0 where Hugging Face's Trainer trains {kind}, which has no config (its "
        f"model's is model.config): pass compute_loss_func, which gets outputs.logits ({_README})"
    )


def read_by_fields(output: type[Output]) -> type[Output]:
    """Make a named tuple, and the slices of it, refuse to become predictions, for which Trainer would take the state.

    Trainer makes predictions by building another tuple of the same class from an iterator over the fields, which raises
    TypeError. Where it wants the loss alone it does not.
    """
    make, item = output.__new__, output.__getitem__

    def check(fields: tuple[Any, ...]) -> None:
        if len(fields) == 1 and isinstance(fields[0], Iterator):
            raise TypeError(
                f"{output.__name__} must be read by its fields, got an iterator to make one of: for compute_metrics "
                f"and predict, Hugging Face's Trainer needs the prediction_step of {_README}"
            )

    class Part(tuple[Any, ...]):
        def __new__(cls, *fields: Any) -> Part:
            check(fields)
            return super().__new__(cls, *fields)

    @wraps(make)
    def new(kind: type[Output], *fields: Any, **named: Any) -> Output:
        check(fields)
        return make(kind, *fields, **named)

    @wraps(item)
    def getitem(self: Output, index: Any) -> Any:
        return Part(item(self, index)) if isinstance(index, slice) else item(self, index)

    output.__new__, output.__getitem__ = new, getitem  # type: ignore[method-assign, assignment]
    return output
