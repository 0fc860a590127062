"""Tiny models with random weights, of every type that the support table has."""

from pathlib import Path
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
_EXPERTS = {
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2},
    **{"moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "n_group": 1, "topk_group": 1},
}
from segattn.runs.text import generate_text


def _sizes(*absent: str, experts: bool = False, **more: Any) -> dict[str, Any]:
    """Return the sizes of a configuration without those that its class does not know."""
    sizes = _SIZES | (_EXPERTS if experts else {}) | more
    return {name: size for name, size in sizes.items() if name not in absent}


# layers of two kinds, where they differ in more than the window, which is longer than the tests' segments
_KINDS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}
# by type of model: the class of its configuration, and that class's arguments
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _SIZES),
    "mistral": ("MistralConfig", _SIZES | {"sliding_window": None}),
    "qwen2": ("Qwen2Config", _SIZES),
    "qwen3": ("Qwen3Config", _SIZES | {"head_dim": 8}),
    "gemma2": ("Gemma2Config", _SIZES | _FULL | {"head_dim": 8, "attn_logit_softcapping": 2.0}),
    "gemma3_text": ("Gemma3TextConfig", _SIZES | _FULL | {"head_dim": 8}),
    "phi3": ("Phi3Config", _SIZES),
    "gpt_neox": ("GPTNeoXConfig", _sizes("num_key_value_heads")),
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
    "mixtral": ("MixtralConfig", _sizes(experts=True, sliding_window=None)),
    "ministral": ("MinistralConfig", _SIZES | _FULL | {"head_dim": 8}),
    "ministral3": (
        "Ministral3Config",
        # queries are scaled by their position from the 32nd on
        _sizes(head_dim=8, sliding_window=None)
        | {
            "rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 128.0}
            | {"original_max_position_embeddings": 32, "llama_4_scaling_beta": 0.5}
        },
    ),
    "qwen2_moe": ("Qwen2MoeConfig", _sizes(experts=True)),
    "qwen3_moe": ("Qwen3MoeConfig", _sizes(experts=True, head_dim=8)),
    "gemma": ("GemmaConfig", _SIZES | {"head_dim": 8}),
    "phi": ("PhiConfig", _SIZES | {"resid_pdrop": 0.0, "qk_layernorm": True}),
    "olmo": ("OlmoConfig", _SIZES | {"clip_qkv": 1.0}),
    "olmo2": ("Olmo2Config", _SIZES),
    "olmo3": ("Olmo3Config", _SIZES | _FULL),
    "granite": ("GraniteConfig", _SIZES | {"attention_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "granitemoe": ("GraniteMoeConfig", _sizes(experts=True, attention_multiplier=0.5)),
    "stablelm": ("StableLmConfig", _SIZES | {"partial_rotary_factor": 0.5, "qk_layernorm": True}),
    "starcoder2": ("Starcoder2Config", _SIZES | {"sliding_window": None, "residual_dropout": 0.0}),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
    ),
    "cohere": ("CohereConfig", _SIZES | {"use_qk_norm": True}),
    "cohere2": ("Cohere2Config", _SIZES | _KINDS),
    "glm4": ("Glm4Config", _SIZES | {"head_dim": 8}),
    "smollm3": ("SmolLM3Config", _SIZES | {"no_rope_layer_interval": 2}),
    "llama4_text": (
        "Llama4TextConfig",
        _sizes(experts=True, head_dim=8, intermediate_size_mlp=48, attn_temperature_tuning=False, num_experts_per_tok=1)
        | {"no_rope_layer_interval": 2, "attention_chunk_size": 64}
        | {"layer_types": ["chunked_attention", "full_attention"]},
    ),
    "nemotron": ("NemotronConfig", _SIZES),
    "helium": ("HeliumConfig", _SIZES | {"head_dim": 8}),
    "exaone4": ("Exaone4Config", _SIZES | _KINDS | {"head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        _sizes(experts=True, num_key_value_heads=4, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16)
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    ),
    "gpt_oss": ("GptOssConfig", _sizes(experts=True, head_dim=8) | _FULL),
    "mimo_v2_flash": ("MiMoV2FlashConfig", _sizes(experts=True, head_dim=8) | _KINDS),
    "falcon": ("FalconConfig", _sizes("num_key_value_heads", "intermediate_size", num_kv_heads=2)),
    "bloom": ("BloomConfig", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}
# types that only a recurrent memory takes
REFUSED = ("falcon", "bloom")
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# the version of transformers whose model of a type can be converted and tested, where that is not the first we take
_SINCE = {
    **dict.fromkeys(("qwen2_moe", "deepseek_v3"), (5, 0)),
    **dict.fromkeys(("granitemoe", "mimo_v2_flash", "ministral3", "nemotron", "stablelm"), (5, 23)),
}
NAMES = tuple(name for name in CONFIGS if name not in REFUSED and _SINCE.get(name, (0,)) <= VERSION)
# those that a recurrent memory takes
TAKEN = (*NAMES, *REFUSED)
# those that differ the most, for tests of what does not depend on attention
CHOSEN = NAMES[:10]
# how types are converted whole whose layers differ
OPTIONS: dict[str, dict[str, Any]] = {
    name: {"convert_sliding": True} for name, (_, sizes) in CONFIGS.items() if len({*sizes.get("layer_types", ())}) > 1
}


def make(name: str = "llama", **changes: Any) -> transformers.PreTrainedModel:
    """Return an untrained model whose attention is sharp enough for its tokens to matter."""
    kind, sizes = CONFIGS[name]
    config = getattr(transformers, kind)(**(sizes | _TOKENS | changes))
    torch.manual_seed(0)
    # before transformers 5, only eager attention caps the scores of Gemma 2
    how = {"attn_implementation": "eager"} if name == "gemma2" else {}
    model = transformers.AutoModelForCausalLM.from_config(config, **how).eval()
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)
            if place.endswith(".sinks"):
                parameter.normal_()
    return model


def make_of_bytes(positions: int, seed: int = 0) -> Any:
    """Return an untrained Llama whose tokens are bytes, with so many positions."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def double(model: Any) -> Any:
    """Return a model in float64, which experts take one after another alone."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    return model.double()


def converted(name: str = "llama", segment_len: int = 16, update: str = "delta", **changes: Any) -> Any:
    """Return a model with every layer converted, in evaluation mode, whose gates are open."""
    model = segattn.convert(make(name, **changes), segment_len, update, quiet=True, **OPTIONS.get(name, {}))
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


def save_plain(folder: Path) -> None:
    """Save a small model of bytes as folder/plain, and running text as folder/text.txt."""
    torch.manual_seed(0)
    make(vocab_size=256).save_pretrained(folder / "plain")
    (folder / "text.txt").write_text(generate_text(400, seed=1), encoding="utf-8")
