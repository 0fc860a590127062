"""A model and its tokenizer by name, as the evaluations load them: converted, to be converted, or plain."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

from ...runs.errors import SettingError, first_line
from ..conversion_options import ConversionOptions
from ..huggingface.conversion import convert
from ..huggingface.gguf_files import load_model, place_of
from ..huggingface.saving import from_pretrained, load_gates
from ..huggingface.settings import ENTRY, conversion_of, is_converted
from .settings import Checkpoint, Source

BYTES = "bytes"
# entry of a configuration that names the tokenizer, where no file of the model's holds it: that of bytes
TOKENIZER = "segattn_tokenizer"
FINGERPRINT_VALUES = 1024


class Tokenizer(Protocol):
    """A map from text to tokens and back; `prefix` holds the tokens that a text begins with."""

    prefix: list[int]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without special ones."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, whole characters or not."""


class ByteTokenizer:
    """A tokenizer whose tokens are the bytes of a text in UTF-8."""

    prefix: list[int] = []  # noqa: RUF012

    def encode(self, text: str) -> list[int]:
        """Return a token for each byte."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text, with replacement marks where the bytes are no UTF-8."""
        return bytes(token if token < 256 else ord("?") for token in tokens).decode(errors="replace")


class PretrainedTokenizer:
    """A tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        begin = tokenizer.bos_token_id
        # a text begins with it only where the tokenizer itself puts it there
        self.prefix = [begin] if begin is not None and tokenizer("a")["input_ids"][:1] == [begin] else []

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text of any length, without special ones."""
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return tokens

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text with all its blanks."""
        text: str = self.tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False)
        return text


class Loaded(NamedTuple):
    """A model in evaluation mode, its tokenizer, and the entries about it for a file of figures."""

    model: nn.Module
    tokenizer: Tokenizer
    about: dict[str, Any]


def load(source: Source, *, with_tokenizer: bool = True) -> Loaded:
    """Load the model of `source` to its device.

    Args:
        with_tokenizer: load its tokenizer too; without, the one that is returned is of bytes and must not be used.

    Raises:
        SettingError: naming the option, and what it must be.
    """
    # first what is small: an error in it is known before the weights are read
    converted = _is_converted(source)
    tokenizer = _tokenizer(source) if with_tokenizer else ByteTokenizer()
    model = _model(source, converted).eval().to(source.device)
    if with_tokenizer:
        _check_vocabulary(source, tokenizer, model.get_input_embeddings().num_embeddings)
    return Loaded(model, tokenizer, about(model))


def load_plain(checkpoint: Checkpoint) -> Loaded:
    """Load a model that is to be converted.

    Raises:
        SettingError: as of `load`; or of `model`, which is converted already.
    """
    loaded = load(Source(**asdict(checkpoint)))
    if loaded.about["conversion"] is not None:
        raise SettingError("model", f"must be plain, got {checkpoint.model!r}, which is converted already")
    return loaded


def convert_named(
    model: Any, options: Mapping[str, Any], refused: tuple[str, str] = ("model", "cannot be"), **others: Any
) -> Any:
    """Convert a plain model by settings, and name the one that cannot be; return the model.

    Args:
        options: arguments of `convert` that are settings of the same names.
        refused: the setting to name where the model or another argument is refused, and the words before the reason.
        others: further arguments of `convert`.

    Raises:
        SettingError: the model cannot be converted so.
    """
    try:
        return convert(model, **options, **others, quiet=True)
    except (TypeError, ValueError) as error:
        name, _, problem = str(error).partition(" ")
        wrong = (name, problem) if name in options else (refused[0], f"{refused[1]}: {error}")
        raise SettingError(*wrong) from None


def check_conversion(model: nn.Module, options: ConversionOptions, whose: str) -> None:
    """Check that a converted model is converted by the options that are not None.

    Args:
        whose: the model's conversion is, for messages.

    Raises:
        SettingError: naming the first option that is another.
    """
    conversion = conversion_of(model)
    for name, value in options.convert_arguments().items():
        held = getattr(conversion.settings, name)
        if name == "memory_layers":
            held, value = list(held), sorted({layer + conversion.depth * (layer < 0) for layer in value})
        if value != held:
            raise SettingError(name, f"must be {whose}, {held!r}, or left out, got {getattr(options, name)!r}")


def about(model: nn.Module) -> dict[str, Any]:
    """Return kind, size, conversion and fingerprint of a model, for a file of figures."""
    config: Any = model.config
    return {
        "class": type(model).__name__,
        "type": config.get_text_config(decoder=True).model_type,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "conversion": conversion_of(model).settings.as_entry() if is_converted(model) else None,
        "fingerprint": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> str:
    """Return a hash of about a thousand values of each parameter."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // FINGERPRINT_VALUES)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def _is_converted(source: Source) -> bool:
    """Say whether the checkpoint is of a converted model."""
    config = _config(source)
    converted = config is not None and getattr(config.get_text_config(decoder=True), ENTRY, None) is not None
    if converted and source.convert:
        raise SettingError("convert", f"must be left out, since {source.model!r} is converted already")
    return converted


def _model(source: Source, converted: bool) -> Any:
    dtype = source.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    with _loading(source):
        load_it = partial(from_pretrained, quiet=True) if converted else load_model
        model = load_it(source.model, dtype=dtype)
    if source.gates is not None:
        return _with_gates(model, source)
    if source.convert:
        convert_named(model, source.convert_arguments(), ("convert", "needs a model that can be converted"))
    return model


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers' progress bars, as of loading or saving a model, out of ours for as long as this lasts."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _loading(source: Source) -> Iterator[None]:
    """Turn errors of loading into those of `model`, and keep transformers' progress bars out of ours."""
    try:
        with without_progress_bars():
            yield
    except (OSError, ValueError, KeyError, SafetensorError, struct.error) as error:
        raise SettingError(
            "model", f"must be a folder or name of a causal language model, got {source.model!r}: {first_line(error)}"
        ) from None


def _with_gates(model: Any, source: Source) -> Any:
    try:
        load_gates(model, str(source.gates), quiet=True)
    except (OSError, TypeError, ValueError) as error:
        raise SettingError("gates", f"must be a file of this model's gates: {error}") from None
    check_conversion(model, source, "that of the gates")
    return model


def _tokenizer(source: Source) -> Tokenizer:
    if source.tokenizer == BYTES or (source.tokenizer is None and _is_of_bytes(source)):
        return ByteTokenizer()
    name = source.model if source.tokenizer is None else source.tokenizer
    try:
        place = place_of(name)
        return PretrainedTokenizer(AutoTokenizer.from_pretrained(place.name, **place.arguments))
    except (OSError, ValueError, KeyError, ImportError, AttributeError, struct.error) as error:
        reason = first_line(error).strip()
        # transformers lists its ways in further lines
        reason = "transformers finds none there" if reason.endswith(":") else reason
        raise SettingError(
            "tokenizer",
            f"must lead to a tokenizer, got {name!r}: {reason}; give its folder or name, or 'bytes' for a model of "
            "bytes",
        ) from None


def _is_of_bytes(source: Source) -> bool:
    """Say whether the model's configuration names the tokenizer of bytes, as `segattn finetune` leaves it."""
    return getattr(_config(source), TOKENIZER, None) == BYTES


def _config(source: Source) -> Any:
    """Return the model's configuration; None for a GGUF file, which has no entries of ours."""
    with _loading(source):
        place = place_of(source.model)
        return None if place.is_gguf else AutoConfig.from_pretrained(place.name)


def _check_vocabulary(source: Source, tokenizer: Tokenizer, vocabulary: int) -> None:
    """Check that the model has embeddings for the tokenizer's tokens."""
    if isinstance(tokenizer, ByteTokenizer):
        if vocabulary < 256:
            raise SettingError("tokenizer", f"must not be 'bytes' for a model of {vocabulary} tokens, fewer than 256")
        return
    # transformers makes a tokenizer without words of some folders that hold none
    tokens = tokenizer.encode("The pass key is 12345.")
    unknown = tokenizer.tokenizer.unk_token_id if isinstance(tokenizer, PretrainedTokenizer) else None
    if not tokens or {*tokens} == {unknown} or max(tokens) >= vocabulary:
        raise SettingError(
            "tokenizer", f"must be of the model's {vocabulary} tokens, got {source.tokenizer!r}, which gives {tokens}"
        )
