"""What a converted model changes of transformers' `generate`: its prompt is checked first, and its cache is made."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation.stopping_criteria import MaxLengthCriteria

from ...kernels.text import MASK_OF_PADDING_ID, token_runs
from .cache import InfiniCache
from .inputs import check_tokens
from .settings import cache_name, conversion_of, trunk_of
from .static_cache import StaticInfiniCache


def take_over(model: Any) -> None:
    """Put the functions of this module in the place of the model's own."""
    for name, instead in _INSTEAD.items():
        if hasattr(model, name):
            setattr(model, name, partial(instead, model))


def give_back(model: Any) -> None:
    """Give a model, and all models in it, their own functions back."""
    for module in model.modules():
        for name in _INSTEAD:
            module.__dict__.pop(name, None)


def _prepare_inputs(model: Any, inputs: Any, bos_token_id: Any, model_kwargs: dict[str, Any]) -> Any:
    """Check the prompt of `generate`, which transformers picks from its arguments, before anything is read.

    Raises:
        TypeError, ValueError: it is no batch of texts, or does not go on where its cache ends.
    """
    found = type(model)._prepare_model_inputs(model, inputs, bos_token_id, model_kwargs)
    tokens, name, _ = found
    trunk = trunk_of(model)
    check_tokens(trunk, {name: tokens})
    cache, mask = model_kwargs.get(cache_name(trunk)), model_kwargs.get("attention_mask")
    if isinstance(cache, (InfiniCache, StaticInfiniCache)) and not cache.is_empty():
        time, held = tokens.shape[1], cache.rows.columns
        # beside a longer mask ids are the new tokens alone
        new = name == "input_ids" and isinstance(mask, Tensor) and mask.shape[-1] > time
        if not new and time <= held:
            raise ValueError(
                f"{name} must be the whole text for generate, the {held} tokens that past_key_values holds and new "
                f"ones after them, got {time}: pass all of them, or input_ids of the new ones with an attention_mask "
                f"[B, {held} + new], or call past_key_values.reset() to begin anew"
            )
    return found


def _prepare_cache(model: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
    """Make the cache of `generate`: an `InfiniCache` where transformers would make one that grows.

    A cache that the caller passed stays, and the forward refuses it where it is of another kind.

    Raises:
        ValueError: the caller asks for another kind by its name, or for settings of one; or a prompt ends with padding.
    """
    name = cache_name(trunk_of(model))
    passed = model_kwargs.get(name)
    for option, taken in (("cache_implementation", (None, "dynamic")), ("cache_config", (None,))):
        if (value := getattr(generation_config, option, None)) not in taken and passed is None:
            raise ValueError(
                f"{option} must be left out for a converted model, got {value!r}: generate makes an InfiniCache, whose "
                "size does not grow; one of fixed size, which compiles, is passed as "
                "past_key_values=segattn.StaticInfiniCache(model, batch_size)"
            )
    type(model)._prepare_cache_for_generation(model, generation_config, model_kwargs, *args, **kwargs)
    if generation_config.is_assistant and model_kwargs.get("attention_mask") is not None:
        # transformers drops a mask of ones, and for an assistant takes every pad_token_id in the prompt for padding
        mask = model_kwargs["attention_mask"].cummax(dim=1).values
        model_kwargs["attention_mask"], model_kwargs["position_ids"] = mask, (mask.cumsum(1) - 1).clamp(min=0)
    _check_end(model_kwargs.get("attention_mask"))
    if passed is None and type(model_kwargs.get(name)) is DynamicCache:
        cache = InfiniCache(model)
        if generation_config.is_assistant:
            cache.activate_past_recording()
        model_kwargs[name] = cache


def _stopping_criteria(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the criteria by which `generate` stops; none warns of the model's positions where these start again."""
    criteria = type(model)._get_stopping_criteria(model, *args, **kwargs)
    if conversion_of(model).restart:
        for criterion in criteria:
            if isinstance(criterion, MaxLengthCriteria):
                criterion.max_position_embeddings = None
    return criteria


def _check_end(mask: Any) -> None:
    """Check that the rows of a prompt end with a token, by its mask [B, T]; None: all are tokens.

    Raises:
        ValueError: one ends with padding, has padding between its tokens, or no token.
    """
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return
    for row, (_, end) in enumerate(token_runs(mask)):
        if end < mask.shape[1]:
            raise ValueError(
                f"attention_mask must end with ones for generate, got row {row} with {mask.shape[1] - end} columns of "
                f"padding behind its tokens: pad on the left. {MASK_OF_PADDING_ID}"
            )


def _refuse_paged(model: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse continuous batching, whose paged cache cannot hold a memory.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "a converted model must not generate with a paged cache (generate_batch, continuous batching), which cannot "
        "hold a memory: call generate with prompts padded on the left"
    )


_INSTEAD: dict[str, Callable[..., Any]] = {
    "_prepare_model_inputs": _prepare_inputs,
    "_prepare_cache_for_generation": _prepare_cache,
    "_get_stopping_criteria": _stopping_criteria,
    "init_continuous_batching": _refuse_paged,
}
