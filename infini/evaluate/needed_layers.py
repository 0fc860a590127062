"""Reading without work that no later token sees, in models of which few layers have a memory.

What a layer without a memory puts out depends on its window alone, and each layer above widens that by a lookback. So
rows that have gone on alike for long enough are alike in all layers below the first memory, which then run for one of
them. And layers above the last memory need not run at all for tokens out of reach of the text's end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..huggingface.cache import InfiniCache
from ..huggingface.forward_pass import ARGUMENT
from ..huggingface.settings import Settings, conversion_of, layers_of, trunk_of


class Needed(NamedTuple):
    """Say which layers a piece of a text needs.

    shared: number of lowest layers that run for one row in place of all.
    layers: number of lowest layers that run; those above keep the state that they have.
    """

    shared: int
    layers: int


def needed_layers(model: nn.Module, tokens: Tensor, begin: int, end: int, cache: Any, *, alike: bool) -> Needed | None:
    """Return the layers that the piece [begin, end) of tokens [B, T] needs; None: all of them, for all rows.

    All pieces but the last are whole segments, so that tails which no layer renews stay as long as they have to be.

    Args:
        model: a causal language model, converted or not.
        cache: with what comes before the piece; None: nothing.
        alike: whether the rows are alike in what comes before `tokens`.
    """
    if not isinstance(cache, InfiniCache) or (conversion := conversion_of(model)).native:
        return None
    settings, rows, depth = conversion.settings, cache.rows, conversion.depth
    size, memories = settings.segment_len, settings.memory_layers
    if len(set(rows.lengths)) > 1 or not min(rows.folded):
        return None
    before = rows.lengths[0] - begin
    shared, above = memories[0], depth - 1 - memories[-1]
    differs = (tokens[:, :end] != tokens[0, :end]).any(dim=0).nonzero()
    if len(differs):
        reaches = _reach(before + int(differs[-1]) + 1, shared, settings)
        alike = alike and reaches <= before + begin and settings.sinks <= before + int(differs[0])
    final = (before + tokens.shape[1] - 1) // size * size
    is_out_of_reach = _reach(before + end, above, settings) <= final
    needed = Needed(shared if alike and len(tokens) > 1 else 0, depth - above if is_out_of_reach else depth)
    return None if needed == (0, depth) else needed


def _reach(end: int, layers: int, settings: Settings) -> int:
    """Return where the last segment ends that sees, through so many layers, a token before `end`."""
    return (-(-end // settings.segment_len) + layers * settings.lookback) * settings.segment_len


@contextmanager
def only_needed(model: nn.Module, cache: Any, needed: Needed | None) -> Iterator[None]:
    """Let a model run the needed layers alone, in one pass that goes on from the cache."""
    if needed is None:
        yield
        return
    trunk, batch = trunk_of(model), len(cache.rows.lengths)
    layers = layers_of(trunk)
    with ExitStack() as stack:
        if needed.shared:
            # behind the hook that sets the positions
            stack.callback(trunk.register_forward_pre_hook(_positions_once, with_kwargs=True).remove)
            for layer, change in ((0, lambda x: x[:1]), (needed.shared, lambda x: x.expand(batch, -1, -1))):
                handle = layers[layer].register_forward_pre_hook(_on_input(change), with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(_change, cache, needed.shared, lambda x: x.expand(batch, *x.shape[1:]))
            _change(cache, needed.shared, lambda x: x[:1])
        if needed.layers < len(layers):
            name = next(name for name, child in trunk.named_children() if child is not None and _holds(child, layers))
            stack.callback(setattr, trunk, name, getattr(trunk, name))
            setattr(trunk, name, nn.ModuleList(layers[: needed.layers]))
            stack.callback(trunk.register_forward_hook(_keep_states, with_kwargs=True, prepend=True).remove)
        yield


def _holds(stack: nn.Module, layers: list[nn.Module]) -> bool:
    return isinstance(stack, nn.ModuleList) and list(stack) == layers


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


def _change(cache: InfiniCache, layers: int, change: Callable[[Tensor], Tensor]) -> None:
    """Change the states of the lowest layers of a cache."""
    for layer in cache.layers[:layers]:
        layer.state = layer.state.map(change)


def _keep_states(trunk: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Keep the states of layers that did not run: a forward hook, before the one that writes the cache."""
    forward = kwargs[ARGUMENT]
    forward.left = {**forward.states, **forward.left}
