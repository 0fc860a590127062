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


@dataclass(frozen=True)
class Setup:
    """The settings of the command.

    people: Facts in a book, of which each is asked for.
    vocabulary: Words of the book that are kept, besides those of the facts.
    memory_tokens, d_mem: Of RMT and ARMT.
    stretch: Of Infini-attention, as in `Cached`.
    segments: Segments of the training texts, by stage; the models are never trained on more.
    steps, threshold, anneal: As in `Recipe`.
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
    stretch: float = 1024.0
    segment_len: int = 64
    segments: tuple[int, ...] = (1, 2, 4, 8)
    steps: int = 500
    threshold: float = 0.97
    anneal: int = 100
    batch: int = 64
    later_batch: int = 32
    lr: float = 2e-3
    lengths: tuple[int, ...] = (512, 4096, 32768, 131072, 524288)
    full_up_to: int = 32768
    books: int = 10
    seed: int = 0

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
        if self.stretch < 1:
            raise SettingError("stretch", f"must be at least 1, got {self.stretch}")
        if self.lr <= 0:
            raise SettingError("lr", f"must be positive, got {self.lr}")

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
            later_lr=self.lr,
            beta2=0.98,
        )
