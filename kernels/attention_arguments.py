"""The arguments that transformers' models hand on to their attention, and which of them change nothing there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HARMLESS = frozenset(
    {
        "cache_position",
        "deterministic",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "use_cache",
    }
)


def with_effect(arguments: Mapping[str, Any], harmless: frozenset[str] = frozenset()) -> list[str]:
    """Return the names of arguments that may change the output of attention, such as a bias of the scores, in order.

    Args:
        arguments: by their names; None and False count as left out.
        harmless: names, beside `HARMLESS`, of what changes nothing where this is called.
    """
    passed = {name for name, x in arguments.items() if x is not None and x is not False}
    return sorted(passed - HARMLESS - harmless)
