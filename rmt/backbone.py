"""What a memory needs to know of a model that takes embeddings: its kind, its embeddings, how long a segment may be."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .twins import HIDDEN_STATES, evaluating, is_huggingface

OFFLOAD_THE_MODEL = (
    "call accelerate.hooks.remove_hook_from_submodules first, and offload the model once the memory is around it, "
    "accelerate.cpu_offload(memory.model)"
)
# what rounding may change of a row, relative to its largest number
ROUNDING = 1e-6


class Outputs(NamedTuple):
    """Hold what a model returns for embeddings.

    hidden: rows of the last layer [B, T, d].
    logits: [B, T, C], [B, C], or None.
    cache: keys and values so far, or None.
    """

    hidden: Tensor
    logits: Tensor | None
    cache: Any


def huggingface_of(model: nn.Module) -> Any:
    """Return the Hugging Face model that `model` is, or wraps (compiled, with adapters); None where there is none."""
    return next(filter(is_huggingface, model.modules()), None)


def kind_of(model: nn.Module) -> str:
    """Return "decoder" for a model with causal attention or that generates text, "encoder" where rows see later ones.

    Raises:
        ValueError: the model does not show which it is.
    """
    inner = huggingface_of(model)
    unknown = f"kind must be 'decoder' or 'encoder' for a {type(model).__name__}, which does not show its kind"
    if inner is None:
        raise ValueError(unknown)
    causal = _causal_flags(inner)
    if True in causal or inner.can_generate():
        return "decoder"
    if False in causal or _sees_ahead(inner):
        return "encoder"
    raise ValueError(unknown)


def _causal_flags(model: nn.Module) -> set[bool]:
    """Return the values of `is_causal` on the modules that have it."""
    flags = (getattr(module, "is_causal", None) for module in model.modules())
    return {flag for flag in flags if isinstance(flag, bool)}


@torch.no_grad()
def _sees_ahead(model: Any) -> bool:
    """Return whether a row's output changes with an input that comes after it; False for a model without weights."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if weight is None or weight.is_meta:
        return False
    x = random_rows(weight, 4)
    texts = torch.stack((x, torch.cat((x[:3], -x[3:]))))
    hidden = run(evaluating(model), texts, HIDDEN_STATES).hidden
    return bool(distances(hidden)[0, 0] > ROUNDING)


def random_rows(embeddings: Tensor, count: int) -> Tensor:
    """Return random rows [count, d] as far from zero as embeddings [vocabulary, d], the same in every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = torch.randn(count, embeddings.shape[1], generator=generator, device="cpu", dtype=torch.float32)
    # some of a large vocabulary say as much as all of it
    spread = embeddings[:1024].float().std().item()
    return (rows * (spread or 1.0)).to(embeddings)


def distances(hidden: Tensor) -> Tensor:
    """Return how far rows [N, T, d] are from those of the first text, relative to the largest of each: [N - 1, T]."""
    first, others = hidden[:1].float(), hidden[1:].float()
    return (others - first).abs().amax(-1) / first.abs().amax(-1)


def embedding_of(model: nn.Module) -> Any:
    """Return the module that turns token ids into vectors.

    Raises:
        ValueError: the model has none.
    """
    inner = huggingface_of(model)
    embedding = None if inner is None else inner.get_input_embeddings()
    if not isinstance(embedding, nn.Module) or getattr(embedding, "weight", None) is None:
        raise ValueError(
            f"model must have input embeddings, got {type(model).__name__} without: pass embedding= (token ids to "
            "vectors), with weight [tokens, d]"
        )
    return embedding


def accepted(model: nn.Module) -> frozenset[str]:
    """Return the names of the arguments that the model's forward takes."""
    inner = huggingface_of(model)
    return frozenset(inspect.signature((model if inner is None else inner).forward).parameters)


def check_model(model: nn.Module) -> None:
    """Check that `model` is an encoder or a decoder with its own attention.

    Raises:
        TypeError: it is not a module.
        ValueError: it is an encoder and a decoder, or runs on the attention of `segattn.convert`.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    inner = huggingface_of(model)
    # the encoder of such a model has the configuration of both
    if inner is not None and "decoder_input_ids" in accepted(model):
        raise ValueError(
            f"model must be an encoder or a decoder, got {type(inner).__name__}, which is both: pass one of them"
        )
    # a plain model of a converted one's folder has its configuration's entry, but neither gates nor its attention
    if any(name.endswith("segattn_gate") for name, _ in model.named_modules()):
        raise ValueError(
            "model must keep its own attention, got one that segattn.convert changed: segattn.revert first"
        )
    if getattr(getattr(inner, "config", None), "_attn_implementation", None) == "segattn":
        raise ValueError(
            "model must keep its own attention, got one made from a converted model's configuration: make it from "
            "type(config).from_dict(config.to_dict())"
        )


def check_not_offloaded(name: str, module: nn.Module, parameters: Iterable[Tensor], remedy: str) -> None:
    """Check that accelerate does not keep weights elsewhere, which it brings for the call of a module alone.

    Weights on the meta device without accelerate's hooks are of a model that will be loaded later.

    Args:
        name: of the module, for the error.
        module: a model, or a memory around one.
        parameters: those of its parameters that must have values.
        remedy: for the error.

    Raises:
        ValueError: one of the parameters has none.
    """
    if any(x.is_meta for x in parameters) and any(hasattr(part, "_hf_hook") for part in module.modules()):
        raise ValueError(
            f"{name} must have its weights, got a {type(module).__name__} that accelerate offloads: {remedy}"
        )


def check_sight(model: nn.Module, kind: str, masked: bool) -> None:
    """Check that an encoder's rows see later ones, and that a decoder's do not.

    Args:
        masked: whether a decoder is called with a mask, which hides later rows.

    Raises:
        ValueError: the model is of the other kind.
    """
    inner = huggingface_of(model)
    if inner is None:
        return
    causal = True in _causal_flags(inner)
    if kind == "encoder" and causal and not _sees_ahead(inner):
        raise ValueError(f"kind must be 'decoder' for a {type(inner).__name__}, whose rows do not see later ones")
    if kind == "decoder" and not masked and not causal and _sees_ahead(inner):
        raise ValueError(
            f"mask must be 'paper' for a {type(inner).__name__}, whose rows see later ones: pass that, or set "
            "is_decoder=True in a configuration that has it"
        )


def first_position(model: nn.Module) -> int:
    """Return the position of a text's first row, which is 0 but where positions stand behind that of padding."""
    table = _shifted_positions(huggingface_of(model))
    return 0 if table is None else table.padding_idx + 1


def _shifted_positions(model: Any) -> Any:
    """Return the table of positions that RoBERTa and those like it count from one past the padding's on, or None."""
    for name, module in () if model is None else model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module
    return None


def check_positions(model: nn.Module, rows: int, extra: int) -> None:
    """Check that a segment fits the positions that the model knows.

    Args:
        rows: of a segment.
        extra: those of them that are not tokens of the text.

    Raises:
        ValueError: the segment is too long.
    """
    inner = huggingface_of(model)
    known = getattr(getattr(inner, "config", None), "max_position_embeddings", None)
    if (table := _shifted_positions(inner)) is not None:
        known = table.num_embeddings - first_position(model)
    # XLNet's is -1: it has no table
    if isinstance(known, int) and 0 < known < rows:
        raise ValueError(
            f"segment_len must be at most {known - extra}, since the model knows {known} positions and {extra} go to "
            f"memory and special tokens, got {rows - extra}"
        )


def check_windows(model: nn.Module, rows: int, extra: int) -> None:
    """Check that every layer of a decoder sees a whole segment.

    Args:
        rows: of a segment.
        extra: those of them that are not tokens of the text.

    Raises:
        ValueError: a layer has a window shorter than the segment.
    """
    config = getattr(huggingface_of(model), "config", None)
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    # GPT-Neo's names
    if "local" in getattr(config, "attention_layers", ()):
        window, kinds = getattr(config, "window_size", None), None
    if isinstance(window, int) and rows > window and (kinds is None or "sliding_attention" in kinds):
        raise ValueError(
            f"segment_len must be at most {window - extra}, since the model has layers with a window of {window} rows "
            f"and {extra} go to memory, got {rows - extra}: shorten the segment, or widen the window in the "
            "configuration"
        )


def check_widths(model: nn.Module) -> None:
    """Check that a row of the last layer is as wide as an embedding, since the memory goes from one to the other.

    Raises:
        ValueError: it is wider or narrower.
    """
    config = getattr(huggingface_of(model), "config", None)
    inside, outside = getattr(config, "hidden_size", None), getattr(config, "embedding_size", None)
    if outside is not None and outside != inside:
        raise ValueError(
            f"model must have embeddings as wide as its layers, {inside}, got {outside}: memory goes from the last "
            "layer to the first"
        )


def run(model: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Outputs:
    """Run a model over embeddings [B, T, d].

    Args:
        arguments: of the call, besides the embeddings; those that ask for hidden states among them.

    Raises:
        TypeError: the model returns neither hidden rows nor a tensor of them.
    """
    out = model(inputs_embeds=x, **arguments)
    if isinstance(out, Tensor):
        return Outputs(out, None, None)
    states = getattr(out, "hidden_states", None)
    hidden = states[-1] if states is not None else getattr(out, "last_hidden_state", None)
    if hidden is None:
        raise TypeError(
            f"model must return the hidden rows [B, T, d], or an object with hidden_states or last_hidden_state, got "
            f"{type(out).__name__}"
        )
    return Outputs(hidden, getattr(out, "logits", None), getattr(out, "past_key_values", None))
