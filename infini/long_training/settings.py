"""What a training run over several processes can be asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...runs.checkpoint import SettingError
from ..finetune.finetuner import FinetuneSettings

SIZES = ("layers", "width", "heads")
DTYPES = ("auto", "float32", "bfloat16")


@dataclass(frozen=True)
class LongSettings(FinetuneSettings):
    """As fine-tuning on one device, without `piece` and `truncate`: a rank reads its run of a row at once.

    A step reads `accumulate` times `batch` rows, over however many ranks. Weights and the optimiser are float32.

    Args:
        model: as there; empty: a Llama of bytes from scratch, of the sizes below.
        layers, width, heads: of that.
        dtype: of products, "float32" or "bfloat16"; "auto": bfloat16 on a GPU.
        device: "cpu" or "cuda"; None: GPUs where there are any.
        sequence_ranks: how many ranks share a row; None: all. The others read other rows of the batch.

    Raises:
        SettingError: naming the setting, what it must be, and what it was.
    """

    model: str = ""
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    dtype: str = "auto"
    sequence_ranks: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("piece", "truncate"):
            if (value := getattr(self, name)) is not None:
                raise SettingError(name, f"must be left out, as a rank reads its run of a row at once, got {value}")
        for name in (*SIZES, "sequence_ranks"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise SettingError(name, f"must be at least 1, got {value}")
        if self.dtype not in DTYPES:
            raise SettingError("dtype", f"must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        self._check_model()

    def _check_model(self) -> None:
        given = [name for name in SIZES if getattr(self, name) is not None]
        if self.model and given:
            raise SettingError(given[0], f"must be left out for a model that is there, got {self.model!r} too")
        if self.model:
            return
        for name in SIZES:
            if name not in given:
                raise SettingError(name, "must be given for a model from scratch: or give a model's folder or name")
        if self.tokenizer not in (None, "bytes"):
            raise SettingError("tokenizer", f"must be bytes for a model from scratch, got {self.tokenizer!r}")
        if self.width % (2 * self.heads):  # type: ignore[operator]
            raise SettingError("width", f"must be a multiple of twice the {self.heads} heads, got {self.width}")

    def product_dtype(self, device: torch.device) -> torch.dtype:
        """Of products on a device."""
        if self.dtype == "auto":
            return torch.bfloat16 if device.type == "cuda" else torch.float32
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype
