"""Training of a converted model by two processes, for tests."""

from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from models import converted, tokens
from sharding import HALF, shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import segattn

L = 16


def join(rank: int, world: int, folder: str) -> None:
    """Join a gloo group, whose processes meet in a file."""
    torch.set_num_threads(1)
    where = f"file://{Path(folder) / 'meet'}"
    dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world, timeout=timedelta(seconds=120))


def model_of(kind: str) -> torch.nn.Module:
    """Return the model that every process begins with."""
    model = converted(segment_len=L).train()
    if kind == "checkpointed":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def gradients(model: torch.nn.Module, ids: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss, and the gradient of every parameter."""
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), gathered(model)


def gathered(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradient of every parameter, put together from its shards."""
    grads = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        grads[name.removeprefix("module.")] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
    return grads


def train(rank: int, world: int, folder: str) -> None:
    """Train with DDP on texts of one segment, then with FSDP2 on long ones; rank 0 writes each step's gradients."""
    join(rank, world, folder)
    results = {}
    model = DistributedDataParallel(model_of("plain"))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    for step in range(3):
        optimizer.zero_grad()
        results[f"ddp {step}"] = gradients(model, tokens(2, L - 3, step)[rank : rank + 1])[1]
        optimizer.step()
    for kind in ("plain", "checkpointed"):
        sharded = shard(model_of(kind))
        gate = sharded.model.layers[0].self_attn.segattn_gate.bias
        assert isinstance(gate, DTensor)
        results[f"fsdp {kind}"] = gradients(sharded, tokens(2, 3 * L + 5)[rank : rank + 1])[1]
    segattn.backward_in_pieces(sharded := shard(model_of("plain")), tokens(2, 3 * L + 5)[rank : rank + 1], L - 3)
    results["fsdp pieces"] = gathered(sharded)
    for way, shard_half in HALF.items():
        half = shard_half(model_of("plain").bfloat16())
        results[f"half {way}"] = gradients(half, tokens(2, 3 * L + 5)[rank : rank + 1])[1]
    segattn.save_gates(sharded, Path(folder) / f"gates of rank {rank}")
    if rank == 0:
        torch.save(results, Path(folder) / "results.pt")
    dist.barrier()
    dist.destroy_process_group()
