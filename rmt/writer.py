"""A decoder with a memory, as transformers' `generate` sees it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from .open_segments import OpenSegments

# how the plain model would keep keys and values
CACHING = ("use_cache", "past_key_values", "cache_implementation", "cache_config", "prefill_chunk_size")
# arguments of transformers' `generate` that have no meaning here → why
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(CACHING, "it always keeps the memory, and the keys and values of one segment"),
    **dict.fromkeys(
        ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit"),
        "a token that is written into the memory cannot be taken back",
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states"), "call the memory on the text, whose model returns them"
    ),
    **dict.fromkeys(
        ("guidance_scale", "negative_prompt_ids", "negative_prompt_attention_mask"),
        "it reads one text, without a second one to guide it",
    ),
    "custom_generate": "pass a logits_processor or stopping_criteria",
    "inputs_embeds": "pass input_ids",
    "position_ids": "positions begin anew with each segment",
    "synced_gpus": "processes that share weights must write equally many tokens, so pass eos_token_id=None",
    "token_healing": "pass a prompt that ends with a whole token",
}
DRAWING = ("temperature", "top_k", "top_p")


class Writer(GenerationMixin):
    """Give transformers' `generate` what it needs: logits for a text, whose last segments stand in for the cache.

    Args:
        model: what the memory is around; its `generation_config`, if it has one, has the defaults.
        vocabulary: number of tokens.
        device: of texts.
    """

    main_input_name = "input_ids"
    _is_stateful = True
    _supported_generation_modes = (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
        GenerationMode.BEAM_SEARCH,
        GenerationMode.BEAM_SAMPLE,
    )

    def __init__(self, model: nn.Module | None, vocabulary: int, device: torch.device) -> None:
        # without the model's number of positions, which a text may exceed
        self.config = PretrainedConfig.from_dict({"vocab_size": vocabulary})
        self.generation_config = _with_own_cache(getattr(model, "generation_config", None) or GenerationConfig())
        self.device = device

    def write(self, prompts: Tensor, mask: Tensor, opened: OpenSegments, options: Mapping[str, Any]) -> Any:
        """Continue prompts [B, P] by transformers' `generate`, and return what that does, without the prompts.

        Args:
            mask: [B, P], 0 where padding stands before a row's tokens.
            opened: the prompts' last segments.
            options: further arguments of `generate`.

        Raises:
            TypeError, ValueError: an argument that has no meaning here, or one of another type or value.
        """
        options = dict(options)
        if options.get("generation_config") is not None:
            options["generation_config"] = _with_own_cache(options["generation_config"])
        self._check(options)
        writer: Any = self
        out = writer.generate(prompts, attention_mask=mask, past_key_values=opened, **options)
        if isinstance(out, Tensor):
            return out[:, prompts.shape[1] :]
        parts = dict(out) | {"sequences": out.sequences[:, prompts.shape[1] :]}
        return type(out)(**{name: part for name, part in parts.items() if name != "past_key_values"})

    def _check(self, options: Mapping[str, Any]) -> None:
        """Check the arguments that transformers would take, and could not honour or would pass over."""
        for name in options:
            if name in REFUSED:
                value = options[name]
                # a model's text is pages long
                got = f"a {type(value).__name__}" if isinstance(value, nn.Module) else repr(value)
                raise TypeError(f"generate takes no {name}, got {got}: {REFUSED[name]}")
        own = options.get("generation_config")
        for name in set(REFUSED) - set(CACHING):
            # a guidance of 1 is none
            nothing = (None, False, 1) if name == "guidance_scale" else (None, False)
            if (value := getattr(own, name, None)) not in nothing:
                raise ValueError(f"generation_config.{name} must not be set, got {value!r}: {REFUSED[name]}")
        samples = [options.get("do_sample"), getattr(own, "do_sample", None), self.generation_config.do_sample]
        chosen = next((choice for choice in samples if choice is not None), False)
        if not chosen and any(options.get(name) is not None for name in DRAWING):
            raise ValueError(
                f"{', '.join(DRAWING[:-1])} and {DRAWING[-1]} must come with do_sample=True, got one of them without"
            )

    def prepare_inputs_for_generation(  # type: ignore[override]
        self, input_ids: Tensor, past_key_values: OpenSegments, **kwargs: Any
    ) -> dict[str, Any]:
        """Return the arguments of the call that reads a text's newest tokens."""
        return {"input_ids": input_ids, "past_key_values": past_key_values}

    def forward(
        self, input_ids: Tensor, past_key_values: OpenSegments, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Return the logits [N, 1, vocabulary] that follow texts [N, T]."""
        logits = past_key_values.next_logits(input_ids)
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=past_key_values)  # type: ignore[arg-type]

    __call__ = forward

    def get_experts_implementation(self) -> dict[str, str]:
        """Return no implementations for `generate` to exchange: experts run as in any other call."""
        return {}


def _with_own_cache(config: GenerationConfig) -> GenerationConfig:
    """Return a copy of the configuration without what it says of the plain model's cache."""
    own = copy.deepcopy(config)
    own.use_cache, own.cache_implementation, own.prefill_chunk_size = True, None, None
    own._from_model_config = False
    return own
