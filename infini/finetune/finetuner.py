"""Training of a converted model on rows of tokens, each read in pieces, to be stopped and gone on with at any step."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...runs.checkpoint import SettingError
from ..gate import Gate, parameter_groups
from ..huggingface.pieces import backward_in_pieces

CLIP = 1.0


@dataclass(frozen=True)
class FinetuneSettings:
    """What a run can be asked for.

    Args:
        model: folder or name of a causal language model, plain or converted; a plain one is converted.
        text: file of running text in UTF-8.
        dataset, split, column: instead, a data set of the `datasets` library.
        tokenizer: folder or name, or "bytes"; None: the model's.
        segment_len, update: as in `convert`, for a plain model; None: its defaults.
        length: tokens per row.
        piece: tokens read at once; None: a whole row.
        truncate: pieces that a gradient reaches back; None: to the row's beginning.
        steps: of the optimiser.
        lr, gate_lr, weight_decay: as in `parameter_groups`.
        warmup: steps over which the rates rise; they then fall as a cosine, to nothing.
        batch: rows read at once.
        accumulate: batches per step.
        gates_only: train the gates alone.
        gradient_checkpointing: compute activations again in the backward pass.
        seed: of the rows' order, and of dropout.
        dtype: of the weights, "auto", "float32", "bfloat16" or "float16"; the gates are float32.
        device: default a GPU where one is.
        save_every: steps between checkpoints.

    Raises:
        SettingError: naming the setting, what it must be, and what it was.
    """

    model: str
    text: str | None = None
    dataset: str | None = None
    split: str = "train"
    column: str = "text"
    tokenizer: str | None = None
    segment_len: int | None = None
    update: str | None = None
    length: int = 8192
    piece: int | None = None
    truncate: int | None = None
    steps: int = 1000
    lr: float = 2e-5
    gate_lr: float = 1e-2
    weight_decay: float = 0.01
    warmup: int = 20
    batch: int = 1
    accumulate: int = 1
    gates_only: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    save_every: int = 100

    def __post_init__(self) -> None:
        least = {"length": 2, "warmup": 0, "seed": 0} | dict.fromkeys(("piece", "truncate"), 1)
        for name in ("length", "piece", "truncate", "steps", "warmup", "batch", "accumulate", "seed", "save_every"):
            value = getattr(self, name)
            if value is not None and value < least.get(name, 1):
                raise SettingError(name, f"must be at least {least.get(name, 1)}, got {value}")
        if self.truncate is not None and self.piece is None:
            raise SettingError("truncate", f"must come with --piece, got {self.truncate} without")
        for name in ("lr", "gate_lr", "weight_decay"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise SettingError(name, f"must be 0 or more, got {value}")
        if self.seed >= 2**32:
            raise SettingError("seed", f"must be below 2**32, got {self.seed}")
        if (self.text is None) == (self.dataset is None):
            which = "neither" if self.text is None else "both"
            raise SettingError("text", f"must be given, or else --dataset, got {which}")

    def rate(self, step: int) -> float:
        """Share of the learning rates at a step, from 0 on."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.steps - self.warmup)))


class Finetuner:
    """A model, its optimiser and its rows; a step depends on these, on its number, and on PyTorch's random numbers.

    Args:
        model: converted; its parameters are trained where they need a gradient.
        rows: int64 [R, length].
    """

    def __init__(self, model: nn.Module, rows: Tensor, settings: FinetuneSettings) -> None:
        self.model, self.rows, self.settings = model.train(), rows, settings
        self.device = next(model.parameters()).device
        groups = parameter_groups(model, settings.lr, settings.gate_lr, settings.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.rates = [group["lr"] for group in self.optimiser.param_groups]
        self.gates = [module for module in model.modules() if isinstance(module, Gate)]
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        torch.manual_seed(settings.seed)

    def advance(self) -> dict[str, Any]:
        """One step; its figures.

        Raises:
            SettingError: of `lr`, where the loss is no number any more; the parameters are as before the step.
        """
        begin, settings = time.perf_counter(), self.settings
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = settings.rate(self.step) * rate
        self.optimiser.zero_grad()
        losses = []
        for micro in range(settings.accumulate):
            rows = self._batch(self.step * settings.accumulate + micro)
            read = backward_in_pieces(
                self.model,
                rows,
                settings.piece or settings.length,
                truncate=settings.truncate,
                scale=1 / settings.accumulate,
            )
            losses.append(read.loss)
        loss = torch.stack(losses).mean().item()
        norm = nn.utils.clip_grad_norm_(self.trained, CLIP).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SettingError("lr", f"must be lower, or --dtype wider: step {self.step + 1} has a loss of {loss}")
        self.optimiser.step()
        self.step += 1
        self.tokens += settings.accumulate * settings.batch * settings.length
        self.seconds += time.perf_counter() - begin
        return self._figures(loss, norm)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, in plain types and tensors."""
        cuda = self.device.type == "cuda"
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go on from a `state_dict`."""
        self.model.load_state_dict(saved["model"])
        self.optimiser.load_state_dict(saved["optimiser"])
        self.step, self.tokens, self.seconds = saved["step"], saved["tokens"], saved["seconds"]
        torch.set_rng_state(saved["random"])
        if self.device.type == "cuda" and saved["random_cuda"] is not None:
            torch.cuda.set_rng_state(saved["random_cuda"], self.device)

    def _batch(self, index: int) -> Tensor:
        """The rows of a batch: each once in an order of its own, then each once in another."""
        first = index * self.settings.batch
        chosen = []
        for place in range(first, first + self.settings.batch):
            epoch, within = divmod(place, len(self.rows))
            chosen.append(self._order(epoch)[within])
        return self.rows[torch.stack(chosen)].to(self.device)

    def _order(self, epoch: int) -> Tensor:
        return torch.from_numpy(np.random.default_rng((self.settings.seed, epoch)).permutation(len(self.rows)))

    def _figures(self, loss: float, norm: float) -> dict[str, Any]:
        shares = torch.cat([gate.bias.detach().float().sigmoid() for gate in self.gates])
        factor = self.settings.rate(self.step - 1)
        return {
            "step": self.step,
            "loss": loss,
            "lr": factor * self.settings.lr,
            "gate_lr": factor * self.settings.gate_lr,
            "gradient_norm": norm,
            "tokens": self.tokens,
            "gate_least": shares.min().item(),
            "gate_mean": shares.mean().item(),
            "gate_largest": shares.max().item(),
            "seconds": round(self.seconds, 3),
        }
