"""What a training run can be asked for, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from ...runs.checkpoint import SettingError
from ..tasks.make import FORMS, TASKS, Task
from .curriculum import Recipe
from .models import ENCODERS, Sizes

ARCHITECTURES = ("rmt", "armt")
CLASS_TASKS = tuple(name for name, form in FORMS.items() if form.kind == "class")
SHORT = (64, 128)
LEAST = {"seed": 0, "anneal": 0, "vocabulary": 0, "warm_up": 1}
COUNTS = (
    "layers width heads memory d_mem segment_len steps anneal warm_up batch later_batch bptt "
    "seed vocabulary key_digits test_samples"
).split()
# what a run that starts from another must share with it
OF_MODEL = "vocabulary encoder layers width heads pretrained architecture memory d_mem segment_len".split()
# what it takes from it besides, where nothing else is said
OF_TASK = "task babi book key_digits rewrite".split()


@dataclass(frozen=True)
class TrainSettings:
    """A training run. Class tasks train an encoder, token tasks a decoder.

    Args:
        task: in `tasks.TASKS`.
        babi: folder of bAbI's files; None: generated facts.
        book: file of running text; None: generated sentences.
        vocabulary: words of the text that are kept, besides those of the facts.
        decoys: of tasks of text, share of the training text's tokens that are single ones out of facts instead.
        key_digits, rewrite: of retrieval.
        encoder: kind of the small model for class tasks, bert or modernbert.
        layers, width, heads: of the small model.
        pretrained: folder of an encoder and its tokenizer, in place of the small one.
        freeze: train memory and head alone.
        start: folder of an earlier run, whose words and weights are the first; the settings of the model must be its.
        architecture: "rmt" or, for token tasks, "armt".
        memory: memory tokens; None: 10, or a segment's tokens where those are fewer.
        d_mem: of armt, width of queries and keys before their features.
        segment_len: tokens; None: 499, or what a pair takes in retrieval.
        short: as in `Recipe`; None: 64 and 128 in tasks of text, where those are possible.
        short_segments: as in `Recipe`.
        segments: as in `Recipe`; none: up to 5.
        steps, threshold, anneal, vary, batch, lr, beta2, weight_decay, warm_up: as in `Recipe`.
        later_batch, later_lr: likewise; None: batch, and 0.4 of lr.
        noise: of rmt, added to the memory between segments in training, relative to its spread.
        bptt: segments that gradients reach back; None: all.
        seed: of weights, dropout and samples.
        device: None: a GPU where one is.
        test_samples: after each stage, at its length.

    Raises:
        SettingError: naming the setting, what it must be, and what it was.
    """

    task: str
    babi: str | None = None
    book: str | None = None
    vocabulary: int = 4000
    decoys: float = 0.0
    key_digits: int = 2
    rewrite: bool = False
    encoder: str = "bert"
    layers: int = 2
    width: int = 64
    heads: int = 4
    pretrained: str | None = None
    freeze: bool = False
    start: str | None = None
    architecture: str = "rmt"
    memory: int | None = None
    d_mem: int = 64
    segment_len: int | None = None
    short: tuple[int, ...] | None = None
    short_segments: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    steps: int = 1500
    threshold: float = 0.99
    anneal: int = 0
    vary: bool = True
    batch: int = 32
    later_batch: int | None = None
    lr: float = 1e-3
    later_lr: float | None = None
    beta2: float = 0.999
    noise: float = 0.0
    weight_decay: float = 1e-3
    warm_up: int = 50
    bptt: int | None = None
    seed: int = 0
    device: str | None = None
    test_samples: int = 200

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise SettingError("task", f"must be one of {', '.join(TASKS)}, got {self.task!r}")
        object.__setattr__(self, "segments", tuple(self.segments) or up_to(5, self.task))
        if self.short is not None:
            object.__setattr__(self, "short", tuple(self.short))
        object.__setattr__(self, "short_segments", tuple(self.short_segments))
        self._check_numbers()
        self._check_model()
        self._check_use()
        if self.task == "retrieval":
            length = self.key_digits + 2
            if self.segment_len not in (None, length):
                raise SettingError("segment_len", f"must be {length} for retrieval, a pair, got {self.segment_len}")
            object.__setattr__(self, "segment_len", length)
        elif self.segment_len is None:
            object.__setattr__(self, "segment_len", 499)
        if self.memory is None:
            object.__setattr__(self, "memory", min(10, self.tokens))
        if self.later_lr is None:
            object.__setattr__(self, "later_lr", 0.4 * self.lr)
        check_device(self.device)

    @property
    def tokens(self) -> int:
        """Of a segment."""
        if self.segment_len is None:
            raise RuntimeError("segment_len is not set before the settings are checked")
        return self.segment_len

    @property
    def memory_tokens(self) -> int:
        """m."""
        if self.memory is None:
            raise RuntimeError("memory is not set before the settings are checked")
        return self.memory

    @property
    def classifies(self) -> bool:
        """Whether the task has classes, and the model is an encoder."""
        return self.task in CLASS_TASKS

    def sizes(self) -> Sizes:
        """Of the small model."""
        return Sizes(self.layers, self.width, self.heads)

    def recipe(self) -> Recipe:
        """How it is trained."""
        return Recipe(
            short=self.short or (),
            short_segments=self.short_segments,
            segments=self.segments,
            steps=self.steps,
            threshold=self.threshold,
            anneal=self.anneal,
            vary=self.vary,
            batch=self.batch,
            later_batch=self.batch if self.later_batch is None else self.later_batch,
            beta2=self.beta2,
            lr=self.lr,
            later_lr=self.lr if self.later_lr is None else self.later_lr,
            weight_decay=self.weight_decay,
            warm_up=self.warm_up,
        )

    def _check_numbers(self) -> None:
        for name in COUNTS:
            value, low = getattr(self, name), LEAST.get(name, 1)
            if value is not None and value < low:
                raise SettingError(name, f"must be at least {low}, got {value}")
        if self.seed >= 2**32:
            raise SettingError("seed", f"must be below 2**32, got {self.seed}")
        if not 0 < self.threshold <= 1:
            raise SettingError("threshold", f"must be above 0 and at most 1, got {self.threshold}")
        for name in ("beta2", "decoys"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(name, f"must be from 0 to below 1, got {getattr(self, name)}")
        for name in ("lr", "later_lr", "weight_decay", "noise"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise SettingError(name, f"must be 0 or more, got {value}")
        for name in ("short", "short_segments", "segments"):
            stages = getattr(self, name) or (1,)
            if stages[0] < 1 or any(b <= a for a, b in pairwise(stages)):
                raise SettingError(name, f"must be rising numbers from 1 on, got {','.join(map(str, stages))}")

    def _check_model(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise SettingError("architecture", f"must be one of {', '.join(ARCHITECTURES)}, got {self.architecture!r}")
        if self.encoder not in ENCODERS:
            raise SettingError("encoder", f"must be one of {', '.join(ENCODERS)}, got {self.encoder!r}")
        if self.architecture == "armt" and self.classifies:
            raise SettingError("architecture", f"must be rmt for {self.task}, whose model is an encoder, got 'armt'")
        if self.width % self.heads:
            raise SettingError("width", f"must be a multiple of --heads {self.heads}, got {self.width}")
        if self.width // self.heads % 2:
            raise SettingError("width", f"must give even heads, for rotary embedding, got {self.width // self.heads}")

    def _check_use(self) -> None:
        """See that nothing is asked for that would change nothing."""
        text, small = self.task in FORMS, self.pretrained is None
        uses = (
            ("babi book decoys", text, f"is for tasks of text, {', '.join(FORMS)}"),
            ("key_digits rewrite", self.task == "retrieval", "is for retrieval"),
            ("pretrained", self.classifies, f"is for tasks of classes, {', '.join(CLASS_TASKS)}"),
            ("freeze", not small, "must come with --pretrained: a model of random weights is not worth keeping"),
            ("encoder", self.classifies and small, "is for the small model of tasks of classes"),
            ("vocabulary", text and small, "is for the small model of tasks of text"),
            ("layers width heads", small, "is for the small model"),
            ("noise", self.architecture == "rmt", "is for rmt"),
            ("d_mem", self.architecture == "armt", "is for armt"),
        )
        for names, used, where in uses:
            for name in names.split():
                value = getattr(self, name)
                if not used and value != self.__dataclass_fields__[name].default:
                    raise SettingError(name, f"{where}, got {value!r} with {self._kind()}")

    def _kind(self) -> str:
        model = self.architecture if self.pretrained is None else "a pretrained model"
        return f"{self.task} and {model}"


def up_to(segments: int, task: str) -> tuple[int, ...]:
    """Every stage up to so many segments; retrieval begins at two, a pair and a question."""
    return tuple(range(min(segments, 1 + (task == "retrieval")), segments + 1))


def short_stages(task: Task, segment_len: int) -> tuple[int, ...]:
    """Where nothing is said: on long texts little is learnt from the beginning."""
    return tuple(n for n in SHORT if task.shortest <= n < segment_len) if task.name in FORMS else ()


def check_device(device: str | None) -> None:
    """See that PyTorch can compute there.

    Raises:
        SettingError: of `device`.
    """
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            "device", f"must be one that PyTorch can use here, such as 'cpu', got {device!r} ({reason})"
        ) from None


def device_of(device: str | None) -> str:
    """As given, or a GPU where one is."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def existing(name: str, path: str | None) -> None:
    """See that a file or folder is there.

    Raises:
        SettingError: of `name`.
    """
    if path is not None and not Path(path).exists():
        raise SettingError(name, f"must be there, got {path!r}")
