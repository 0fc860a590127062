"""The model of a training run: load or make it, convert it, choose what of it is trained, save it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...runs.errors import SettingError
from ..evaluate.loading import (
    BYTES,
    TOKENIZER,
    ByteTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    check_conversion,
    convert_named,
    load,
    without_progress_bars,
)
from ..evaluate.settings import Source
from ..gate import Gate
from ..huggingface.pieces import check_checkpointing
from ..huggingface.saving import save_pretrained
from ..huggingface.settings import is_converted
from ..memory_map import MemoryMap
from .settings import TrainSettings

ADAPTER = "default"


def build_model(settings: TrainSettings) -> tuple[Any, Tokenizer]:
    """Return the converted model, on the CPU, and its tokenizer.

    Raises:
        SettingError: naming the setting.
    """
    tokenizer: Tokenizer = ByteTokenizer()
    # weights from scratch and adapters must be the same on every rank
    torch.manual_seed(settings.seed)
    if settings.model is None:
        model = _llama(settings)
    else:
        source = Source(settings.model, tokenizer=settings.tokenizer, dtype=settings.weights, device="cpu")
        model, tokenizer, _ = load(source)
    _convert(model, settings)
    _check_dropout(model)
    if settings.lora is not None:
        _add_adapters(model, settings.lora)
    elif settings.freeze_but_gates:
        model.requires_grad_(False)
    trained = (Gate,) if settings.freeze_but_gates else (Gate, MemoryMap)
    for module in model.modules():
        if isinstance(module, trained):
            module.requires_grad_(True)
    if settings.gradient_checkpointing:
        _checkpoint_gradients(model)
    return model, tokenizer


def save_model(model: Any, tokenizer: Tokenizer, weights: Mapping[str, Any], folder: Path) -> None:
    """Write a trained model, its adapters merged, to be read by `segattn.from_pretrained`.

    Args:
        weights: the whole state dict of the model, on the CPU.
    """
    is_of_bytes = isinstance(tokenizer, ByteTokenizer)
    # None where the model that was trained had an entry of its own
    if is_of_bytes or hasattr(model.config, TOKENIZER):
        setattr(model.config, TOKENIZER, BYTES if is_of_bytes else None)
    # tied weights by one of their names: transformers 5.0 unties what a checkpoint has by both
    tied = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
    with without_progress_bars():
        save_pretrained(model, folder, state_dict=_merged(model, {x: weights[x] for x in weights if x not in tied}))
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.tokenizer.save_pretrained(folder)


def _llama(settings: TrainSettings) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": settings.width,
        "intermediate_size": 3 * (settings.width or 0),
        "num_hidden_layers": settings.layers,
        "num_attention_heads": settings.heads,
        "max_position_embeddings": settings.length,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))


def _convert(model: Any, settings: TrainSettings) -> None:
    """Convert a plain model; check that a converted model agrees with the settings."""
    if is_converted(model):
        check_conversion(model, settings, "the model's")
        return
    # from scratch both halves of attention learn at once; a pretrained model is to change little at first
    scratch: dict[str, Any] = {} if settings.model is not None else {"gate_init": 0.0}
    convert_named(model, scratch | settings.convert_arguments())


def _check_dropout(model: Any) -> None:
    config = model.config.get_text_config(decoder=True)
    for name in ("attention_dropout", "attn_pdrop"):
        if rate := getattr(config, name, 0):
            problem = f"must have no dropout of attention, got {name} of {rate}: set it to 0 in its config.json"
            raise SettingError("model", problem)


def _add_adapters(model: Any, rank: int) -> None:
    """Add LoRA adapters to all linear layers but the head, scaled by 2; freeze all other weights."""
    peft = import_module("peft")
    transposed = any(type(module).__name__ == "Conv1D" for module in model.modules())
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", fan_in_fan_out=transposed)
    peft.inject_adapter_in_model(config, model, ADAPTER)


def _merged(model: Any, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights with the matrices of each adapter multiplied and added to the layer that it adapts."""
    merged = dict(weights)
    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A") and hasattr(layer, "base_layer"):
            down, up = (merged.pop(f"{name}.lora_{which}.{ADAPTER}.weight").float() for which in "AB")
            change = layer.scaling[ADAPTER] * (up @ down)
            for key in ("weight", "bias"):
                if (base := merged.pop(f"{name}.base_layer.{key}", None)) is not None:
                    merged[f"{name}.{key}"] = base
            base = merged[f"{name}.weight"]
            merged[f"{name}.weight"] = (base + (change.T if layer.fan_in_fan_out else change)).to(base.dtype)
    return merged


def _checkpoint_gradients(model: Any) -> None:
    """Checkpoint the layers in the way that keeps the gradient of the memory."""
    # newer versions of transformers warn of the older name
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    try:
        check_checkpointing(model.train())
    except ValueError as error:
        raise SettingError("gradient_checkpointing", f"must be left out: {error}") from None
