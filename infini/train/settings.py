"""The settings of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from ...runs.errors import SettingError
from ...runs.settings import absolute, check_least
from ..conversion_options import ConversionOptions

SIZES = ("layers", "width", "heads")
CHOICES = {
    "dtype": ("auto", "float32", "bfloat16"),
    "weights": ("float32", "bfloat16", "float16", "auto"),
    "log": ("none", "tensorboard", "wandb"),
}
# the least value of a count; 1 where it is not listed
LEAST = {"length": 2, "segment_len": 2, "lookback": 0, "sinks": 0, "warmup": 0, "seed": 0, "eval_rows": 0}
RATES = ("lr", "gate_lr", "weight_decay")
# may be below 0
SIGNED = ("gate_init",)
# may stand elsewhere when a run is resumed: it takes its weights from the checkpoint, and compares the text
SOURCES = ("model", "text", "dataset", "split", "column", "tokenizer")
# may change when a run is resumed: no step that was taken depends on them, but on its own rates
MAY_CHANGE = (
    *SOURCES,
    *("steps", "lr", "gate_lr", "warmup", "eval_every", "save_every", "log"),
    *("sequence_ranks", "gradient_checkpointing"),
)


@dataclass(frozen=True)
class TrainSettings(ConversionOptions):
    """A training run: its model, its text, its recipe. The string beside a field is the help of its option.

    Paths become absolute, so that a run can be resumed from any folder.

    Raises:
        SettingError: naming the setting, what it must be, and what it was.
    """

    model: Annotated[str | None, "Folder or name of a model; a plain one is converted."] = None
    layers: Annotated[int | None, "Layers of a Llama of bytes from scratch, in the place of MODEL."] = None
    width: Annotated[int | None, "Width of a model from scratch."] = None
    heads: Annotated[int | None, "Heads of a model from scratch."] = None
    text: Annotated[str | None, "File of the text to train on, UTF-8."] = None
    dataset: Annotated[
        str | None,
        "Data set in the place of --text: a folder, or a name of the hub (HF_HUB_OFFLINE=1: use no network).",
    ] = None
    split: Annotated[str, "Split of the data set."] = "train"
    column: Annotated[str, "Column of the data set that holds the text."] = "text"
    tokenizer: Annotated[
        str | None, "Folder or name of a tokenizer, or 'bytes' for a model of bytes. Default: that of the model."
    ] = None
    length: Annotated[int, "Tokens per row."] = 8192
    stream: Annotated[
        bool, "Read rows in the order of the text, as they are needed, instead of shuffling all of them."
    ] = False
    eval_rows: Annotated[int, "First rows of the text to hold out from training and evaluate on."] = 0
    eval_every: Annotated[int, "Steps between evaluations."] = 100
    piece: Annotated[int | None, "Tokens of a row to read at once; in a single process only. Default: all."] = None
    truncate: Annotated[
        int | None, "Pieces that gradients reach back, and whose activations are held. Default: all."
    ] = None
    sequence_ranks: Annotated[
        int | None, "Processes that share a row; other processes read other rows. Default: all."
    ] = None
    batch: Annotated[int, "Rows to read at once, by all processes together."] = 1
    accumulate: Annotated[int, "Batches per step."] = 1
    steps: Annotated[int, "Steps of the optimizer."] = 1000
    lr: Annotated[float, "Learning rate."] = 2e-5
    gate_lr: Annotated[float, "Learning rate of the gates."] = 1e-2
    weight_decay: Annotated[float, "Weight decay of matrices."] = 0.01
    warmup: Annotated[int, "Steps over which the rates rise, before they fall as a cosine.", "--warm-up"] = 20
    lora: Annotated[
        int | None, "Rank of LoRA adapters on all linear layers; they, gates and maps are trained, nothing else."
    ] = None
    freeze_but_gates: Annotated[bool, "Train the gates alone."] = False
    gradient_checkpointing: Annotated[
        bool, "Compute activations again in the backward pass: less memory, a third more time."
    ] = False
    dtype: Annotated[str, "Dtype of matrix products: float32, bfloat16, or auto: bfloat16 on a GPU."] = "auto"
    weights: Annotated[
        str,
        "Dtype of weights: float32; in a single process also bfloat16, float16, or auto: that of the model's files.",
    ] = "float32"
    seed: Annotated[int, "Seed of the order of rows, of dropout, of adapters, and of weights from scratch."] = 0
    save_every: Annotated[int, "Steps between checkpoints."] = 100
    # torchrun reads --log as an abbreviation of an option of its own
    log: Annotated[str, "Log to tensorboard or wandb too; under torchrun, call it --log-to.", "--log-to"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("model", "text", "dataset", "tokenizer"):
            if getattr(self, name) != "bytes":
                object.__setattr__(self, name, absolute(getattr(self, name)))
        self._check_numbers()
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise SettingError(name, f"must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        self._check_together()
        self._check_model()
        needed = {"lora": "peft" if self.lora else "none", "log": self.log}
        for name, package in needed.items():
            if package != "none" and not is_installed(package):
                raise SettingError(name, f"needs {package}: pip install {package}")

    def _check_numbers(self) -> None:
        for name in RATES:
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise SettingError(name, f"must be 0 or more, got {getattr(self, name)}")
        counts = [
            name
            for name in self.__dataclass_fields__
            if type(getattr(self, name)) is int and name not in (*RATES, *SIGNED)
        ]
        check_least(self, {name: LEAST.get(name, 1) for name in counts})

    def _check_together(self) -> None:
        if (self.text is None) == (self.dataset is None):
            which = "neither" if self.text is None else "both"
            raise SettingError("text", f"must be given, or else --dataset, got {which}")
        if self.truncate is not None and self.piece is None:
            raise SettingError("truncate", f"must come with --piece, got {self.truncate} without")
        if self.eval_rows % self.batch:
            raise SettingError("eval_rows", f"must be a multiple of --batch, {self.batch}, got {self.eval_rows}")
        if self.lora and self.freeze_but_gates:
            raise SettingError("lora", f"must come without --freeze-but-gates, got {self.lora} with it")
        if self.weights != "float32" and self.dtype != "auto":
            raise SettingError("dtype", f"must be auto, that of the weights, for --weights {self.weights}")

    def _check_model(self) -> None:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.model is not None:
            if given:
                raise SettingError(given[0], f"must be left out for a model that is there, got {self.model!r} too")
            return
        if not given:
            problem = "must be given: a folder, or a name of the hub; or else --layers, --width and --heads"
            raise SettingError("model", problem)
        for name in SIZES:
            if name not in given:
                raise SettingError(name, "must be given for a model from scratch: or give a model's folder or name")
        if self.tokenizer not in (None, "bytes"):
            raise SettingError("tokenizer", f"must be bytes for a model from scratch, got {self.tokenizer!r}")
        if self.width % (2 * self.heads):  # type: ignore[operator]
            raise SettingError("width", f"must be a multiple of twice the {self.heads} heads, got {self.width}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step reads."""
        return self.accumulate * self.batch * self.length

    def rate(self, step: int) -> float:
        """Return the share of the learning rates at a step, counted from 0."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


def is_installed(package: str) -> bool:
    """Return whether a package can be imported; a folder of its name, such as `wandb` leaves behind, is none."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
