"""A training run's folder: the places of its files, and the task and memory built and loaded from them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model
from torch import nn

from ...runs.device import usable_device
from ...runs.errors import SettingError, first_line, named
from ..associative.memory import AssociativeMemory
from ..recurrent.memory import RecurrentMemory
from ..tasks.facts import babi_file
from ..tasks.make import FORMS, Task, make_task
from ..tasks.symbols import CopyTask
from ..tasks.vocabulary import CLS, SEP, Vocabulary
from .models import Pretrained, freeze_model, pretrained_encoder, pretrained_tokenizer, small_decoder, small_encoder
from .settings import OF_MODEL, TrainSettings

# tokens of the first stages of tasks of text
SHORT = (64, 128)
# names of arguments → settings
_OF_TASK = {name: name for name in ("babi", "book", "decoys", "key_digits")} | {"path": "babi", "text": "book"}
_OF_MODEL = {name: name for name in ("segment_len", "bptt", "d_mem", "noise")} | {"num_memory_tokens": "memory"}
# errors that reading a folder may raise which is no run's, or damaged
_UNREADABLE = (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError)


class RunFiles(NamedTuple):
    """The places of a run's files.

    figures: settings and everything measured in training.
    checkpoint: the state from which a stopped run is resumed.
    weights: of the memory and its model.
    vocabulary: the words of the token ids.
    pretrained: folder of a pretrained model's configuration and tokenizer.
    before: figures of the run that this one started from.
    evaluation, attention: figures of what is measured after training; beside each stands a picture.
    """

    figures: Path
    checkpoint: Path
    weights: Path
    vocabulary: Path
    pretrained: Path
    before: Path
    evaluation: Path
    attention: Path

    @classmethod
    def of(cls, folder: Path) -> RunFiles:
        """Return the places of a run's files in a folder."""
        training = (
            "figures.json",
            "checkpoint.pt",
            "model.safetensors",
            "vocabulary.json",
            "pretrained",
            "before.json",
        )
        return cls(*(folder / name for name in (*training, "evaluation.json", "attention.json")))


class Run(NamedTuple):
    """A memory and the task that it is trained on.

    source: a pretrained model's tokenizer; None for a small model.
    """

    settings: TrainSettings
    task: Task
    memory: nn.Module
    source: Pretrained | None

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a sentence, without special tokens."""
        if self.source is not None:
            return self.source.encode(text)
        if self.task.vocabulary is None:
            raise RuntimeError("a task without a vocabulary has a pretrained model's tokenizer")
        return self.task.vocabulary.encode(text)


def build(settings: TrainSettings, earlier: RunFiles | None = None) -> Run:
    """Make the task and the memory of a run, before its first step, and fill in the settings that depend on the task.

    Args:
        earlier: files of a run that was begun, whose vocabulary, configuration and tokenizer are taken; the weights are
            random. None: all are made anew.

    Raises:
        SettingError: naming the setting.
    """
    source = None
    if settings.pretrained is not None:
        source = pretrained_tokenizer(earlier.pretrained if earlier else Path(settings.pretrained))
    with named(**_OF_TASK):
        task = make_task(settings.task, **_task_options(settings, source, earlier))
    if settings.short is None:
        settings = replace(settings, short=_short_stages(task, settings.tokens))
    torch.manual_seed(settings.seed)
    with named(**_OF_MODEL):
        memory = _memory(settings, task, source, earlier)
    return Run(settings, task, memory.to(usable_device(settings.device)), source)


def start_from(folder: Path, settings: TrainSettings) -> Run:
    """Make the task and the memory of a run, with the vocabulary and weights of an earlier one.

    Args:
        folder: of the earlier run.

    Raises:
        SettingError: naming the setting; of `start`, where the folder holds no run, or one of another model.
    """
    before = settings_of(folder, "start")
    for name in OF_MODEL:
        value, earlier = getattr(settings, name), before[name]
        # a pretrained model is in the folder, wherever it was
        same = (value is None) == (earlier is None) if name == "pretrained" else value == earlier
        if not same:
            raise SettingError(name, f"must be the earlier run's with start, {earlier!r}, got {value!r}")
    with _reading(folder, "start"):
        return _load(settings, folder)


def settings_of(folder: Path, option: str = "folder") -> dict[str, Any]:
    """Return the settings of the run in a folder.

    Raises:
        SettingError: of `option`: the folder holds no run.
    """
    with _reading(folder, option):
        settings = dict(_figures(folder)["settings"])
        if settings.keys() != TrainSettings.__dataclass_fields__.keys():
            raise ValueError("its figures.json is of another command, or of another version")
        return settings


def trained_tokens(folder: Path) -> int:
    """Return the length of the longest texts that the run in a folder, or one that it started from, was trained on."""

    def longest(figures: dict[str, Any]) -> int:
        before = figures.get("before")
        return max([longest(before) if before else 0, *(stage["tokens"] for stage in figures["stages"])])

    return longest(_figures(folder))


def write_sources(run: Run, files: RunFiles) -> None:
    """Write what `build` takes from a run that was begun, and the figures of the run that this one started from."""
    if run.settings.start is not None:
        shutil.copyfile(RunFiles.of(Path(run.settings.start)).figures, files.before)
    if run.source is not None:
        model: Any = run.memory.model
        model.config.save_pretrained(files.pretrained)
        run.source.tokenizer.save_pretrained(files.pretrained)
    elif run.task.vocabulary is not None:
        files.vocabulary.write_text(json.dumps(run.task.vocabulary.words) + "\n", encoding="utf-8")


def load_run(folder: Path, *, babi: str | None = None, book: str | None = None, device: str | None = None) -> Run:
    """Load a trained run, with its memory in evaluation mode.

    Args:
        babi, book: other files than those that it was trained on; None: the same.
        device: None: a GPU where one is.

    Raises:
        SettingError: of `folder`, where it holds no run, or of the others.
    """
    files = {name: path for name, path in {"babi": babi, "book": book}.items() if path is not None}
    for name, path in files.items():
        if not Path(path).exists():
            raise SettingError(name, f"must be there, got {path!r}")
    saved = settings_of(folder) | files | {"device": device}
    with _reading(folder, "folder"):
        run = _load(TrainSettings(**saved), folder)
    run.memory.eval()
    return run


def _load(settings: TrainSettings, folder: Path) -> Run:
    """Build a run with the vocabulary and weights in a folder."""
    files = RunFiles.of(folder)
    run = build(settings, files)
    load_model(run.memory, files.weights, device=usable_device(settings.device))
    return run


@contextmanager
def _reading(folder: Path, option: str) -> Iterator[None]:
    """Turn errors of reading a folder that holds no run into a `SettingError` of `option`."""
    try:
        yield
    except SettingError:
        raise
    except _UNREADABLE as error:
        message = f"must be one that segattn rmt train wrote, got {str(folder)!r} ({first_line(error)})"
        raise SettingError(option, message) from None


def _figures(folder: Path) -> dict[str, Any]:
    """Read the figures of a run."""
    return dict(json.loads(RunFiles.of(folder).figures.read_text(encoding="utf-8")))


def fingerprint(settings: TrainSettings) -> str:
    """Return the SHA-256 of the files that samples are made from."""
    files = []
    if settings.task in FORMS and settings.book is not None:
        files.append(Path(settings.book))
    form = FORMS[settings.task].questions if settings.task in FORMS else None
    if form is not None and settings.babi is not None:
        files += [babi_file(settings.babi, form, split) for split in ("train", "test")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _task_options(settings: TrainSettings, source: Pretrained | None, earlier: RunFiles | None) -> dict[str, Any]:
    """Return the arguments of `make_task`."""
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


def _short_stages(task: Task, segment_len: int) -> tuple[int, ...]:
    """Return the default stages shorter than a segment, since little is learnt from long texts at first."""
    return tuple(n for n in SHORT if task.shortest <= n < segment_len) if task.name in FORMS else ()


def _memory(settings: TrainSettings, task: Task, source: Pretrained | None, earlier: RunFiles | None) -> nn.Module:
    """Make the memory of a run, around a model that has random or pretrained weights."""
    m, length = settings.memory_tokens, settings.tokens
    if settings.classifies:
        return _classifier(settings, task, source, earlier)
    model = small_decoder(task.vocab_size, length + 2 * m, settings.sizes())
    if settings.architecture == "armt":
        return AssociativeMemory(model, m, length, d_mem=settings.d_mem, bptt=settings.bptt)
    # copies stand in many segments, other answers in the last
    loss = "all" if isinstance(task, CopyTask) else "last"
    return RecurrentMemory(model, m, length, bptt=settings.bptt, loss=loss, noise=settings.noise)


def _classifier(settings: TrainSettings, task: Task, source: Pretrained | None, earlier: RunFiles | None) -> nn.Module:
    """Make the memory of a run with a task of classes, around an encoder."""
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
