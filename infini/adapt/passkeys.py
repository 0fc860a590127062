"""The stage of an adaptation that teaches a memory to recall passkeys, where full attention does so untaught."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ...runs.errors import SettingError, named
from ..conversion_options import layers_named
from ..evaluate.loading import Loaded, convert_named
from ..evaluate.reading import longest_text
from ..huggingface.conversion import revert
from ..huggingface.settings import attentions_of, conversion_of, trunk_of
from .kept import FittedLayers, Listener, without_memory
from .lookups import Lookups, Prompts, choose, looked_up, make_prompts, record
from .recall import RecallFit, RecallRecipe, fit_recall
from .settings import Adaptation, Passkeys

# prompts in which the layers that look passkeys up are searched for
SEARCHED = 8


def prompts_for(loaded: Loaded, adaptation: Adaptation, passkeys: Passkeys) -> Prompts:
    """Draw the prompts of a run.

    Raises:
        SettingError: they are too short, or too long for the model.
    """
    check_room(loaded.model, passkeys.prompt_tokens, "prompt_tokens")
    with named(length="prompt_tokens"):
        return make_prompts(
            loaded.tokenizer,
            passkeys.prompts,
            passkeys.prompt_tokens,
            adaptation.segment_len,
            adaptation.lookback,
            adaptation.seed,
        )


def check_room(model: nn.Module, count: int, option: str) -> None:
    """Check that a plain model has positions for so many tokens.

    Raises:
        SettingError: of `option`: it has fewer.
    """
    limit = longest_text(model)
    if limit is not None and count > limit:
        problem = f"must be at most the {limit} positions of the model, which full attention needs, got {count}"
        raise SettingError(option, f"{problem}: choose fewer")


def check_convertible(model: Any, options: Mapping[str, Any], passkeys: Passkeys) -> None:
    """Check that a plain model can be converted, and has the layers that are named; it stays as it is.

    Raises:
        SettingError: naming the option.
    """
    convert_named(model, options)
    try:
        if passkeys.prompt_layers is not None:
            _layers(model, passkeys.prompt_layers)
    finally:
        revert(model)


def convert_where_looked_up(
    model: Any, options: Mapping[str, Any], prompts: Prompts, passkeys: Passkeys, seed: int
) -> dict[int, Lookups]:
    """Convert a plain model, with a memory in the layers that look up passkeys; return what they look up.

    Unless they are named, layers are found in a first pass, in which all are in full attention: those of heads with
    half the share of attention that is asked for. In the next pass all others see their window alone, as they will.

    Args:
        options: arguments of `convert`.
        seed: of the rows that do not ask.

    Raises:
        SettingError: an option cannot be, or no head attends to passkeys enough.
    """
    convert_named(model, options)
    try:
        with without_memory(model):
            heads = _heads(model, prompts.first(SEARCHED), passkeys)
            lookups = record(model, prompts, heads, seed)
    finally:
        revert(model)
    convert_named(model, options, memory_layers=list(heads))
    return lookups


def fit_to_passkeys(
    loaded: Loaded,
    prompts: Prompts,
    lookups: Mapping[int, Lookups],
    adaptation: Adaptation,
    passkeys: Passkeys,
    kept: FittedLayers,
    listener: Listener,
) -> None:
    """Fit the layers that are not kept, each after those below it.

    With `adaptation.own`, a layer is fitted on what the fitted layers below it put out, to the same lookups.
    """
    attentions = attentions_of(trunk_of(loaded.model))
    left = kept.left(lookups)
    listener.begin(len(left) * passkeys.prompt_steps)
    for layer in left:
        own = wanted = lookups[layer]
        if adaptation.own and layer != min(lookups):
            with without_memory(attentions[layer]):
                own = record(loaded.model, prompts, {layer: wanted.heads}, adaptation.seed)[layer]
        recipe = RecallRecipe(
            adaptation.segment_len,
            adaptation.lookback,
            passkeys.prompt_steps,
            adaptation.map_lr,
            adaptation.gate_lr,
            passkeys.stretch,
            adaptation.seed * 1_000_003 + layer,
        )
        target = own._replace(full=wanted.full, wanted=wanted.wanted)
        figures = fit_recall(attentions[layer], target, prompts, recipe, on_step=lambda: listener.read(1))
        kept.add(attentions[layer], figures._asdict())
        listener.finished(_said(figures))


def _heads(model: Any, prompts: Prompts, passkeys: Passkeys) -> dict[int, list[int]]:
    """Return the heads of each layer that look up passkeys.

    Raises:
        SettingError: there are none, or the model lacks a layer that is named, or does not convert it.
    """
    if passkeys.prompt_layers is None:
        shares = looked_up(model, prompts, conversion_of(model).settings.layers)
        layers = list(choose(shares, passkeys.attended / 2))
    else:
        layers = _layers(model, passkeys.prompt_layers)
    if layers:
        shares = looked_up(model, prompts, layers)
    heads = choose(shares, passkeys.attended)
    if not heads:
        most = max(float(share.max()) for share in shares.values())
        problem = f"must be a share that some head gives to passkeys, at most {most:.2g}, got {passkeys.attended}"
        raise SettingError("attended", problem)
    return heads


def _layers(model: Any, text: str) -> list[int]:
    """Return the indices of the layers that `prompt_layers` names, from 0."""
    conversion, layers = conversion_of(model), layers_named(text, "prompt_layers")
    count = conversion.depth
    if not all(-count <= layer < count for layer in layers):
        problem = f"must be layers of the model, which has {count}, got {text!r}"
        raise SettingError("prompt_layers", problem)
    named = sorted({layer % count for layer in layers})
    if native := [layer for layer in named if layer in conversion.native]:
        problem = (
            f"must be layers that are converted, got {text!r}: {native} stay as they are, since their window slides; "
            f"choose from {list(conversion.settings.layers)}"
        )
        raise SettingError("prompt_layers", problem)
    return named


def _said(fitted: RecallFit) -> str:
    found = ", ".join(
        f"head {head} finds {100 * share:.0f} %" for head, share in zip(fitted.heads, fitted.found, strict=True)
    )
    return f"layer {fitted.layer}: {found}"
