"""What users of Hugging Face's models and Trainer are told where a memory is none of these models."""

from __future__ import annotations

from collections.abc import Iterator
from functools import wraps
from typing import Any, TypeVar

Output = TypeVar("Output", bound=tuple[Any, ...])
_README = "rmt/README.md, 'With other libraries'"


# attributes of a Hugging Face model that a memory lacks, and what to do instead
_MISSING = {
    "config": "label_smoothing_factor must be 0 where Hugging Face's Trainer trains {kind}, which has no config (its "
    f"model's is model.config): pass compute_loss_func, which gets outputs.logits ({_README})",
    **dict.fromkeys(
        ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"),
        "{kind} has no {name}, as a paged cache (continuous batching) cannot hold a memory: call generate with a batch "
        "of prompts and an attention_mask",
    ),
    "save_pretrained": "{kind} has no {name}: save its model by model.save_pretrained, and the memory by "
    "segattn.save_memory",
}


def missing(name: str, kind: str) -> AttributeError | None:
    """Return the error of an attribute that a memory lacks, and that is looked for by its name; None of others."""
    return AttributeError(_MISSING[name].format(kind=kind, name=name)) if name in _MISSING else None


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
