"""The stage of an adaptation that teaches a memory to recall passkeys, where full attention does so untaught."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from torch import nn

from ...runs.errors import SettingError, named
from ..evaluate.loading import Loaded
from ..evaluate.reading import longest_text
from ..huggingface.settings import attentions_of, conversion_of, trunk_of
from .kept import Kept, Listener, without_memory
from .lookups import Prompts, choose, looked_up, make_prompts, record
from .recall import RecallFit, RecallRecipe, fit_recall
from .settings import Adaptation, Passkeys

# prompts in which the layers that look passkeys up are searched for
SEARCHED = 8
# of the largest share of attention that a head gives to the answer, what the heads of a layer must reach to be chosen
LEAST_SHARE = 0.5


def prompts_for(loaded: Loaded, adaptation: Adaptation, passkeys: Passkeys) -> Prompts:
    """Draw the prompts of a run, for a plain model.

    Raises:
        SettingError: they are too short, or too long for the model.
    """
    check_room(loaded.model, passkeys.prompt_tokens, "prompt_tokens")
    with named(length="prompt_tokens"):
        return make_prompts(
            loaded.tokenizer,
            adaptation.prompts,
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


def search_heads(
    model: Any, prompts: Prompts, attended: float, listener: Listener, *, everywhere: bool
) -> dict[int, list[int]]:
    """Return the heads that look passkeys up, by layer, of those layers of a converted model that have a memory.

    They are searched for in full attention in those layers, while all others see their window alone, as they will.

    Args:
        attended: share of its attention that a head must give to passkeys.
        everywhere: choose among the layers first, in a pass in which all are in full attention: those with a head that
            attends to the token that is to be answered at least half as much as the head that does so most.

    Raises:
        SettingError: of `attended`: no head gives so much.
    """
    stage, prompts = "search for layers", prompts.first(SEARCHED)
    listener.begin(stage, (1 + everywhere) * len(prompts.tokens))
    read = partial(listener.read, stage)
    layers = list(conversion_of(model).settings.memory_layers)
    with without_memory(model):
        if everywhere:
            shares = looked_up(model, prompts, prompts.answered, layers, read)
            layers = list(choose(shares, LEAST_SHARE * max(float(share.max()) for share in shares.values())))
        shares = looked_up(model, prompts, prompts.keys[:, None], layers, read)
    heads = choose(shares, attended)
    if not heads:
        most = max(float(share.max()) for share in shares.values())
        # two digits, not above it
        unit = 10.0 ** (math.floor(math.log10(max(most, 1e-9))) - 1)
        most = math.floor(most / unit) * unit
        problem = f"must be a share that some head gives to passkeys, at most {most:.2g} in this model, got {attended}"
        raise SettingError("attended", f"{problem}: choose less, or name --memory-layers")
    listener.finished(f"passkeys are looked up in layers {', '.join(map(str, heads))}")
    return heads


def fit_to_passkeys(
    loaded: Loaded,
    prompts: Prompts,
    adaptation: Adaptation,
    passkeys: Passkeys,
    kept: Kept,
    listener: Listener,
) -> None:
    """Fit the layers that are not kept, each after those below it, to what their heads look up in full attention.

    With `adaptation.own`, a layer is fitted on what the fitted layers below it put out, to the same lookups.
    """
    model, attentions, heads = loaded.model, attentions_of(trunk_of(loaded.model)), kept.heads
    left = kept.left(heads)
    if not left:
        return
    # of which the first is as it was
    on_fitted = [layer for layer in left if adaptation.own and layer != min(heads)]
    reading, fitting = "read prompts", "fit layers"
    listener.begin(reading, (1 + len(on_fitted)) * len(prompts.tokens))
    listener.begin(fitting, len(left) * passkeys.prompt_steps)
    read = partial(listener.read, reading)
    with without_memory(model):
        lookups = record(model, prompts, heads, adaptation.seed, read)
    for layer in left:
        own = wanted = lookups[layer]
        if layer in on_fitted:
            with without_memory(attentions[layer]):
                own = record(model, prompts, {layer: wanted.heads}, adaptation.seed, read)[layer]
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
        figures = fit_recall(attentions[layer], target, prompts, recipe, on_step=lambda: listener.read(fitting, 1))
        kept.add(attentions[layer], figures._asdict())
        listener.finished(_said(figures))


def _said(fitted: RecallFit) -> str:
    found = ", ".join(
        f"head {head} finds {100 * share:.0f} %" for head, share in zip(fitted.heads, fitted.found, strict=True)
    )
    return f"layer {fitted.layer}: {found}"
