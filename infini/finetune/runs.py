"""Continue training a model on a text with its memory: what `segattn finetune` does, and the files that it writes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ...runs.checkpoint import InterruptedRunError, SettingError, deferred_interrupt, read_checkpoint, save_checkpoint
from ...runs.figures import prepare
from ..evaluate.loading import PretrainedTokenizer, Source, Tokenizer, load
from ..gate import Gate
from ..huggingface.conversion import convert
from ..huggingface.pieces import check_checkpointing
from ..huggingface.saving import save_pretrained
from ..huggingface.settings import conversion_of, is_converted
from .finetuner import Finetuner, FinetuneSettings
from .text import rows_of, tokens_of_dataset, tokens_of_file

# may change between a run and its continuation: the tokens are compared, and the weights are the checkpoint's
FREE = ("model", "text", "dataset", "split", "column", "tokenizer", "device", "save_every")


class Outputs(NamedTuple):
    """Where a run's files are: a line of JSON per step, what a stopped run goes on from, the model's folder."""

    log: Path
    checkpoint: Path
    model: Path

    @classmethod
    def of(cls, folder: Path) -> Outputs:
        """The files of a run in `folder`."""
        return cls(folder / "log.jsonl", folder / "checkpoint.pt", folder / "model")


class Listener(Protocol):
    """Is told how far a run has come."""

    def trained(self, step: int, steps: int, figures: Mapping[str, Any]) -> None:
        """After each step, with its line of the log."""


def run_finetune(
    settings: FinetuneSettings, folder: Path, listener: Listener, *, resume: bool = False
) -> dict[str, Any]:
    """Train, and write log, checkpoint and model to `folder`.

    Args:
        resume: go on from the checkpoint in `folder`; the weights become those of a run that was never stopped.

    Returns:
        The log's last line; nothing where no step was left.

    Raises:
        SettingError: a setting that cannot be, or with `resume`, one that is not the checkpoint's.
        InterruptedRunError: by Ctrl-C, with the checkpoint written.
    """
    outputs = Outputs.of(folder)
    saved = _checkpoint(outputs.checkpoint) if resume else None
    if saved is not None:
        _check_same(saved["settings"], settings)
    tuner, tokenizer, fingerprint = build(settings)
    if saved is not None:
        _restore(tuner, saved, fingerprint, settings)
    prepare(outputs.log, resume)
    keep_lines(outputs.log, tuner.step)
    figures = _train(tuner, fingerprint, outputs, listener)
    tuner.model.eval()
    save_pretrained(tuner.model, outputs.model)
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.tokenizer.save_pretrained(outputs.model)
    return figures


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run whose checkpoint is in `folder`.

    Raises:
        SettingError: of `resume`, where there is none.
    """
    return dict(_checkpoint(Outputs.of(folder).checkpoint)["settings"])


def build(settings: FinetuneSettings) -> tuple[Finetuner, Tokenizer, str]:
    """A run before its first step, its tokenizer, and the fingerprint of its rows."""
    source = Source(settings.model, tokenizer=settings.tokenizer, dtype=settings.dtype, device=settings.device)
    model, tokenizer, _ = load(source)
    convert_plain(model, settings)
    if settings.text is not None:
        tokens = tokens_of_file(settings.text, tokenizer)
    else:
        tokens = tokens_of_dataset(str(settings.dataset), tokenizer, settings.split, settings.column)
    rows = rows_of(tokens, settings.length)
    choose_trained(model, settings)
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    return Finetuner(model, rows, settings), tokenizer, digest


def choose_trained(model: Any, settings: FinetuneSettings) -> None:
    """All of a converted model or its gates alone, its layers run again in the backward if that is asked for."""
    if settings.gates_only:
        model.requires_grad_(False)
        for module in model.modules():
            if isinstance(module, Gate):
                module.requires_grad_(True)
    if settings.gradient_checkpointing:
        checkpoint_gradients(model)


def convert_plain(model: Any, settings: FinetuneSettings) -> None:
    """A plain model, as asked; one that is converted must be so already."""
    given: dict[str, Any] = {"segment_len": settings.segment_len, "update": settings.update}
    given = {name: value for name, value in given.items() if value is not None}
    if is_converted(model):
        for name, value in given.items():
            held = getattr(conversion_of(model).settings, name)
            if value != held:
                raise SettingError(name, f"must be the model's, {held!r}, or left out, got {value!r}")
    else:
        try:
            convert(model, **given, quiet=True)
        except (TypeError, ValueError) as error:
            name, _, problem = str(error).partition(" ")
            raise (
                SettingError(name, problem) if name in given else SettingError("model", f"cannot be: {error}")
            ) from None
    config = model.config.get_text_config(decoder=True)
    for name in ("attention_dropout", "attn_pdrop"):
        if getattr(config, name, 0):
            raise SettingError(
                "model",
                f"must have no dropout of attention, got {name} of {getattr(config, name)}: set it to 0 in its "
                "config.json",
            )


def checkpoint_gradients(model: Any) -> None:
    """Have the model's layers run again in the backward pass, by the kind of checkpointing that a memory can bear."""
    # its older name warns where there is a newer one
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    try:
        check_checkpointing(model.train())
    except ValueError as error:
        raise SettingError("gradient_checkpointing", f"must be left out: {error}") from None


def _train(tuner: Finetuner, fingerprint: str, outputs: Outputs, listener: Listener) -> dict[str, Any]:
    settings = tuner.settings
    figures: dict[str, Any] = {}

    def save() -> None:
        content = {"settings": asdict(settings), "rows": fingerprint, "tuner": tuner.state_dict()}
        save_checkpoint(outputs.checkpoint, content)

    with deferred_interrupt() as interrupted, outputs.log.open("a", encoding="utf-8") as log:
        while tuner.step < settings.steps:
            figures = tuner.advance()
            log.write(json.dumps(figures) + "\n")
            log.flush()
            listener.trained(tuner.step, settings.steps, figures)
            if interrupted or tuner.step % settings.save_every == 0 or tuner.step == settings.steps:
                save()
            if interrupted:
                raise InterruptedRunError
    return figures


def keep_lines(log: Path, steps: int) -> None:
    """Of the log, those of the steps that the checkpoint holds."""
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:steps] if log.is_file() else []
    log.write_text("".join(lines), encoding="utf-8")


def _checkpoint(path: Path) -> dict[str, Any]:
    settings = FinetuneSettings.__dataclass_fields__
    # mapped, since the settings alone are asked for too
    return read_checkpoint(path, "segattn finetune", ("rows", "tuner"), settings, mapped=True)


def _check_same(saved: Mapping[str, Any], settings: FinetuneSettings) -> None:
    for name, value in asdict(settings).items():
        if name not in FREE and saved[name] != value:
            raise SettingError(name, f"must be the checkpoint's with resume, {saved[name]!r}, got {value!r}")


def _restore(tuner: Finetuner, saved: dict[str, Any], fingerprint: str, settings: FinetuneSettings) -> None:
    if saved["rows"] != fingerprint:
        name = "dataset" if settings.text is None else "text"
        raise SettingError(name, "must hold the tokens of the checkpoint's with resume, got others")
    try:
        tuner.load_state_dict(saved["tuner"])
    except (RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError("model", f"must be the checkpoint's with resume, got another ({reason})") from None
