"""The steps of a training run: a model, and its parameters, rows and batches spread over a mesh of processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ...runs.checkpoint import whole
from ...runs.errors import SettingError
from ..gate import Gate, parameter_groups
from ..huggingface.parallel import sequence_parallel
from ..huggingface.pieces import backward_in_pieces
from ..huggingface.settings import attentions_of, conversion_of, trunk_of
from ..loss import cross_entropy_sum, shifted
from ..sharding import shard_batch
from .settings import TrainSettings

CLIP = 1.0
# logits in memory at once: those of a long row would outweigh everything else
LOGITS = 2**27


class Autocast(nn.Module):
    """A model that multiplies matrices in a dtype, whatever its weights are; None: in theirs."""

    def __init__(self, model: Any, device: torch.device, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.model, self.device, self.dtype = model, device, dtype

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype):
            return self.model(*args, **kwargs)


class LossSum(nn.Module):
    """A causal language model that returns the sum of its losses, and never holds all logits at once."""

    def __init__(self, model: Any, logits: int = LOGITS) -> None:
        super().__init__()
        self.model = model
        self.tokens = max(1, logits // model.get_output_embeddings().weight.shape[0])
        config = model.config.get_text_config(decoder=True)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, shift_labels: Tensor, **inputs: Tensor) -> Tensor:
        """Return the sum of the losses, [] float32 in nats, of a batch as `shard_batch` returns it."""
        hidden = trunk_of(self.model)(**inputs, use_cache=False).last_hidden_state
        each = max(1, self.tokens // len(hidden))
        if hidden.shape[1] <= each:
            # computed last and let go first: to compute them twice would save nothing
            return self._sum(hidden, shift_labels)
        total = torch.zeros((), device=hidden.device, dtype=torch.float32)
        for part, targets in zip(hidden.split(each, 1), shift_labels.split(each, 1), strict=True):
            total = total + checkpoint(self._sum, part, targets, use_reentrant=False)
        return total

    def _sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return cross_entropy_sum(logits, targets)


def shard(module: LossSum, mesh: DeviceMesh, dtype: torch.dtype | None) -> None:
    """Spread the parameters over all ranks of the mesh, layer by layer, then the rest."""
    everyone = mesh._flatten("all")
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if dtype else MixedPrecisionPolicy()
    trunk = trunk_of(module)
    attentions = set(attentions_of(trunk))
    for stack in trunk.children():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                if attentions.intersection(layer.modules()):
                    fully_shard(layer, mesh=everyone, mp_policy=policy)
    fully_shard(module, mesh=everyone, mp_policy=policy)


class Trainer:
    """A model, its optimizer and the number of its steps. A step depends on these and its rows, and on nothing else.

    In a single process the model stays as it is; FSDP2 spreads it over several.

    Args:
        model: converted, the same on every rank; float32 on several.
        mesh: ("dp", "sp"), of all processes.
        device: of this one.
    """

    def __init__(self, model: Any, settings: TrainSettings, mesh: DeviceMesh, device: torch.device) -> None:
        self.model, self.settings, self.mesh, self.device = model, settings, mesh, device
        self.dtype = product_dtype(settings, model, device)
        loss_sum = LossSum(model)
        if mesh.size() > 1:
            shard(loss_sum, mesh, self.dtype)
            self.loss_sum: nn.Module = loss_sum
        else:
            self.loss_sum = Autocast(loss_sum, device, self.dtype).to(device)
        self.loss_sum.train()
        groups = parameter_groups(model, settings.lr, settings.gate_lr, settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.rates = [group["lr"] for group in groups]
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.gates = [module for module in model.modules() if isinstance(module, Gate)]
        self.segment_len = conversion_of(model).settings.segment_len
        self.step = 0

    def advance(self, read: Callable[[int], Tensor]) -> dict[str, Any]:
        """Take one step; return its figures, the same on every rank but for the seconds.

        Args:
            read: returns so many rows [n, length], the same on every rank.

        Raises:
            SettingError: of `lr`, where the loss is no number any more; the parameters are as before the step.
        """
        begin, settings = time.perf_counter(), self.settings
        # dropout depends on the number of the step, so that no random state has to be saved
        entropy = (settings.seed, self.step, dist.get_rank())
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        factor = settings.rate(self.step)
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate
        self.optimizer.zero_grad()
        losses = torch.stack([self._backward(read(settings.batch)) for _ in range(settings.accumulate)])
        loss = losses.mean().item()
        norm = whole(nn.utils.clip_grad_norm_(self.trained, CLIP)).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SettingError("lr", f"must be lower, or --dtype wider: step {self.step + 1} has a loss of {loss}")
        self.optimizer.step()
        self.step += 1
        shares = torch.cat([whole(gate.bias.detach()).sigmoid() for gate in self.gates])
        return {
            "step": self.step,
            "loss": loss,
            "lr": factor * settings.lr,
            "gate_lr": factor * settings.gate_lr,
            "gradient_norm": norm,
            "tokens": self.step * settings.tokens_per_step,
            "gate_least": shares.min().item(),
            "gate_mean": shares.mean().item(),
            "gate_largest": shares.max().item(),
            "seconds": time.perf_counter() - begin,
        }

    @torch.no_grad()
    def evaluate(self, rows: Tensor) -> float:
        """Return the mean loss of rows [n batch, length], in nats per token, the same on every rank."""
        self.loss_sum.eval()
        total = torch.stack([self._sum(self._mine(batch)).cpu().double() for batch in rows.split(self.settings.batch)])
        self.loss_sum.train()
        return self._mean(total.sum(), len(rows)).item()

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on, but for its number, for `torch.distributed.checkpoint`."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, saved: dict[str, Any], step: int) -> None:
        """Go on from a `state_dict`."""
        set_state_dict(self.model, self.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        self.step = step

    def _backward(self, rows: Tensor) -> Tensor:
        """Add the gradient of a batch [batch, length]; return its mean loss, [] float64 on the CPU."""
        settings, mine = self.settings, self._mine(rows)
        if settings.piece is not None:
            reader, scale = Autocast(self.model, self.device, self.dtype).train(), 1 / settings.accumulate
            read = backward_in_pieces(reader, mine, settings.piece, truncate=settings.truncate, scale=scale)
            return read.loss.cpu().double()
        total = self._sum(mine)
        # fully_shard averages over all ranks
        (total * (self.mesh.size() / self._targets(len(rows)) / settings.accumulate)).backward()
        return self._mean(total, len(rows))

    def _sum(self, mine: Tensor) -> Tensor:
        """Return the sum of the losses [] over this rank's part of its rows."""
        sequence = self.mesh["sp"]
        if sequence.size() == 1:
            return self.loss_sum(shifted(mine), input_ids=mine)
        run = shard_batch({"input_ids": mine}, sequence, self.segment_len)
        with sequence_parallel(self.model, sequence):
            return self.loss_sum(**run)

    def _mine(self, rows: Tensor) -> Tensor:
        """Return the rows of a batch that this rank reads, alone or with others."""
        return rows.tensor_split(self.mesh["dp"].size())[self.mesh.get_local_rank("dp")].to(self.device)

    def _mean(self, total: Tensor, rows: int) -> Tensor:
        """Return the mean loss of so many rows, [] float64 on the CPU, from the sum of each rank."""
        summed = total.detach().cpu().double()
        dist.all_reduce(summed)
        return summed / self._targets(rows)

    def _targets(self, rows: int) -> int:
        """Return how many tokens are predicted."""
        return rows * (self.settings.length - 1)


def product_dtype(settings: TrainSettings, model: Any, device: torch.device) -> torch.dtype | None:
    """Return the dtype of matrix products; None: that of the weights."""
    half = settings.dtype == "bfloat16" or (settings.dtype == "auto" and device.type == "cuda")
    return torch.bfloat16 if half and model.dtype == torch.float32 else None
