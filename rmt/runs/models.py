"""The models of memory tasks: small ones made from their sizes, or a pretrained encoder from a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from ...runs.errors import SettingError, first_line
from ..tasks.vocabulary import CLS, PAD, SEP


class Sizes(NamedTuple):
    """The sizes of a small model: layers, width, attention heads."""

    layers: int
    width: int
    heads: int


class Pretrained(NamedTuple):
    """A pretrained encoder's tokenizer, and the ids of its first and separating tokens."""

    tokenizer: Any
    special_tokens: tuple[int, int]

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens."""
        # texts longer than the model are meant to be read: no warning
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def small_encoder(kind: str, vocab_size: int, classes: int, rows: int, sizes: Sizes) -> nn.Module:
    """Make an encoder without dropout that classifies a text by its first row.

    Args:
        kind: "bert" or, with rotary positions and norms before its layers, "modernbert".
        vocab_size: number of token ids.
        classes: number of classes.
        rows: positions that the model knows, at least the rows of a segment.
    """
    common: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": sizes.width,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "max_position_embeddings": rows,
        "pad_token_id": PAD,
    }
    config = _CONFIGS[kind](common)
    config.num_labels = classes
    return transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa")


def _bert(common: dict[str, Any]) -> Any:
    own = {"intermediate_size": 4 * common["hidden_size"]}
    return transformers.BertConfig(**common, **own, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def _modernbert(common: dict[str, Any]) -> Any:
    own: dict[str, Any] = {"bos_token_id": CLS, "cls_token_id": CLS, "eos_token_id": SEP, "sep_token_id": SEP}
    # no windows; a gated layer has three matrices for two
    own |= {
        "classifier_pooling": "cls",
        "global_attn_every_n_layers": 1,
        "intermediate_size": 2 * common["hidden_size"],
    }
    config = transformers.ModernBertConfig(**common, **own)
    # before transformers 5 it compiles itself where it can
    config.reference_compile = False
    return config


_CONFIGS = {"bert": _bert, "modernbert": _modernbert}


def small_decoder(vocab_size: int, rows: int, sizes: Sizes) -> nn.Module:
    """Make a Llama that knows `rows` positions, at least the rows of a segment."""
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        max_position_embeddings=rows,
        pad_token_id=PAD,
        bos_token_id=CLS,
        eos_token_id=SEP,
    )
    return transformers.LlamaForCausalLM(config)


def pretrained_tokenizer(folder: Path) -> Pretrained:
    """Load the tokenizer of a folder.

    Raises:
        SettingError: of `pretrained`: the folder holds no tokenizer, or one without special tokens.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise _unusable(folder, "a tokenizer", error) from None
    special = tokenizer.cls_token_id, tokenizer.sep_token_id
    if None in special:
        raise SettingError("pretrained", f"must have a first and a separating token, got {special} in {str(folder)!r}")
    return Pretrained(tokenizer, special)


def pretrained_encoder(folder: Path, classes: int | None = None) -> nn.Module:
    """Load an encoder that classifies texts.

    Args:
        classes: number of classes of a new head on the folder's weights; None: use only the folder's configuration,
            with random weights.

    Raises:
        SettingError: of `pretrained`: the folder holds no encoder, or one without its weights.
    """
    auto = transformers.AutoModelForSequenceClassification
    options: dict[str, Any] = {"local_files_only": True}
    try:
        if classes is None:
            return auto.from_config(transformers.AutoConfig.from_pretrained(folder, **options))
        options |= {"num_labels": classes, "ignore_mismatched_sizes": True, "output_loading_info": True}
        with _quiet():
            model, report = auto.from_pretrained(folder, dtype=torch.float32, **options)
    except (OSError, ValueError) as error:
        raise _unusable(folder, "an encoder", error) from None
    trunk = sorted(name for name in report["missing_keys"] if name.startswith(model.base_model_prefix + "."))
    if missing := [name for name in trunk if ".pooler." not in name]:
        raise SettingError("pretrained", f"must hold the encoder's weights, got {str(folder)!r} without {missing[0]}")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the report that the head is new, which it is meant to be; other missing weights raise an error here."""
    log = transformers.utils.logging
    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)


def freeze_model(memory: nn.Module) -> None:
    """Freeze the pretrained trunk, and leave the memory, the model's head and an encoder's pooler to training."""
    model: Any = memory.model
    for name, parameter in model.base_model.named_parameters():
        if not name.startswith("pooler."):
            parameter.requires_grad_(False)


def _unusable(folder: Path, what: str, error: Exception) -> SettingError:
    """Return the error of a folder from which transformers cannot load what is wanted."""
    problem = f"must be a folder with {what} of Hugging Face's format, got {str(folder)!r} ({first_line(error)})"
    return SettingError("pretrained", problem)
