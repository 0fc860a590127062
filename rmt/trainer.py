"""What Hugging Face's Trainer is told of its settings that do not suit a memory, where it first meets the memory."""

from __future__ import annotations

_README = "rmt/README.md, 'With other libraries'"


def no_config(kind: str) -> AttributeError:
    """Return the error of a memory's `config`, which Trainer reads where it is to smooth labels."""
    return AttributeError(
        f"label_smoothing_factor must be 0 where Hugging Face's Trainer trains a {kind}, which has no config (its "
        f"model's is model.config): pass compute_loss_func, which gets outputs.logits ({_README})"
    )


def check_index(index: object, kind: str) -> None:
    """Check that an output is not sliced, as Trainer does for predictions, which it would take the state for.

    Raises:
        TypeError: the index is a slice.
    """
    if isinstance(index, slice):
        raise TypeError(
            f"a {kind} must be read by its fields, got a slice of it: for compute_metrics and predict, Hugging Face's "
            f"Trainer needs the prediction_step of {_README}"
        )
