"""What recurrent memories on two processes, each with a text of its own, make of their gradients."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from models import make, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segattn import AssociativeMemory, RecurrentMemory

TIME = 53
KINDS = ("recurrent", "associative")
WAYS = ("ddp", "fsdp")


def memory(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "recurrent":
        return RecurrentMemory(make("llama"), 4, 10, bptt=3, checkpoint=True).train()
    return AssociativeMemory(make("llama"), 4, 10, d_mem=4).train()


def spread(model: nn.Module, way: str) -> nn.Module:
    if way == "ddp":
        return DistributedDataParallel(model)
    for stack in [module for module in model.modules() if isinstance(module, nn.ModuleList)][:1]:
        for layer in stack:
            fully_shard(layer)
    fully_shard(model)
    return model


def gradients(model: nn.Module, texts: Tensor) -> dict[str, Tensor]:
    model(texts, labels=texts).loss.backward()
    found = {}
    for name, parameter in model.named_parameters():
        if (grad := parameter.grad) is not None:
            found[name.removeprefix("module.")] = grad.full_tensor() if isinstance(grad, DTensor) else grad
    return found


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    mine = tokens(2, TIME)[rank : rank + 1]
    found = {f"{kind} {way}": gradients(spread(memory(kind), way), mine) for kind in KINDS for way in WAYS}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
