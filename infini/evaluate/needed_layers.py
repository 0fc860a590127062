"""Reading without work that no later token sees, in models of which few layers have a memory.

What a layer without a memory puts out depends on its window alone, and each layer above widens that by a lookback. So
rows that have gone on alike for long enough are alike in all layers below the first memory, which then run for one of
them. And layers above the last memory need not run at all for tokens out of reach of the text's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..huggingface.cache import InfiniCache
from ..huggingface.forward_pass import ARGUMENT
from ..huggingface.settings import Settings, conversion_of, is_converted, stack_of, trunk_of


class Rest(NamedTuple):
    """Hold what is to be known of the rest of some texts, of which the beginning may be read already.

    time: tokens of each row.
    differs: int64 [n], the columns in which the rows are not all alike, in rising order.
    alike: whether the rows have begun alike.
    """

    time: int
    differs: Tensor
    alike: bool

    @classmethod
    def of(cls, tokens: Tensor, *, alike: bool) -> Rest:
        """Return it for tokens [B, T]."""
        return cls(tokens.shape[1], (tokens != tokens[:1]).any(dim=0).nonzero().flatten(), alike)


class Needed(NamedTuple):
    """Say how many layers a piece of a text needs, counted from the lowest.

    shared: those that run for one row in place of all.
    run: those that run; the others keep the state that they have.
    """

    shared: int
    run: int


def needed_layers(model: nn.Module, rest: Rest, begin: int, end: int, cache: Any) -> Needed | None:
    """Return what the piece [begin, end) of the rest of a text needs; None: all layers, for all rows.

    All pieces but the last are whole segments, so that tails which no layer renews stay as long as they have to be.

    Args:
        model: a causal language model, converted or not.
        cache: with what comes before the piece; None: nothing.
    """
    # a cache that records keeps a segment more in the layers that run
    if not isinstance(cache, InfiniCache) or cache.recording or (conversion := conversion_of(model)).native:
        return None
    settings, rows, depth = conversion.settings, cache.rows, conversion.depth
    if len(set(rows.lengths)) > 1 or not min(rows.folded):
        return None
    before = rows.lengths[0] - begin
    below, above = settings.memory_layers[0], depth - 1 - settings.memory_layers[-1]
    shared = below if len(rows.lengths) > 1 and _are_alike(rest, begin, end, before, below, settings) else 0
    last_segment = (before + rest.time - 1) // settings.segment_len * settings.segment_len
    run = depth - above if _reach(before + end, above, settings) <= last_segment else depth
    return None if (shared, run) == (0, depth) else Needed(shared, run)


def _are_alike(rest: Rest, begin: int, end: int, before: int, layers: int, settings: Settings) -> bool:
    """Return whether so many layers, the lowest, hold and put out the same for all rows from `begin` to `end`."""
    if not rest.alike:
        return False
    if not (count := int(torch.searchsorted(rest.differs, end))):
        return True
    first, last = int(rest.differs[0]), int(rest.differs[count - 1])
    return settings.sinks <= before + first and _reach(before + last + 1, layers, settings) <= before + begin


def _reach(end: int, layers: int, settings: Settings) -> int:
    """Return where the last segment ends that sees, through so many layers, a token before `end`."""
    return (-(-end // settings.segment_len) + layers * settings.lookback) * settings.segment_len


# of models by the module that runs their layers: what is changed for a pass is shared by all threads
_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_LOCK = RLock()


@contextmanager
def only_needed(model: nn.Module, cache: Any, needed: Needed | None) -> Iterator[None]:
    """Let a model run what is needed alone, in one pass that goes on from the cache; other threads' passes wait."""
    if not is_converted(model):
        yield
        return
    trunk = trunk_of(model)
    with _LOCK:
        lock = _LOCKS.setdefault(trunk, RLock())
    with lock, ExitStack() as stack:
        if needed is not None:
            _run_once(stack, trunk, cache, needed.shared)
            _leave_out(stack, trunk, needed.run)
        yield


def _run_once(stack: ExitStack, trunk: Any, cache: InfiniCache, count: int) -> None:
    """Let so many layers, the lowest, run for the first row in place of all."""
    if not count:
        return
    layers, batch = stack_of(trunk)[1], len(cache.rows.lengths)

    def first(x: Tensor) -> Tensor:
        return x[:1]

    def all_rows(x: Tensor) -> Tensor:
        return x.expand(batch, *x.shape[1:])

    # behind the hook that sets the positions
    stack.callback(trunk.register_forward_pre_hook(_positions_once, with_kwargs=True).remove)
    stack.callback(layers[0].register_forward_pre_hook(_on_input(first), with_kwargs=True).remove)
    stack.callback(layers[count].register_forward_pre_hook(_on_input(all_rows), with_kwargs=True).remove)
    stack.callback(_change, cache, count, all_rows)
    _change(cache, count, first)


def _leave_out(stack: ExitStack, trunk: Any, count: int) -> None:
    """Let no more than so many layers run, the lowest."""
    name, layers = stack_of(trunk)
    if count == len(layers):
        return
    stack.callback(setattr, trunk, name, layers)
    setattr(trunk, name, layers[:count])
    stack.callback(trunk.register_forward_hook(_keep_states, with_kwargs=True, prepend=True).remove)


def _positions_once(
    trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give all rows one row of positions, as they are alike: a pre-hook of the trunk."""
    positions = kwargs.get("position_ids")
    return args, kwargs if positions is None else {**kwargs, "position_ids": positions[:1]}


def _on_input(change: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """Return a pre-hook of a layer that changes its hidden states."""

    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

    return hook


def _change(cache: InfiniCache, count: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change the states of the lowest layers of a cache."""
    for layer in cache.layers[:count]:
        layer.state = layer.state.map(change)


def _keep_states(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Keep the states of layers that did not run: a forward hook, before the one that writes the cache."""
    forward = kwargs[ARGUMENT]
    forward.left = {**forward.states, **forward.left}
