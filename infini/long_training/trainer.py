"""A model whose parameters, rows and batches are spread over a mesh, and the steps of its training."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from ...runs.checkpoint import SettingError, whole
from ..finetune.finetuner import CLIP
from ..gate import Gate, parameter_groups
from ..huggingface.parallel import sequence_parallel
from ..huggingface.settings import attentions_of, conversion_of, trunk_of
from ..loss import IGNORED
from ..sharding import shard_batch
from .settings import LongSettings

# logits that are there at once: of a long run they would be most of what is held
LOGITS = 2**27


class RunLoss(nn.Module):
    """A causal language model that gives the sum of its losses over a rank's run, never all logits at once."""

    def __init__(self, model: Any, logits: int = LOGITS) -> None:
        super().__init__()
        self.model = model
        self.tokens = max(1, logits // model.get_output_embeddings().weight.shape[0])
        config = model.config.get_text_config(decoder=True)
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)

    def forward(self, shift_labels: Tensor, **inputs: Tensor) -> Tensor:
        """[] float32, in nats, of what `shard_batch` gives."""
        hidden = self.model.base_model(**inputs, use_cache=False).last_hidden_state
        total = torch.zeros((), device=hidden.device)
        each = max(1, self.tokens // len(hidden))
        for part, targets in zip(hidden.split(each, 1), shift_labels.split(each, 1), strict=True):
            total = total + checkpoint(self._sum, part, targets, use_reentrant=False)
        return total

    def _sum(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logits = self.model.get_output_embeddings()(hidden).float()
        if self.softcap is not None:
            logits = self.softcap * (logits / self.softcap).tanh()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")


def shard(module: RunLoss, mesh: DeviceMesh, dtype: torch.dtype) -> None:
    """Spread the parameters over all ranks of the mesh: each layer's by itself, then the rest."""
    everyone = mesh._flatten("all")
    half = dtype != torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32) if half else MixedPrecisionPolicy()
    trunk = trunk_of(module)
    attentions = set(attentions_of(trunk))
    for stack in trunk.children():
        if isinstance(stack, nn.ModuleList):
            for layer in stack:
                if attentions.intersection(layer.modules()):
                    fully_shard(layer, mesh=everyone, mp_policy=policy)
    fully_shard(module, mesh=everyone, mp_policy=policy)


class LongTrainer:
    """A step depends on the parameters, the optimiser, its number and its rows, and on nothing else.

    Args:
        model: converted, every layer of it, float32, the same on every rank.
        mesh: ("dp", "sp"), of all processes.
        device: of this one.

    Raises:
        SettingError: of `model` or `batch`.
    """

    def __init__(self, model: Any, settings: LongSettings, mesh: DeviceMesh, device: torch.device) -> None:
        self.model, self.settings, self.mesh, self.device = model.train(), settings, mesh, device
        self.run = RunLoss(model).train()
        shard(self.run, mesh, settings.product_dtype(device))
        groups = parameter_groups(model, settings.lr, settings.gate_lr, settings.weight_decay)
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.rates = [group["lr"] for group in groups]
        self.trained = [parameter for group in groups for parameter in group["params"]]
        self.gates = [module for module in model.modules() if isinstance(module, Gate)]
        self.segment_len = conversion_of(model).settings.segment_len
        self.step = 0

    def advance(self, read: Callable[[int], Tensor]) -> dict[str, Any]:
        """One step; its figures, the same on every rank but for the seconds.

        Args:
            read: gives so many rows [n, length], the same on every rank.

        Raises:
            SettingError: of `lr`, where the loss is no number any more; the parameters are as before the step.
        """
        begin, settings = time.perf_counter(), self.settings
        # of dropout: nothing but the step's number has to be kept
        entropy = (settings.seed, self.step, dist.get_rank())
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0]))
        factor = settings.rate(self.step)
        for group, rate in zip(self.optimiser.param_groups, self.rates, strict=True):
            group["lr"] = factor * rate
        self.optimiser.zero_grad()
        losses = torch.stack([self._backward(read(settings.batch)) for _ in range(settings.accumulate)])
        loss = losses.mean().item()
        norm = whole(nn.utils.clip_grad_norm_(self.trained, CLIP)).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise SettingError("lr", f"must be lower, or --dtype wider: step {self.step + 1} has a loss of {loss}")
        self.optimiser.step()
        self.step += 1
        shares = torch.cat([whole(gate.bias.detach()).sigmoid() for gate in self.gates])
        return {
            "step": self.step,
            "loss": loss,
            "lr": factor * settings.lr,
            "gate_lr": factor * settings.gate_lr,
            "gradient_norm": norm,
            "tokens": self.step * settings.accumulate * settings.batch * settings.length,
            "gate_least": shares.min().item(),
            "gate_mean": shares.mean().item(),
            "gate_largest": shares.max().item(),
            "seconds": time.perf_counter() - begin,
        }

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, but for its number, for `torch.distributed.checkpoint`."""
        model, optimiser = get_state_dict(self.model, self.optimiser)
        return {"model": model, "optimiser": optimiser}

    def load_state_dict(self, saved: dict[str, Any], step: int) -> None:
        """Go on from a `state_dict`."""
        set_state_dict(self.model, self.optimiser, model_state_dict=saved["model"], optim_state_dict=saved["optimiser"])
        self.step = step

    def _backward(self, rows: Tensor) -> Tensor:
        """The mean loss of some rows, whose gradient is added."""
        settings, sequence = self.settings, self.mesh["sp"]
        mine = rows.tensor_split(self.mesh["dp"].size())[self.mesh.get_local_rank("dp")].to(self.device)
        run = shard_batch({"input_ids": mine}, sequence, self.segment_len)
        with sequence_parallel(self.model, sequence):
            total = self.run(**run)
        tokens = settings.batch * (settings.length - 1)
        # fully_shard averages over all ranks
        (total * (self.mesh.size() / tokens / settings.accumulate)).backward()
        told = total.detach().double()
        dist.all_reduce(told)
        return told / tokens
