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
        f"label_smoothing_factor must be 0 where Hugging Face's Trainer trains a {kind}, which has no config (its "
        f"model's is model.config): pass compute_loss_func, which gets outputs.logits ({_README})"
    )


def read_by_fields(output: type[Output]) -> type[Output]:
    """Make a named tuple refuse what Trainer does to predictions, for which it would take the state too.

    It slices the output of a call with labels, and makes another one of an iterator over the fields of a call without.
    Both then raise TypeError.
    """
    make, item = output.__new__, output.__getitem__

    def refused(got: str) -> TypeError:
        return TypeError(
            f"a {output.__name__} must be read by its fields, got {got}: for compute_metrics and predict, Hugging "
            f"Face's Trainer needs the prediction_step of {_README}"
        )

    @wraps(make)
    def new(kind: type[Output], *fields: Any, **named: Any) -> Output:
        if len(fields) == 1 and isinstance(fields[0], Iterator):
            raise refused("an iterator to make one of")
        return make(kind, *fields, **named)

    @wraps(item)
    def getitem(self: Output, index: Any) -> Any:
        if isinstance(index, slice):
            raise refused("a slice of it")
        return item(self, index)

    output.__new__, output.__getitem__ = new, getitem  # type: ignore[method-assign, assignment]
    return output
