"""The processes of `test_ranks`: two ranks, each with one text, train, save, load and generate with a memory."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import make, tokens
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from segattn import AssociativeMemory, RecurrentMemory
from segattn.rmt.saving import load_memory, own_parameters, save_memory

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


def own(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that a memory has besides its model's."""
    parameters = own_parameters(model).items()
    return {name: x.detach().full_tensor() if isinstance(x, DTensor) else x.detach().clone() for name, x in parameters}


def loaded(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """Save a memory, overwrite it, and return what is loaded from the file."""
    save_memory(model, path)
    dist.barrier()
    with torch.no_grad():
        for parameter in own_parameters(model).values():
            parameter.fill_(0.5)
    load_memory(model, path)
    return own(model)


def generated(model: Any, text: Tensor) -> dict[str, Tensor]:
    """Return what a memory generates after a text."""
    return {"tokens": model.eval().generate(text, max_new_tokens=15)}


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=120))
    mine = tokens(2, TIME)[rank : rank + 1]
    found = {f"{kind} {way}": gradients(spread(memory(kind), way), mine) for kind in KINDS for way in WAYS}
    found |= {f"{kind} loaded": loaded(spread(memory(kind), "fsdp"), folder / f"{kind}.safetensors") for kind in KINDS}
    for kind in KINDS:
        parts = spread(memory(kind), "fsdp")
        register_fsdp_forward_method(parts, "generate")
        found[f"{kind} generated"] = generated(parts, mine)
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()
