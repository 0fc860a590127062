"""The settings of a training run, checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import pairwise

import torch

from ...runs.checkpoint import SettingError
from ..tasks.make import FORMS, TASKS, Task
from .curriculum import Recipe
from .models import ENCODERS, Sizes

ARCHITECTURES = ("rmt", "armt")
CLASS_TASKS = tuple(name for name, form in FORMS.items() if form.kind == "class")
SHORT = (64, 128)
COUNTS = (
    "layers width heads memory d_mem segment_len steps warm_up batch later_batch bptt key_digits test_samples".split()
)
LEAST = dict.fromkeys(COUNTS, 1) | {"anneal": 0, "seed": 0, "vocabulary": 0}
# settings that a run must share with the one that it starts from
OF_MODEL = "vocabulary encoder layers width heads pretrained architecture memory d_mem segment_len".split()
# settings that it takes from that one by default
OF_TASK = "task babi book key_digits rewrite".split()


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a training run. Class tasks train an encoder, token tasks a decoder.

    Args:
        task: a name in `tasks.make.TASKS`.
        babi: folder of bAbI's files; None: generated facts.
        book: file of running text; None: generated sentences.
        vocabulary: words of the text that are kept, besides those of the facts.
        decoys: in tasks of text, share of the training text's tokens that are replaced by single ones out of facts.
        key_digits, rewrite: as in `RetrievalTask`.
        encoder: kind of the small model for class tasks, bert or modernbert.
        layers, width, heads: of the small model.
        pretrained: folder of an encoder and its tokenizer, in place of the small model.
        freeze: train only the memory and the head of a pretrained model.
        start: folder of an earlier run with the same model, whose vocabulary and weights the run begins with.
        architecture: "rmt" or, for token tasks, "armt".
        memory: memory tokens; None: 10, or a segment's tokens where those are fewer.
        d_mem: of armt, width of queries and keys before their features.
        segment_len: tokens of a segment; None: 499, in retrieval those of a pair.
        short: as in `Recipe`; None: 64 and 128 in tasks of text, where those are possible.
        short_segments: as in `Recipe`.
        segments: as in `Recipe`; empty: up to 5.
        steps, threshold, anneal, vary, batch, lr, beta2, weight_decay, warm_up: as in `Recipe`.
        later_batch, later_lr: as in `Recipe`; None: batch, and 0.4 of lr.
        noise: of rmt, added to the memory between segments in training, relative to the size of its rows.
        bptt: segments that gradients reach back; None: all.
        seed: of weights, dropout and samples.
        device: as PyTorch names it; None: a GPU where one is.
        test_samples: number of test samples after each stage, at its length.

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
        """The tokens of a segment."""
        if self.segment_len is None:
            raise RuntimeError("segment_len is not set before the settings are checked")
        return self.segment_len

    @property
    def memory_tokens(self) -> int:
        """The number of memory tokens, m."""
        if self.memory is None:
            raise RuntimeError("memory is not set before the settings are checked")
        return self.memory

    @property
    def classifies(self) -> bool:
        """Whether the task has classes, and the model is an encoder."""
        return self.task in CLASS_TASKS

    def sizes(self) -> Sizes:
        """Return the sizes of the small model."""
        return Sizes(self.layers, self.width, self.heads)

    def recipe(self) -> Recipe:
        """Return the recipe of the curriculum, whose settings have the same names."""
        shared = {field.name: getattr(self, field.name) for field in fields(Recipe) if hasattr(self, field.name)}
        return Recipe(**shared | {"short": self.short or (), "later_batch": self.later_batch or self.batch})

    def _check_numbers(self) -> None:
        check_least(self, LEAST)
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
        """Check that no option is set that would change nothing."""
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
        """Describe the task and the model, for messages."""
        model = self.architecture if self.pretrained is None else "a pretrained model"
        return f"{self.task} and {model}"


def up_to(segments: int, task: str) -> tuple[int, ...]:
    """Return the stages from one segment up to `segments`; retrieval begins at two, a pair and a question."""
    return tuple(range(min(segments, 1 + (task == "retrieval")), segments + 1))


def short_stages(task: Task, segment_len: int) -> tuple[int, ...]:
    """Return the default stages shorter than a segment, since little is learnt from long texts at first."""
    return tuple(n for n in SHORT if task.shortest <= n < segment_len) if task.name in FORMS else ()


def check_device(device: str | None) -> None:
    """Check that PyTorch can compute on a device.

    Raises:
        SettingError: of `device`: it cannot.
    """
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingError(
            "device", f"must be one that PyTorch can use here, such as 'cpu', got {device!r} ({reason})"
        ) from None


def device_of(device: str | None) -> str:
    """Return the device, by default a GPU where one is."""
    return device or ("cuda" if torch.cuda.is_available() else "cpu")


def check_least(settings: object, least: Mapping[str, int]) -> None:
    """Check that no setting is below its least value; one that is None has no value.

    Raises:
        SettingError: naming the setting.
    """
    for name, low in least.items():
        value = getattr(settings, name)
        if value is not None and value < low:
            raise SettingError(name, f"must be at least {low}, got {value}")
