"""The warning of training that trains no memory: one rule for all that has one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from weakref import WeakSet

import torch
from torch import nn

from .errors import UntrainedMemoryWarning

# modules of which there is nothing more to say, and those that have read one short text, whose state may go on
_SETTLED: WeakSet[nn.Module] = WeakSet()
_WAITING: WeakSet[nn.Module] = WeakSet()


def without_memory(segment_len: int, lookback: int = 0) -> tuple[str, int]:
    """Return how many of a text's first tokens see no memory: what that number is called, and the number."""
    return "(1 + lookback) · segment_len" if lookback else "segment_len", (1 + lookback) * segment_len


def warn_untrained(
    module: nn.Module, limit: tuple[str, int], longest: Callable[[], int], *, name: str = "input_ids", how: str
) -> None:
    """Warn once, for each module, of a text in training that ends before a memory is read.

    Args:
        module: what reads the text, in training or not.
        limit: as `without_memory` returns it.
        longest: returns the tokens of the longest text; called only where the answer matters.
        name: the argument that holds the texts.
        how: how the module gets shorter segments.

    Warns:
        UntrainedMemoryWarning: no text is longer than the limit.
    """
    if _is_open(module) and (tokens := longest()) <= limit[1]:
        _warn(module, limit, tokens, name, how)


def warn_untrained_piece(
    module: nn.Module, goes_on: bool, limit: tuple[str, int], longest: Callable[[], int], *, name: str = "input_ids"
) -> None:
    """Warn once, as `warn_untrained`, of a module that returns its state: where two short texts follow each other.

    The state of one may go on into the next call, which then reads it.

    Args:
        module, limit, longest, name: as in `warn_untrained`.
        goes_on: whether the text goes on from a state.

    Warns:
        UntrainedMemoryWarning: neither this text nor the one before is longer than the limit or goes on.
    """
    if not _is_open(module):
        return
    if goes_on:
        _SETTLED.add(module)
    elif (tokens := longest()) > limit[1]:
        _WAITING.discard(module)
    elif module in _WAITING:
        _warn(module, limit, tokens, name, f"make the {type(module).__name__}")
    else:
        _WAITING.add(module)


def expect_short_texts(module: nn.Module) -> None:
    """Let a module, and all modules in it, be trained on short texts without a warning, as a curriculum begins."""
    _SETTLED.update(module.modules())


def _is_open(module: nn.Module) -> bool:
    """Return whether a module is in training and may still be warned of."""
    # a graph of torch.compile holds no warnings
    trained = not torch.compiler.is_compiling() and module.training and torch.is_grad_enabled()
    return trained and module not in _SETTLED


def _warn(module: nn.Module, limit: tuple[str, int], tokens: int, name: str, how: str) -> None:
    _SETTLED.add(module)
    warnings.warn(
        f"no memory is trained: {name} must be longer than {limit[0]}, {limit[1]}, for a text to read its memory, "
        f"got texts of at most {tokens} tokens: pass longer blocks, or {how} with a smaller segment_len",
        UntrainedMemoryWarning,
        stacklevel=4,
    )
