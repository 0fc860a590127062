"""Tiny models with random weights, one of each type that can be converted."""

from typing import Any

import torch
import transformers

import segattn

VOCABULARY = 61
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_FULL = {"layer_types": ["full_attention"] * 2}
# by type of model: the class of its configuration, and that class's arguments
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "mistral": ("MistralConfig", _SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", _SIZES | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", _SIZES | _FULL | {"head_dim": 8, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", _SIZES | _FULL | {"head_dim": 8}),
    "phi3": ("Phi3Config", _SIZES),
    "gpt_neox": ("GPTNeoXConfig", {n: v for n, v in _SIZES.items() if n != "num_key_value_heads"}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
    ),
    "opt": (
        "OPTConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    ),
}
NAMES = tuple(CONFIGS)


def make(name: str = "llama", **changes: Any) -> transformers.PreTrainedModel:
    """Return an untrained model whose attention is sharp enough for its tokens to matter."""
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(**(sizes | _TOKENS | changes))
    torch.manual_seed(0)
    # before transformers 5, only eager attention caps the scores of Gemma 2
    how = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
    return model


def converted(name: str = "llama", segment_len: int = 16, **changes: Any) -> Any:
    """Return a converted model, in evaluation mode, whose gates are open."""
    model = segattn.convert(make(name, **changes), segment_len, quiet=True)
    open_gates(model)
    return model


def open_gates(model: transformers.PreTrainedModel, seed: int = 0) -> None:
    """Set the gates of all heads at random, so that each reads its memory."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "segattn_gate" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    """Return random token ids [B, T], none of them special."""
    return torch.randint(3, VOCABULARY, (batch, time), generator=torch.Generator().manual_seed(seed))
