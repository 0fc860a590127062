"""The settings of a training run, checked."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated

from ...runs.device import usable_device
from ...runs.errors import SettingError
from ...runs.settings import absolute, check_least

# imported where they are needed, since settings are read for the help of commands too
if TYPE_CHECKING:
    from .curriculum import Recipe
    from .models import Sizes

ARCHITECTURES = ("rmt", "armt")
ENCODERS = ("bert", "modernbert")
PATHS = ("babi", "book", "pretrained", "start")
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

    The string beside a field is the help of its option. Paths become absolute, so that a run can be resumed from any
    folder. Recipes are explained at `Recipe`, tasks at `tasks.make`.

    Raises:
        SettingError: naming the setting, what it must be, and what it was.
    """

    task: Annotated[str, "Task to learn: memorize, detect, reasoning; qa1, qa2, qa4; book; retrieval, copy or reverse."]
    babi: Annotated[str | None, "Folder of bAbI's files. Default: generated facts."] = None
    book: Annotated[str | None, "File of running text, UTF-8. Default: generated sentences."] = None
    vocabulary: Annotated[int, "Words of the text that are kept, besides those of facts."] = 4000
    decoys: Annotated[float, "Share of stray words of facts in the text of half the samples."] = 0.0
    key_digits: Annotated[int, "Digits of a retrieval key."] = 2
    rewrite: Annotated[bool, "Write retrieval keys again, with other values."] = False
    encoder: Annotated[str, "Encoder of the small model of memorize, detect and reasoning: bert or modernbert."] = (
        "bert"
    )
    layers: Annotated[int, "Layers of the small model."] = 2
    width: Annotated[int, "Width of the small model's hidden states."] = 64
    heads: Annotated[int, "Attention heads of the small model."] = 4
    pretrained: Annotated[
        str | None, "Folder of a Hugging Face encoder and its tokenizer, in place of the small model."
    ] = None
    freeze: Annotated[bool, "Train only the memory and the head of a pretrained model."] = False
    start: Annotated[str | None, "Folder of an earlier run, whose model, vocabulary and weights are taken."] = None
    architecture: Annotated[str, "Kind of memory: rmt, or armt for tasks that a decoder learns (qa1 to reverse)."] = (
        "rmt"
    )
    memory: Annotated[
        int | None, "Number of memory tokens. Default: 10, or a segment's tokens where those are fewer."
    ] = None
    d_mem: Annotated[int, "Width of ARMT's queries and keys before their features."] = 64
    segment_len: Annotated[
        int | None, "Tokens per segment. Default: 499; those of a pair, --key-digits + 2, in retrieval."
    ] = None
    short: Annotated[
        tuple[int, ...] | None,
        "Tokens of the stages before a whole segment, or none. Default: 64,128 in tasks of text.",
    ] = None
    short_segments: Annotated[
        tuple[int, ...], "Segments, each as short as the last of --short, of the stages after those. Default: none."
    ] = ()
    segments: Annotated[
        tuple[int, ...],
        "Whole segments of the stages, as 1,2,5; 5 alone stands for all from the first to 5, and 5, for one stage. "
        "Default: 5.",
    ] = ()
    steps: Annotated[int, "Most steps of a stage, converged or not."] = 1500
    threshold: Annotated[float, "Share of right answers in training at which a stage converges, and ends."] = 0.99
    anneal: Annotated[int, "Steps after the last stage, over which the rate falls to nothing."] = 0
    vary: Annotated[bool, "Draw every other batch from shorter texts. Default: on."] = True
    batch: Annotated[int, "Samples per step."] = 32
    later_batch: Annotated[int | None, "Samples per step in stages of several segments. Default: --batch."] = None
    lr: Annotated[float, "Learning rate."] = 1e-3
    later_lr: Annotated[float | None, "Learning rate in stages of several segments. Default: 0.4 of --lr."] = None
    beta2: Annotated[float, "β₂ of AdamW, decay of the mean of squared gradients."] = 0.999
    noise: Annotated[float, "Noise on RMT's memory in training, relative to the size of its rows."] = 0.0
    weight_decay: Annotated[float, "Weight decay of all parameters."] = 1e-3
    warm_up: Annotated[int, "Steps over which the rate rises in each stage.", "--warmup"] = 50
    bptt: Annotated[int | None, "Segments that gradients reach back. Default: all."] = None
    seed: Annotated[int, "Seed of weights, dropout and samples."] = 0
    device: Annotated[str | None, "Where to run, such as cpu or cuda. Default: a GPU where one is."] = None
    test_samples: Annotated[int, "Number of samples to test on after each stage."] = 200

    def __post_init__(self) -> None:
        from ..tasks.make import TASKS

        if self.task not in TASKS:
            raise SettingError("task", f"must be one of {', '.join(TASKS)}, got {self.task!r}")
        for name in PATHS:
            object.__setattr__(self, name, absolute(getattr(self, name)))
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
        usable_device(self.device)

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
        """Return whether the task has classes, and the model is an encoder."""
        from ..tasks.make import FORMS

        return self.task in FORMS and FORMS[self.task].kind == "class"

    def sizes(self) -> Sizes:
        """Return the sizes of the small model."""
        from .models import Sizes

        return Sizes(self.layers, self.width, self.heads)

    def recipe(self) -> Recipe:
        """Return the recipe of the curriculum, whose settings have the same names."""
        from .curriculum import Recipe

        shared = {field.name: getattr(self, field.name) for field in fields(Recipe) if hasattr(self, field.name)}
        return Recipe(**shared | {"short": self.short or (), "later_batch": self.later_batch or self.batch})

    def _check_numbers(self) -> None:
        check_least(self, LEAST)
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
        from ..tasks.make import FORMS

        text, small = self.task in FORMS, self.pretrained is None
        of_classes = ", ".join(name for name, form in FORMS.items() if form.kind == "class")
        uses = (
            ("babi", text and self.task != "book", "is for tasks of bAbI's questions"),
            ("book decoys", text, f"is for tasks of text, {', '.join(FORMS)}"),
            ("key_digits rewrite", self.task == "retrieval", "is for retrieval"),
            ("pretrained", self.classifies, f"is for tasks of classes, {of_classes}"),
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
