"""The settings of the experiment: the task, the models, how they are trained, and the books that they read."""

from __future__ import annotations

from dataclasses import dataclass

from ....rmt.runs.curriculum import Recipe
from ....rmt.runs.models import Sizes
from ....runs.errors import SettingError
from ....runs.settings import check_least

LEAST = dict.fromkeys(
    "people vocabulary layers width heads memory_tokens d_mem segment_len steps batch later_batch books".split(), 1
)


NAMES = ("full", "delta", "rmt", "armt")


@dataclass(frozen=True)
class Setup:
    """The settings of the command.

    people: Facts in a book, of which each is asked for.
    vocabulary: Words of the book that are kept, besides those of the facts.
    memory_tokens, d_mem: Of RMT and ARMT.
    stretch: Of Infini-attention, as in `Cached`.
    noise: Of RMT, on its memory in training.
    segments: Segments of the training texts, by stage; the models are never trained on more.
    steps to later_lr: As in `Recipe`.
    models: Those to run, which may differ from those of an earlier call.
    lengths: Tokens of the books, as their numbers of segments.
    full_up_to: Tokens of the longest book that full attention reads.
    books: Books per length.
    """

    people: int = 4
    vocabulary: int = 500
    layers: int = 2
    width: int = 64
    heads: int = 4
    memory_tokens: int = 8
    d_mem: int = 16
    stretch: float = 65536.0
    noise: float = 0.1
    segment_len: int = 64
    segments: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 400
    threshold: float = 0.97
    anneal: int = 150
    batch: int = 64
    later_batch: int = 32
    lr: float = 2e-3
    later_lr: float = 1e-3
    lengths: tuple[int, ...] = (512, 4096, 32768, 131072, 524288)
    full_up_to: int = 32768
    books: int = 10
    seed: int = 0
    models: tuple[str, ...] = NAMES

    def __post_init__(self) -> None:
        check_least(self, LEAST | {"anneal": 0, "seed": 0})
        for name in ("segments", "lengths"):
            values = list(getattr(self, name))
            if not values or values != sorted(set(values)) or values[0] < 1:
                raise SettingError(name, f"must be positive and go up, got {values}")
        if any(length % self.segment_len for length in self.lengths):
            raise SettingError("lengths", f"must be multiples of segment_len, {self.segment_len}, got {self.lengths}")
        if self.width % (2 * self.heads):
            raise SettingError("width", f"must be a multiple of {2 * self.heads}, twice the heads, got {self.width}")
        if not 0 < self.threshold <= 1:
            raise SettingError("threshold", f"must be above 0 and at most 1, got {self.threshold}")
        for name in self.models:
            if name not in NAMES:
                raise SettingError("models", f"must be among {', '.join(NAMES)}, got {name!r}")
        if self.noise < 0:
            raise SettingError("noise", f"must be 0 or more, got {self.noise}")
        if self.stretch < 1:
            raise SettingError("stretch", f"must be at least 1, got {self.stretch}")
        for name in ("lr", "later_lr"):
            if getattr(self, name) <= 0:
                raise SettingError(name, f"must be positive, got {getattr(self, name)}")

    @property
    def sizes(self) -> Sizes:
        """The sizes of the Llama in all models."""
        return Sizes(self.layers, self.width, self.heads)

    @property
    def recipe(self) -> Recipe:
        """The curriculum of all models."""
        return Recipe(
            short=(),
            segments=self.segments,
            steps=self.steps,
            threshold=self.threshold,
            anneal=self.anneal,
            batch=self.batch,
            later_batch=self.later_batch,
            lr=self.lr,
            later_lr=self.later_lr,
            beta2=0.98,
        )
