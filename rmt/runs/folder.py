"""A training run's folder: where its files are, and what is built and loaded from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from ...runs.checkpoint import SettingError, named
from ..associative.memory import AssociativeMemory
from ..recurrent.memory import RecurrentMemory
from ..tasks.facts import babi_file
from ..tasks.make import FORMS, CopyTask, Task, make_task
from ..tasks.vocabulary import CLS, SEP, Vocabulary
from .models import Pretrained, freeze_model, pretrained_encoder, pretrained_tokenizer, small_decoder, small_encoder
from .settings import OF_MODEL, TrainSettings, device_of, short_stages

# arguments → settings
_OF_TASK = {name: name for name in ("babi", "book", "decoys", "key_digits")} | {"path": "babi", "text": "book"}
_OF_MODEL = {name: name for name in ("segment_len", "bptt", "d_mem", "noise")} | {"num_memory_tokens": "memory"}
# what reading a folder that is no run's, or is damaged, may raise
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError)


class Outputs(NamedTuple):
    """Where a run's files are.

    figures: settings and everything measured.
    checkpoint: what a stopped run goes on from.
    weights: of the memory and its model.
    vocabulary: the words of the token ids.
    pretrained: a pretrained model's configuration and tokenizer.
    before: figures of the run that this one started from.
    """

    figures: Path
    checkpoint: Path
    weights: Path
    vocabulary: Path
    pretrained: Path
    before: Path

    @classmethod
    def of(cls, folder: Path) -> Outputs:
        """The files of a run in `folder`."""
        names = ("figures.json", "checkpoint.pt", "model.safetensors", "vocabulary.json", "pretrained", "before.json")
        return cls(*(folder / name for name in names))


class Run(NamedTuple):
    """What is trained, or was: `source` is a pretrained model's tokenizer, otherwise None."""

    settings: TrainSettings
    task: Task
    memory: nn.Module
    source: Pretrained | None

    def encode(self, text: str) -> list[int]:
        """Token ids of a sentence."""
        if self.source is not None:
            return self.source.encode(text)
        if self.task.vocabulary is None:
            raise RuntimeError("a task without a vocabulary has a pretrained model's tokenizer")
        return self.task.vocabulary.encode(text)


def build(settings: TrainSettings, earlier: Outputs | None = None) -> Run:
    """Task and memory, before the first step, with the settings that follow from the task.

    Args:
        earlier: of a run that was begun: its words, configuration and tokenizer are taken, and weights are random.

    Raises:
        SettingError: naming the setting.
    """
    source = None
    if settings.pretrained is not None:
        source = pretrained_tokenizer(earlier.pretrained if earlier else Path(settings.pretrained))
    with named(**_OF_TASK):
        task = make_task(settings.task, **_task_options(settings, source, earlier))
    if settings.short is None:
        settings = replace(settings, short=short_stages(task, settings.tokens))
    torch.manual_seed(settings.seed)
    with named(**_OF_MODEL):
        memory = _memory(settings, task, source, earlier)
    return Run(settings, task, memory.to(device_of(settings.device)), source)


def start_from(folder: Path, settings: TrainSettings) -> Run:
    """Task and memory with the words and weights of an earlier run.

    Raises:
        SettingError: naming the setting; of `start`, where the folder holds no run, or one of another model.
    """
    outputs = Outputs.of(folder)
    before = settings_of(folder, "start")
    for name in OF_MODEL:
        given, own = (getattr(settings, name), before[name])
        # a pretrained model is in the folder, wherever it was
        same = (given is None) == (own is None) if name == "pretrained" else given == own
        if not same:
            raise SettingError(name, f"must be the earlier run's with start, {own!r}, got {given!r}")
    try:
        run = build(settings, outputs)
        load_model(run.memory, outputs.weights, device=device_of(settings.device))
    except SettingError:
        raise
    except _UNREADABLE as error:
        raise _no_run("start", folder, error) from None
    return run


def settings_of(folder: Path, option: str = "folder") -> dict[str, Any]:
    """The settings of the run in a folder.

    Raises:
        SettingError: of `option`: no run is there.
    """
    try:
        settings = dict(_figures(folder)["settings"])
        if settings.keys() != TrainSettings.__dataclass_fields__.keys():
            raise ValueError("its figures.json is of another command, or of another version")
        return settings
    except _UNREADABLE as error:
        raise _no_run(option, folder, error) from None


def trained_tokens(folder: Path) -> int:
    """Of the longest texts that the run in a folder was trained on, and those that it started from."""

    def longest(figures: dict[str, Any]) -> int:
        before = figures.get("before")
        return max([longest(before) if before else 0, *(stage["tokens"] for stage in figures["stages"])])

    return longest(_figures(folder))


def write_sources(run: Run, outputs: Outputs) -> None:
    """What `build` takes from a run that was begun, and the record of what came before it."""
    if run.settings.start is not None:
        shutil.copyfile(Outputs.of(Path(run.settings.start)).figures, outputs.before)
    if run.source is not None:
        model: Any = run.memory.model
        model.config.save_pretrained(outputs.pretrained)
        run.source.tokenizer.save_pretrained(outputs.pretrained)
    elif run.task.vocabulary is not None:
        outputs.vocabulary.write_text(json.dumps(run.task.vocabulary.words) + "\n", encoding="utf-8")


def load_run(folder: Path, *, babi: str | None = None, book: str | None = None, device: str | None = None) -> Run:
    """A trained run, for questions.

    Args:
        babi, book: other files than those that it was trained on.
        device: None: a GPU where one is.

    Raises:
        SettingError: of `folder`, where it holds no run, or of the others.
    """
    outputs = Outputs.of(folder)
    files = {name: path for name, path in {"babi": babi, "book": book}.items() if path is not None}
    given = settings_of(folder) | files | {"device": device}
    try:
        run = build(TrainSettings(**given), outputs)
        load_model(run.memory, outputs.weights, device=device_of(device))
    except SettingError:
        raise
    except _UNREADABLE as error:
        raise _no_run("folder", folder, error) from None
    run.memory.eval()
    return run


def _figures(folder: Path) -> dict[str, Any]:
    return dict(json.loads(Outputs.of(folder).figures.read_text(encoding="utf-8")))


def _no_run(setting: str, folder: Path, error: Exception) -> SettingError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return SettingError(setting, f"must be one that segattn rmt train wrote, got {str(folder)!r} ({reason})")


def fingerprint(settings: TrainSettings) -> str:
    """Of the files that samples are made from."""
    files = []
    if settings.task in FORMS and settings.book is not None:
        files.append(Path(settings.book))
    if settings.task in FORMS and settings.babi is not None:
        form = FORMS[settings.task].questions
        files += [babi_file(settings.babi, form, split) for split in ("train", "test")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _task_options(settings: TrainSettings, source: Pretrained | None, earlier: Outputs | None) -> dict[str, Any]:
    if settings.task == "retrieval":
        return {"key_digits": settings.key_digits, "rewrite": settings.rewrite}
    if settings.task not in FORMS:
        return {}
    files = {"babi": settings.babi, "book": settings.book, "decoys": settings.decoys}
    if source is not None:
        return files | {"encode": source.encode, "vocab_size": len(source.tokenizer)}
    if earlier is not None:
        return files | {"vocabulary": Vocabulary(json.loads(earlier.vocabulary.read_text(encoding="utf-8")))}
    return files | {"vocabulary_size": settings.vocabulary}


def _memory(settings: TrainSettings, task: Task, source: Pretrained | None, earlier: Outputs | None) -> nn.Module:
    m, length = settings.memory_tokens, settings.tokens
    if settings.classifies:
        return _classifier(settings, task, source, earlier)
    model = small_decoder(task.vocab_size, length + 2 * m, settings.sizes())
    if settings.architecture == "armt":
        return AssociativeMemory(model, m, length, d_mem=settings.d_mem, bptt=settings.bptt)
    # copies stand in many segments, other answers in the last
    loss = "all" if isinstance(task, CopyTask) else "last"
    return RecurrentMemory(model, m, length, bptt=settings.bptt, loss=loss, noise=settings.noise)


def _classifier(settings: TrainSettings, task: Task, source: Pretrained | None, earlier: Outputs | None) -> nn.Module:
    m, length = settings.memory_tokens, settings.tokens
    special = (CLS, SEP) if source is None else source.special_tokens
    if settings.pretrained is None:
        model = small_encoder(settings.encoder, task.vocab_size, len(task.classes), length + m + 3, settings.sizes())
    elif earlier is None:
        model = pretrained_encoder(Path(settings.pretrained), len(task.classes))
    else:
        model = pretrained_encoder(earlier.pretrained)
    memory = RecurrentMemory(
        model,
        m,
        length,
        kind="encoder",
        special_tokens=special,
        alignment="right",
        loss="last",
        bptt=settings.bptt,
        noise=settings.noise,
    )
    if settings.freeze:
        freeze_model(memory)
    return memory
